"""Sums of rows that belong to the same row of another tensor: the gradient of every gather with repeats.

``N`` entries, entry ``i`` taken from row ``index[i]`` of ``R`` rows of width ``D``. The gradient of a row is the sum
over its entries, in fp32 (fp64 for fp64), in an order that only the index decides, rounded once. Nothing is atomic, and
nothing waits for a CUDA device.

The kernels write every row of the result once, zeros included: ``R D`` elements written and ``N D`` read. Zeros first
and then only the rows that have entries would write those twice, and need their number on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from revisual_fast.kernels.dispatch import pick_backend
from revisual_fast.kernels.plan import statistics_dtype

__all__ = ["RowMap", "packing_backend", "row_sums", "rows_or_nan"]

CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class RowMap:
    """From which row each entry was taken, and, made when first needed, the entries of each row. -1 is no row."""

    index: Tensor  # [N] int64
    n_rows: int  # R

    @classmethod
    def checked(cls, index: Tensor, n_rows: int) -> RowMap:
        """The map, after checks. That it points into ``[0, n_rows)`` is checked on the CPU only, where it costs no
        sync; on CUDA, an entry outside gives a row of nan, and nothing to the sums. Raises ValueError.
        """
        if index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(f"the map must be [N] int64; got {list(index.shape)} {index.dtype}")
        if index.device.type == "cpu" and len(index) > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= n_rows:
                raise ValueError(f"the map must point into [0, {n_rows}); it goes from {low} to {high}")
        return cls(index.contiguous(), n_rows)

    @cached_property
    def transpose(self) -> tuple[Tensor, Tensor]:
        """The entries in the order of their rows ``[N]``, and where each row's begin, ``[R + 1]``, both int64.

        Entries outside ``[0, R)`` lie before the first or behind the last.
        """
        ascending, order = self.index.sort(stable=True)
        return order, torch.searchsorted(ascending, torch.arange(self.n_rows + 1, device=order.device))


def row_sums(
    sources: Sequence[Tensor],  # one or two, each [N, D], of one dtype
    rows: RowMap,
    dtype: torch.dtype,
    backend: str = "auto",
) -> list[Tensor]:
    """For each source the sums ``[R, D]`` of its rows over ``rows``, in ``dtype``; 0 where a row has no entry.

    Both sources are summed in one launch. Raises ValueError for a backend that cannot run here.
    """
    backend = packing_backend(backend, sources[0])
    if backend == "torch":
        return [_sum_by_torch(source, rows, dtype) for source in sources]
    sources = [source if source.stride(-1) == 1 else source.contiguous() for source in sources]
    # of the sums that the kernels can write, the one that is rounded to dtype once
    written = dtype if backend == "triton" or dtype == sources[0].dtype else torch.float32
    sums = [source.new_empty((rows.n_rows, source.shape[1]), dtype=written) for source in sources]
    if sum(total.numel() for total in sums):
        if backend == "cuda":
            pairs = [*sources, None][:2], [*sums, None][:2]
            torch.ops.revisual_fast_cuda.segment_sums(*rows.transpose, *pairs[0], *pairs[1])
        else:
            from revisual_fast.kernels.packing_triton import segment_sums

            segment_sums(*rows.transpose, sources, sums)
    return [total.to(dtype) for total in sums]


def _sum_by_torch(source: Tensor, rows: RowMap, dtype: torch.dtype) -> Tensor:
    known = (rows.index >= 0) & (rows.index < rows.n_rows)
    index = torch.where(known, rows.index, rows.n_rows)  # all others to a row more, which is cut off
    wide = source.to(statistics_dtype(source.dtype))
    total = wide.new_zeros((rows.n_rows + 1, source.shape[1]))
    if total.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        total.index_put_((index,), wide, accumulate=True)
    else:
        total.index_add_(0, index, wide)
    return total[: rows.n_rows].to(dtype)


def rows_or_nan(
    x: Tensor,  # [R, ...]
    index: Tensor,  # [N] int64
) -> Tensor:
    """``x[index]`` by torch, ``[N, ...]``, and as in the kernels nan where there is no such row."""
    if len(x) == 0:
        return x.new_full((len(index), *x.shape[1:]), torch.nan)
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
