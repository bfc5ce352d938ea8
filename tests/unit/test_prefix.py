"""The gather of keys and values for shared prompts: rows, and gradients against float64, on every backend."""

import pytest
import torch

from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.kernels.row_sums import row_sums, transposed
from tests.devices import ALL_BACKENDS, DEVICE, ON_DEVICE
from tests.packing_backends import FLOATS, skip_missing

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned_and_deterministic")]
backends = pytest.mark.parametrize("backend", ALL_BACKENDS)


def shared_rows(prompts=((4, 3), (2, 12)), length: int = 1) -> KVRows:
    """As attention needs them: each prompt once for itself, and before the rows of each of its completions."""
    found, at = [], 0
    for prompt, completions in prompts:
        own = list(range(at, at + prompt))
        found += own
        at += prompt
        for _ in range(completions):
            found += [*own, *range(at, at + length)]
            at += length
    return KVRows.checked(torch.tensor(found, device=DEVICE), at)


def make(dtype: torch.dtype, d: int, dv: int, heads: int = 2):
    rows = shared_rows()
    g = torch.Generator().manual_seed(0)
    shapes = (rows.n_rows, heads, d), (rows.n_rows, heads, dv)
    key, value = (torch.randn(shape, generator=g).to(DEVICE, dtype).requires_grad_() for shape in shapes)
    upstream = [torch.randn(len(rows.index), *shape[1:], generator=g).to(DEVICE, dtype) for shape in shapes]
    return rows, key, value, upstream


