"""Attention with shared prefixes: values and gradients against float64, and that nothing leaks."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revisual_fast.kernels.shared_attention import AttentionTiles, shared_attention
from tests.devices import BACKENDS, DEVICE, ON_DEVICE, needs_triton

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned")]
backends = pytest.mark.parametrize("backend", BACKENDS)

Group = tuple[int, list[int]]
"""Rows of a prompt and of its completions."""
GROUPS = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), max_size=4)), min_size=1, max_size=4)


def shared(*groups: Group) -> list[tuple[int, int, int, int]]:
    """(start, length, prefix_start, prefix_length) of groups one after another."""
    segments, at = [], 0
    for prompt, completions in groups:
        first = at
        segments.append((first, prompt, 0, 0))
        at += prompt
        for length in completions:
            segments.append((at, length, first, prompt))
            at += length
    return segments


def varlen(*lengths: int) -> list[tuple[int, int, int, int]]:
    return [(sum(lengths[:i]), n, 0, 0) for i, n in enumerate(lengths)]


LAYOUTS = {
    "groups": shared((20, [7, 1, 30]), (5, []), (40, [9, 9])),
    "one group": shared((16, [16, 16])),
    "a prompt alone": shared((37, [])),
    "one row": shared((1, [])),
    "many short texts": varlen(3, 5, 1, 1, 2, 9, 4, 4, 1, 3, 40, 2),
    "prompts first": [(0, 18, 0, 0), (18, 3, 0, 0), (21, 20, 0, 18), (41, 2, 0, 18), (43, 17, 18, 3), (60, 1, 18, 3)],
    "part of a prompt": [(0, 30, 0, 0), (30, 10, 3, 20), (40, 8, 3, 20), (48, 4, 0, 0)],
    "prefixes of completions": [(0, 9, 0, 0), (9, 20, 0, 9), (29, 5, 12, 17), (34, 5, 12, 17)],
    "prefix behind": [(0, 6, 8, 12), (6, 2, 8, 12), (8, 12, 0, 0)],
}


def tiles_of(segments: list[tuple[int, int, int, int]], grain: int = 16) -> AttentionTiles:
    """Tiles so small that few rows make many."""
    return AttentionTiles.of(*zip(*segments, strict=True), DEVICE, grain=grain)


def seen(segments: list[tuple[int, int, int, int]]) -> Tensor:
    """[T, T] bool: which row sees which, by the definition."""
    n = sum(length for _, length, _, _ in segments)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for start, length, prefix, n_prefix in segments:
        for row in range(start, start + length):
            mask[row, prefix : prefix + n_prefix] = True
            mask[row, start : row + 1] = True
    return mask


def make(n: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the gradient of the result."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, h, d, generator=g).to(DEVICE, dtype) for h in (heads, kv_heads, kv_heads, heads)]


def both_ways(tensors: list[Tensor], tiles: AttentionTiles, backend: str) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    out = shared_attention(*inputs, tiles, scale=inputs[0].shape[2] ** -0.5, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


def plain(tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Eager attention as in transformers: products in the inputs' dtype, softmax in fp32 at least."""
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    q, k, v = (x.transpose(0, 1).repeat_interleave(inputs[0].shape[1] // x.shape[1], 0) for x in inputs)
    scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(~mask, -math.inf)
    p = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    out = (p @ v).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


def check(segments, heads: int, kv_heads: int, d: int, dtype: torch.dtype, backend: str, grain: int = 16) -> None:
    """At most twice the error of plain torch in the same dtype, both against float64, and what rounding must allow."""
    tiles, mask = tiles_of(segments, grain), seen(segments).to(DEVICE)
    query, key, value, upstream = tensors = make(tiles.n_rows, heads, kv_heads, d, dtype)
    exact = plain([x.double() for x in tensors], mask)
    # The interpreter's casts to 16 bits truncate, a device's round: a whole unit in the last place, not a half.
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 2**-24
    # dP and its mean are sums of d terms in fp32; of a row with one key their difference is 0 but for rounding.
    difference = 2**-23 * float(upstream.abs().max() * value.abs().max()) * d**0.5
    floors = (0.0, difference * float(key.abs().max()), difference * float(query.abs().max()), 0.0)
    results = both_ways(tensors, tiles, backend), plain(tensors, mask), exact
    for name, floor, got, allowed, x in zip(("out", "dq", "dk", "dv"), floors, *results, strict=True):
        assert got.dtype == dtype, name
        assert got.is_contiguous(), name
        error, bound = (got - x).abs().max(), 2 * (allowed - x).abs().max() + unit * x.abs().max() + floor
        assert error <= bound, (name, float(error), float(bound))


# values and gradients


@backends
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, backend):
    check(LAYOUTS[name], 2, 1, 16, torch.float32, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 16), (4, 1, 40), (7, 1, 64), (4, 2, 24)])
