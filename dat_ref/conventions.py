"""Where a key point sits: four coordinate conventions, as data.

A key grid of ``Hk × Wk`` points is laid over a feature map of ``H × W`` pixels. Three choices fix
the geometry of one axis:

1. **reference**: the normalised coordinate of key ``i`` is ``2 (i + shift) / (Hk - gap) - 1``;
2. **query**: the same form, for the grid of queries that the position bias measures displacements from;
3. **align_corners**: what the normalised interval means in pixels (pixel 0 is the *center* of the first pixel)::

       pixel = (n + 1) / 2 · (H - a) - (1 - a) / 2        a = 1 if align_corners else 0

   ``align_corners``: -1 and +1 are the centers of the first and the last pixel. Otherwise: the outer edges of the map.

Two combinations are consistent, in the sense that at stride 1 and zero offset key ``i`` samples pixel ``i``:
cell centers with edges at ±1 (``CELL_CENTER``), and corners with pixel centers at ±1 (``PAPER``, the article's
text). Each release takes half of one and half of the other, and its weights mean what its geometry says, so
both are kept bug for bug:

================  =================  ==================  =============  ==========================================
convention        reference          query               align_corners  zero offset at stride 1 samples
================  =================  ==================  =============  ==========================================
``CELL_CENTER``   2(i+½)/Hk - 1      2(i+½)/H - 1        no             the pixel itself
``PAPER``         2i/(Hk-1) - 1      2i/(H-1) - 1        yes            the pixel itself
``CVPR2022``      2(i+½)/Hk - 1      2(i+½)/H - 1        yes            contracted towards the center of the map
``DATPP2023``     2(i+½)/(Hk-1) - 1  2i/(H-1) - 1        yes            half a pixel down and right; the last clamped
================  =================  ==================  =============  ==========================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal


@dataclass(frozen=True)
class Spacing:
    """The grid ``2 (i + shift) / (n - gap) - 1`` for i = 0 … n-1; `degenerate` stands where ``n = gap`` (0/0)."""

    shift: float
    gap: int
    degenerate: float = 0.0

    def coordinate(self, index: int, count: int) -> float:
        """Return the normalised coordinate of point `index` of `count`.

        >>> [Spacing(0.5, 0).coordinate(i, 4) for i in range(4)]
        [-0.75, -0.25, 0.25, 0.75]
        """
        if count == self.gap:
            return self.degenerate
        return 2 * (index + self.shift) / (count - self.gap) - 1

    def pitch(self, count: int) -> float:
        """Return the distance between neighbours, ``2 / (n - gap)``; 2 (the whole map) for a single point."""
        return 2 / max(count - self.gap, 1)


@dataclass(frozen=True)
class Geometry:
    """What a convention says; see the module's table."""

    reference: Spacing
    query: Spacing
    align_corners: bool
    offset_padding: Literal["same", "half"]
    release: str | None = None


_CELLS = Spacing(shift=0.5, gap=0)
_CORNERS = Spacing(shift=0.0, gap=1)
# The 2023 code divides by Hk - 1 = 0 for a single key; its clamp then brings +inf to the last pixel.
_SHIFTED = Spacing(shift=0.5, gap=1, degenerate=math.inf)


class Convention(Enum):
    """A coordinate convention; ``.value`` is its `Geometry`, and its fields can be read from the member itself.

    - ``CELL_CENTER``: the default for new work. Resolution independent, defined for a single key.
    - ``PAPER``: the article's text, corners at ±1 (a single key, undefined there, sits at the center).
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
        """Whether ±1 are the centers of the outermost pixels (otherwise the edges of the map)."""
        return self.value.align_corners

    @property
    def offset_padding(self) -> str:
        """``"same"``: windows of the offset network centered on the key cells; ``"half"``: k // 2 on every side."""
        return self.value.offset_padding

    @property
    def release(self) -> str | None:
        """Name of the release that this convention reproduces, if any."""
        return self.value.release

    @classmethod
    def of_release(cls, release: str) -> Convention:
        """Return the convention of a release.

        Raises:
            ValueError: unless `release` is ``"cvpr2022"`` or ``"datpp2023"``.
        """
        for convention in cls:
            if convention.release == release and release is not None:
                return convention
        raise ValueError(f"release: expected 'cvpr2022' or 'datpp2023', got {release!r}")

    def __repr__(self) -> str:
        return f"Convention.{self.name}"
