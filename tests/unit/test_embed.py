"""Packed input embeddings: rows from where they lie, and gradients against float64, in every dtype and backend."""

import pytest
import torch

from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.kernels.row_sums import packing_backend, row_sums, transposed
from revisual_fast.policy.model import _is_plain
from tests.devices import ALL_BACKENDS, DEVICE, ON_DEVICE
from tests.packing_backends import FLOATS, skip_missing

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned_and_deterministic")]
backends = pytest.mark.parametrize("backend", ALL_BACKENDS)


def make(width: int, dtype: torch.dtype, features_dtype: torch.dtype | None = None):
    """23 ids, of which some never occur and one occurs often; seven features, one unused, two used three times."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (120,), generator=g)
    ids[30:90] = 4
    feature_index = torch.full((120,), -1)
    feature_index[10:16] = torch.arange(6)
    feature_index[100:104] = torch.tensor([0, 5, 5, 0])
    table = torch.randn(23, width, generator=g).to(DEVICE, dtype).requires_grad_()
    features = torch.randn(7, width, generator=g).to(DEVICE, features_dtype or dtype).requires_grad_()
    upstream = torch.randn(120, width, generator=g).to(DEVICE, dtype)
    return ids.to(DEVICE), table, features, feature_index.to(DEVICE), upstream


def plain(ids, table, features, feature_index):
    """The same by indexing."""
    return torch.where((feature_index == -1)[:, None], table[ids], features[feature_index].to(table.dtype))


@backends
@pytest.mark.parametrize("width", [5, 1100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_and_gradients(backend, width, dtype):
    skip_missing(backend, dtype)
    ids, table, features, feature_index, upstream = make(width, dtype)
    out = pack_embeddings(ids, table, features, feature_index, backend)
    expected = plain(ids, table, features, feature_index)
    assert torch.equal(out, expected)
    got = torch.autograd.grad(out, (table, features), upstream)
    usual = torch.autograd.grad(expected, (table, features), upstream)
    wide = [x.detach().double().requires_grad_() for x in (table, features)]
    exact = torch.autograd.grad(plain(ids, wide[0], wide[1], feature_index), wide, upstream.double())
    for x, y, z in zip(got, usual, exact, strict=True):
        assert x.dtype == dtype
        assert (x - z).abs().max() <= 2 * (y - z).abs().max()
    assert bool((got[0][20:] == 0).all())
    assert bool((got[1][6] == 0).all())


@backends
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float16], ids=str)
def test_features_of_another_dtype(backend, features_dtype):
    ids, table, features, feature_index, upstream = make(24, torch.bfloat16, features_dtype)
    out = pack_embeddings(ids, table, features, feature_index, backend)
    assert torch.equal(out, plain(ids, table, features, feature_index))
    (got,) = torch.autograd.grad(out, features, upstream)
    exact = torch.zeros(7, 24, dtype=torch.float64, device=DEVICE)
    rows = feature_index >= 0
    exact.index_add_(0, feature_index[rows], upstream[rows].double())
    assert torch.equal(got, exact.float().to(features_dtype))  # sums of three bf16 numbers: exact in fp32, rounded once


@backends
def test_the_padding_row_is_not_trained(backend):
    ids, table, features, feature_index, upstream = make(8, torch.float32)
    everything, without = (
        torch.autograd.grad(pack_embeddings(ids, table, features, feature_index, backend, pad), table, upstream)[0]
        for pad in (None, 4)
    )
    assert everything[4].any()
    assert not without[4].any()
    assert torch.equal(without[5:], everything[5:])
    embedding = torch.nn.Embedding(23, 8, padding_idx=4, _weight=table.detach().clone(), device=DEVICE)
    usual = plain(ids, embedding(torch.arange(23, device=DEVICE)), features.detach(), feature_index)
    (wanted,) = torch.autograd.grad(usual, embedding.weight, upstream)
    torch.testing.assert_close(without, wanted)


@backends
def test_text_alone(backend):
    ids, table, _, feature_index, upstream = make(8, torch.float32)
    nothing = torch.full_like(feature_index, -1)
    for features in (None, torch.empty(0, 8, device=DEVICE, requires_grad=True)):
        out = pack_embeddings(ids, table, features, nothing, backend)
        assert torch.equal(out, table[ids])
        inputs = [table] if features is None else [table, features]
        got = torch.autograd.grad(out, inputs, upstream)
        assert [g.shape for g in got] == [x.shape for x in inputs]


@backends
def test_frozen_inputs_cost_nothing(backend, monkeypatch):
    ids, table, features, feature_index, upstream = make(8, torch.float32)
    sums = []

    def counted(sources, index, n_rows, *rest):
        sums.append(n_rows)
        return row_sums(sources, index, n_rows, *rest)

    monkeypatch.setattr("revisual_fast.kernels.embed.row_sums", counted)
    for frozen, expected in ((table, [7]), (features, [23])):
        frozen.requires_grad_(False)
        pack_embeddings(ids, table, features, feature_index, backend).backward(upstream)
        assert frozen.grad is None
        assert sums == expected
        frozen.requires_grad_(True)
        table.grad = features.grad = None
        sums.clear()


@backends
def test_strided_inputs_and_an_expanded_gradient(backend):
    ids, table, features, feature_index, _ = make(12, torch.float32)
    for view in (lambda x: x[:, 2:8], lambda x: x[:, ::2], lambda x: x.T.contiguous().T):
        out = pack_embeddings(ids, view(table), view(features), feature_index, backend)
        expected = plain(ids, view(table), view(features), feature_index)
        assert torch.equal(out, expected)
        got, usual = (torch.autograd.grad(o.sum(), (table, features)) for o in (out, expected))
        assert all(torch.equal(x, y) for x, y in zip(got, usual, strict=True))  # small whole numbers


@backends
def test_nothing_packed(backend):
    _, table, features, _, _ = make(8, torch.float32)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = pack_embeddings(none, table, features, none, backend)
    assert out.shape == (0, 8)
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), (table, features)))


@backends
def test_rows_that_do_not_exist_are_nan_where_they_cannot_be_refused(backend, monkeypatch):
    monkeypatch.setattr("revisual_fast.kernels.embed._check", lambda *_: None)  # as on a CUDA device
    ids, table, features, feature_index, upstream = make(8, torch.float32)
    ids[0], ids[1], feature_index[12], feature_index[13] = 23, -1, 7, -2
    out = pack_embeddings(ids, table, features, feature_index, backend)
    bad = [0, 1, 12, 13]
    assert out.isnan().all(dim=1).nonzero().flatten().tolist() == bad
    good = [i for i in range(120) if i not in bad]
    got = torch.autograd.grad(out, (table, features), upstream)
    expected = plain(ids[good], table, features, feature_index[good])
    usual = torch.autograd.grad(expected, (table, features), upstream[good])
    for x, y in zip(got, usual, strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_reads_a_value_back():
    """Tensors without data cannot be read: the same code runs on a CUDA device without waiting for it."""
    table = torch.empty(9, 4, device="meta", requires_grad=True)
    features = torch.empty(3, 4, device="meta", requires_grad=True)
    ids, feature_index = torch.empty(2, 5, dtype=torch.int64, device="meta").unbind()
    pack_embeddings(ids, table, features, feature_index).sum().backward()
    assert (table.grad.shape, features.grad.shape) == ((9, 4), (3, 4))
    assert [x.shape for x in transposed(ids, 9)] == [(5,), (10,)]


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float64], ids=str)
def test_compiled(features_dtype):
    ids, table, features, feature_index, upstream = make(8, torch.float32, features_dtype)

    def twice(table, features):
        return pack_embeddings(ids, 2 * table, 2 * features, feature_index, padding_idx=4)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    outputs = twice(table, features), compiled(table, features)
    assert torch.equal(*outputs)
    eager, got = (torch.autograd.grad(out, (table, features), upstream) for out in outputs)
    assert all(x.any() and torch.equal(x, y) for x, y in zip(got, eager, strict=True))


IDS, TABLE, FEATURES = torch.tensor([0, 2]), torch.zeros(3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, torch.zeros(3), None, IDS), r"table must be \[V, D\]"),
        ((IDS.int(), TABLE, None, IDS), r"ids must be \[T\] int64 on cpu"),
        ((IDS, TABLE, FEATURES, IDS[:1]), r"feature_index must be \[T\] int64"),
        ((IDS, TABLE, FEATURES[:, :3], IDS), r"features must be \[M, 4\]"),
        ((IDS + 1, TABLE, None, IDS * 0 - 1), r"ids must lie in \[0, 3\); they go from 1 to 3"),
        ((IDS, TABLE, FEATURES, IDS), r"feature_index must lie in \[-1, 2\); they go from 0 to 2"),
        ((IDS, TABLE, None, IDS * 0), r"feature_index must lie in \[-1, 0\)"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_embeddings(*arguments)


def test_ids_of_rows_that_take_a_feature_do_not_matter():
    out = pack_embeddings(torch.tensor([99, 1]), TABLE, FEATURES + 1, torch.tensor([0, -1]))
    assert out[:, 0].tolist() == [1.0, 0.0]


def test_the_backend_of_fp64():
    with pytest.raises(ValueError, match="no kernel for"):
        packing_backend("cuda", torch.zeros(1, dtype=torch.float64))
    assert packing_backend("auto", torch.zeros(1, dtype=torch.float64)) == "torch"


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        (torch.nn.Embedding(5, 3, padding_idx=0), True),
        (torch.nn.Embedding(5, 3, max_norm=1.0), False),
        (torch.nn.Embedding(5, 3, scale_grad_by_freq=True), False),
        (torch.nn.Embedding(5, 3, sparse=True), False),
        (torch.nn.Sequential(torch.nn.Embedding(5, 3)), False),
    ],
)
def test_only_a_plain_embedding_is_read_past_its_module(module, plain):
    assert _is_plain(module) == plain
    if plain:
        module.register_forward_hook(lambda module, inputs, output: output)
        assert not _is_plain(module)
