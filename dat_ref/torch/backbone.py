"""The backbone as a module: `dat_ref.backbone` in PyTorch, with timm's interface.

Maps are ``(B, C, H, W)``, in channels_last layout from the patch embedding on. Images may have either layout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import official
from .._checks import ConfigError
from ..backbone import DATTrace, EmbedTrace, StageTrace, Step
from ..config import BiasKind, DATConfig, Init
from ._checks import check_map, check_tensors, is_requested
from .block import Block, ChannelNorm, attentions_with
from .bridge import SpecModule, state_dtype
from .functional._symbolic import statically_zero
from .functional.registry import check_backend
from .functional.sampling import Sampler, check_sampler

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLS = ("avg", "max", "avgmax", "catavgmax", "")  # names of timm


class Embed(nn.Module):
    """Strided convolution and layer norm.

    A 3 × 3 kernel has stride 2, so its windows overlap. Any other kernel has stride = kernel size, without overlap.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.kernel = kernel
        overlaps = kernel == 3
        self.projection = nn.Conv2d(
            channels_in, channels_out, kernel, stride=2 if overlaps else kernel, padding=int(overlaps), bias=bias
        )
        self.norm = ChannelNorm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Embed a map: (B, C, H, W) → (B, C', ⌈H/r⌉, ⌈W/r⌉) at stride r, with zero padding at the bottom and right."""
        return self.norm(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """Apply the convolution without the norm."""
        if self.kernel != 3:
            height, width = x.shape[2:]
            if not statically_zero(height % self.kernel, width % self.kernel):
                # Pad by the most that any size needs: the convolution ignores an incomplete last window.
                x = F.pad(x, (0, self.kernel - 1, 0, self.kernel - 1))
        return self.projection(x)

    def traced(self, x: Tensor) -> tuple[Tensor, EmbedTrace]:
        """Return the output of `forward`, and its intermediates."""
        projected = self.project(x)
        output = self.norm(projected)
        fields: dict[str, Any] = {"x": x, "projected": projected, "output": output}
        return output, EmbedTrace(**fields)


class Stage(nn.Module):
    """The blocks of one stage, all at the same resolution."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks: (B, C, H, W) → (B, C, H, W)."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class DAT(SpecModule):
    """DAT or DAT++ backbone with a classifier: images (B, channels, H, W) of any size → logits (B, classes).

    Args:
        config: backbone configuration. ``dat_ref.config("dat_tiny")`` returns a preset; `create_model` builds a
            backbone from the name of a preset.
        backend: backend of deformable and neighborhood attention, one of `dat_ref.torch.backends()`, or ``"auto"``.
        sampler: sampling method, see `functional.bilinear_sample`.
        init: ``"released"``, or ``"zero_offset"`` to start with every point on its reference.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` (their mean), ``"catavgmax"`` (both, twice the features), or
            ``""`` to classify every position of the last map; as the config says if None.

    `forward_features` returns the last map after the final norm. `forward_head` pools and classifies it.
    `forward_intermediates` returns the maps of all stages, and `feature_info` describes them.
    """

    def __init__(
        self,
        config: DATConfig,
        *,
        backend: str = "auto",
        sampler: Sampler = "gather",
        init: Init = "released",
        global_pool: str | None = None,
    ) -> None:
        super().__init__()
        global_pool = config.global_pool if global_pool is None else global_pool
        _check_pool(global_pool)
        self.config = config
        self.in_chans, self.num_features = config.in_channels, config.dims[-1]
        self.output_fmt = "NCHW"
        self.grad_checkpointing = False
        self.feature_info: Any = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}", "index": i}
            for i, (dim, reduction) in enumerate(zip(config.dims, config.reductions, strict=True))
        ]

        dims = config.dims
        if config.patch_embedding == "patch":
            stem = [Embed(config.in_channels, dims[0], kernel=4, bias=True)]
        else:
            widths = (config.in_channels, dims[0] // 2, dims[0])
            stem = [Embed(widths[i], widths[i + 1], kernel=3, bias=True) for i in range(2)]
        downsample_kernel = 2 if config.patch_embedding == "patch" else 3
        options: dict[str, Any] = {"backend": backend, "sampler": sampler, "init": init, "dropout": config.dropout}
        self.patch_embedding = nn.ModuleList(stem)
        self.stages = nn.ModuleList(_stages(config, options))
        self.downsamples = nn.ModuleList(
            Embed(dims[i], dims[i + 1], downsample_kernel, bias=False) for i in range(len(dims) - 1)
        )
        self.norm: nn.Module = ChannelNorm(dims[-1])
        self.reset_classifier(config.num_classes, global_pool)
        self.default_cfg = self.pretrained_cfg = data_settings(config)

    # -------------------------------------------------------------------------------------------- forward

    @overload
    def forward(self, x: Tensor, return_trace: Literal[False] = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_trace: Literal[True]) -> tuple[Tensor, DATTrace]: ...

    def forward(self, x: Tensor, return_trace: bool = False) -> Tensor | tuple[Tensor, DATTrace]:
        """Return logits (B, classes) of images (B, channels, H, W), and the trace if requested.

        With ``global_pool=""``: logits of every position of the last map, (B, classes, H/32, W/32) with four stages.
        Without a head (``num_classes=0``): the features instead of the logits.

        Raises:
            ShapeError, ConfigError: if the shape of the images does not fit the configuration.
        """
        if not is_requested(return_trace):
            return self.forward_head(self.forward_features(x))
        stages, maps = self._trace(x)
        normed = self.norm(maps)
        fields: dict[str, Any] = {"stages": stages, "normed": normed, "pooled": _pool(normed, self.global_pool)}
        return self.forward_head(normed), DATTrace(**fields)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map after the final norm, without pooling: (B, num_features, ⌈H/32⌉, ⌈W/32⌉)."""
        x = self._embed(x)
        for index in range(len(self.stages)):
            x = self._run_stage(x, index)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the output of `forward_features`.

        Args:
            pre_logits: whether to return the features before the classifier.
        """
        check_tensors(x=x)
        x = _pool(x, self.global_pool)
        if pre_logits or isinstance(self.head, nn.Identity):
            return x
        return self.head(x) if self.global_pool else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the output maps of the stages.

        Args:
            indices: indices of the stages. None selects all, an integer n the last n. Negative indices count from the
                end.
            norm: whether to apply the final norm to the last stage's map.
            stop_early: whether to skip the stages after the last selected one.
            output_fmt: ``"NCHW"``, or ``"NHWC"`` for channels last.
            intermediates_only: whether to return only the list of maps.

        Returns:
            the list of maps, or (output of `forward_features`, list of maps). If stages were skipped, the last computed
            map takes the place of the output.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        selected = self._stage_indices(indices)
        maps: list[Tensor] = []
        x = self._embed(x)
        last = len(self.stages) - 1
        computed = max(selected, default=-1) + 1 if stop_early else last + 1
        for index in range(computed):
            x = self._run_stage(x, index)
            if index in selected:
                maps.append(self.norm(x) if norm and index == last else x)
        if output_fmt == "NHWC":
            maps = [each.permute(0, 2, 3, 1) for each in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if computed == last + 1 else x), maps

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = False
    ) -> list[Tensor]:
        """Return the outputs of some stages as tokens (B, H·W, C), or as maps (B, C, H, W) if `reshape`.

        Args:
            n: a number of last stages, or indices of stages.
            norm: whether to apply the final norm to the last stage's map.
        """
        maps: list[Tensor] = self.forward_intermediates(x, n, norm=norm, stop_early=True, intermediates_only=True)
        return maps if reshape else [each.flatten(2).transpose(1, 2) for each in maps]

    def _stage_indices(self, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
        """Return the selected stages in order of depth; an integer n selects the last n, as in timm."""
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ConfigError(f"{name}: expected a number of stages from 1 to {count}, or indices, got {indices}")
            return list(range(count - indices, count))
        if any(not -count <= index < count for index in indices):
            raise ConfigError(f"{name}: expected stages from {-count} to {count - 1}, got {indices}")
        selected = sorted(index % count for index in indices)
        if len(set(selected)) < len(selected):
            raise ConfigError(f"{name}: expected each stage once, got {indices}")
        return selected

    def _embed(self, x: Tensor) -> Tensor:
        check_map("x", x, self.in_chans)
        for index, embed in enumerate(self.patch_embedding):
            x = embed(F.gelu(x) if index else x)
        return x

    def _run_stage(self, x: Tensor, index: int) -> Tensor:
        return self.stages[index](self.downsamples[index - 1](x) if index else x)

    # -------------------------------------------------------------------------------------------- traces

    def walk(self, x: Tensor) -> Iterator[Step]:
        """Run the backbone block by block. A trace that the caller does not store is freed before the next block."""
        check_map("x", x, self.in_chans)
        embeddings: list[EmbedTrace] = []
        for index, embed in enumerate(self.patch_embedding):
            assert isinstance(embed, Embed)
            x, trace = embed.traced(F.gelu(x) if index else x)
            embeddings.append(trace)
        for number, stage in enumerate(self.stages):
            blocks: Any = stage.blocks
            if number:
                downsample = self.downsamples[number - 1]
                assert isinstance(downsample, Embed)
                x, trace = downsample.traced(x)
                embeddings = [trace]
            for index, block in enumerate(blocks):
                x, block_trace = block(x, return_trace=True)
                output: Any = x
                yield Step(number, index, [] if index else embeddings, block_trace, output)

    def _trace(self, x: Tensor) -> tuple[list[StageTrace], Any]:
        stages: list[StageTrace] = []
        output: Any = None
        for step in self.walk(x):
            if step.block == 0:
                stages.append(StageTrace(step.embeddings, [], step.output))
            blocks = stages[-1].blocks + [step.trace]
            output = step.output
            stages[-1] = StageTrace(stages[-1].embeddings, blocks, output)
        return stages, output

    # -------------------------------------------------------------------------------------------- timm's interface

    def get_classifier(self) -> nn.Module:
        """Return the head: a linear layer, or an identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head for another number of classes (0 for none), and perhaps another pooling."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * (2 if self.global_pool == "catavgmax" else 1)
        weight = next(self.parameters())
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head = head.to(weight.device, weight.dtype)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the bias tables to another image size, as in a checkpoint that is loaded.

        Images of any size can be fed without it; tables of another size are then read by `bias_resolution`.

        Raises:
            ConfigError: if a stage would have an empty map, or has a bias for a single size (``BiasKind.FIXED``).
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        config = self.config.resized(size)  # type: ignore[arg-type]  # it checks the length
        blocks = [
            (block, new)
            for stage, configs in zip(self.stages, config.stages, strict=False)
            for block, new in zip(stage.blocks, configs, strict=True)  # type: ignore[arg-type, union-attr]
        ]
        if any(getattr(new.attention, "bias", None) is BiasKind.FIXED for _, new in blocks):
            raise ConfigError(
                "img_size: expected a position bias that is a function of displacement, got BiasKind.FIXED"
            )
        self.config = config
        for block, new in blocks:
            block.resize(new)

    def load_pretrained(self, path: str | PathLike[str]) -> None:
        """Load a file of weights, see `load_weights` of `dat_ref.torch.models`."""
        from .models import load_weights  # imports this module

        load_weights(self, path)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the input of each block during training, and recompute the block in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def set_backend(self, backend: str = "auto", sampler: Sampler | None = None) -> None:
        """Set the backend, and optionally the sampler, of all attention modules that have one.

        See `dat_ref.torch.backends()`.

        Raises:
            ConfigError: for an unknown backend or sampler.
        """
        check_backend(backend)
        if sampler is not None:
            check_sampler(sampler)
        for module in self.modules():
            if isinstance(module, attentions_with("backend")):
                module.backend = backend
            if isinstance(module, attentions_with("sampler")):
                module.sampler = sampler or module.sampler

    def no_weight_decay(self) -> set[str]:
        """Return the names of the bias tables. The caller has to exempt 1-d parameters itself."""
        return {name for name, _ in self.named_parameters() if name.endswith(".table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        end = (99999,)  # merged into the group before it
        if coarse:
            # Downsampling i follows stage i: (i, 0) sorts after (i,).
            blocks = [(r"^stages\.(\d+)", None), (r"^downsamples\.(\d+)", (0,)), (r"^norm", end)]
        else:
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^downsamples\.(\d+)", (9999,)),
                (r"^norm", end),
            ]
        return {"stem": r"^patch_embedding", "blocks": blocks}

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected one; return the selected stages.

        Args:
            indices: stages to keep, as in `forward_intermediates`.
            prune_norm: whether to remove the final norm.
            prune_head: whether to remove the head and the pooling.
        """
        selected = self._stage_indices(indices)
        count = max(selected, default=-1) + 1
        cut = count < len(self.stages)  # norm and head belong to the last stage
        self.stages, self.downsamples = self.stages[:count], self.downsamples[: max(count - 1, 0)]
        self.num_features = self.config.dims[max(count - 1, 0)]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return selected

    def sequential(self) -> nn.Sequential:
        """Return stem and stages as one chain with the children ``stem``, ``stage0``, ``stage1``, …

        For functions that take feature maps from the children of a network, such as torchvision's
        ``IntermediateLayerGetter`` and ``BackboneWithFPN``. The chain shares the parameters of this model under other
        names, and returns the last map without the final norm. Load checkpoints into this model, not into the chain.
        """
        first, *others = self.patch_embedding
        stem = nn.Sequential(first, *(layer for embed in others for layer in (nn.GELU(), embed)))
        parts: dict[str, nn.Module] = {"stem": stem, "stage0": self.stages[0]}
        for i, downsample in enumerate(self.downsamples, start=1):
            parts[f"stage{i}"] = nn.Sequential(downsample, self.stages[i])
        return nn.Sequential(OrderedDict(parts))

    # -------------------------------------------------------------------------------------------- released names

    def official_names(self) -> official.NameMapping:
        """Return the released name and layout of each parameter."""
        return official.backbone_names(self.config)

    @classmethod
    def from_official(
        cls, mapping: Mapping[str, Any], state: Mapping[str, Any], *, release: str, **options: Any
    ) -> DAT:
        """Build a backbone from a released model's arguments and state dict, in the dtype of the state dict.

        Args:
            mapping: arguments of the released ``DAT`` class, by name.
            state: released state dict, tensors or arrays.
            release: ``"cvpr2022"`` or ``"datpp2023"``.
            options: further arguments of this class: `backend`, `sampler`, `global_pool`.

        Raises:
            CheckpointError: if the state dict does not fit; with a report of missing, unexpected and mis-shaped keys.
        """
        model = cls(DATConfig.from_official(mapping, release=release), **options).to(state_dtype(state))
        model.load_official(state)
        return model


def _stages(config: DATConfig, options: dict[str, Any]) -> list[Stage]:
    """Build the stages. The drop rate of stochastic depth grows linearly from 0 at the first block to its maximum."""
    last = max(sum(len(blocks) for blocks in config.stages) - 1, 1)
    stages, depth = [], 0
    for blocks in config.stages:
        built = []
        for block in blocks:
            built.append(Block(block, drop_path=config.drop_path_rate * depth / last, **options))
            depth += 1
        stages.append(Stage(built))
    return stages


def data_settings(config: DATConfig) -> dict[str, Any]:
    """Return timm's description of a model: preprocessing, classes, and names of the first and last layer."""
    height, width = config.image_size
    stride = config.reductions[-1]
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (config.in_channels, height, width),
        "pool_size": (height // stride, width // stride),
        "crop_pct": 0.9 if max(height, width) <= 256 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embedding.0.projection",
        "classifier": "head",
        "license": "",
    }


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ConfigError(f"global_pool: expected one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")


def _pool(x: Tensor, global_pool: str) -> Tensor:
    """Pool a map: (B, C, H, W) → (B, C), twice the channels for ``"catavgmax"``, or the same map for ``""``."""
    if not global_pool:
        return x
    if global_pool == "avg":
        return x.mean(dim=(2, 3))
    mean, peak = x.mean(dim=(2, 3)), x.amax(dim=(2, 3))
    return {"max": peak, "avgmax": (mean + peak) / 2, "catavgmax": torch.cat((mean, peak), dim=1)}[global_pool]
