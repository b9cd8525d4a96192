"""What everything costs: closed forms, term by term, and counters of what actually runs.

- `formulas`: parameters, multiply-adds, gathers and memory of any attention, block and backbone.
- `counter`: multiply-adds, gathers and bytes of a forward pass of the spec, counted while it runs.
- `torch_counter`: the same for a torch module, through torch's own hooks.
- `growth`: exponents fitted on counts.
- `contenders`: the systems that are compared.

Counts equal the formulas as integers, for every attention and for whole backbones. `torch_counter` needs torch and is
imported by name.
"""

from .contenders import Curve, curves, lineup
from .counter import Allocation, Counts, allocated, count, counting, held_bytes, watched
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
    "allocated",
    "attention_terms",
    "backbone_cost",
    "block_cost",
    "count",
    "counting",
    "curves",
    "doubling",
    "growth",
    "held_bytes",
    "lineup",
    "total",
    "watched",
]
