"""The kernels around packed rows on a CUDA device at sizes of real models: offsets, alignment, long sums, no waiting.

What they compute is tested in ``tests/unit`` (test_embed, test_prefix, test_mrope, test_gather), on a device where one
is at hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.kernels.mrope import mrope, mrope_, mrope_axis
from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.kernels.row_sums import row_sums
from tests.devices import ALL_BACKENDS
from tests.gpu.test_kernels import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
backends = pytest.mark.parametrize("backend", ALL_BACKENDS)
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(seed))


def numbers(limit: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(limit, shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def sums_in_float64(source: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Of the given rows, ``[len(rows), D]``."""
    chosen = (index[None] == rows[:, None]).double()
    return chosen @ source.double()


@backends
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "width", "start"), [(152_064, 3584, 0), (151_936, 2048, 0), (9001, 1023, 0), (9001, 64, 3)]
)
def test_embeddings_and_their_gradient(vocab, width, start, dtype, backend):
    table = random(vocab, width + start, dtype=dtype)[:, start:].requires_grad_()
    features = random(1500, width, dtype=dtype, seed=1).requires_grad_()
    ids, taken = numbers(vocab, 8192), torch.full((8192,), -1, device="cuda")
    ids[4000:7000] = 198  # a sum of 3000 rows
    taken[100:1600] = torch.arange(1500, device="cuda")
    taken[1700:2700] = torch.arange(1000, device="cuda")
    out = pack_embeddings(ids, table, features, taken, backend)
    assert torch.equal(out, torch.where((taken == -1)[:, None], table[ids], features[taken]))
    upstream = random(8192, width, dtype=dtype, seed=2)
    d_table, d_features = torch.autograd.grad(out, (table, features), upstream)
    usual = torch.zeros_like(d_table).index_add_(0, ids[taken == -1], upstream[taken == -1])
    rows = torch.cat([ids[:50], ids[4000:4001], torch.tensor([vocab - 1], device="cuda")])
    exact = sums_in_float64(upstream, torch.where(taken == -1, ids, -1), rows)
    assert (d_table[rows] - exact).abs().max() <= 2 * (usual[rows] - exact).abs().max()
    assert torch.equal((d_table != 0).any(1), (usual != 0).any(1))
    exact = sums_in_float64(upstream, taken, torch.arange(1500, device="cuda"))
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert bool(((d_features - exact).abs() <= unit).all())  # two terms: rounded once


@backends
def test_a_table_of_more_than_two_to_the_31_elements(backend):
    vocab, width = 530_000, 4096
    table = torch.zeros(vocab, width, device="cuda", dtype=torch.bfloat16)
    last = torch.tensor([vocab - 1, vocab - 2, vocab - 1], device="cuda")
    table[vocab - 2 :] = random(2, width)
    out = pack_embeddings(last, table, None, torch.full_like(last, -1), backend)
    assert torch.equal(out, table[last])
    (sums,) = row_sums([out], last, vocab, torch.bfloat16, backend)
    assert torch.equal(sums[-1], (out[0].float() * 2).bfloat16())
    assert torch.equal(sums[-2], out[1])
    assert not bool(sums[:-2].any())


@backends
def test_ids_outside_are_loud(backend):
    ids = torch.tensor([0, 10, -1, 3, 1 << 40], device="cuda")
    table = random(10, 512).requires_grad_()
    out = pack_embeddings(ids, table, None, torch.tensor([-1, -1, -1, 0, -1], device="cuda"), backend)
    assert out.isnan().all(dim=1).tolist() == [False, True, True, True, True]
    (gradient,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert gradient[:, 0].tolist() == [1.0] + [0.0] * 9


@backends
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "d"), [(4, 128), (2, 128), (3, 5)])
def test_keys_and_values_of_a_fused_projection(heads, d, dtype, backend):
    tokens, prompt, group = 6000, 1200, 16
    fused = random(tokens, 3 * heads, d, dtype=dtype).requires_grad_()
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    each = (tokens - prompt) // group
    ranges = [torch.arange(prompt)]
    ranges += [x for i in range(group) for x in (ranges[0], torch.arange(prompt + i * each, prompt + (i + 1) * each))]
    rows = KVRows.checked(torch.cat(ranges).cuda(), tokens)
    got = gather_kv(key, value, rows, backend)
    assert all(torch.equal(x, y[rows.index]) for x, y in zip(got, (key, value), strict=True))
    upstream = [random(len(rows.index), heads, d, dtype=dtype, seed=i) for i in (1, 2)]
    (gradient,) = torch.autograd.grad(got, fused, upstream)
    assert not bool(gradient[:, :heads].any())
    sample = torch.tensor([0, 7, prompt - 1, prompt, tokens - 1], device="cuda")
    for part, up in zip((gradient[:, heads : 2 * heads], gradient[:, 2 * heads :]), upstream, strict=True):
        exact = sums_in_float64(up.flatten(1), rows.index, sample)
        usual = torch.zeros(tokens, heads * d, device="cuda", dtype=dtype).index_add_(0, rows.index, up.flatten(1))
        error = (part[sample].flatten(1) - exact).abs().max()
        assert error <= 2 * (usual[sample] - exact).abs().max()


