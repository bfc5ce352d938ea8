"""Attention with shared prefixes on a CUDA device, at sizes of real models: against SDPA in float64, and repeatable.

Layouts, leaks and arguments are tested in ``tests/unit/test_shared_attention.py``, on a device where one is at hand.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.kernels.shared_attention import AttentionTiles, shared_attention
from tests.gpu.test_kernels import no_synchronisation
from tests.unit.test_shared_attention import Group, shared, varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEGMENTS = list[tuple[int, int, int, int]]
GROUPS: list[Group] = [(1450, [500, 497, 512, 3, 801, 640, 128, 450]), (1450, [500] * 8)]
SIZES = pytest.mark.parametrize(("heads", "kv_heads", "d"), [(16, 2, 128), (28, 4, 128), (14, 2, 64), (8, 8, 80)])


def make(n: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(n, h, d, generator=g, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def tiles_of(segments: SEGMENTS) -> AttentionTiles:
    return AttentionTiles.of(*zip(*segments, strict=True), "cuda")


def ours(tensors: list[Tensor], tiles: AttentionTiles) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    out = shared_attention(*inputs, tiles, scale=tensors[0].shape[2] ** -0.5, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


def sdpa(tensors: list[Tensor], segments: SEGMENTS) -> list[Tensor]:
    """A segment at a time; keys and values gathered."""
    query, key, value = inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    share, parts = query.shape[1] // key.shape[1], []
    for start, length, prefix, n_prefix in segments:
        keys, values = (
            torch.cat([x[prefix : prefix + n_prefix], x[start : start + length]]).repeat_interleave(share, 1)
            for x in (key, value)
        )
        mask = torch.ones(length, n_prefix + length, dtype=torch.bool, device="cuda").tril(n_prefix)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start : start + length], keys, values))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1))
    out = torch.cat(parts)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_groups_of_real_sizes(heads, kv_heads, d, dtype):
    segments = shared(*GROUPS)
    tiles = tiles_of(segments)
    tensors = make(tiles.n_rows, heads, kv_heads, d, dtype)
    exact = sdpa([x.double() for x in tensors], segments)
    unit = torch.finfo(dtype).eps / 2
    for name, got, allowed, x in zip(
        ("out", "dq", "dk", "dv"), ours(tensors, tiles), sdpa(tensors, segments), exact, strict=True
    ):
        error, bound = (got - x).abs().max(), 2 * (allowed - x).abs().max() + unit * x.abs().max()
        assert error <= bound, (name, float(error), float(bound))


@pytest.mark.parametrize("segments", [shared(*GROUPS), varlen(*range(1, 200, 3)), varlen(8192)], ids=len)
def test_the_result_repeats(segments):
    tiles = tiles_of(segments)
    tensors = make(tiles.n_rows, 16, 2, 128, torch.bfloat16)
    first, again = (ours(tensors, tiles) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_long_rows_and_wide_strides():
    """2^17 rows; and rows so far apart that offsets pass 2^31."""
    tiles = tiles_of(varlen(*[64] * 2048))
    tensors = make(2**17, 4, 1, 128, torch.bfloat16)
    whole = ours(tensors, tiles)
    part = ours([x[-64:] for x in tensors], tiles_of(varlen(64)))
    for x, y in zip(whole, part, strict=True):
        assert (x[-64:] - y).abs().max() <= torch.finfo(torch.bfloat16).eps * y.abs().max()
    few = make(200, 4, 1, 128, torch.bfloat16)
    segments = tiles_of(shared((100, [60, 40])))
    usual = ours(few, segments)
    wide = torch.empty(200, 2**24, dtype=torch.bfloat16, device="cuda")[:, : 4 * 128].view(200, 4, 128)
    wide.copy_(few[0])
    assert all(torch.equal(x, y) for x, y in zip(ours([wide, *few[1:]], segments), usual, strict=True))


def test_nothing_waits_for_the_device_and_nothing_is_compiled_again():
    """But for the kernel of dK and dV, which writes fp32 where it splits the heads and bf16 where it does not."""
    from revisual_fast.kernels.shared_attention_triton import forward_kernel, key_gradient_kernel, query_gradient_kernel

    kernels = (forward_kernel, query_gradient_kernel, key_gradient_kernel)
    compiled = []
    for groups in (GROUPS, [(64, [17] * 3)], [(1, [])], [(1024, [128] * 8)], [(100, [60, 5])] * 200):
        tiles = tiles_of(shared(*groups))
        tensors = make(tiles.n_rows, 16, 2, 128, torch.bfloat16)
        ours(tensors, tiles)
        with no_synchronisation():
            ours(tensors, tiles)
        compiled.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(counts[:2] == compiled[0][:2] for counts in compiled)
    assert compiled[-1][2] <= compiled[0][2] + 1
