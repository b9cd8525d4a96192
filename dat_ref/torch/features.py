"""Backbone that returns feature maps, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .._checks import ConfigError
from .backbone import DAT


@dataclass(frozen=True)
class FeatureInfo:
    """Description of the maps of all stages and of those that are returned, with the interface of timm's class.

    Without `idx` a method describes the returned maps. An index, or a list of them, selects among all stages.
    """

    info: tuple[dict[str, Any], ...]  # per stage: num_chs, reduction, module, index
    out_indices: tuple[int, ...]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return the value of a key for each map."""
        found = self.get_dicts(idx=idx)
        return found[key] if isinstance(found, dict) else [entry[key] for entry in found]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Return the entries of the maps, optionally with some of their keys only."""
        if isinstance(idx, int):
            return {key: value for key, value in self.info[idx].items() if keys is None or key in keys}
        return [self.get_dicts(keys, each) for each in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the number of channels of each map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the stride of each map in image pixels."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the name of the module that computes each map."""
        return self.get("module", idx)

    def from_other(self, out_indices: Sequence[int]) -> FeatureInfo:
        """Return the description of the same stages with other returned maps."""
        return replace(self, out_indices=tuple(out_indices))

    def __len__(self) -> int:
        """Return the number of stages."""
        return len(self.info)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the entry of a stage."""
        return self.info[index]


class DATFeatures(DAT):
    """A backbone that returns feature maps: images → a list of (B, dims[i], ⌈H/reduction⌉, ⌈W/reduction⌉).

    The stages after the last returned map, the final norm and the head are removed. Parameter names are the same as in
    `DAT`. `return_layers` has the stages whose maps are returned, by module name; transformers changes it to get all.
    """

    out_indices: tuple[int, ...]
    return_layers: dict[str, str]

    def keep_stages(self, out_indices: int | Sequence[int]) -> None:
        """Select the stages whose maps are returned, and remove everything that those maps do not need.

        Raises:
            ConfigError: if a stage does not exist or is named twice, or none is selected.
        """
        selected = self._stage_indices(out_indices, "out_indices")
        if not selected:
            raise ConfigError(f"out_indices: expected at least one stage, got {out_indices}")
        entries = tuple(self.feature_info)
        self.out_indices = tuple(self.prune_intermediate_layers(selected, prune_norm=True, prune_head=True))
        self.feature_info = FeatureInfo(entries, self.out_indices)
        self.return_layers = {entry["module"]: str(entry["index"]) for entry in self.feature_info.get_dicts()}

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return the maps, in order of depth."""
        indices = [i for i in range(len(self.stages)) if self.feature_info[i]["module"] in self.return_layers]
        return self.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
