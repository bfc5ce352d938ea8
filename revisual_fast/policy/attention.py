"""Attention over packed rows, registered with transformers under the name ``revisual_packed``.

A model whose text tower uses this name calls :func:`packed_attention` in every layer; the keyword ``packed`` carries
the plan that does the work. One plan is made for each packed row (:func:`make_plan`), for all layers, by one of four
backends, which :func:`pick_attention` chooses once for a policy:

- ``flash``: flash-attn's varlen kernel, if it is installed; ``varlen``: torch's own (``torch.nn.attention.varlen``).
  CUDA, half precision. Keys and values of a shared prompt are gathered in front of each completion's.
- ``triton``: kernels of this project, which read a shared prompt's keys and values where they lie, once for a group.
- ``sdpa``: torch's ``scaled_dot_product_attention`` over rectangles of similar segments. Any device, any dtype.

:class:`KeepingPlan` is for a prefill, and ``DecodePlan`` in ``rollout/hf.py`` for one new token per sequence.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from revisual_fast.kernels.dispatch import triton_problem
from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.kernels.shared_attention import AttentionTiles, shared_attention
from revisual_fast.packing import Segments

__all__ = [
    *("BACKENDS", "NAME", "AttentionPlan", "KeepingPlan", "SdpaPlan", "SharedPrefixPlan", "VarlenPlan"),
    *("attention_problem", "available_backends", "make_plan", "packed_attention", "pick_attention", "repeats_heads"),
]

NAME = "revisual_packed"
BACKENDS = ("flash", "varlen", "triton", "sdpa")
AUTO = ("flash", "varlen", "sdpa")
"""What ``auto`` tries, in this order; ``triton`` is not among them until it has been measured."""
HALF = (torch.bfloat16, torch.float16)
WASTE = 0.25
"""Largest share of padding in a rectangle of the SDPA backend."""
BLOCK = 128
"""Queries that the SDPA backend takes at once: a mask does not keep torch from computing the keys that nobody sees."""


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


def attention_problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot attend on ``device`` in ``dtype``, or None."""
    if backend == "sdpa":
        return None
    if backend == "triton":
        return triton_problem(device)
    if backend == "flash" and (problem := _flash_problem()) is not None:
        return problem
    if device.type != "cuda":
        return f"made for CUDA, the model is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "made for GPUs from Ampere on (compute capability 8.0)"
    return None if dtype in HALF else f"made for bfloat16 and float16, the model is in {dtype}".replace("torch.", "")


def _flash_problem() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed: pip install flash-attn"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"installed, but its varlen kernel cannot be imported ({error})"
    return None


def available_backends() -> dict[str, str]:
    """Backend -> "yes", or the reason why it is not available here, in bfloat16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: attention_problem(name, device, torch.bfloat16) or "yes" for name in BACKENDS}


def pick_attention(setting: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend for ``model.attention: setting``, and why. Raises ValueError where it is unknown or cannot run."""
    if setting not in ("auto", *BACKENDS):
        raise ValueError(f"model.attention: {setting!r} is unknown; it is one of auto, {', '.join(BACKENDS)}")
    if setting != "auto":
        problem = attention_problem(setting, device, dtype)
        if problem is not None:
            raise ValueError(f"model.attention: {setting} is {problem}; set it to auto or sdpa")
        return setting, "as model.attention says"
    problems = {name: attention_problem(name, device, dtype) for name in AUTO}
    chosen = next(name for name in AUTO if problems[name] is None)
    passed = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    return chosen, "; ".join(passed) or "the first choice"


def repeats_heads(backend: str, device: torch.device) -> bool:
    """Whether keys and values are repeated for the query heads that share them: sdpa on CUDA, where a mask with grouped
    heads would fall to the unfused kernel, and torch 2.11's varlen, which does not know of groups."""
    if backend == "varlen":
        return "enable_gqa" not in inspect.signature(varlen_attn).parameters
    return backend == "sdpa" and device.type == "cuda"


def make_plan(backend: str, segments: Segments, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """How one packed row attends, for all its layers, with queries, keys and values of ``dtype``."""
    if backend == "sdpa":
        return SdpaPlan(segments, device, dtype)
    return SharedPrefixPlan(segments, device) if backend == "triton" else VarlenPlan(segments, device, backend)


class KeepingPlan:
    """Attends as ``plan`` does and keeps every layer's keys and values, each [T, Hkv, d]."""

    def __init__(self, plan: AttentionPlan):
        self.plan = plan
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.kept[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        return self.plan.attend(layer, query, key, value, scaling)


class VarlenPlan:
    """One varlen call over all segments, bottom-right causal, keys and values gathered where a prefix is shared.

    Query heads that share a key head are the kernel's business; torch 2.11's cannot, and gets the heads repeated.
    """

    def __init__(self, segments: Segments, device: torch.device, backend: str):
        n_rows = sum(segments.length)
        self.cu_q, self.cu_k = (x.to(device, non_blocking=True) for x in (segments.cu_q, segments.cu_k))
        self.max_q, self.max_k = max(segments.length), max(segments.keys)
        shared = any(segments.prefix_length)
        self.rows = KVRows.checked(segments.key_rows.to(device, non_blocking=True), n_rows) if shared else None
        self.flash = backend == "flash"
        self.exact = torch.are_deterministic_algorithms_enabled()
        self.repeats = repeats_heads(backend, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
        if self.rows is not None:
            k, v = gather_kv(k, v, self.rows)
        return (self._flash if self.flash else self._torch)(q, k, v, scaling)[None]

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        bounds = (self.cu_q, self.cu_k, self.max_q, self.max_k)
        return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, causal=True, deterministic=self.exact)

    def _torch(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        grouped: dict[str, Any] = {}
        if q.shape[1] != k.shape[1]:
            if self.repeats:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            else:
                grouped = {"enable_gqa": True}
        bounds = (self.cu_q, self.cu_k, self.max_q, self.max_k)
        out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(-1, 0), **grouped)
        assert isinstance(out, Tensor)
        return out


class SharedPrefixPlan:
    """Attention by the kernels of :mod:`revisual_fast.kernels.shared_attention`: nothing is gathered."""

    def __init__(self, segments: Segments, device: torch.device):
        fields = (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
        self.tiles = AttentionTiles.of(*fields, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_attention(q, k, v, self.tiles, scale=scaling, backend="triton")[None]


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
        self.queries = torch.cat([b.query_index.flatten() for b in self.buckets]).to(device)
        keys = torch.cat([b.key_index.flatten() for b in self.buckets]).to(device)
        self.keys = KVRows.checked(keys, sum(segments.length))
        self.repeats = repeats_heads("sdpa", device)
        order, offset = [torch.empty(0, dtype=torch.long)] * len(segments.start), 0
        for chosen in members:  # where each segment's rows lie in the buckets' rows
            width = max(segments.length[i] for i in chosen)
            for place, i in enumerate(chosen):
                first = offset + place * width
                order[i] = torch.arange(first, first + segments.length[i])
            offset += len(chosen) * width
        self.order = torch.cat(order).to(device)  # [T]

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
    fields = (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
    start, length, prefix_start, prefix = (torch.tensor([field[i] for i in members])[:, None] for field in fields)
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
    mask = mask.to(device)
    blocks = []
    for begin in range(0, n_queries, BLOCK):
        end = min(begin + BLOCK, n_queries)
        width = int((prefix + length.clamp(max=end)).max())
        blocks.append(_Block(begin, end, width, mask[:, :, begin:end, :width]))
    return _Bucket(query_index, key_index, tuple(blocks))
