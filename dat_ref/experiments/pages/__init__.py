"""The pages of the site, written from what was measured: no number that was measured is typed.

    python -m dat_ref.experiments.pages docs/experiments

=================  ==================================================
`formatting`       numbers in words: what the pages share
`offset_ablation`  does the network that ships need its offsets?
`points`           do the points move to the objects?
`peers`            another attention in their place
`ablations`        what is changed in the offsets, groups, bias, grid
`overview`         how it was measured, and all verdicts
=================  ==================================================
"""

from __future__ import annotations

from typing import Any

from . import ablations, offset_ablation, overview, peers, points

HEADER = (
    "<!-- Written by dat_ref/experiments/pages from dat_ref/experiments/measured; edit there and run it again. -->\n"
)


def pages(results: dict[str, Any]) -> dict[str, str]:
    """Return each page by the name of its file."""
    written = {
        "index.md": overview.page(results),
        "points.md": points.page(results),
        "offsets.md": offset_ablation.page(results["offset_ablation"], results["no_offset_baseline"]),
        "peers.md": peers.page(results),
        "ablations.md": ablations.page(results),
    }
    return {name: HEADER + text for name, text in written.items()}
