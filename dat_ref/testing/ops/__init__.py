"""Operations that the kit can check, one file each: cases, checks, mutants and drawings of counter-examples."""

from .attention import ATTENTION
from .bias import BIAS
from .deform_conv import DEFORM_CONV
from .layer import LAYER
from .multi_scale import MULTI_SCALE
from .neighborhood import NEIGHBORHOOD
from .offset_bound import OFFSET_BOUND
from .reference_grid import REFERENCE_GRID
from .sampler import SAMPLER

OPS = (SAMPLER, REFERENCE_GRID, OFFSET_BOUND, BIAS, ATTENTION, LAYER, MULTI_SCALE, DEFORM_CONV, NEIGHBORHOOD)

__all__ = [
    "ATTENTION",
    "BIAS",
    "DEFORM_CONV",
    "LAYER",
    "MULTI_SCALE",
    "NEIGHBORHOOD",
    "OFFSET_BOUND",
    "OPS",
    "REFERENCE_GRID",
    "SAMPLER",
]
