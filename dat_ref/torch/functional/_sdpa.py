"""torch's attention with a mask, in a form that exporters accept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Before torch 2.7, export cannot be distinguished from compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
EXPORT_IS_KNOWN = hasattr(torch.compiler, "is_exporting")


def is_recording() -> bool:
    """Return whether `torch.export` or `torch.jit.trace` (also in the older ONNX exporter) records this call.

    A recorded program has plain operations only: it can run without this package.
    """
    if torch.compiler.is_compiling():
        return is_exporting()
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Return softmax(q kᵀ · scale + mask) v, by `F.scaled_dot_product_attention` outside of export.

    torch selects a kernel by whether the mask needs a gradient, and the kernels return different memory layouts. An
    exporter traces the program several times, with gradients and without them. The views that one pass recorded after
    the attention do not fit the layout of another ("Cannot view a tensor with shape …"). Plain operations have the same
    layout in all passes.

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        mask: broadcasts to (B, heads, N, M); -inf hides a key.
    """
    if not is_exporting() or not (EXPORT_IS_KNOWN or torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
    finite_mask = mask.clamp(min=torch.finfo(mask.dtype).min / 2)  # a row without any visible key gives no NaN
    logits = q @ k.transpose(-2, -1) * scale + finite_mask
    return F.dropout(torch.softmax(logits, dim=-1), dropout) @ v
