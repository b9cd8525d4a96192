"""What the articles print of the eight backbones, to stand beside what is counted here.

Their "FLOPs" are multiply-adds of matrix products and convolutions: those that interpolate are left out.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One line of an article's table."""

    side: int  # of the square image
    parameters: float  # in millions
    macs: float  # in thousands of millions


PUBLISHED = {
    "dat_tiny": Published(224, 29, 4.6),
    "dat_small": Published(224, 50, 9.0),
    "dat_base": Published(224, 88, 15.8),
    "dat_base_384": Published(384, 88, 49.8),
    "dat_pp_tiny": Published(224, 24, 4.3),
    "dat_pp_small": Published(224, 53, 9.4),
    "dat_pp_base": Published(224, 93, 16.6),
    "dat_pp_base_384": Published(384, 93, 49.7),
}
