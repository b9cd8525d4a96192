"""Published parameters and FLOPs of the eight backbones, for comparison with the counts.

The articles' "FLOPs" are multiply-adds of matrix products and convolutions, without those that interpolate.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row of an article's table."""

    side: int  # of the square image, in pixels
    parameters: float  # in millions
    macs: float  # in billions (10⁹)


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
