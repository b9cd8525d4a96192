"""Layers whose offsets can be measured or replaced: ours, deformable convolution, multi-scale deformable attention.

An adapter intercepts the raw offsets of a layer in the forward pass, and computes from them the sampling points in
pixels. Layers of other packages are recognized by their interface:

- deformable convolution: ``forward(x, offset, …)`` with the offsets as an argument, as in torchvision's
  ``DeformConv2d``. Channels are in the order group, tap, (dy, dx), in pixels.
- multi-scale deformable attention: a linear layer ``sampling_offsets``, and ``forward`` with reference points and the
  sizes of the levels, as in Deformable DETR and in transformers. Channels are in the order head, level, point, (x, y).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import ConfigError
from ..ops.coverage import coverage
from ..ops.offsets import share_at_bound
from ..peers.deform_conv import ConvGeometry
from . import functional
from .bridge import as_numpy
from .functional.deform_conv import deform_points
from .functional.grid import Size
from .functional.multi_scale import level_sizes
from .functional.per_query import lattice
from .layer import DeformableAttention
from .peers.dat_dcn import DATDCNAttention
from .peers.ms_deform_attn import MultiScaleDeformableAttention, cell_centers
from .peers.per_query import PerQueryAttention

# (raw offsets (B, G, 2, Hk, Wk), geometry of the call) → offsets to use instead, or None to leave them
Intercept = Callable[[Tensor, Any], Tensor | None]


class Points(NamedTuple):
    """Sampling points of a forward pass, in pixels of the map that each of them reads, float64.

    For a deformable convolution each tap of each group counts as a group, for multi-scale attention each point of each
    level and head.
    """

    moved: Tensor  # distance from the position with zero offsets, (B, G, Hk, Wk, 2)
    points: Tensor  # (B, G, Hk, Wk, 2), (y, x)
    sizes: Tensor  # (H, W) of the map, (G or 1, 1, 1, 2)
    at_bound: float = 0.0  # share of the components at their bound

    @property
    def outside(self) -> Tensor:
        """Mask of the points that their offsets moved to zeros, one pixel or more outside the map: (B, G, Hk, Wk)."""
        now, before = (
            ((points <= -1) | (points >= self.sizes)).any(-1) for points in (self.points, self.points - self.moved)
        )
        return now & ~before


@dataclass
class OffsetLayer:
    """Adapter of a layer: intercepts its raw offsets, and computes its points.

    Args:
        name: name of the module in the model; empty for the model itself.
        module: the layer.
    """

    name: str
    module: nn.Module
    kind: ClassVar[str]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether the adapter can handle a module."""
        raise NotImplementedError

    def register(self, intercept: Intercept) -> list[Any]:
        """Call a function on the raw offsets of each forward pass; return the handles of the hooks."""
        raise NotImplementedError

    def points(self, raw: Tensor, call: Any) -> Points:
        """Compute the points of a forward pass from its raw offsets and its geometry."""
        raise NotImplementedError

    def settings(self, size: Size) -> dict[str, Any]:
        """Return the fields of `LayerOffsets` that the configuration and the size of the map determine."""
        return {}

    @contextmanager
    def intercepted(self, intercept: Intercept) -> Iterator[None]:
        """Call a function on the raw offsets of each forward pass inside the context."""
        handles = self.register(intercept)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class NetworkOffsets(OffsetLayer):
    """Offsets that an offset network predicts, (B·G, 2·N, Hk, Wk) with N points of a group at each position."""

    @property
    def count(self) -> int:
        """Number of points at each position, G·N."""
        raise NotImplementedError

    def register(self, intercept: Intercept) -> list[Any]:
        """Intercept the output of the offset network; the geometry is the size of the map."""
        count, network = self.count, self.module.offset_network
        assert isinstance(network, nn.Module)

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            raw = output[0].reshape(-1, count, 2, *output[0].shape[2:])
            new = intercept(raw, (inputs[0].shape[2], inputs[0].shape[3]))
            return None if new is None else (new.reshape(output[0].shape), output[1])

        return [network.register_forward_hook(hook)]


