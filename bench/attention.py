"""Attention over packed groups: N rows in four groups, half of each its prompt, the rest eight completions.

Every variant goes forward and back, with the same upstream gradient. D is the width of the query heads; a key head
serves seven or eight of them, as in Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.checks import Outputs
from bench.harness import Call, Case, Problem, Variant
from bench.machine import ceilings
from bench.ours import by_device
from bench.packing import GROUP, PROMPTS, QUERIES, both_ways, head_size
from revisual_fast.kernels.shared_attention import AttentionTiles
from revisual_fast.kernels.shared_attention import shared_attention as our_attention
from revisual_fast.packing import Segments
from revisual_fast.policy.attention import attention_problem, make_plan

GATHERED = {"flash": "flash-attn varlen", "varlen": "torch varlen_attn"}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def shared_attention(case: Case) -> Problem:
    """A prompt's keys and values are read by all its completions. Tables and indices are made before, once a batch."""
    head = head_size(case.d)
    heads = case.d // head
    kv_heads = max(1, heads // QUERIES)
    segments, device, scale = groups(case.n), torch.device(case.device), head**-0.5
    g = torch.Generator(case.device).manual_seed(0)

    def normal(n_heads: int) -> Tensor:
        return torch.randn(case.n, n_heads, head, generator=g, device=case.device).to(case.torch_dtype)

    inputs = {"query": normal(heads), "key": normal(kv_heads), "value": normal(kv_heads)}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    upstream = {"rows": normal(heads)}
    fields = (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
    tiles = AttentionTiles.of(*fields, device)

    def call(attend: Attend) -> Callable[[], Call]:
        return both_ways(lambda query, key, value: [attend(query, key, value)], inputs, upstream)

    def mine(backend: str) -> Callable[[], Call]:
        return call(lambda q, k, v: our_attention(q, k, v, tiles, scale=scale, backend=backend))

    def planned(backend: str) -> Callable[[], Call]:
        plan = make_plan(backend, segments, device, case.torch_dtype)
        return call(lambda q, k, v: plan.attend(0, *heads_first(q, k, v), scale)[0])

    variants = [
        *by_device(case, mine, backends=("triton", "torch")),
        Variant(
            "eager",
            "plain",
            call(lambda q, k, v: by_segment(q, k, v, segments, scale)),
            note="SDPA, segment by segment",
        ),
        Variant("SDPA rectangles", "plain", planned("sdpa"), note="what the policy does without a GPU"),
    ]
    for backend, name in GATHERED.items():
        why = attention_problem(backend, device, case.torch_dtype) or ""
        note = "of keys and values that we gather before, and whose gradients we sum"
        variants.append(Variant(f"gather + {name}", "peer", None if why else planned(backend), why, note))

    def answer() -> Outputs:
        query, key, value = wide = [x.detach().double().requires_grad_() for x in inputs.values()]
        out = by_segment(query, key, value, segments, scale)
        gradients = torch.autograd.grad(out, wide, upstream["rows"].double())
        return {"rows": out.detach(), **{f"d_{name}": x for name, x in zip(inputs, gradients, strict=True)}}

    flops = 14 * pairs(segments) * case.d  # two products forward, five backward
    n_bytes = (6 * heads + 6 * kv_heads) * case.n * head * case.torch_dtype.itemsize
    return Problem(case, variants, answer, flops, n_bytes, ceilings(case))


def heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, T, d]."""
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def groups(n: int) -> Segments:
    """Of ``n`` rows."""
    rows: list[tuple[int, int, int, int]] = []
    for group in range(PROMPTS):
        first, end = n * group // PROMPTS, n * (group + 1) // PROMPTS
        length = (end - first) // (2 * GROUP)
        prompt = end - first - GROUP * length
        own = range(first + prompt, end, length)
        rows += [(first, prompt, 0, 0), *((start, length, first, prompt) for start in own)]
    start, length_, prefix_start, prefix_length = zip(*rows, strict=True)
    return Segments(start, length_, prefix_start, prefix_length)


def pairs(segments: Segments) -> int:
    """Of a query and a key that it sees."""
    both = zip(segments.length, segments.prefix_length, strict=True)
    return sum(length * prefix + length * (length + 1) // 2 for length, prefix in both)


def by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Each with its prompt's keys and values in front of its own."""
    share, parts = query.shape[1] // key.shape[1], []
    for start, length, prefix, n_prefix in zip(
        segments.start, segments.length, segments.prefix_start, segments.prefix_length, strict=True
    ):
        keys, values = (
            torch.cat([x[prefix : prefix + n_prefix], x[start : start + length]]).repeat_interleave(share, 1)
            for x in (key, value)
        )
        mask = torch.ones(length, n_prefix + length, dtype=torch.bool, device=query.device).tril(n_prefix)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start : start + length], keys, values))
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)
