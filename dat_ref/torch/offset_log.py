"""Offsets during training, for a log: size, shares at the bound and outside the map, part that depends on the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .offset_adapters import Intercept, OffsetLayer
from .offset_findings import OffsetReport
from .offset_report import Measurement, check_deformable

PREFIX = "offsets/"  # of the names of scalars
SCALARS = ("mean", "at_bound", "outside", "image")  # fields of `LayerOffsets` that a log shows


class OffsetLog:
    """Hooks that keep each layer's offsets of the last forward pass in training mode.

    A forward pass stores references only. `scalars` and `report` compute, so call them on the steps that are logged::

        log = OffsetLog(model)
        for step, (images, labels) in enumerate(loader):
            train_step(model, images, labels)
            if step % 100 == 0:
                for name, value in log.scalars().items():
                    writer.add_scalar(name, value, step)

    With several processes, the offsets are those of this process's images. Create the log before the first call of a
    compiled model.

    Args:
        model: module with deformable layers, see `offset_report`.

    Raises:
        ConfigError: if the model has no such layer.

    >>> import torch
    >>> from dat_ref.torch import DeformableAttention
    >>> layer = DeformableAttention(dim=8, heads=2, stride=4, init="zero_offset")
    >>> with OffsetLog(layer) as log:
    ...     y = layer(torch.ones(2, 8, 16, 16))
    >>> log.scalars()
    {'offsets/layer/mean': 0.0, 'offsets/layer/at_bound': 0.0, 'offsets/layer/outside': 0.0, 'offsets/layer/image': 0.0}
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = check_deformable(model)
        self._last: dict[str, tuple[Tensor, Any]] = {}
        self._handles = [
            handle for name, layer in self._layers.items() for handle in layer.register(self._recorder(name, layer))
        ]

    def _recorder(self, name: str, layer: OffsetLayer) -> Intercept:
        module, last = layer.module, self._last

        def record(raw: Tensor, call: Any) -> None:
            if module.training:
                last[name] = (raw.detach(), call)

        return record

    @property
    def names(self) -> list[str]:
        """Names of all scalars."""
        return [_scalar(layer, name) for layer in self._layers for name in SCALARS]

    def report(self) -> OffsetReport:
        """Return the report of the last forward pass in training mode: its images, and the layers that it ran."""
        layers, images = [], 0
        for name, (raw, call) in self._last.items():
            measurement = Measurement(self._layers[name])
            measurement.add(raw, call)
            layers.append(measurement.result())
            images = max(images, measurement.images)
        return OffsetReport(tuple(layers), images)

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the last forward pass in training mode, by ``offsets/LAYER/NAME``.

        The names are ``mean`` (pixels), ``at_bound``, ``outside``, and ``image``, the share of the squared offsets that
        depends on the image, which needs at least two images.
        """
        report = self.report()
        return {
            _scalar(layer.name, name): float(getattr(layer, name))
            for layer in report.layers
            for name in SCALARS
            if name != "image" or report.images > 1
        }

    def close(self) -> None:
        """Remove the hooks. The last offsets stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> OffsetLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _scalar(layer: str, name: str) -> str:
    return f"{PREFIX}{layer or 'layer'}/{name}"