class DeformableAttentionOffsets(NetworkOffsets):
    """Offsets of `DeformableAttention`."""

    kind = "deformable attention"
    module: DeformableAttention

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is ours and has an offset network."""
        return isinstance(module, DeformableAttention) and module.offset_network is not None

    @property
    def count(self) -> int:
        """One point for each group."""
        return self.module.config.groups

    def points(self, raw: Tensor, call: Size) -> Points:
        """Compute the points as the layer does, in float64."""
        config = self.module.config
        raw = raw.double().permute(0, 1, 3, 4, 2)  # (B, G, Hk, Wk, 2)
        bounding: dict[str, Any] = {"offset_range": config.offset_range, "convention": config.convention}
        key_size = (raw.shape[2], raw.shape[3])
        reference = functional.reference_points(key_size, config.convention, dtype=raw.dtype, device=raw.device)
        offsets, points = functional.bound_offsets(raw, reference, config.offset_bound, **bounding)
        _, unmoved = functional.bound_offsets(torch.zeros_like(raw), reference, config.offset_bound, **bounding)
        points_px, unmoved_px = (functional.to_pixels(each, call, config.convention) for each in (points, unmoved))
        arrays = as_numpy(offsets), as_numpy(reference)
        at_bound = share_at_bound(*arrays, config.offset_bound, **bounding)
        return Points(points_px - unmoved_px, points_px, _sizes([call], raw), at_bound)

    def settings(self, size: Size) -> dict[str, Any]:
        """Return stride, kernel, bound and coverage."""
        config = self.module.config
        return {
            "stride": config.stride,
            "kernel_size": config.kernel_size,
            "offset_bound": config.offset_bound.name,
            "offset_range": config.offset_range,
            "coverage": coverage(size, config.stride, config.convention),
        }


class PerQueryOffsets(NetworkOffsets):
    """Offsets of `PerQueryAttention`, in pixels."""

    kind = "attention with keys of each query"
    module: PerQueryAttention

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is ours."""
        return isinstance(module, PerQueryAttention)

    @property
    def count(self) -> int:
        """Keys of each group."""
        return self.module.config.groups * self.module.config.keys

    def points(self, raw: Tensor, call: Size) -> Points:
        """Compute the position of each key of each pixel."""
        config = self.module.config
        moved = raw.double().permute(0, 1, 3, 4, 2)  # (B, G·N, H, W, 2)
        around = lattice(call, config.kernel_size, dtype=moved.dtype, device=raw.device)  # (H·W, N, 2)
        around = around.transpose(0, 1).unflatten(1, call).repeat(config.groups, 1, 1, 1)
        return Points(moved, moved + around, _sizes([call], moved))


class DeformableConvOffsets(OffsetLayer):
    """Offsets of a deformable convolution that gets them as an argument, ``forward(x, offset, …)``."""

    kind = "deformable convolution"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is a convolution with an argument `offset`."""
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, Tensor) and weight.ndim == 4 and hasattr(module, "padding")):
            return False
        return list(inspect.signature(module.forward).parameters)[1:2] == ["offset"]

    @property
    def geometry(self) -> ConvGeometry:
        """Kernel size, stride, padding and dilation."""
        module: Any = self.module
        pairs = (_pair(getattr(module, name, 1)) for name in ("stride", "padding", "dilation"))
        return ConvGeometry(_pair(tuple(module.weight.shape[2:])), *pairs)

    def register(self, intercept: Intercept) -> list[Any]:
        """Intercept the argument `offset`; the geometry is the size of the map."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            bound = inspect.signature(module.forward).bind(*arguments, **options)
            x, offset = bound.args[:2]
            raw = offset.unflatten(1, (-1, 2))  # (B, groups · taps, 2, H', W')
            new = intercept(raw, (x.shape[2], x.shape[3]))
            if new is None:
                return None
            return (x, new.flatten(1, 2), *bound.args[2:]), bound.kwargs

        return [self.module.register_forward_pre_hook(hook, with_kwargs=True)]

    def points(self, raw: Tensor, call: Size) -> Points:
        """Compute the position of each tap at each output pixel."""
        moved = raw.double()
        points = deform_points(moved.flatten(1, 2), self.geometry).flatten(1, 2)
        return Points(moved.permute(0, 1, 3, 4, 2), points, _sizes([call], moved))


class MultiScaleCall(NamedTuple):
    """Geometry of a call of multi-scale deformable attention."""

    reference_points: Tensor  # (B, Q, L, 2) as (x, y), or boxes (B, Q, L, 4), in [0, 1]
    shapes: Sequence[Size]  # (H, W) of each level


