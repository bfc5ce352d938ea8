"""Attention backends over packed rows: which one runs, and that each attends as the segments say."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revisual_fast.packing import Segments
from revisual_fast.policy import attention
from revisual_fast.policy.attention import make_plan, pick_attention
from revisual_fast.policy.sdpa import SdpaPlan
from tests.devices import needs_triton
from tests.groups import blank_groups
from tests.numerics import relative_error
from tests.unit.test_packing import pack, visible

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
HEADS, KV_HEADS, DIM = 4, 2, 16


def segments_of(shapes: list[tuple[int, list[int]]], layout: str = "shared") -> Segments:
    return pack(blank_groups(shapes), layout).segments


def inputs(n_rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """query [1, H, T, d], key and value [1, Hkv, T, d] as transformers gives them: views of [1, T, heads, d]."""
    g = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = [torch.randn(1, n_rows, n, DIM, generator=g).to(dtype).requires_grad_() for n in heads]
    return [x.transpose(1, 2) for x in made]


def expected(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Row by row, [1, T, H, d]."""
    share, rows = HEADS // KV_HEADS, []
    for row, seen in sorted(visible(segments).items()):
        keys, values = (x[0][:, seen].repeat_interleave(share, 0) for x in (k, v))  # [H, n, d]
        scores = torch.einsum("hd,hnd->hn", q[0, :, row], keys) * scaling
        rows.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), values))
    return torch.stack(rows)[None]


def errors(backend: str, segments: Segments, dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients of query, key and value, against float64."""
    x = inputs(sum(segments.length), dtype)
    leaves = [t.detach().double().requires_grad_() for t in x]
    reference = expected(*leaves, segments, 0.3)
    out = make_plan(backend, segments, CPU, dtype).attend(0, *x, 0.3)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert out.shape == reference.shape
    got = torch.autograd.grad(out, x, upstream)
    wanted = torch.autograd.grad(reference, leaves, upstream.double())
    pairs = zip((out, *got), (reference, *wanted), strict=True)
    return [relative_error(a, b) if b.any() else float(a.abs().max()) for a, b in pairs]


SHAPES = [
    [(6, [3, 5, 2]), (4, [2, 9])],
    [(30, [1, 1, 12, 2, 12, 11])],
    [(5, []), (3, [4]), (1, [1, 1]), (2, [7, 7])],
    [(3, [2]), (9, [4]), (2, [12]), (7, [1])],
]
LONG = [(20, [300, 280, 290]), (150, [140, 3])]  # several blocks of queries


@pytest.fixture
def varlen_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the CUDA kernels that attend by their arguments; which were called."""
    called: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float):
        n_q, n_k = cu_q.diff(), cu_k.diff()
        assert (max_q, max_k) == (n_q.max(), n_k.max())
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (len(q), len(k), len(v)) == (cu_q[-1], cu_k[-1], cu_k[-1])
        share, parts = q.shape[1] // k.shape[1], []
        for a, b, c in zip(q.split(n_q.tolist()), k.split(n_k.tolist()), v.split(n_k.tolist()), strict=True):
            b, c = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (b, c))
            mask = torch.ones(len(a), b.shape[1], dtype=torch.bool).tril(b.shape[1] - len(a))  # from the bottom right
            scores = (a.transpose(0, 1) @ b.mT * scale).masked_fill(~mask, -torch.inf)
            parts.append((scores.softmax(-1) @ c).transpose(0, 1))
        return torch.cat(parts)

    signature = inspect.signature(attention.varlen_attn)

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        called.append("varlen")
        given = signature.bind(*args, **kwargs).arguments
        assert given["window_size"] == (-1, 0), "causal"
        assert given.get("enable_gqa") or given["query"].shape[1] == given["key"].shape[1]
        names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale")
        return attend(*(given[name] for name in names))

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, deterministic):
        called.append("flash")
        assert causal
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return attend(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale)

    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    return called


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("layout", ["shared", "varlen", "padded"])
@pytest.mark.parametrize("backend", ["flash", "varlen", pytest.param("triton", marks=needs_triton), "sdpa"])
def test_every_backend_attends_as_the_segments_say(backend, layout, shapes, varlen_kernels):
    assert max(errors(backend, segments_of(shapes, layout), torch.float32)) < 1e-5
    assert set(varlen_kernels) == {backend} & {"flash", "varlen"}


