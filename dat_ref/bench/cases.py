"""Benchmark cases: shapes of the core and of neighborhood attention, and whole models."""

from __future__ import annotations

from dataclasses import dataclass

from ..conventions import Convention

Size = tuple[int, int]


@dataclass(frozen=True)
class CoreCase:
    """Shape for the core: queries on a map, and keys sampled around a coarser or equal grid."""

    name: str
    batch: int
    size: Size  # map size, H·W queries
    keys: Size  # size of the key grid, Ns points
    heads: int
    groups: int
    convention: Convention = Convention.DATPP2023
    depth: int = 32

    @property
    def description(self) -> str:
        """Description of the case for a table."""
        height, width = self.size
        year = ", step of 2022" if self.convention is Convention.CVPR2022 else ""
        return f"batch {self.batch}, {height}×{width}, {self.heads} heads, {self.keys[0] * self.keys[1]} keys{year}"


@dataclass(frozen=True)
class NeighborhoodCase:
    """Shape for neighborhood attention with relative bias."""

    name: str
    batch: int
    size: Size
    heads: int
    kernel: int = 7
    depth: int = 32

    @property
    def description(self) -> str:
        """Description of the case for a table."""
        height, width = self.size
        return f"batch {self.batch}, {height}×{width}, {self.heads} heads, {self.kernel}×{self.kernel} neighbors"


@dataclass(frozen=True)
class ModelCase:
    """Whole backbone."""

    name: str
    batch: int
    image: int = 224

    @property
    def description(self) -> str:
        """Description of the case for a table."""
        return f"batch {self.batch}, {self.image}×{self.image}"


Case = CoreCase | NeighborhoodCase | ModelCase

# A: stage 3 of DAT at 224². C: stage 1 of DAT++ at 224². B and L: stages 3 and 2 of DAT at 800 × 1333.
_CORE = (
    CoreCase("A", 8, (14, 14), (14, 14), 12, 3),
    CoreCase("A22", 8, (14, 14), (14, 14), 12, 3, Convention.CVPR2022),
    CoreCase("B", 1, (50, 84), (50, 84), 12, 3),
    CoreCase("C", 1, (56, 56), (7, 7), 2, 1),
    CoreCase("L", 1, (100, 168), (100, 168), 12, 3),
)
# The three stages of dat_pp_tiny that have neighborhood attention, at 224².
_NEIGHBORHOOD = (
    NeighborhoodCase("N1", 8, (56, 56), 2),
    NeighborhoodCase("N2", 8, (28, 28), 4),
    NeighborhoodCase("N3", 8, (14, 14), 8),
)
_MODELS = {"cpu": 8, "cuda": 64}  # batch size
SHAPES = (*(case.name for case in (*_CORE, *_NEIGHBORHOOD)), "dat_tiny", "dat_pp_tiny")
DEFAULT_SHAPES = {"cpu": tuple(name for name in SHAPES if name != "L"), "cuda": SHAPES}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}  # for single attentions


def cases(names: tuple[str, ...], device: str) -> list[Case]:
    """Return the cases with these names, in the order of `SHAPES`.

    >>> [case.description for case in cases(("C",), "cpu")]
    ['batch 1, 56×56, 2 heads, 49 keys']
    """
    known: list[Case] = [*_CORE, *_NEIGHBORHOOD]
    known += [ModelCase(name, _MODELS[device]) for name in ("dat_tiny", "dat_pp_tiny")]
    return [case for case in known if case.name in names]


def resolutions(sides: tuple[int, ...]) -> list[CoreCase]:
    """Return cases of the core on square maps with one key per pixel, as in stage 3 of DAT."""
    return [CoreCase(f"{side}²", 1, (side, side), (side, side), 12, 3) for side in sides]
