"""Sampling-mask replay against masked full logits in float64, its cost, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revisual_fast.kernels import kept as replay
from revisual_fast.kernels.kept import Kept, make_kept
from tests.numerics import LargestTensor, relative_error

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

BACKENDS = ["torch", "triton"]
ALL = (True, True, True)
Result = list[Tensor]  # logp, entropy, dX, dW, db


def device_of(backend: str) -> str:
    if backend == "triton":
        pytest.importorskip("triton")
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    targets: Tensor
    mask: tuple[Tensor, Tensor]
    temperature: Tensor  # [N]
    softcap: float | None
    c: Tensor
    e: Tensor | None

    def cast(self, dtype: torch.dtype | None = None, device: str | None = None) -> Case:
        fields: dict[str, Any] = {k: v.to(device, copy=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if dtype is not None:
            fields = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields.items()}
        return replace(self, **fields, mask=tuple(t.to(device) for t in self.mask))


def draw_sets(sizes: list[int], v: int, g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Kept sets of these sizes in random order, and a target of each."""
    sets = [torch.randperm(v, generator=g)[:size] for size in sizes]
    indptr = torch.tensor([0, *sizes]).cumsum(0)
    targets = [ids[torch.randint(len(ids), (1,), generator=g)] for ids in sets]
    return (indptr, torch.cat([torch.zeros(0, dtype=torch.int64), *sets])), torch.cat([indptr[:0], *targets])


def make_case(sizes: list[int], v: int = 41, d: int = 6, seed: int = 0, softcap: float | None = None) -> Case:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n = len(sizes)
    mask, targets = draw_sets(sizes, v, g)
    temperature = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
    head = (randn(n, d), randn(v, d) * 2 / d**0.5, randn(v))
    return Case(*head, targets, mask, temperature, softcap, randn(n), randn(n))


def run(case: Case, backend: str, needs: tuple[bool, bool, bool] = ALL, kept: Kept | None = None) -> Result:
    case = case.cast(device=device_of(backend))
    stats = torch.promote_types(case.hidden.dtype, torch.float32)
    kept = kept or make_kept(case.mask, case.targets, len(case.weight))
    z = replay.kept_logits(case.hidden, case.weight, case.bias, kept, stats, backend)
    s = replay.kept_statistics(z, case.targets, kept, case.temperature.to(stats), case.softcap)
    dz = replay.kept_gradient(s, kept, case.c.to(stats), None if case.e is None else case.e.to(stats))
    gradients = replay.kept_backward(dz, case.hidden, case.weight, kept, needs, backend)
    return [t.cpu() for t in (s.logp, s.entropy, *gradients) if t is not None]


def naive(case: Case, dtype: torch.dtype) -> Result:
    """Autograd through full logits that are -inf outside the kept sets, all in ``dtype``."""
    case = case.cast(dtype)
    bias = torch.zeros(len(case.weight), dtype=dtype) if case.bias is None else case.bias
    inputs = [case.hidden.requires_grad_(), case.weight.requires_grad_(), bias.requires_grad_()]
    z = inputs[0] @ inputs[1].T + inputs[2]
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    inside = torch.zeros(z.shape, dtype=torch.bool)
    for i, (start, end) in enumerate(zip(case.mask[0][:-1], case.mask[0][1:], strict=True)):
        inside[i, case.mask[1][start:end].long()] = True
    log_p = (z / case.temperature[:, None]).masked_fill(~inside, -torch.inf).log_softmax(-1)
    logp = log_p[torch.arange(len(z)), case.targets]
    entropy = -torch.where(inside, log_p.exp() * log_p.masked_fill(~inside, 0), 0).sum(-1)
    loss = (case.c * logp).sum() + (0 if case.e is None else (case.e * entropy).sum())
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)]


def within_twice_plain(got: Result, case: Case, dtype: torch.dtype, needs: tuple[bool, bool, bool] = ALL) -> None:
    """Each result's error is at most twice plain torch's, or that of one rounding."""
    exact, plain = naive(case.cast(dtype), torch.float64), naive(case, dtype)
    there = [i for i, wanted in enumerate((True, True, *needs)) if wanted]
    for i, value in zip(there, got, strict=True):
        bound = max(2 * relative_error(plain[i], exact[i]), torch.finfo(value.dtype).eps)
        assert relative_error(value, exact[i]) <= bound, ("logp", "entropy", "dX", "dW", "db")[i]