class MultiScaleOffsets(OffsetLayer):
    """Offsets of multi-scale deformable attention in the interface of Deformable DETR."""

    kind = "multi-scale deformable attention"
    offset_layer = "sampling_offsets"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module has Deformable DETR's attributes. RT-DETRv2 scales its offsets differently."""
        names = ("sampling_offsets", "n_heads", "n_levels", "n_points")
        return all(hasattr(module, name) for name in names) and not hasattr(module, "offset_scale")

    @property
    def axes(self) -> tuple[int, int, int]:
        """Heads, levels, points."""
        module: Any = self.module
        return module.n_heads, module.n_levels, module.n_points

    def call(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Return the geometry of a call from its arguments."""
        given = inspect.signature(self.module.forward).bind(*arguments, **options).arguments
        for name in ("spatial_shapes_list", "spatial_shapes", "input_spatial_shapes"):
            if given.get(name) is not None and given.get("reference_points") is not None:
                return MultiScaleCall(given["reference_points"].detach(), level_sizes(given[name]))
        raise ConfigError(
            f"model: expected layer {self.name!r} to get reference_points and spatial_shapes, got {', '.join(given)}"
        )

    def register(self, intercept: Intercept) -> list[Any]:
        """Intercept the output of the linear layer that predicts the offsets."""
        heads, levels, points = self.axes
        calls: list[Any] = []

        def before(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls[:] = [self.call(arguments, options)]

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not calls:
                raise ConfigError(f"model: expected forward calls of layer {self.name!r}, got a call of another method")
            raw = output.unflatten(2, (heads * levels * points, 2)).permute(0, 2, 3, 1)[..., None]  # (B, G, 2, Q, 1)
            new = intercept(raw, calls.pop())
            return None if new is None else new[..., 0].permute(0, 3, 1, 2).flatten(2)

        predictor = getattr(self.module, self.offset_layer)
        return [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            predictor.register_forward_hook(hook),
        ]

    def points(self, raw: Tensor, call: Any) -> Points:
        """Compute the points of each query: pixels of their level, or shares of a reference box."""
        heads, levels, points = self.axes
        moved = raw.double()[..., 0].unflatten(1, (heads, levels, points)).movedim((4, 5), (5, 1))  # (B, Q, h, L, P, 2)
        ends = moved.new_tensor([(width, height) for height, width in call.shapes])[:, None]  # (L, 1, 2)
        references = call.reference_points.to(moved)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if references.shape[-1] == 4:
            moved = moved * references[..., 2:] * ends / (2 * points)
        positions = references[..., :2] * ends - 0.5 + moved
        moved, positions = (each.flatten(2, 4).transpose(1, 2)[:, :, :, None].flip(-1) for each in (moved, positions))
        sizes = [size for _ in range(heads) for size in call.shapes for _ in range(points)]
        return Points(moved, positions, _sizes(sizes, moved))


class OwnMultiScaleOffsets(MultiScaleOffsets):
    """Offsets of `MultiScaleDeformableAttention`, called on a map."""

    module: MultiScaleDeformableAttention
    offset_layer = "offset"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is ours."""
        return isinstance(module, MultiScaleDeformableAttention)

    @property
    def axes(self) -> tuple[int, int, int]:
        """Heads, levels, points."""
        config = self.module.config
        return config.heads, config.levels, config.points

    def call(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> MultiScaleCall:
        """Return the pixel centers as reference points."""
        size = _map_size(self.module, arguments, options)
        return MultiScaleCall(
            cell_centers(size, dtype=torch.float64, device=self.module.offset.weight.device)[None], [size]
        )


class DATDCNOffsets(MultiScaleOffsets):
    """Offsets of `DATDCNAttention`, in units of half a map."""

    kind = "DAT-DCN attention"
    module: DATDCNAttention
    offset_layer = "offset"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a module is ours."""
        return isinstance(module, DATDCNAttention)

    @property
    def axes(self) -> tuple[int, int, int]:
        """Heads, levels, points."""
        return self.module.config.heads, 1, self.module.config.points

    def call(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Size:
        """Return the size of the map."""
        return _map_size(self.module, arguments, options)

    def points(self, raw: Tensor, call: Size) -> Points:
        """Compute the points of each pixel."""
        convention = self.module.config.convention
        offsets = raw.double().permute(0, 1, 3, 4, 2)  # (B, heads·P, H·W, 1, 2), (y, x)
        reference = functional.reference_points(call, convention, dtype=offsets.dtype, device=raw.device)
        reference = reference.reshape(-1, 1, 2)
        points, unmoved = (functional.to_pixels(each, call, convention) for each in (reference + offsets, reference))
        return Points(points - unmoved, points, _sizes([call], offsets))


ADAPTERS: tuple[type[OffsetLayer], ...] = (
    DeformableAttentionOffsets,
    PerQueryOffsets,
    DATDCNOffsets,
    OwnMultiScaleOffsets,
    MultiScaleOffsets,
    DeformableConvOffsets,
)


def offset_layers(model: nn.Module) -> dict[str, OffsetLayer]:
    """Return the layers of a model that predict or get offsets, by module name."""
    found: dict[str, OffsetLayer] = {}
    for name, module in model.named_modules():
        for adapter in ADAPTERS:
            if adapter.fits(module):
                found[name] = adapter(name, module)
                break
    return found


def _map_size(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Size:
    """Return the size of the map x in a call of a peer."""
    x = inspect.signature(module.forward).bind(*arguments, **options).arguments["x"]
    return x.shape[2], x.shape[3]


def _sizes(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """Return map sizes as a tensor that broadcasts against points: (len(sizes), 1, 1, 2)."""
    return like.new_tensor(sizes)[:, None, None]


def _pair(value: Any) -> tuple[int, int]:
    """Return one number or two as a pair."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return int(rows), int(columns)
