"""Packed attention by torch's ``scaled_dot_product_attention``, on any device and in any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.packing import Segments, to_device

__all__ = ["SdpaPlan"]

WASTE = 0.25
"""Largest share of padding in a rectangle of the SDPA backend."""
BLOCK = 128
"""Queries that are taken at once: a mask does not keep torch from computing the keys that nobody sees."""


@dataclass(frozen=True)
class _Block:
    """Queries ``[begin, end)`` of a bucket's segments, which see at most its first ``keys`` keys."""

    begin: int
    end: int
    keys: int
    mask: Tensor | None  # [B, 1, end - begin, keys], 0 or -inf, added to the scores; None: plain causal


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar lengths, padded to a rectangle of ``B`` segments."""

    query_index: Tensor  # [B, Lq] int64, padding points at row 0
    key_index: Tensor  # [B, Lk], likewise
    blocks: tuple[_Block, ...]


class SdpaPlan:
    """Packed attention by torch's scaled_dot_product_attention over buckets of similar segments, block by block.

    All buckets' rows are gathered at once, so that the gradient of a row is summed over all of them in fp32.
    """

    def __init__(self, segments: Segments, device: torch.device, dtype: torch.dtype):
        members = _similar(segments)
        self.buckets = [_bucket(segments, chosen, dtype, device) for chosen in members]
        self.n_queries, self.n_keys = (
            [getattr(b, f).numel() for b in self.buckets] for f in ("query_index", "key_index")
        )
        self.queries = to_device(torch.cat([b.query_index.flatten() for b in self.buckets]), device)
        keys = to_device(torch.cat([b.key_index.flatten() for b in self.buckets]), device)
        self.keys = KVRows.checked(keys, sum(segments.length))
        self.repeats = device.type == "cuda"  # there, a mask with grouped heads would fall to the unfused kernel
        order, offset = [torch.empty(0, dtype=torch.long)] * len(segments.start), 0
        for chosen in members:  # where each segment's rows lie in the buckets' rows
            width = max(segments.length[i] for i in chosen)
            for place, i in enumerate(chosen):
                first = offset + place * width
                order[i] = torch.arange(first, first + segments.length[i])
            offset += len(chosen) * width
        self.order = to_device(torch.cat(order), device)  # [T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        k, v = gather_kv(k, v, self.keys)
        if self.repeats and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        queries = q.index_select(0, self.queries).split(self.n_queries)
        rows = zip(self.buckets, queries, k.split(self.n_keys), v.split(self.n_keys), strict=True)
        return torch.cat([_attend(*of, scaling) for of in rows]).index_select(0, self.order)[None]


def _attend(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Attention within a bucket: q [B * Lq, H, d], k and v [B * Lk, Hkv, d] -> [B * Lq, H, d]."""
    size = len(bucket.query_index)
    queries, keys, values = (x.unflatten(0, (size, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    grouped, parts = keys.shape[1] != queries.shape[1], []
    for b in bucket.blocks:
        seen = (queries[:, :, b.begin : b.end], keys[:, :, : b.keys], values[:, :, : b.keys])
        out = F.scaled_dot_product_attention(*seen, b.mask, is_causal=b.mask is None, scale=scaling, enable_gqa=grouped)
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, 1).flatten(0, 1)


def _similar(segments: Segments) -> list[list[int]]:
    """Split the segments into buckets whose padded rectangles waste at most ``WASTE`` of their area."""

    def shape(i: int) -> tuple[int, int]:
        return segments.length[i], segments.length[i] + segments.prefix_length[i]

    buckets: list[list[int]] = []
    used = width_q = width_k = 0
    for i in sorted(range(len(segments.start)), key=shape, reverse=True):
        q, k = shape(i)
        wide_q, wide_k = max(width_q, q), max(width_k, k)
        if buckets and used + q * k >= (1 - WASTE) * (len(buckets[-1]) + 1) * wide_q * wide_k:
            buckets[-1].append(i)
            used, width_q, width_k = used + q * k, wide_q, wide_k
        else:
            buckets.append([i])
            used, width_q, width_k = q * k, q, k
    return buckets


def _bucket(segments: Segments, members: list[int], dtype: torch.dtype, device: torch.device) -> _Bucket:
    chosen = (torch.tensor([field[i] for i in members])[:, None] for field in segments.fields)
    start, length, prefix_start, prefix = chosen
    n_queries, n_keys = int(length.max()), int((prefix + length).max())
    q, k = torch.arange(n_queries)[None], torch.arange(n_keys)[None]  # [1, Lq], [1, Lk]
    query_index = torch.where(q < length, start + q, 0)
    key_index = torch.where(k < prefix, prefix_start + k, start + k - prefix)
    key_index = torch.where(k < prefix + length, key_index, 0)
    if (prefix == 0).all() and (length == n_queries).all():
        return _Bucket(query_index, key_index, (_Block(0, n_queries, n_keys, None),))
    sees = k[:, None, :] <= (q + prefix)[:, :, None]  # [B, Lq, Lk]: bottom-right causal
    sees = sees & (k < prefix + length)[:, None, :] | ~(q < length)[:, :, None]
    # in the dtype of the scores: torch would make such a mask of a bool one in every layer, and keep each for backward;
    # on CUDA it would as well copy one whose rows do not begin at multiples of 8
    mask = torch.zeros(len(members), 1, n_queries, -(-n_keys // 8) * 8, dtype=dtype)
    mask[..., :n_keys].masked_fill_(~sees[:, None], -torch.inf)
    mask = to_device(mask, device)
    blocks = []
    for begin in range(0, n_queries, BLOCK):
        end = min(begin + BLOCK, n_queries)
        width = int((prefix + length.clamp(max=end)).max())
        blocks.append(_Block(begin, end, width, mask[:, :, begin:end, :width]))
    return _Bucket(query_index, key_index, tuple(blocks))