@backends
@pytest.mark.parametrize(("d", "dv"), [(3, 3), (64, 40)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_and_gradients(backend, d, dv, dtype):
    skip_missing(backend, dtype)
    rows, key, value, upstream = make(dtype, d, dv)
    out = gather_kv(key, value, rows, backend)
    usual = key[rows.index], value[rows.index]
    assert all(torch.equal(x, y) for x, y in zip(out, usual, strict=True))
    got = torch.autograd.grad(out, (key, value), upstream)
    plain = torch.autograd.grad(usual, (key, value), upstream)
    for x, y, up in zip(got, plain, upstream, strict=True):
        exact = torch.zeros(y.shape, dtype=torch.float64, device=DEVICE).index_add_(0, rows.index, up.double())
        assert x.dtype == dtype
        assert (x - exact).abs().max() <= 2 * (y - exact).abs().max()


@backends
def test_views_of_a_fused_projection_are_read_in_place(backend):
    rows, *_ = make(torch.float32, 8, 8)
    fused = torch.randn(rows.n_rows, 6, 8, device=DEVICE, requires_grad=True)  # two heads of q, k and v each
    key, value = fused[:, 2:4], fused[:, 4:]
    out = gather_kv(key, value, rows, backend)
    assert all(torch.equal(x, y[rows.index]) for x, y in zip(out, (key, value), strict=True))
    (got,) = torch.autograd.grad((out[0] * 2 + out[1]).sum(), fused)
    count = torch.bincount(rows.index).to(got.dtype)
    weights = torch.tensor([0, 0, 2, 2, 1, 1], device=DEVICE, dtype=got.dtype)
    assert torch.equal(got, (count[:, None] * weights)[..., None].expand_as(got))


@backends
def test_the_layout_of_attention(backend):
    """[1, Hkv, T, d] that was a view of [1, T, Hkv, d], and a real [Hkv, T, d]."""
    rows, *_ = make(torch.float32, 4, 4)
    projected = torch.randn(1, rows.n_rows, 2, 4, device=DEVICE).transpose(1, 2)
    for x in (projected, projected.contiguous()):
        key = x[0].transpose(0, 1)
        out = gather_kv(key, key, rows, backend)
        assert torch.equal(out[1], key[rows.index])


@backends
def test_only_what_is_needed_is_summed(backend, monkeypatch):
    rows, key, value, upstream = make(torch.float32, 8, 8)
    sums = []

    def counted(sources, *rest):
        sums.append(len(sources))
        return row_sums(sources, *rest)

    monkeypatch.setattr("revisual_fast.kernels.prefix.row_sums", counted)
    torch.autograd.grad(gather_kv(key, value, rows, backend), (key, value), upstream)
    (alone,) = torch.autograd.grad(gather_kv(key, value, rows, backend)[0], key, upstream[0])
    key.requires_grad_(False)
    gather_kv(key, value, rows, backend)[1].sum().backward()
    assert sums == [2, 1, 1]
    assert key.grad is None
    assert torch.isfinite(alone).all()


def test_the_map_has_its_transpose():
    rows = shared_rows()
    order, indptr = rows.order, rows.indptr
    assert sorted(order.tolist()) == list(range(len(rows.index)))
    assert indptr.tolist() == [int((rows.index < row).sum()) for row in range(rows.n_rows + 1)]
    for row in (0, 11, rows.n_rows - 1):
        entries = order[indptr[row] : indptr[row + 1]]
        assert entries.tolist() == (rows.index == row).nonzero().flatten().tolist()


@backends
def test_a_row_outside_is_nan_and_adds_nothing(backend):
    index = torch.tensor([1, 4, -1, 1], device=DEVICE)
    rows = KVRows(index, 4, *transposed(index, 4))  # unchecked, as on CUDA
    key = torch.ones(4, 2, 3, device=DEVICE, requires_grad=True)
    out, _ = gather_kv(key, key.detach(), rows, backend)
    assert out.isnan().all(dim=2).all(dim=1).tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(out, key, torch.ones_like(out))
    assert gradient[:, 0, 0].tolist() == [0.0, 2.0, 0.0, 0.0]


@backends
def test_the_sum_has_one_order(backend):
    rows, key, value, upstream = make(torch.float32, 33, 5)
    first, again = (torch.autograd.grad(gather_kv(key, value, rows, backend), (key, value), upstream) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@backends
def test_edges(backend):
    none = KVRows.checked(torch.empty(0, dtype=torch.int64, device=DEVICE), 3)
    key = torch.ones(3, 1, 2, device=DEVICE, requires_grad=True)
    out, _ = gather_kv(key, key.detach(), none, backend)
    assert out.shape == (0, 1, 2)
    (gradient,) = torch.autograd.grad(out.sum(), key)
    assert bool((gradient == 0).all())


@backends
def test_layers_share_the_transpose(backend, monkeypatch):
    rows, key, value, upstream = make(torch.float32, 8, 8)

    def no_more(*_):
        raise AssertionError("the map has it")

    monkeypatch.setattr("revisual_fast.kernels.row_sums.transposed", no_more)
    for _ in range(2):
        torch.autograd.grad(gather_kv(key, value, rows, backend), (key, value), upstream)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside):
    """With the map made outside, as layers have it, and in the graph."""
    rows, key, value, upstream = make(torch.float32, 8, 6)

    def twice(key, value):
        of = KVRows.checked(rows.index, rows.n_rows) if inside else rows
        return gather_kv(2 * key, 2 * value, of)

    outputs = twice(key, value), torch.compile(twice, fullgraph=True, backend="aot_eager")(key, value)
    for wanted in ([0, 1], [1]):
        inputs, ups = [(key, value)[i] for i in wanted], [upstream[i] for i in wanted]
        eager, got = (torch.autograd.grad([out[i] for i in wanted], inputs, ups, retain_graph=True) for out in outputs)
        assert all(x.any() and torch.equal(x, y) for x, y in zip(got, eager, strict=True))


def test_nothing_reads_a_value_back():
    rows = KVRows.checked(torch.empty(9, dtype=torch.int64, device="meta"), 5)
    key, value = (torch.empty(5, 2, 4, device="meta", requires_grad=True) for _ in range(2))
    sum(x.sum() for x in gather_kv(key, value, rows)).backward()
    assert key.grad.shape == value.grad.shape == (5, 2, 4)


def test_what_does_not_fit():
    rows = KVRows.checked(torch.tensor([0, 2]), 3)
    x = torch.zeros(3, 2, 4)
    for key, value, message in (
        (x[0], x, r"key must be \[3, Hkv, d\]"),
        (x, x[:2], r"value must be \[3, Hkv, d\]"),
        (x, x.double(), "same dtype"),
        (x.long(), x, "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_kv(key, value, rows)
    with pytest.raises(ValueError, match=r"\[0, 3\); it goes from 0 to 3"):
        KVRows.checked(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match=r"\[L\] int64"):
        KVRows.checked(torch.tensor([0, 1], dtype=torch.int32), 3)
