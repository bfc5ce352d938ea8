"""Attention over packed rows, registered with transformers under the name ``revisual_packed``.

A model whose text tower uses this name calls :func:`packed_attention` in every layer; the keyword ``packed`` carries
the plan that does the work. One plan is made for each packed row (:func:`make_plan`), for all layers, by one of four
backends, which :func:`pick_attention` chooses once for a policy:

- ``flash``: flash-attn's varlen kernel, if it is installed; ``varlen``: torch's own (``torch.nn.attention.varlen``).
  CUDA, half precision. Keys and values of a shared prompt are gathered in front of each completion's.
- ``triton``: kernels of this project, which read a shared prompt's keys and values where they lie.
- ``sdpa``: torch's ``scaled_dot_product_attention`` over rectangles of similar segments. Any device, any dtype.

:class:`KeepingPlan` is for a prefill, and ``DecodePlan`` in ``rollout/decode.py`` for one new token per sequence.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from revisual_fast.kernels.dispatch import triton_problem
from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.kernels.shared_attention import AttentionTiles, shared_attention
from revisual_fast.packing import Segments, to_device
from revisual_fast.policy.sdpa import SdpaPlan

__all__ = [
    *("BACKENDS", "NAME", "AttentionPlan", "KeepingPlan", "SharedPrefixPlan", "VarlenPlan"),
    *("attention_problem", "available_backends", "make_plan", "packed_attention", "pick_attention", "repeats_heads"),
]

NAME = "revisual_packed"
BACKENDS = ("flash", "varlen", "triton", "sdpa")
AUTO = ("flash", "varlen", "sdpa")
"""What ``auto`` tries, in this order; ``triton`` is not among them until it has been measured."""
HALF = (torch.bfloat16, torch.float16)


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
    query, key, value = as_autocast(query, key, value)
    return packed.attend(layer, query, key, value, scaling), None


AttentionInterface.register(NAME, packed_attention)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a type of device, or None where it is off or not to be had."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in autocast's dtype where it is on: a rotation in fp32 has widened queries and keys, not values."""
    dtype = autocast_dtype(tensors[0].device.type)
    return tensors if dtype is None else tuple(x.to(dtype) for x in tensors)


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
        self.cu_q, self.cu_k = (to_device(x, device) for x in (segments.cu_q, segments.cu_k))
        self.max_q, self.max_k = max(segments.length), max(segments.keys)
        shared = any(segments.prefix_length)
        self.rows = KVRows.checked(to_device(segments.key_rows, device), n_rows) if shared else None
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
        self.tiles = AttentionTiles.of(*segments.fields, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_attention(q, k, v, self.tiles, scale=scaling, backend="triton")[None]
