"""Attention over packed rows, registered with transformers under the name ``revisual_packed``.

A model whose text tower uses this name calls :func:`packed_attention` in every layer; the keyword ``packed`` carries
the plan that does the work. There are three plans, all for the same packed layout: :class:`SdpaPlan` (training and
scoring), :class:`PrefillPlan` (the same, and it keeps keys and values) and ``DecodePlan`` in ``rollout/hf.py`` (one new
token per sequence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from revisual_fast.packing import Segments

__all__ = ["NAME", "AttentionPlan", "PrefillPlan", "SdpaPlan", "available_backends", "packed_attention"]

NAME = "revisual_packed"
WASTE = 0.25
"""Largest share of padding in a bucket of the SDPA backend."""


class AttentionPlan(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d]."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, Hkv, T, d]
    value: Tensor,  # [1, Hkv, T, d]
    attention_mask: Tensor | None,
    *,
    packed: AttentionPlan | None = None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls; see ``transformers.AttentionInterface``."""
    if packed is None:
        raise ValueError(f"attention {NAME!r} needs packed=<plan>; to use this model elsewhere, reload it from disk")
    layer: Any = module.layer_idx
    return packed.attend(layer, query, key, value, scaling), None


AttentionInterface.register(NAME, packed_attention)


def available_backends() -> dict[str, str]:
    """Backend -> "yes", or the reason why it is not available."""
    return {"sdpa": "yes"}


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar lengths, padded to a rectangle. Built once per batch, used in every layer."""

    query_index: Tensor  # [B, Lq] int64, padding points at row 0
    key_index: Tensor  # [B, Lk]
    mask: Tensor | None  # [B, 1, Lq, Lk] bool, True = attend; None: plain causal without padding
    valid: Tensor  # [B, Lq] bool


class SdpaPlan:
    """Packed attention by torch's scaled_dot_product_attention over buckets of similar segments; on any device."""

    def __init__(self, segments: Segments, device: torch.device):
        self.buckets = [_bucket(segments, members, device) for members in _similar(segments)]
        order = torch.cat([b.query_index[b.valid] for b in self.buckets])
        self.back = torch.empty_like(order)
        self.back[order] = torch.arange(len(order), device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        parts = []
        for b in self.buckets:
            queries, keys, values = (
                x[index].transpose(1, 2)  # [B, heads, L, d]
                for x, index in ((q, b.query_index), (k, b.key_index), (v, b.key_index))
            )
            grouped = keys.shape[1] != queries.shape[1]
            if grouped and queries.is_cuda:  # there, a mask with grouped heads would fall to the unfused kernel
                share = queries.shape[1] // keys.shape[1]
                keys, values, grouped = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1), False
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=b.mask, is_causal=b.mask is None, scale=scaling, enable_gqa=grouped
            )
            parts.append(out.transpose(1, 2)[b.valid])  # [rows, H, d]
        return torch.cat(parts)[self.back][None]


class PrefillPlan(SdpaPlan):
    """As :class:`SdpaPlan`, and keeps keys and values: ``kept[layer] = (key, value)``, each [T, Hkv, d]."""

    def __init__(self, segments: Segments, device: torch.device):
        super().__init__(segments, device)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.kept[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        return super().attend(layer, query, key, value, scaling)


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


def _bucket(segments: Segments, members: list[int], device: torch.device) -> _Bucket:
    start, length, prefix_start, prefix = (
        torch.tensor([field[i] for i in members], device=device)[:, None]
        for field in (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
    )
    q = torch.arange(int(length.max()), device=device)[None]  # [1, Lq]
    k = torch.arange(int((prefix + length).max()), device=device)[None]  # [1, Lk]
    valid = q < length
    query_index = torch.where(valid, start + q, 0)
    key_index = torch.where(k < prefix, prefix_start + k, start + k - prefix)
    key_index = torch.where(k < prefix + length, key_index, 0)
    mask = k[:, None, :] <= (q + prefix)[:, :, None]  # [B, Lq, Lk]: bottom-right causal
    mask = mask & (k < prefix + length)[:, None, :] | ~valid[:, :, None]
    plain = bool((prefix == 0).all() and valid.all())
    return _Bucket(query_index, key_index, None if plain else mask[:, None], valid)
