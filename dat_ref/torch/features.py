"""A backbone that gives its feature maps, for detectors and segmenters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backbone import DAT


@dataclass(frozen=True)
class FeatureInfo:
    """What the maps of a features-only backbone are."""

    entries: tuple[dict[str, Any], ...]  # one a map: num_chs, reduction, module
    out_indices: tuple[int, ...]

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return [entry["num_chs"] for entry in self.entries]

    def reduction(self) -> list[int]:
        """Return how many image pixels one pixel of each map spans."""
        return [entry["reduction"] for entry in self.entries]

    def module_name(self) -> list[str]:
        """Return the name of the module that puts out each map."""
        return [entry["module"] for entry in self.entries]

    def get_dicts(self) -> list[dict[str, Any]]:
        """Return all of it."""
        return [dict(entry) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.entries[index]


class DATFeatures(DAT):
    """A backbone that returns feature maps: images → a list of (B, dims[i], ⌈H/reduction⌉, ⌈W/reduction⌉).

    Stages behind the last map, the final norm and the head are left out; names of parameters are `DAT`'s.
    """

    out_indices: tuple[int, ...]

    def keep_stages(self, out_indices: Sequence[int]) -> None:
        """Keep what the maps of these stages need, drop the rest."""
        entries = self.feature_info
        self.out_indices = tuple(self.prune_intermediate_layers(out_indices, prune_norm=True, prune_head=True))
        self.feature_info = FeatureInfo(tuple(entries[index] for index in self.out_indices), self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return the maps, shallow to deep."""
        return self.forward_intermediates(x, indices=self.out_indices, stop_early=True, intermediates_only=True)