@pytest.mark.usefixtures("poisoned_and_deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("variant", ["all", "no bias", "no entropy"])
def test_everything_equals_float64_autograd(backend: str, softcap: float | None, variant: str) -> None:
    case = make_case([3, 1, 8, 41, 17, 2, 33], d=300, softcap=softcap)
    case.bias = None if variant == "no bias" else case.bias
    case.e = None if variant == "no entropy" else case.e
    torch.testing.assert_close(run(case, backend), naive(case, torch.float64), rtol=1e-11, atol=1e-12)


def stress(kind: str, case: Case) -> Case:
    assert case.bias is not None
    if kind == "peaked":
        case.weight *= 12
    elif kind == "shifted":
        case.bias += 1e4
    elif kind == "all negative":
        case.hidden.abs_()
        case.weight.abs_().mul_(-5)
    return case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "peaked", "shifted", "all negative"])
def test_the_error_is_at_most_twice_plain_torchs(backend: str, dtype: torch.dtype, kind: str) -> None:
    case = stress(kind, make_case([8, 1, 3, 30, 12, 41, 2, 9], d=150, seed=3)).cast(dtype)
    got = run(case, backend)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, dtype, torch.float32, torch.float32]
    assert (got[0] <= 0).all()
    assert (got[1] >= 0).all()
    within_twice_plain(got, case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_from_one_to_thousands(backend: str) -> None:
    case = make_case([1, 5000, 2, 127, 1, 1000], v=5003, d=5, seed=4).cast(torch.float32)
    case.targets[1] = case.mask[1][5000]  # the last entry of the large set
    needs = (True, backend == "torch" or torch.cuda.is_available(), True)  # 5003 programs are slow to interpret
    logp, entropy, d_hidden, *_, d_bias = got = run(case, backend, needs)
    for row in (0, 4):
        assert logp[row] == entropy[row] == 0
        assert (d_hidden[row] == 0).all()
    unseen = torch.ones(5003, dtype=torch.bool)
    unseen[case.mask[1]] = False
    assert unseen.any()
    assert (d_bias[unseen] == 0).all()
    within_twice_plain(got, case, torch.float32, needs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeping_the_full_vocabulary_is_the_plain_softmax(backend: str) -> None:
    case = make_case([41] * 4, softcap=4.0)
    assert case.bias is not None
    z = 4 * torch.tanh((case.hidden @ case.weight.T + case.bias) / 4) / case.temperature[:, None]
    log_p = z.log_softmax(-1)
    logp, entropy = run(case, backend)[:2]
    torch.testing.assert_close(logp, log_p[torch.arange(4), case.targets])
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_weight_is_rounded_for_the_products(backend: str) -> None:
    rounded = make_case([5, 9, 2]).cast(torch.bfloat16)
    wide = replace(rounded, weight=rounded.weight.float() * (1 + 2**-11))  # truncated, as by the interpreter, the same
    got, expected = run(wide, backend), run(rounded, backend)
    for index in (0, 1, 3, 4):  # dX takes the weight as it is
        torch.testing.assert_close(got[index], expected[index], rtol=0, atol=0)
    assert got[2].dtype == torch.bfloat16
    assert relative_error(got[2], expected[2]) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transposed_weight_and_strided_hidden(backend: str) -> None:
    case = make_case([5, 9, 2])
    strided = case.cast()
    strided.weight = case.weight.T.contiguous().T
    strided.hidden = torch.stack([case.hidden, case.hidden * torch.nan], dim=1).flatten(1)[:, :6]
    got = run(strided, backend)
    torch.testing.assert_close(got, naive(case, torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_comes_back(backend: str, needs: tuple[bool, bool, bool]) -> None:
    case = make_case([5, 9, 2])
    got, everything = run(case, backend, needs), run(case, backend)
    assert len(got) == 3
    torch.testing.assert_close(got[2], everything[2 + needs.index(True)], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_to_the_last_bit(backend: str) -> None:
    case = make_case([20] * 40, v=23).cast(torch.bfloat16)
    first, second = run(case, backend), run(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    logp, entropy, d_hidden, d_weight, d_bias = run(make_case([]), backend)
    assert logp.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, 6)
    assert d_weight.shape == (41, 6)
    assert not d_weight.any()
    assert not d_bias.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["lacking", "twice", "empty"])
def test_an_unchecked_fault_gives_nan_in_its_row_alone(backend: str, fault: str) -> None:
    case = make_case([4, 5, 6])
    indptr, indices = case.mask[0].clone(), case.mask[1].clone()
    spare = next(i for i in range(41) if i not in indices[4:9])
    if fault == "lacking":
        case.targets[1] = spare
    elif fault == "twice":
        indices[4:6] = case.targets[1]
    else:
        indptr = torch.tensor([0, 4, 4, 10])
        indices = torch.cat([indices[:4], indices[9:]])
    kept = Kept(indptr, indices, replay.kept_rows(indptr, len(indices)))
    kept = Kept(*(t.to(device_of(backend)) for t in kept))
    logp = run(case, backend, kept=kept)[0]
    assert logp.isnan().tolist() == [False, True, False]


def test_the_kernels_read_no_id_outside_the_head() -> None:
    case = make_case([4, 5, 6])
    indptr, indices = case.mask[0], case.mask[1].clone()
    indices[5], indices[12], case.bias = 41, -1, None
    kept = Kept(indptr, indices, replay.kept_rows(indptr, len(indices)))
    kept = Kept(*(t.to(device_of("triton")) for t in kept))
    logp, _, d_hidden, *_ = run(case, "triton", kept=kept)
    assert logp.isnan().tolist() == d_hidden.isnan().all(dim=1).tolist() == [False, True, True]


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that are made under it: the work of operations on elements."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def work(nnz_per_row: int, v: int, rows: int = 50, d: int = 64) -> tuple[int, int]:
    """Elements made in all, and in the largest tensor, by forward and dX; no id is above 100."""
    case = make_case([nnz_per_row] * rows, v=100, d=d).cast(torch.float32)
    case.weight = torch.randn(v, d)
    case.bias = None
    kept = make_kept(case.mask, case.targets, v)
    with Elements() as elements, LargestTensor(case.weight) as largest:
        run_on_cpu(case, kept, (True, False, False))
    return elements.total, largest.numel


def run_on_cpu(case: Case, kept: Kept, needs: tuple[bool, bool, bool]) -> None:
    z = replay.kept_logits(case.hidden, case.weight, case.bias, kept, torch.float32, "torch")
    s = replay.kept_statistics(z, case.targets, kept, case.temperature, case.softcap)
    replay.kept_backward(replay.kept_gradient(s, kept, case.c, case.e), case.hidden, case.weight, kept, needs, "torch")


def test_cost_grows_with_the_entries_and_not_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replay.CHUNK_BYTES, "cpu", 100 * 64 * 4)
    (small, largest), (many_ids, _), (many_entries, _) = work(8, 1000), work(8, 64_000), work(80, 1000)
    assert small == many_ids
    assert 5 * small < many_entries < 10 * small
    assert largest == 100 * 64  # one chunk


def test_the_only_tensor_of_the_heads_size_is_its_gradient() -> None:
    case = make_case([8] * 20, v=3000, d=16).cast(torch.bfloat16)
    kept = make_kept(case.mask, case.targets, 3000)
    with Elements() as elements, LargestTensor(case.weight) as largest:
        run_on_cpu(case, kept, ALL)
    assert largest.numel == 3000 * 16
    assert elements.total < 2 * 3000 * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ready_logits(dtype: torch.dtype) -> None:
    case = make_case([3, 1, 8, 41], softcap=2.0)
    assert case.bias is not None
    logits = (case.hidden @ case.weight.T + case.bias).to(dtype)
    kept = make_kept(case.mask, case.targets, 41)
    z = replay.kept_from_logits(logits, kept, torch.float64)
    s = replay.kept_statistics(z, case.targets, kept, case.temperature, case.softcap)
    gradient = torch.zeros_like(logits)
    replay.kept_scatter(replay.kept_gradient(s, kept, case.c, case.e), kept, gradient)
    whole = replace(case, hidden=logits.double(), weight=torch.eye(41, dtype=torch.float64), bias=None)
    logp, entropy, expected = naive(whole, torch.float64)[:3]
    torch.testing.assert_close([s.logp, s.entropy], [logp, entropy])
    torch.testing.assert_close(gradient, expected.to(dtype))


def sparse_table(path: Path, rows: int, columns: int) -> Tensor:
    """A table of zeros that takes up no memory: a file with a hole."""
    return torch.from_file(str(path), shared=True, size=rows * columns, dtype=torch.bfloat16).view(rows, columns)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_beyond_two_to_the_31_elements(backend: str, tmp_path: Path) -> None:
    if device_of(backend) == "cuda":
        pytest.skip("the table is a file on the CPU")
    d = 2048
    v = 2**31 // d + 5
    weight = sparse_table(tmp_path / "weight", v, d)
    weight[-3:] = torch.arange(1, 4)[:, None]
    indices = torch.tensor([v - 1, 2, v - 2, v - 3])
    kept = make_kept((torch.tensor([0, 2, 4]), indices), torch.tensor([2, v - 2]), v)
    hidden = torch.ones(2, d, dtype=torch.bfloat16)
    z = replay.kept_logits(hidden, weight, None, kept, torch.float32, backend)
    assert z.tolist() == [3 * d, 0, 2 * d, d]
    dz = torch.tensor([1.0, 5.0, 1.0, 3.0])
    d_hidden = replay.kept_backward(dz, hidden, weight, kept, (True, False, False), backend)[0]
    assert d_hidden is not None
    assert d_hidden[:, -1].tolist() == [3, 5]


def test_logits_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    v = 151_936
    n = 2**31 // v + 2
    logits = sparse_table(tmp_path / "logits", n, v)
    logits[-1, -1] = 7
    kept = Kept(torch.tensor([0]), torch.tensor([v - 1, v - 2]), torch.tensor([n - 1, n - 1]))
    assert replay.kept_from_logits(logits, kept, torch.float32).tolist() == [7, 0]
    replay.kept_scatter(torch.tensor([2.0, 3.0]), kept, logits)
    assert logits[-1, -2:].tolist() == [3, 2]


FAULTS: dict[str, tuple[Any, Any, str]] = {  # indptr, indices, message; targets are [1, 5], 9 ids
    "one tensor": (None, [1, 5], "pair"),
    "short": ([0, 2], [1, 5], r"\[N \+ 1\] = \[3\]"),
    "float": ([0, 1, 2], [1.0, 5.0], "indices must have one dimension and be int32 or int64"),
    "matrix": ([[0, 1, 2]], [1, 5], "indptr must have one dimension"),
    "start": ([1, 2, 3], [0, 1, 5], "from 0 to nnz = 3; it goes from 1 to 3"),
    "end": ([0, 1, 2], [1, 5, 6], "from 0 to nnz = 3; it goes from 0 to 2"),
    "falls": ([0, 3, 2], [1, 5], "falls at row 1"),
    "empty": ([0, 2, 2], [1, 5], "no id in row 1"),
    "negative": ([0, 1, 3], [1, 5, -1], "id -1 in row 1, outside"),
    "too large": ([0, 2, 3], [1, 9, 5], "id 9 in row 0, outside"),
    "twice": ([0, 1, 4], [1, 5, 3, 5], "id 5 more than once in row 1"),
    "no target": ([0, 2, 4], [1, 5, 1, 4], "row 1 lacks its target 5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    indptr, indices, message = FAULTS[fault]
    mask: Any = (torch.tensor(indptr), torch.tensor(indices)) if indptr else torch.tensor(indices)
    with pytest.raises(ValueError, match=message):
        make_kept(mask, torch.tensor([1, 5]), 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_either_integer_makes_the_same_sets(dtype: torch.dtype) -> None:
    mask = (torch.tensor([0, 1, 4], dtype=dtype), torch.tensor([1, 8, 0, 5], dtype=dtype))
    kept = make_kept(mask, torch.tensor([1, 5]), 9)
    assert [t.tolist() for t in kept] == [[0, 1, 4], [1, 8, 0, 5], [0, 1, 1, 1]]
    assert {t.dtype for t in kept} == {torch.int64}


def test_values_are_not_looked_at_off_the_cpu() -> None:
    mask = (torch.empty(3, dtype=torch.int32, device="meta"), torch.empty(7, dtype=torch.int32, device="meta"))
    kept = make_kept(mask, torch.empty(2, dtype=torch.int64, device="meta"), 9)
    assert [t.shape[0] for t in kept] == [3, 7, 7]
    with pytest.raises(ValueError, match="targets on cpu: move it"):
        make_kept(mask, torch.tensor([1, 5]), 9)


def test_every_launch_is_listed_for_the_compile_gate() -> None:
    kept_triton = pytest.importorskip("revisual_fast.kernels.kept_triton")
    for kernel, signature, constants, warps in kept_triton.gates():
        assert list(signature) == list(kernel.arg_names)
        assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constants)
        assert warps in (1, 2, 4, 8)
