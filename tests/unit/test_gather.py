"""The gather of rows with targets: its gradient against float64, in every dtype and on both backends."""

import pytest
import torch

from revisual_fast.kernels.dispatch import pick_backend
from revisual_fast.kernels.gather import gather_rows, gather_rows_backward
from tests.devices import ALL_BACKENDS, DEVICE, ON_DEVICE
from tests.packing_backends import skip_missing

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned_and_deterministic")]


def make_rows(groups: int = 5, completions: int = 12, length: int = 3) -> tuple[torch.Tensor, int]:
    """Rows as packing lays them out: every completion starts at its prompt's last row; prompts have four rows."""
    rows, at = [], 0
    for _ in range(groups):
        last = at + 3
        at += 4
        for _ in range(completions):
            rows += [last, *range(at, at + length)]
            at += length
    return torch.tensor(rows, device=DEVICE), at


def make(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, n_rows = make_rows()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_rows, width, generator=g).to(DEVICE, dtype).requires_grad_()
    return hidden, rows, torch.randn(len(rows), width, generator=g).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("width", [7, 520])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_gradient(backend, width, dtype):
    skip_missing(backend, dtype)
    hidden, rows, d_out = make(width, dtype)
    out = gather_rows(hidden, rows, backend)
    assert torch.equal(out, hidden[rows])
    (got,) = torch.autograd.grad(out, hidden, d_out)
    (plain,) = torch.autograd.grad(hidden[rows], hidden, d_out)
    exact = torch.zeros(hidden.shape, dtype=torch.float64, device=DEVICE).index_add_(0, rows, d_out.double())
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
    once = torch.bincount(rows, minlength=len(hidden)) == 1
    assert torch.equal(got[once], plain[once])
    nobody = torch.bincount(rows, minlength=len(hidden)) == 0
    assert int(nobody.sum()) == 15
    assert bool((got[nobody] == 0).all())


def test_fp32_on_the_cpu_is_plain_indexing_to_the_last_bit():
    hidden, rows, d_out = (x.detach().cpu() for x in make(64, torch.float32))
    hidden.requires_grad_()
    plain, got = (torch.autograd.grad(out, hidden, d_out)[0] for out in (hidden[rows], gather_rows(hidden, rows)))
    assert torch.equal(plain, got)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_large_group_is_rounded_once(backend):
    rows = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    d_out = torch.full((4096, 1), 1.0, device=DEVICE, dtype=torch.bfloat16)
    assert gather_rows_backward(d_out, rows, 2, backend).tolist() == [[4096.0], [0.0]]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_sum_has_one_order(backend):
    hidden, rows, d_out = make(33, torch.float32)
    first, again = (gather_rows_backward(d_out, rows, len(hidden), backend) for _ in range(2))
    assert torch.equal(first, again)
    shuffled = rows.flip(0)
    got = gather_rows_backward(d_out.flip(0), shuffled, len(hidden), backend)
    torch.testing.assert_close(got, first)


def test_nothing_but_the_rows_is_kept():
    hidden, rows, _ = make(16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gather_rows(hidden, rows)
    assert [(x.data_ptr(), x.dtype) for x in kept] == [(rows.data_ptr(), torch.int64)]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_edges(backend):
    hidden = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    (gradient,) = torch.autograd.grad(gather_rows(hidden, none, backend).sum(), hidden)
    assert bool((gradient == 0).all())
    last = torch.tensor([3, 3], device=DEVICE)
    out = gather_rows(hidden, last, backend)
    for upstream in (1.0, -2.5):  # two backward passes, and an expanded gradient
        (gradient,) = torch.autograd.grad((upstream * out).sum(), hidden, retain_graph=True)
        assert gradient[:, 0].tolist() == [0.0, 0.0, 0.0, 2 * upstream]
    empty = torch.empty(0, 3, device=DEVICE)
    assert gather_rows_backward(empty, none, 0, backend).shape == (0, 3)


def test_nothing_reads_a_value_back():
    """Tensors without data cannot be read: the same code runs on a CUDA device without waiting for it."""
    hidden = torch.empty(9, 4, device="meta", requires_grad=True)
    gather_rows(hidden, torch.empty(5, dtype=torch.int64, device="meta")).sum().backward()
    assert hidden.grad.shape == (9, 4)


def test_compiled():
    hidden, rows, d_out = make(8, torch.float32)

    def twice(hidden):
        return gather_rows(2 * hidden, rows)

    outputs = twice(hidden), torch.compile(twice, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(*outputs)
    eager, got = (torch.autograd.grad(out, hidden, d_out)[0] for out in outputs)
    assert got.any()
    assert torch.equal(got, eager)


@pytest.mark.parametrize(
    ("hidden", "rows", "message"),
    [
        (torch.zeros(4), torch.tensor([0]), r"hidden must be \[T, D\]"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.tensor([0]), "floating-point"),
        (torch.zeros(4, 2), torch.tensor([0], dtype=torch.int32), r"rows must be \[N\] int64"),
        (torch.zeros(4, 2), torch.tensor([[0]]), r"rows must be \[N\] int64"),
        (torch.zeros(4, 2), torch.tensor([1, 4]), r"in \[0, 4\).*from 1 to 4"),
        (torch.zeros(4, 2), torch.tensor([-1, 2]), "from -1 to 2"),
    ],
)
def test_what_does_not_fit(hidden, rows, message):
    with pytest.raises(ValueError, match=message):
        gather_rows(hidden, rows)


def test_the_backend(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("revisual_fast.kernels.dispatch.TRITON_INSTALLED", True)
    assert (pick_backend("auto", cpu), pick_backend("auto", cuda)) == ("torch", "triton")
    assert (pick_backend("torch", cuda), pick_backend("triton", cuda)) == ("torch", "triton")
    with pytest.raises(ValueError, match="made for CUDA, the tensors are on cpu"):
        pick_backend("triton", cpu)
    with pytest.raises(ValueError, match="one of auto, triton, torch"):
        pick_backend("cuda", cpu)
    monkeypatch.setattr("revisual_fast.kernels.dispatch.TRITON_INSTALLED", False)
    assert pick_backend("auto", cuda) == "torch"
    with pytest.raises(ValueError, match="not installed: pip install triton"):
        pick_backend("triton", cuda)