@backends
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "half"), [(28, 4, 64), (16, 2, 64), (12, 12, 40), (3, 1, 5)])
def test_mrope_in_place(heads, kv_heads, half, dtype, backend):
    tokens = 16_000
    rest = half * 3 // 8
    angles = (
        numbers(131_072, 3, tokens),
        (1e6 ** -(torch.arange(half, device="cuda") / half)).float(),
        mrope_axis([half - 2 * rest, rest, rest]).cuda(),
    )
    q, k = (random(1, tokens, n, 2 * half, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    views = [x[0].transpose(0, 1) for x in (q, k)]
    exact = mrope(*(x.double() for x in views), *angles, backend="torch")
    plain = mrope(*views, *angles, backend="torch")
    fresh = mrope(*views, *angles, backend=backend)
    back = [x.clone().requires_grad_() for x in views]
    gradients = torch.autograd.grad(mrope(*back, *angles, backend=backend), back, fresh)
    mrope_(*views, *angles, backend=backend)
    for x, view, y, z in zip(fresh, views, plain, exact, strict=True):
        assert torch.equal(x, view)
        assert (x - z).abs().max() <= 2 * (y - z).abs().max()
    for gradient, x in zip(gradients, back, strict=True):
        assert (gradient - x).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()  # there and back: two roundings


def every_op(backend: str) -> list[Tensor]:
    dtype = torch.bfloat16
    table, features = random(5000, 256).requires_grad_(), random(30, 256, seed=1).requires_grad_()
    ids, taken = numbers(5000, 900), torch.full((900,), -1, device="cuda")
    taken[5:35] = torch.arange(30, device="cuda")
    packed = pack_embeddings(ids, table, features, taken, backend)
    q, k, v = packed.view(900, 4, 64).split([2, 1, 1], dim=1)
    axis, inv_freq = torch.zeros(32, device="cuda", dtype=torch.int8), torch.rand(32, device="cuda")
    q, k = mrope(q, k, numbers(900, 3, 900), inv_freq, axis, backend=backend)
    key, value = gather_kv(k, v, KVRows.checked(numbers(900, 3000), 900), backend)
    loss = (q.float() ** 2).sum() + (key.float() * value.float()).sum()
    assert packed.dtype == dtype
    return [packed, q, key, value, *torch.autograd.grad(loss, (table, features))]


@backends
def test_nothing_waits_for_the_device_and_every_run_is_the_same(backend):
    first = every_op(backend)
    with no_synchronisation():
        again = every_op(backend)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@backends
def test_other_streams_and_devices(backend):
    goal = every_op(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = every_op(backend)
    side.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(goal, got, strict=True))
    if torch.cuda.device_count() > 1:
        ids = torch.arange(5, device="cuda:1")
        table = torch.ones(5, 8, device="cuda:1", dtype=torch.bfloat16)
        assert torch.equal(pack_embeddings(ids, table, None, torch.full_like(ids, -1), backend), table)


def test_fp64_has_no_cuda_kernel():
    source, index = random(3, 4, dtype=torch.float64), numbers(3, 3)
    with pytest.raises(ValueError, match="no kernel for"):
        row_sums([source], index, 3, source.dtype, "cuda")
    assert row_sums([source], index, 3, source.dtype)[0].dtype == source.dtype
