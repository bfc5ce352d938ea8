"""Sums of rows that belong to the same row of another tensor: the gradient of every gather with repeats.

``N`` entries, entry ``i`` taken from row ``index[i]`` of ``R`` rows of width ``D``. The gradient of a row is the sum
over its entries, in fp32 (fp64 for fp64), in an order that only the index decides, rounded once. Nothing is atomic, and
nothing waits for a CUDA device.

The kernels write every row of the result once, zeros included: ``R D`` elements written and ``N D`` read. Zeros first
and then only the rows that have entries would write those twice, and need their number on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revisual_fast.kernels.dispatch import CUDA_DTYPES, pick_backend
from revisual_fast.kernels.plan import statistics_dtype

__all__ = ["host_bounds", "packing_backend", "row_sums", "rows_or_nan", "transposed"]


def transposed(
    index: Tensor,  # [N] int64
    n_rows: int,  # R
) -> tuple[Tensor, Tensor]:
    """The entries in the order of their rows ``[N]``, and where each row's begin, ``[R + 1]``, both int64.

    Entries outside ``[0, R)`` lie before the first or behind the last.
    """
    ascending, order = index.sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(n_rows + 1, device=index.device))


def row_sums(
    sources: Sequence[Tensor],  # one or two, each [N, D], of one dtype
    index: Tensor,  # [N] int64: the row that each entry was taken from; outside [0, R) it is none
    n_rows: int,  # R
    dtype: torch.dtype,
    backend: str = "auto",
    transpose: Sequence[Tensor] | None = None,  # transposed(index, n_rows), where somebody has it
) -> list[Tensor]:
    """For each source the sums ``[R, D]`` of its rows by ``index``, in ``dtype``; 0 where a row has no entry.

    Both sources are summed in one launch. Raises ValueError for a backend that cannot run here.
    """
    backend = packing_backend(backend, sources[0])
    if backend == "torch":
        return [_sum_by_torch(source, index, n_rows, dtype) for source in sources]
    sources = [source if source.stride(-1) == 1 else source.contiguous() for source in sources]
    # of the sums that the kernels can write, the one that is rounded to dtype once
    written = dtype if backend == "triton" or dtype == sources[0].dtype else torch.float32
    sums = [source.new_empty((n_rows, source.shape[1]), dtype=written) for source in sources]
    if sum(total.numel() for total in sums):
        order, indptr = transposed(index, n_rows) if transpose is None else transpose
        if backend == "cuda":
            pairs = [*sources, None][:2], [*sums, None][:2]
            torch.ops.revisual_fast_cuda.segment_sums(order, indptr, *pairs[0], *pairs[1])
        else:
            from revisual_fast.kernels.packing_triton import segment_sums

            segment_sums(order, indptr, sources, sums)
    return [total.to(dtype) for total in sums]


def _sum_by_torch(source: Tensor, index: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    index = torch.where((index >= 0) & (index < n_rows), index, n_rows)  # all others to a row more, which is cut off
    wide = source.to(statistics_dtype(source.dtype))
    total = wide.new_zeros((n_rows + 1, source.shape[1]))
    if total.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        total.index_put_((index,), wide, accumulate=True)
    else:
        total.index_add_(0, index, wide)
    return total[:n_rows].to(dtype)


def host_bounds(index: Tensor) -> tuple[int, int] | None:
    """The least and the greatest entry; None without any, on a device, where a look waits, and in ``torch.compile``."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or len(index) == 0:
        return None
    low, high = index.aminmax()
    return int(low), int(high)


def rows_or_nan(
    x: Tensor,  # [R, ...]
    index: Tensor,  # [N] int64
) -> Tensor:
    """``x[index]`` by torch, ``[N, ...]``, and as in the kernels nan where there is no such row."""
    if len(x) == 0:
        return x.new_full((len(index), *x.shape[1:]), torch.nan)
    if (bounds := host_bounds(index)) and bounds[0] >= 0 and bounds[1] < len(x):
        return x.index_select(0, index)
    known = ((index >= 0) & (index < len(x))).view(-1, *[1] * (x.ndim - 1))
    return torch.where(known, x.index_select(0, index.clamp(0, len(x) - 1)), torch.nan)


def packing_backend(backend: str, tensor: Tensor) -> str:
    """``cuda``, ``triton`` or ``torch`` for work on ``tensor``: ``auto`` is the first of them that can do it.

    Raises ValueError for an unknown backend, or one that cannot run on this device or in this dtype.
    """
    if tensor.dtype in CUDA_DTYPES:
        return pick_backend(backend, tensor.device, ("cuda", "triton", "torch"))
    if backend == "cuda":
        raise ValueError(f"backend='cuda' has no kernel for {tensor.dtype}; use backend='auto', 'triton' or 'torch'")
    return pick_backend(backend, tensor.device, ("triton", "torch"))
