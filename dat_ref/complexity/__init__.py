"""Computational cost: closed-form formulas by term, and counters of executed operations.

- `formulas`: parameters, multiply-adds, gathers and memory of any attention, block and backbone.
- `counter`: multiply-adds, gathers and bytes of a forward pass of the NumPy spec, counted during execution.
- `torch_counter`: multiply-adds and bytes of a torch module, counted through torch's own hooks.
- `growth`: exponents fitted to counts.
- `curves`: cost of all compared systems against the map size.

Counts equal the formulas exactly, as integers, for every attention and for whole backbones. `torch_counter` needs torch
and must be imported explicitly.
"""

from .._deprecation import deprecated_names
from .counter import Allocation, Counts, count, counting, mark_as_data, measure_allocation, retained_bytes
from .curves import Curve, compared_systems, curves
from .formulas import BackboneCost, BlockCost, Term, attention_terms, backbone_cost, block_cost, total
from .growth import Growth, doubling, growth
from .published import PUBLISHED, Published

__all__ = [
    "PUBLISHED",
    "Allocation",
    "BackboneCost",
    "BlockCost",
    "Counts",
    "Curve",
    "Growth",
    "Published",
    "Term",
    "attention_terms",
    "backbone_cost",
    "block_cost",
    "compared_systems",
    "count",
    "counting",
    "curves",
    "doubling",
    "growth",
    "mark_as_data",
    "measure_allocation",
    "retained_bytes",
    "total",
]

__getattr__ = deprecated_names(
    __name__,
    {
        "allocated": "measure_allocation",
        "held_bytes": "retained_bytes",
        "lineup": "compared_systems",
        "watched": "mark_as_data",
    },
)