@pytest.mark.parametrize("layout", ["shared", "varlen", "padded"])
def test_sdpa_takes_long_segments_block_by_block(layout):
    segments = segments_of(LONG, layout)
    plan = SdpaPlan(segments, CPU, torch.float32)
    assert max(len(b.blocks) for b in plan.buckets) == 3
    computed = sum(len(b.query_index) * (x.end - x.begin) * x.keys for b in plan.buckets for x in b.blocks)
    area = sum(b.query_index.numel() * b.key_index.shape[1] for b in plan.buckets)
    assert computed < 0.85 * area or layout != "shared", "keys that nobody in a block sees are left out"
    assert max(errors("sdpa", segments, torch.float32)) < 1e-5


def test_heads_are_repeated_where_torch_cannot_group_them(monkeypatch, varlen_kernels):
    ours: Any = attention.varlen_attn
    kept = [p for name, p in ours.__signature__.parameters.items() if name != "enable_gqa"]
    monkeypatch.setattr(ours, "__signature__", ours.__signature__.replace(parameters=kept))
    assert max(errors("varlen", segments_of(SHAPES[0]), torch.float32)) < 1e-5


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), max_size=5)), min_size=1, max_size=4))
def test_sdpa_attends_as_the_segments_say_for_any_shapes(shapes):
    assert max(errors("sdpa", segments_of(shapes), torch.float32)) < 1e-5


def test_the_gradient_of_a_shared_prefix_is_summed_in_fp32():
    """In bf16 256 + 1 is 256: a sum in bf16 over 64 completions would lose most of them."""
    lengths = [2] * 64 + [5] * 16 + [17] * 4  # in several buckets
    segments = segments_of([(1, lengths)])
    n_rows = sum(segments.length)
    q, k, v = (torch.zeros_like(x, requires_grad=True) for x in inputs(n_rows, torch.bfloat16))
    plan = SdpaPlan(segments, CPU, torch.bfloat16)
    assert len(plan.buckets) > 2
    out = plan.attend(0, q, k, v, 1.0)
    upstream = torch.zeros_like(out)
    upstream[:, 0] = 512  # of the prompt's own row
    upstream[:, segments.start[1:]] = 2  # of each completion's first row, which looks half at the prompt
    (grad,) = torch.autograd.grad(out, [v], upstream)
    shared = HEADS // KV_HEADS * (512 + len(lengths))
    assert grad[0, :, 0].unique().item() == torch.tensor(float(shared)).bfloat16()


def test_buckets_of_the_sdpa_backend_waste_little():
    segments = segments_of([(5, [2, 3, 60, 61, 62, 7]), (40, [1, 2, 3])])
    plan = SdpaPlan(segments, CPU, torch.float32)
    area = sum(b.query_index.numel() * b.key_index.shape[1] for b in plan.buckets)
    used = sum(n * k for n, k in zip(segments.length, segments.keys, strict=True))
    assert used / area >= 0.75


def test_auto_takes_the_first_that_can_run(monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    assert pick_attention("auto", CPU, bf16)[0] == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    chosen, why = pick_attention("auto", CUDA, bf16)
    assert (chosen, why) == ("varlen", "flash: not installed: pip install flash-attn")
    assert pick_attention("auto", CUDA, fp32)[0] == "sdpa"
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    chosen, why = pick_attention("auto", CUDA, bf16)
    assert chosen == "varlen"
    assert "its varlen kernel cannot be imported" in why
    sys.modules["flash_attn"].flash_attn_varlen_func = print  # type: ignore[attr-defined]
    assert pick_attention("auto", CUDA, bf16) == ("flash", "the first choice")
    chosen, why = pick_attention("auto", CUDA, fp32)
    assert chosen == "sdpa"
    assert "flash: made for bfloat16 and float16, the model is in float32" in why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_attention("auto", CUDA, torch.float16)[0] == "sdpa"


def test_a_backend_that_cannot_run_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="varlen is made for CUDA, the model is on cpu; set it to auto or sdpa"):
        pick_attention("varlen", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="'fast' is unknown; it is one of auto, flash, varlen, triton, sdpa"):
        pick_attention("fast", CPU, torch.bfloat16)


def test_a_model_with_packed_attention_refuses_an_ordinary_call(tiny_policy):
    with pytest.raises(ValueError, match="needs packed=<plan>"):
        tiny_policy.base(input_ids=torch.tensor([[20, 21]]))
