"""Whole backbones: in the released formulation, as in this package, rewritten for inference, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch import DAT, create_model, optimize_for_inference
from ..torch.inference import unsupported_reason
from .agreement import WHOLE_GRADIENT, Results
from .cases import ModelCase
from .implementations import Implementation
from .released import released_formulation

RELEASED = "released"  # the reference, in float32
OPTIMIZED = "optimized"  # `optimize_for_inference`, forward pass only
COMPILED = ", compiled"


def model_implementations(
    case: ModelCase, names: list[str], dtypes: list[torch.dtype], device: str, seed: int, compiled: bool
) -> list[Implementation]:
    """Return the requested implementations of a backbone, all with the same random weights and images.

    Args:
        names: ``"released"``, ``"optimized"``, or names of backends.
        dtypes: dtypes. Those other than float32 run under autocast (``"optimized"``: the model is cast; omitted where
            it is `unavailable`).
        compiled: add each implementation under `torch.compile`, in the last dtype.
    """
    missing = unavailable(case, dtypes, device)
    original = _original(case, device, seed)
    images = torch.randn(case.batch, 3, case.image, case.image, device=device)
    labels = torch.randint(original.num_classes, (case.batch,), device=device)
    implementations = []
    for dtype in dtypes:
        for name in names:
            if name == OPTIMIZED and dtype in missing:
                continue
            implementations.append(_model_implementation(name, original, images, labels, dtype, compiled=False))
            if compiled and name != OPTIMIZED and dtype == dtypes[-1]:
                implementations.append(_model_implementation(name, original, images, labels, dtype, compiled=True))
    return implementations


def unavailable(case: ModelCase, dtypes: list[torch.dtype], device: str) -> dict[torch.dtype, str]:
    """Return the dtypes in which this machine cannot run the optimized backbone, each with the reason."""
    reasons = {dtype: unsupported_reason(_original(case, device, seed=0).to(dtype)) for dtype in dtypes}
    return {dtype: reason for dtype, reason in reasons.items() if reason}


def _original(case: ModelCase, device: str, seed: int) -> DAT:
    torch.manual_seed(seed)
    return create_model(case.name, drop_path_rate=0.0).eval().to(device)


def _model_implementation(
    name: str, original: DAT, images: Tensor, labels: Tensor, dtype: torch.dtype, compiled: bool
) -> Implementation:
    module = _variant(name, original, dtype)
    parameters = list(module.parameters())
    model: Callable[[Tensor], Tensor] = torch.compile(module) if compiled else module
    images = images.to(dtype) if name == OPTIMIZED else images

    def forward() -> Tensor:
        with torch.no_grad(), _autocast(name, images, dtype):
            return model(images)

    def backward() -> Results:
        with _autocast(name, images, dtype):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, parameters)
        return {"logits": logits.detach(), WHOLE_GRADIENT: torch.cat([grad.flatten() for grad in grads])}

    return Implementation(name + COMPILED * compiled, dtype, forward, None if name == OPTIMIZED else backward)


def _variant(name: str, original: DAT, dtype: torch.dtype) -> nn.Module:
    if name == RELEASED:
        return released_formulation(original)
    model = copy.deepcopy(original)
    if name == OPTIMIZED:
        return optimize_for_inference(model.to(dtype))
    model.set_backend(name)
    return model


def _autocast(name: str, images: Tensor, dtype: torch.dtype) -> AbstractContextManager[object]:
    if name == OPTIMIZED or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(images.device.type, dtype=dtype)
