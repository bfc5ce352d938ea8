"""Keys and values of shared prompts: every segment of queries gets its prompt's in front of its own, gathered.

``T`` packed rows, ``L`` gathered ones. A prompt's rows are gathered once for itself and once for each of its
completions, so the gradient of a row is a sum, which :mod:`revisual_fast.kernels.row_sums` makes in fp32, without
atomics, rounded once. Key and value go together: one launch forward, one backward. An op by itself: the attention of
``revisual_fast.policy`` gathers by indexing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast.kernels.row_sums import host_bounds, packing_backend, row_sums, rows_or_nan, transposed
from revisual_fast.ranges import ranged, span

__all__ = ["KVRows", "gather_kv"]


@dataclass(frozen=True)
class KVRows:
    """Which row of ``[0, T)`` each of the ``L`` gathered rows is, and the transpose of this map, for the gradients.

    Made once a batch by :meth:`checked`, for all layers.
    """

    index: Tensor  # [L] int64
    n_rows: int  # T
    order: Tensor  # [L] int64: the gathered rows, sorted by where they come from
    indptr: Tensor  # [T + 1] int64: where in order those of each row begin

    @classmethod
    def checked(cls, index: Tensor, n_rows: int) -> KVRows:
        """The map ``index [L]`` int64 into ``n_rows`` rows, after checks.

        That it points into ``[0, n_rows)`` is checked on the CPU only, where it costs no sync, and not under
        ``torch.compile``; an entry outside gives a row of nan, and nothing to the sums. Raises ValueError.
        """
        if index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(f"the map must be [L] int64; got {list(index.shape)} {index.dtype}")
        if (bounds := host_bounds(index)) and (bounds[0] < 0 or bounds[1] >= n_rows):
            raise ValueError(f"the map must point into [0, {n_rows}); it goes from {bounds[0]} to {bounds[1]}")
        return cls(index.contiguous(), n_rows, *transposed(index, n_rows))


@ranged("revisual_fast.gather_kv")
def gather_kv(
    key: Tensor,  # [T, Hkv, d] bf16, fp16, fp32 or fp64
    value: Tensor,  # [T, Hkv, dv], same dtype
    rows: KVRows,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``key[map] [L, Hkv, d]`` and ``value[map] [L, Hkv, dv]``, differentiable in both.

    The kernels read rows wherever they lie, such as views of a fused projection; only where the heads of a row do not
    lie side by side is a copy made. ``auto`` is cuda, triton or torch on a CUDA device, the first that can run, and
    torch elsewhere. Raises ValueError for shapes, dtypes, devices or a backend that do not fit.
    """
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 3 or len(x) != rows.n_rows or not x.is_floating_point() or x.device != rows.index.device:
            raise ValueError(
                f"{name} must be [{rows.n_rows}, Hkv, d] of floating-point numbers on {rows.index.device}, as the map; "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
    if key.dtype != value.dtype:
        raise ValueError(f"key and value must have the same dtype; got {key.dtype} and {value.dtype}")
    return _GatherKV.apply(key, value, rows.index, rows.order, rows.indptr, packing_backend(backend, key))


class _GatherKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, index: Tensor, order: Tensor, indptr: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index, order, indptr)
        ctx.backend, ctx.shapes = backend, (key.shape, value.shape)
        ctx.set_materialize_grads(False)
        if backend == "torch":
            return rows_or_nan(key, index), rows_or_nan(value, index)
        outputs = tuple(x.new_empty((len(index), *x.shape[1:])) for x in (key, value))
        k, v, k_out, v_out = (_rows(x) for x in (key, value, *outputs))
        if backend == "cuda":
            torch.ops.revisual_fast_cuda.gather_pair(k, v, index, k_out, v_out)
        else:
            from revisual_fast.kernels import packing_triton

            packing_triton.gather_pair(k, v, index, k_out, v_out)
        return outputs[0], outputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        index, *transpose = ctx.saved_tensors
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[i] and upstream[i] is not None]
        gradients: list[Tensor | None] = [None, None]
        if wanted:
            with span("revisual_fast.gather_kv_backward"):
                sources = [_rows(upstream[i]) for i in wanted]
                of = (index, ctx.shapes[0][0], sources[0].dtype, ctx.backend, transpose)
                for i, total in zip(wanted, row_sums(sources, *of), strict=True):
                    gradients[i] = total.view(ctx.shapes[i])
        return gradients[0], gradients[1], None, None, None, None


def _rows(x: Tensor | None) -> Tensor:
    """``[T, Hkv, d]`` as ``[T, Hkv d]``, without a copy where the heads of a row lie side by side."""
    assert x is not None
    flat = x.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()
