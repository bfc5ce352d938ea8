"""A finished gradient times the upstream gradient of the loss, which is 1 in nearly every backward pass.

On CUDA the kernels look at the factor on the device and touch nothing where it is 1: the host need not know, and the
gradient, as large as the logits, is not read and written again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revisual_fast.kernels.dispatch import CUDA_DTYPES, pick_backend

__all__ = ["scale_"]


def scale_(
    x: Tensor,  # [...] contiguous, or [n, V] with contiguous rows; bf16, fp16, fp32 or fp64
    by: Tensor,  # 0-d fp32 or fp64, on the same device
    backend: str = "auto",
) -> Tensor:
    """``x *= by`` in place, rounded once; returns ``x``. ``auto`` is cuda, triton or torch on CUDA, torch elsewhere.

    Raises ValueError for an unknown backend, or one that cannot run here.
    """
    has = ("cuda", "triton", "torch") if x.dtype in CUDA_DTYPES and by.dtype == torch.float32 else ("triton", "torch")
    backend = pick_backend(backend, x.device, has)
    if x.numel() == 0:
        return x
    if backend == "torch":
        if not x.is_cuda and by == 1:
            return x
        return torch.mul(x, by.reshape(1) if x.is_cuda else by, out=x)  # [1]: so that it is not rounded to x's dtype
    rows = x.view(1, -1) if x.is_contiguous() else x
    assert rows.ndim == 2, "anything but rows is contiguous"
    if backend == "cuda":
        torch.ops.revisual_fast_cuda.scale_(rows, by)
    else:
        from revisual_fast.kernels.scaling_triton import scale

        scale(rows, by)
    return x
