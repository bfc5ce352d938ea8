"""The rows of the hidden states that have a target: a gather with repeats, whose backward adds.

``T`` packed rows, ``N`` gathered ones, hidden size ``D``. The last row of a prompt predicts the first token of every
completion, so it is gathered as often as its group has completions. The gradients of the copies are added up by
:mod:`revisual_fast.kernels.row_sums`, in fp32 (fp64 for fp64) and rounded once: the sum has one rounding error however
large the group, and is the same in every run. Plain indexing adds in the dtype of the gradient. Nothing but ``rows`` is
kept for the backward pass, and nothing waits for a CUDA device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast.kernels.row_sums import host_bounds, packing_backend, row_sums
from revisual_fast.ranges import ranged

__all__ = ["GatherRows", "gather_rows", "gather_rows_backward"]


@ranged("revisual_fast.gather_rows")
def gather_rows(
    hidden: Tensor,  # [T, D] bf16, fp16, fp32 or fp64
    rows: Tensor,  # [N] int64, repeats allowed, any order
    backend: str = "auto",
) -> Tensor:
    """``hidden[rows]``, ``[N, D]``, differentiable in ``hidden``; ``backend`` says what computes the gradient.

    ``auto`` is cuda, triton or torch on a CUDA device, the first that can run, and torch elsewhere. That rows lie in
    ``[0, T)`` is checked on the CPU only, where it costs no sync, and not under ``torch.compile``. Raises ValueError
    for shapes, dtypes, rows or a backend that do not fit.
    """
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be [T, D] of floating-point numbers; got {list(hidden.shape)} {hidden.dtype}")
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != hidden.device:
        raise ValueError(
            f"rows must be [N] int64 on {hidden.device}, as hidden; "
            f"got {list(rows.shape)} {rows.dtype} on {rows.device}"
        )
    if (bounds := host_bounds(rows)) and (bounds[0] < 0 or bounds[1] >= len(hidden)):
        raise ValueError(f"rows must lie in [0, {len(hidden)}), hidden's rows; they go from {bounds[0]} to {bounds[1]}")
    return GatherRows.apply(hidden, rows, packing_backend(backend, hidden))


@ranged("revisual_fast.gather_rows_backward")
def gather_rows_backward(
    d_out: Tensor,  # [N, D]
    rows: Tensor,  # [N] int64
    n_rows: int,  # T
    backend: str = "auto",
) -> Tensor:
    """Gradient ``[T, D]`` of :func:`gather_rows`, in the dtype of ``d_out``; 0 in rows that nobody gathered.

    Raises ValueError for a backend that cannot run here.
    """
    (total,) = row_sums([d_out], rows, n_rows, d_out.dtype, backend)
    return total


class GatherRows(torch.autograd.Function):
    """``apply(hidden [T, D], rows [N], backend)`` with a backend that :func:`packing_backend` gave."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n_rows, ctx.backend = len(hidden), backend
        return hidden.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gather_rows_backward(d_out, rows, ctx.n_rows, ctx.backend), None, None
