"""Backbone that returns feature maps, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._checks import ConfigError
from .backbone import DAT


@dataclass(frozen=True)
class FeatureInfo:
    """Description of the maps of a features-only backbone, with timm's interface."""

    entries: tuple[dict[str, Any], ...]  # per map: num_chs, reduction, module
    out_indices: tuple[int, ...]

    def channels(self) -> list[int]:
        """Return the number of channels of each map."""
        return [entry["num_chs"] for entry in self.entries]

    def reduction(self) -> list[int]:
        """Return the stride of each map in image pixels."""
        return [entry["reduction"] for entry in self.entries]

    def module_name(self) -> list[str]:
        """Return the name of the module that computes each map."""
        return [entry["module"] for entry in self.entries]

    def get_dicts(self) -> list[dict[str, Any]]:
        """Return a copy of the entries."""
        return [dict(entry) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.entries[index]


class DATFeatures(DAT):
    """A backbone that returns feature maps: images → a list of (B, dims[i], ⌈H/reduction⌉, ⌈W/reduction⌉).

    The stages after the last returned map, the final norm and the head are removed. Parameter names are the same as in
    `DAT`.
    """

    out_indices: tuple[int, ...]

    def keep_stages(self, out_indices: int | Sequence[int]) -> None:
        """Select the stages whose maps are returned, and remove everything that those maps do not need.

        Raises:
            ConfigError: if a stage does not exist or is named twice, or none is selected.
        """
        selected = self._stage_indices(out_indices, "out_indices")
        if not selected:
            raise ConfigError(f"out_indices: expected at least one stage, got {out_indices}")
        entries = self.feature_info
        self.out_indices = tuple(self.prune_intermediate_layers(selected, prune_norm=True, prune_head=True))
        self.feature_info = FeatureInfo(tuple(entries[index] for index in self.out_indices), self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return the maps, in order of depth."""
        return self.forward_intermediates(x, indices=self.out_indices, stop_early=True, intermediates_only=True)