def test_heads_and_dtypes(heads, kv_heads, d, dtype, backend):
    check(shared((19, [18, 5]), (4, [])), heads, kv_heads, d, dtype, backend)


@needs_triton
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16), (160, torch.bfloat16)]
)
def test_the_blocks_of_the_launch_tables(d, dtype):
    check(shared((150, [40, 100, 3]), (30, [130])), 2, 1, d, dtype, "triton", grain=128)


@needs_triton
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=GROUPS, heads=st.sampled_from([(1, 1), (2, 1)]))
def test_any_groups(groups, heads):
    check(shared(*groups), *heads, 16, torch.float32, "triton")


@needs_triton
def test_parts_of_the_heads_add_up(monkeypatch):
    segments = shared((20, [7, 30]))
    tensors = make(57, 4, 1, 16, torch.float32)
    results = []
    for splits in (1, 2, 4):
        monkeypatch.setattr(AttentionTiles, "splits", lambda *_, n=splits: n)
        results.append(both_ways(tensors, tiles_of(segments), "triton"))
    for other in results[1:]:
        for one, x in zip(results[0], other, strict=True):
            assert (one - x).abs().max() <= 2**-20 * one.abs().max()


@needs_triton
def test_offsets_of_more_than_32_bits(monkeypatch):
    """The other way to compute an address; a device's memory is too small to need it in a test."""
    from revisual_fast.kernels import shared_attention_launch

    tensors, tiles = make(59, 2, 1, 16, torch.float32), tiles_of([*LAYOUTS["groups"][:4], (58, 1, 0, 0)])
    usual = both_ways(tensors, tiles, "triton")
    monkeypatch.setattr(shared_attention_launch, "LONGEST", 0)
    assert all(torch.equal(x, y) for x, y in zip(both_ways(tensors, tiles, "triton"), usual, strict=True))


