"""Backbones in transformers' registry: import this module, then use ``AutoBackbone`` and models that take a backbone.

    >>> from transformers import AutoBackbone
    >>> config = DATBackboneConfig.from_name("dat_nano", out_features=["stage2", "stage3"])
    >>> AutoBackbone.from_config(config).channels
    [64, 112]

``save_pretrained`` and ``from_pretrained`` are transformers' own: ``config.json`` with the configuration of the
backbone, and ``model.safetensors``. For a folder use ``DATBackbone.from_pretrained``: ``AutoBackbone.from_pretrained``
of transformers 5.23 takes names of repositories only. Needs transformers 5.10 or newer, the extra ``hub``.
"""

from typing import Any

from torch import Tensor, nn

from .._checks import ConfigError
from ..checkpoints import LoadReport
from ..config_json import from_mapping, to_mapping
from .backbone import DAT
from .checkpoints import load_checkpoint
from .models import preset_of

try:
    from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise ImportError(
        f"transformers 5.10 or newer is needed and cannot be imported ({error}): pip install 'dat-ref[hub]'"
    ) from error

__all__ = ["DATBackbone", "DATBackboneConfig"]


class DATBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration for ``AutoBackbone``; the stages are ``stage1``, ``stage2``, …

    Args:
        backbone: fields of a `dat_ref.DATConfig`, see `dat_ref.config_json`; None: ``dat_tiny``.
        out_features, out_indices: stages whose maps are returned, by name or by index from 0; the last one by default.

    Raises:
        ConfigError: if the fields are not those of a backbone.
    """

    model_type = "dat_ref"

    backbone: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        values = to_mapping(preset_of("dat_tiny")) if self.backbone is None else self.backbone
        config = from_mapping(values, "backbone")
        self.backbone = to_mapping(config)
        self.num_channels, self.image_size = config.in_channels, list(config.image_size)
        self.hidden_size, self.hidden_sizes = config.dims[-1], list(config.dims)
        self.stage_names = [f"stage{number}" for number in range(1, len(config.stages) + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_name(cls, name: str, **options: Any) -> "DATBackboneConfig":
        """Return the configuration of a preset, see `dat_ref.torch.list_models`; options are those of the class."""
        return cls(backbone=to_mapping(preset_of(name)), **options)


class DATBackbone(BackboneMixin, PreTrainedModel):
    """Backbone whose forward returns transformers' ``BackboneOutput``: one map (B, C, H, W) for each selected stage.

    The maps are those of `DAT.forward_intermediates`, without a norm. `load_checkpoint` reads released weights.
    """

    config_class = DATBackboneConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    has_attentions = False
    supports_gradient_checkpointing = False

    def __init__(self, config: DATBackboneConfig) -> None:
        super().__init__(config)
        dat_config = from_mapping(config.backbone, "backbone")
        self.num_features = list(dat_config.dims)
        self.model = DAT(dat_config)
        self.model.reset_classifier(0)
        self.model.norm = nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialization of `DAT`."""

    def load_checkpoint(self, path: str, prefix: str | None = None) -> LoadReport:
        """Load the backbone's weights from a checkpoint of either release or of ours.

        Args:
            path, prefix: as in `dat_ref.torch.checkpoints.load_checkpoint`.
        """
        return load_checkpoint(self.model, path, prefix=prefix)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Return the maps of the selected stages.

        Args:
            pixel_values: images (B, channels, H, W) of any size.
            output_hidden_states: whether to return the maps of all stages as well.
            output_attentions: not supported, since a deformable layer has no map of attention over pixels.
            return_dict: whether to return a ``BackboneOutput``, or a tuple. The configuration's choice if None.

        Raises:
            ConfigError: if `output_attentions` is set.
        """
        if output_attentions:
            raise ConfigError("output_attentions: expected False; model.model(x, return_trace=True) has the attention")
        maps = self.model.forward_intermediates(pixel_values, intermediates_only=True)
        selected = tuple(each for name, each in zip(self.stage_names, maps, strict=True) if name in self.out_features)
        hidden_states = tuple(maps) if output_hidden_states else None
        use_dict = self.config.return_dict if return_dict is None else return_dict
        if not use_dict:
            return (selected,) if hidden_states is None else (selected, hidden_states)
        return BackboneOutput(feature_maps=selected, hidden_states=hidden_states)


AutoConfig.register(DATBackboneConfig.model_type, DATBackboneConfig, exist_ok=True)
AutoBackbone.register(DATBackboneConfig, DATBackbone, exist_ok=True)
