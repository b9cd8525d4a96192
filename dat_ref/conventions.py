"""Coordinate conventions of DAT, as data: key grid, query grid, and conversion to pixels.

A key grid of ``Hk × Wk`` points covers a feature map of ``H × W`` pixels. Three choices define
the geometry of one axis:

1. **reference**: the normalized coordinate of key ``i`` is ``2 (i + shift) / (Hk - gap) - 1``;
2. **query**: the same formula for the query grid. The position bias measures displacements from this grid;
3. **align_corners**: the conversion from normalized to pixel coordinates (pixel 0 is the *center* of the first pixel)::

       pixel = (n + 1) / 2 · (H - a) - (1 - a) / 2        a = 1 if align_corners else 0

   With ``align_corners``, -1 and +1 are the centers of the first and last pixel. Otherwise they are the map's edges.

Two combinations are consistent: at stride 1 and zero offset, key ``i`` samples pixel ``i``. The first has cell
centers, with edges at ±1 (``CELL_CENTER``). The second has corners, with pixel centers at ±1 (``PAPER``, the text
of the paper). Each release combines one half of each. Its trained weights depend on its geometry, so both releases
are reproduced bug for bug:

================  =================  ==================  =============  ============================================
convention        reference          query               align_corners  sampling position at zero offset, stride 1
================  =================  ==================  =============  ============================================
``CELL_CENTER``   2(i+½)/Hk - 1      2(i+½)/H - 1        no             pixel i
``PAPER``         2i/(Hk-1) - 1      2i/(H-1) - 1        yes            pixel i
``CVPR2022``      2(i+½)/Hk - 1      2(i+½)/H - 1        yes            contracted towards the center of the map
``DATPP2023``     2(i+½)/(Hk-1) - 1  2i/(H-1) - 1        yes            half a pixel down and right; last one clamped
================  =================  ==================  =============  ============================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal


@dataclass(frozen=True)
class Spacing:
    """Grid ``2 (i + shift) / (n - gap) - 1`` for i = 0 … n-1. `degenerate` replaces 0/0 where ``n = gap``."""

    shift: float
    gap: int
    degenerate: float = 0.0

    def coordinate(self, index: int, count: int) -> float:
        """Return the normalized coordinate of point `index` in a grid of `count` points.

        >>> [Spacing(0.5, 0).coordinate(i, 4) for i in range(4)]
        [-0.75, -0.25, 0.25, 0.75]
        """
        if count == self.gap:
            return self.degenerate
        return 2 * (index + self.shift) / (count - self.gap) - 1

    def pitch(self, count: int) -> float:
        """Return the distance between neighboring points, ``2 / (n - gap)``; 2 (the whole map) for a single point."""
        return 2 / max(count - self.gap, 1)


@dataclass(frozen=True)
class Geometry:
    """Parameters of a convention; see the table in the module docstring."""

    reference: Spacing
    query: Spacing
    align_corners: bool
    offset_padding: Literal["same", "half"]
    release: str | None = None


_CELLS = Spacing(shift=0.5, gap=0)
_CORNERS = Spacing(shift=0.0, gap=1)
# The 2023 code divides by Hk - 1 = 0 for a single key; its clamp then moves +inf to the last pixel.
_SHIFTED = Spacing(shift=0.5, gap=1, degenerate=math.inf)


class Convention(Enum):
    """Coordinate convention. ``.value`` is its `Geometry`; the fields are also attributes of the member.

    - ``CELL_CENTER``: the default for new work. Independent of the resolution, defined for a single key.
    - ``PAPER``: the text of the paper, with corners at ±1. A single key, undefined there, is at the center.
    - ``CVPR2022``, ``DATPP2023``: the released code, bug for bug.

    >>> Convention.CELL_CENTER.align_corners, Convention.PAPER.reference.shift
    (False, 0.0)
    """

    CELL_CENTER = Geometry(_CELLS, _CELLS, align_corners=False, offset_padding="same")
    PAPER = Geometry(_CORNERS, _CORNERS, align_corners=True, offset_padding="same")
    CVPR2022 = Geometry(_CELLS, _CELLS, align_corners=True, offset_padding="half", release="cvpr2022")
    DATPP2023 = Geometry(_SHIFTED, _CORNERS, align_corners=True, offset_padding="half", release="datpp2023")

    @property
    def reference(self) -> Spacing:
        """Spacing of the key grid."""
        return self.value.reference

    @property
    def query(self) -> Spacing:
        """Spacing of the query grid, from which the position bias measures displacements."""
        return self.value.query

    @property
    def align_corners(self) -> bool:
        """True if ±1 are the centers of the outermost pixels, False if they are the edges of the map."""
        return self.value.align_corners

    @property
    def offset_padding(self) -> str:
        """Padding of the offset network: ``"same"`` (windows centered on key cells) or ``"half"`` (⌊k/2⌋ per side)."""
        return self.value.offset_padding

    @property
    def release(self) -> str | None:
        """Name of the release that this convention reproduces, or None."""
        return self.value.release

    @classmethod
    def of_release(cls, release: str) -> Convention:
        """Return the convention of a release.

        Raises:
            ValueError: if `release` is not ``"cvpr2022"`` or ``"datpp2023"``.
        """
        for convention in cls:
            if convention.release == release and release is not None:
                return convention
        raise ValueError(f"release: expected 'cvpr2022' or 'datpp2023', got {release!r}")

    def __repr__(self) -> str:
        return f"Convention.{self.name}"