@backends
def test_the_result_repeats(backend):
    tensors, tiles = make(121, 2, 1, 16, torch.float32), tiles_of(LAYOUTS["groups"])
    first, again = (both_ways(tensors, tiles, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@backends
def test_tensors_are_read_where_they_lie(backend):
    """[1, H, T, d] and views of a fused projection, for inputs and for the incoming gradient."""
    tiles = tiles_of(LAYOUTS["groups"])
    tensors = make(tiles.n_rows, 2, 1, 16, torch.float32)
    usual = both_ways(tensors, tiles, backend)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    fused = torch.cat(tensors, 1)
    views = [fused[:, :2], fused[:, 2:3], fused[:, 3:4], fused[:, 4:]]
    spread = [torch.stack([x, x], -1)[..., 0] for x in tensors]  # elements of a head apart: copied
    for given_as in (heads_first, views, spread):
        got = both_ways(given_as, tiles, backend)
        assert all(torch.equal(x, y) for x, y in zip(got, usual, strict=True))


# leaks


def leak(backend: str, segments, changed: slice, value: float, others: Tensor) -> None:
    """Rows ``others [T]`` bool, and the gradients that come from them, do not know what stands in rows ``changed``."""
    tiles = tiles_of(segments)
    tensors = make(tiles.n_rows, 2, 1, 16, torch.float32)
    tensors[3][~others] = 0  # gradients come from the other rows alone
    usual = both_ways(tensors, tiles, backend)
    for x in tensors[:3]:
        x[changed] = value
    got = both_ways(tensors, tiles, backend)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, usual, strict=True):
        assert torch.equal(x[others], y[others]), name
    assert not torch.equal(got[0][changed], usual[0][changed])


@backends
@pytest.mark.parametrize("which", [1, 2, 3, 5, 6, 7])
def test_a_completion_is_seen_by_no_other_sequence(which, backend):
    segments = shared((20, [7, 5, 30]), (40, [9, 9, 3]))
    start, length, _, _ = segments[which]
    others = torch.ones(123, dtype=torch.bool, device=DEVICE)
    others[start : start + length] = False
    leak(backend, segments, slice(start, start + length), 1e3, others)


@backends
def test_a_group_is_seen_by_no_other_even_if_it_is_nan(backend):
    segments = shared((20, [7, 5, 30]), (40, [9, 9, 3]))
    others = torch.arange(123, device=DEVICE) >= 62
    leak(backend, segments, slice(0, 62), math.nan, others)
    leak(backend, segments, slice(62, 123), math.nan, ~others)


def test_a_completion_of_nan_stays_alone_in_plain_torch():
    """The prompt's gradient is a sum over all completions; all else of the others is as it was."""
    tiles = tiles_of(shared((20, [7, 5, 30])))
    tensors = make(tiles.n_rows, 2, 1, 16, torch.float32)
    others = torch.ones(tiles.n_rows, dtype=torch.bool, device=DEVICE)
    others[27:32] = False
    usual = both_ways(tensors, tiles, "torch")
    for x in tensors[1:3]:
        x[27:32] = math.nan
    got = both_ways(tensors, tiles, "torch")
    assert all(x[27:32].isnan().all() for x in got[:2])
    others[:20] = False
    for x, y in zip(got, usual, strict=True):
        assert torch.equal(x[others], y[others])
    for x, y in zip(got[:2], usual[:2], strict=True):
        assert torch.equal(x[:20], y[:20])


@backends
def test_a_row_does_not_see_the_rows_after_it(backend):
    segments = shared((20, [30]))
    others = torch.arange(50, device=DEVICE) < 33
    leak(backend, segments, slice(33, 50), 1e3, others)


# arguments


@backends
def test_no_rows(backend):
    tiles = AttentionTiles.of((), (), (), (), DEVICE)
    query, key, value, _ = make(0, 2, 1, 16, torch.float32)
    query.requires_grad_()
    out = shared_attention(query, key, value, tiles, scale=1.0, backend=backend)
    assert out.shape == (0, 2, 16)
    out.sum().backward()
    assert query.grad.shape == (0, 2, 16)


@backends
def test_only_what_is_asked_for(backend):
    query, key, value, upstream = make(121, 2, 1, 16, torch.float32)
    tiles = tiles_of(LAYOUTS["groups"])
    value.requires_grad_()
    shared_attention(query, key, value, tiles, scale=0.25, backend=backend).backward(upstream)
    assert torch.equal(value.grad, both_ways([query, key, value, upstream], tiles, backend)[3])
    assert query.grad is key.grad is None


def test_auto_on_a_cpu_is_plain_torch_and_in_the_dtype_it_is_given():
    tensors, tiles = make(121, 2, 1, 16, torch.float64), tiles_of(LAYOUTS["groups"])
    for got, exact in zip(
        both_ways(tensors, tiles, "auto"), plain(tensors, seen(LAYOUTS["groups"]).to(DEVICE)), strict=True
    ):
        assert (got - exact).abs().max() <= 1e-12


@needs_triton
@pytest.mark.parametrize(
    ("shapes", "dtype", "scale", "message"),
    [
        (((4, 2, 16), (4, 1, 16), (4, 1, 16)), torch.float32, 1.0, r"query must be \[5, H, d\]"),
        (((5, 2, 16), (4, 1, 16), (4, 1, 16)), torch.float32, 1.0, r"key must be \[5, Hkv, d\]"),
        (((5, 2, 16), (5, 1, 8), (5, 1, 8)), torch.float32, 1.0, "key must be"),
        (((5, 2, 16), (5, 1, 16), (5, 2, 16)), torch.float32, 1.0, "value must be"),
        (((5, 3, 16), (5, 2, 16), (5, 2, 16)), torch.float32, 1.0, "2 key heads do not divide 3"),
        (((5, 2, 16), (5, 1, 16), (5, 1, 16)), torch.int64, 1.0, "floating-point"),
        (((5, 2, 16), (5, 1, 16), (5, 1, 16)), torch.float32, 0.0, "scale must be positive"),
        (((5, 2, 16), (5, 1, 16), (5, 1, 16)), torch.float32, math.nan, "scale must be positive"),
        (((5, 2, 16), (5, 1, 16), (5, 1, 16)), torch.float64, 1.0, "not with torch.float64; use backend='torch'"),
        (((5, 2, 272), (5, 1, 272), (5, 1, 272)), torch.float32, 1.0, "heads of up to 256 elements, not 272"),
    ],
)
def test_what_does_not_fit(shapes, dtype, scale, message):
    tensors = [torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        shared_attention(*tensors, tiles_of(varlen(5)), scale=scale, backend="triton")


def test_dtypes_that_differ_and_unknown_backends():
    x, tiles = torch.zeros(5, 1, 16, device=DEVICE), tiles_of(varlen(5))
    with pytest.raises(ValueError, match="one dtype"):
        shared_attention(x, x.half(), x.half(), tiles, scale=1.0)
    with pytest.raises(ValueError, match="unknown"):
        shared_attention(x, x, x, tiles, scale=1.0, backend="flash")
