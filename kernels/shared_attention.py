"""Attention over packed rows in which segments share prefixes: a prompt's keys and values are read where they lie.

``T`` packed rows, ``H`` query heads of ``d`` elements, ``Hkv`` key heads, each for ``H / Hkv`` query heads. Nothing is
gathered: the kernels go over a segment's prefix and then over its own rows. The gradient of a prefix is summed over all
segments that read it in fp32, in one order, and rounded once; a result repeats to the bit.

The kernel of dK and dV has a program for each tile of keys, key head and part of the query heads that read it. One
program for all heads would need no more memory, but with two key heads there are too few to fill a GPU, and a prompt's
tiles, which all completions read, would keep a few busy while the others are done. So the query heads are split as far
as the batch needs it (:meth:`AttentionTiles.splits`); each part writes fp32 and a sum over the parts follows. Long
batches need no parts, and so no memory for them.

Rows of different segments may share a tile. What a row does not see has the weight 0 in its sums: it changes no bit of
them as long as it is finite, but a nan or an infinity reaches the rows of the same tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast.kernels.dispatch import pick_backend
from revisual_fast.kernels.shared_attention_tiles import AttentionTiles
from revisual_fast.ranges import ranged, span

__all__ = ["AttentionTiles", "shared_attention"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_HEAD = 256
"""Elements of a head that the kernels can hold."""


@ranged("revisual_fast.shared_attention")
def shared_attention(
    query: Tensor,  # [T, H, d] bf16, fp16 or fp32
    key: Tensor,  # [T, Hkv, d], same dtype; Hkv divides H
    value: Tensor,  # [T, Hkv, d], same dtype
    tiles: AttentionTiles,
    *,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention ``[T, H, d]`` of every row over its prefix and its own segment up to itself; differentiable.

    Scores are multiplied by ``scale``, which is positive. Rows and heads may lie anywhere, as in views of a projection;
    only where the elements of a head do not lie side by side is a copy made. Scores, softmax and sums are fp32;
    products of bf16 and fp16 tensors have the probabilities rounded to their dtype. ``auto`` is triton on a CUDA device
    for these dtypes and heads of up to 256 elements, and torch elsewhere: plain torch, a segment at a time, in fp32
    (fp64 for fp64), not made to be fast. Raises ValueError for what does not fit.
    """
    _check(query, key, value, tiles, scale)
    problem = _kernel_problem(query)
    if backend == "auto" and problem is not None:
        backend = "torch"
    if pick_backend(backend, query.device) == "torch":
        return _in_torch(query, key, value, tiles, scale)
    if problem is not None:
        raise ValueError(f"{problem}; use backend='torch'")
    return _SharedAttention.apply(query, key, value, tiles, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, tiles: AttentionTiles, scale: float) -> None:
    n, device = tiles.n_rows, tiles.own_start.device
    heads, kv_heads, d = query.shape[1:2], key.shape[1:2], query.shape[2:]
    for name, x, shape in (
        ("query", query, (n, *heads, *d)),
        ("key", key, (n, *kv_heads, *d)),
        ("value", value, key.shape),
    ):
        if x.ndim != 3 or x.shape != shape or not x.is_floating_point() or x.device != device or x.dtype != query.dtype:
            wanted = f"[{n}, {'H' if x is query else 'Hkv'}, d], d the same for all"
            raise ValueError(
                f"{name} must be {wanted}, floating-point numbers of one dtype on {device}, as the tiles; "
                f"got {list(x.shape)} {x.dtype} on {x.device}, query {list(query.shape)} {query.dtype}"
            )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0 or query.shape[2] == 0:
        raise ValueError(f"{key.shape[1]} key heads do not divide {query.shape[1]} query heads of {query.shape[2]}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive; got {scale}")


def _kernel_problem(query: Tensor) -> str | None:
    if query.dtype not in KERNEL_DTYPES:
        return f"the kernels of shared attention compute with bf16, fp16 or fp32, not with {query.dtype}"
    if query.shape[2] > WIDEST_HEAD:
        return f"the kernels of shared attention take heads of up to {WIDEST_HEAD} elements, not {query.shape[2]}"
    return None


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: AttentionTiles, scale: float) -> Tensor:
        from revisual_fast.kernels import shared_attention_launch

        query, key, value = (_side_by_side(x) for x in (query, key, value))
        out = query.new_empty(query.shape)
        lse = query.new_empty((query.shape[1], len(query)), dtype=torch.float32)
        if query.numel():
            shared_attention_launch.forward(query, key, value, tiles, scale, out, lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from revisual_fast.kernels import shared_attention_launch

        query, key, value, out, lse = ctx.saved_tensors
        tiles, scale = ctx.tiles, ctx.scale
        d_query, delta = torch.empty_like(out), torch.empty_like(lse)
        splits = tiles.splits(query.shape[1] // key.shape[1], key.shape[1])
        dtype = key.dtype if splits == 1 else torch.float32
        d_key, d_value = (key.new_empty((splits, *key.shape), dtype=dtype) for _ in range(2))
        with span("revisual_fast.shared_attention_backward"):
            if query.numel():
                d_out = _side_by_side(d_out)
                of = (query, key, value, tiles, scale)
                shared_attention_launch.query_gradient(*of, out, lse, d_out, d_query, delta)
                shared_attention_launch.key_gradients(*of, lse, d_out, delta, d_key, d_value)
            if splits == 1:
                return d_query, d_key[0], d_value[0], None, None
            return d_query, d_key.sum(0).to(key.dtype), d_value.sum(0).to(key.dtype), None, None


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _in_torch(query: Tensor, key: Tensor, value: Tensor, tiles: AttentionTiles, scale: float) -> Tensor:
    """The reference: a segment at a time, in fp32 or fp64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    share = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype) for x in (query, key, value))
    parts = [q[:0]]
    for first, end, prefix_start, prefix_end in tiles.segments:
        keys, values = (
            torch.cat([x[prefix_start:prefix_end], x[first:end]]).repeat_interleave(share, 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[first:end], keys) * scale
        unseen = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(prefix_end - prefix_start + 1)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -math.inf).softmax(-1), values))
    return torch.cat(parts).to(query.dtype)
