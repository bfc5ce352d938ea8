"""Input embeddings of packed rows: the rows of the embedding table, image features in the places of image tokens.

``T`` packed rows, ``V`` ids, ``M`` image features, width ``D``. One kernel reads each row from where it lies and writes
it once. The gradients are sums over the rows that took the same id, or the same feature (an image may stand in several
prompts), as :mod:`revisual_fast.kernels.row_sums` makes them: fp32, no atomics, rounded once. The table's gradient is
dense, as optimizers want it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast.kernels.row_sums import packing_backend, row_sums, rows_or_nan
from revisual_fast.ranges import ranged, span

__all__ = ["pack_embeddings"]


@ranged("revisual_fast.pack_embeddings")
def pack_embeddings(
    ids: Tensor,  # [T] int64
    table: Tensor,  # [V, D] bf16, fp16, fp32 or fp64
    features: Tensor | None,  # [M, D] floating point
    feature_index: Tensor,  # [T] int64: the feature that a row takes, -1 = the table's row of its id
    backend: str = "auto",
    padding_idx: int | None = None,
) -> Tensor:
    """``[T, D]`` in the dtype of ``table``, differentiable in ``table`` and in ``features``.

    Features of another dtype are rounded to the table's, and their gradient comes in their own. A row that takes a
    feature gives nothing to the table, nor does one whose id is ``padding_idx`` (as in ``nn.Embedding``). ``auto`` is
    cuda, triton or torch on a CUDA device, the first that can run, and torch elsewhere. Numbers outside the table or
    the features are refused on the CPU; on CUDA, where a check would wait for the device, and under ``torch.compile``
    they give a row of nan. Raises ValueError for what does not fit.
    """
    _check(ids, table, features, feature_index)
    return _PackEmbeddings.apply(ids, table, features, feature_index, packing_backend(backend, table), padding_idx)


def _check(ids: Tensor, table: Tensor, features: Tensor | None, feature_index: Tensor) -> None:
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(f"table must be [V, D] of floating-point numbers; got {list(table.shape)} {table.dtype}")
    for name, x in (("ids", ids), ("feature_index", feature_index)):
        if x.shape != ids.shape or x.ndim != 1 or x.dtype != torch.int64 or x.device != table.device:
            raise ValueError(
                f"{name} must be [T] int64 on {table.device}, as the table; got {list(x.shape)} {x.dtype} on {x.device}"
            )
    n_features = 0
    if features is not None:
        fits = features.ndim == 2 and features.shape[1] == table.shape[1] and features.device == table.device
        if not fits or not features.is_floating_point():
            raise ValueError(
                f"features must be [M, {table.shape[1]}] of floating-point numbers on {table.device}; "
                f"got {list(features.shape)} {features.dtype} on {features.device}"
            )
        n_features = len(features)
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    by_id = feature_index == -1
    for name, x, first, limit in (("ids", ids[by_id], 0, len(table)), ("feature_index", feature_index, -1, n_features)):
        if len(x) > 0 and (int(x.min()) < first or int(x.max()) >= limit):
            raise ValueError(f"{name} must lie in [{first}, {limit}); they go from {int(x.min())} to {int(x.max())}")


class _PackEmbeddings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        features: Tensor | None,
        feature_index: Tensor,
        backend: str,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, feature_index)
        ctx.backend, ctx.vocab, ctx.padding_idx = backend, len(table), padding_idx
        ctx.features = (0, table.dtype) if features is None else (len(features), features.dtype)
        ids, feature_index = ids.contiguous(), feature_index.contiguous()
        features = None if features is None else features.to(table.dtype)
        if backend == "torch":
            by_id = (feature_index == -1)[:, None]
            taken = torch.nan if features is None else rows_or_nan(features, feature_index)
            return torch.where(by_id, rows_or_nan(table, ids), taken)
        table = table if table.stride(1) == 1 else table.contiguous()
        features = features if features is None or features.stride(1) == 1 else features.contiguous()
        out = table.new_empty((len(ids), table.shape[1]))
        if backend == "cuda":
            torch.ops.revisual_fast_cuda.pack_embeddings(ids, table, features, feature_index, out)
        else:
            from revisual_fast.kernels import packing_triton

            packing_triton.pack_embeddings(ids, table, features, feature_index, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None, None]:
        ids, feature_index = ctx.saved_tensors
        n_features, features_dtype = ctx.features
        d_table = d_features = None
        with span("revisual_fast.pack_embeddings_backward"):
            if ctx.needs_input_grad[1]:
                by_id = feature_index == -1
                if ctx.padding_idx is not None:
                    by_id &= ids != ctx.padding_idx
                (d_table,) = row_sums([d_out], torch.where(by_id, ids, -1), ctx.vocab, d_out.dtype, ctx.backend)
            if ctx.needs_input_grad[2]:
                (d_features,) = row_sums([d_out], feature_index, n_features, features_dtype, ctx.backend)
        return None, d_table, d_features, None, None, None
