"""Gradients of several chunks multiplied at once, as on CUDA: a CPU does the same if it is given a budget for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss
from revisual_fast.kernels import linear, plan
from revisual_fast.kernels.superchunk import close_gaps
from tests.memory import LiveStorages
from tests.numerics import flops_of, grads, make, make_tokens, relative_error

N, D, V = 14, 6, 19
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TOKEN = PolicyObjective(kl_coef=0.1, entropy_coef=0.1)
GSPO = PolicyObjective.preset("gspo", clip_low=0.2, clip_high=0.2)


def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
    return -(logp.exp() * entropy).sum() / 7


OBJECTIVES = {"token": TOKEN, "sequence": GSPO, "own": own}


def budgets(monkeypatch: pytest.MonkeyPatch, chunk: int, superchunk: int, dtype: torch.dtype = F64) -> None:
    """So many rows a chunk and a superchunk."""
    monkeypatch.setitem(plan.SUPERCHUNK_BYTES, "cpu", superchunk * V * dtype.itemsize)
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", chunk * V * plan.statistics_dtype(dtype).itemsize)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that gives dW."""
    rows: list[int] = []

    def counted(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        rows.append(len(b))
        return add_product(total, a, b, dtype)

    add_product = linear.add_product
    monkeypatch.setattr(linear, "add_product", counted)
    return rows


def run(x: dict[str, Tensor], tokens: TokenBatch, objective: Any, which: str = "hwb", **options: Any) -> list[Tensor]:
    """Loss, logp, entropy and the gradients of the inputs named by ``which``."""
    dtype = x["hidden"].dtype
    leaves = {"h": x["hidden"], "w": x["weight"], "b": torch.linspace(-1, 1, V).to(dtype)}
    leaves = {name: t.detach().clone().requires_grad_(name in which) for name, t in leaves.items()}
    temperature = torch.linspace(0.8, 1.2, N)
    out = linear_policy_loss(
        leaves["h"],
        leaves["w"],
        x["targets"],
        tokens,
        objective,
        bias=leaves["b"],
        softcap=5.0,
        temperature=temperature,
        **options,
    )
    return [out.loss, out.logp, out.entropy, *torch.autograd.grad(2 * out.loss, [leaves[name] for name in which])]


SOME = [1.0, 0.0, -2.0, 0.0, 0.5]  # of sequences of 5, 0, 1, 3 and 5 rows
ADVANTAGES = {"all": [1.0, 1.0, -2.0, 3.0, 0.5], "some": SOME, "late": [0.0, 0.0, 0.0, 1.0, 1.0], "none": [0.0] * 5}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("sizes", [(3, 7), (2, 100), (100, 5)], ids=str)
@pytest.mark.parametrize("advantages", ADVANTAGES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nothing_changes(
    kind: str, advantages: str, sizes: tuple[int, int], skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(N, D, V)
    tokens, o = make_tokens(x, advantages=torch.tensor(ADVANTAGES[advantages])), OBJECTIVES[kind]
    o = PolicyObjective() if kind == "token" and advantages != "all" else o  # without KL, rows are inactive
    wanted = run(x, tokens, o)
    budgets(monkeypatch, *sizes)
    torch.testing.assert_close(run(x, tokens, o, skip_inactive=skip), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("which", ["h", "w", "b"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_one_gradient_alone(kind: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(N, D, V)
    tokens = make_tokens(x, advantages=torch.tensor(SOME))
    wanted = run(x, tokens, OBJECTIVES[kind], which)
    budgets(monkeypatch, 3, 7)
    torch.testing.assert_close(run(x, tokens, OBJECTIVES[kind], which), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_backend_and_dtype(
    kind: str, dtype: torch.dtype, logits_dtype: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (dtype, logits_dtype) == (F32, "bfloat16"):
        pytest.skip("refused")
    x = make(N, D, V, dtype)
    tokens, options = make_tokens(x, advantages=torch.tensor(SOME)), {"backend": backend, "logits_dtype": logits_dtype}
    wide = {k: t if k == "targets" else t.detach().double() for k, t in x.items()}
    exact, plain = run(wide, tokens, OBJECTIVES[kind]), run(x, tokens, OBJECTIVES[kind], **options)
    budgets(monkeypatch, 3, 8, dtype)
    ours = run(x, tokens, OBJECTIVES[kind], **options)
    step = 1e-6 if dtype == F32 else 2**-8
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + step


@pytest.mark.parametrize(("rows", "wanted"), [(100, [14]), (8, [7, 7]), (5, [5, 5, 4])])
def test_one_product_a_superchunk(
    rows: int, wanted: list[int], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(N, D, V)
    budgets(monkeypatch, 2, rows)
    run(x, make_tokens(x), TOKEN)
    assert products == wanted


@pytest.mark.parametrize(("rows", "wanted"), [(100, [14]), (9, [9, 5]), (6, [5, 4, 5])])
def test_whole_sequences_fill_it(
    rows: int, wanted: list[int], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(N, D, V)
    budgets(monkeypatch, 5, rows)
    o = PolicyObjective.preset("gspo", clip_low=9.0, clip_high=9.0)
    run(x, make_tokens(x), o)
    assert products == wanted
    assert flops_of(x, o, make_tokens(x)) == 6


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inactive_rows_leave_the_products(level: str, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(N, D, V)
    tokens = make_tokens(x, advantages=torch.tensor(SOME))
    o = PolicyObjective(level=level, clip_low=9.0, clip_high=9.0)
    budgets(monkeypatch, 5, 100)
    run(x, tokens, o)
    assert products == [11]
    assert flops_of(x, o, tokens) == pytest.approx(2 + 4 * 11 / 14)
    products.clear()
    run(x, tokens, o, skip_inactive=False)
    assert products == [14]
    products.clear()
    gradients = run(x, make_tokens(x, advantages=torch.zeros(5)), o)[3:]
    assert products == []
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_logprob(dtype: torch.dtype, keep: bool, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not keep:
        monkeypatch.setitem(plan.SAVED_BYTES, "cpu", 0)
    x = make(N, D, V, dtype)
    upstream = (torch.arange(N) % 3).to(torch.promote_types(dtype, F32))

    def gradients() -> tuple[Tensor, ...]:
        logp, entropy = linear_logprob(**x)
        return grads((logp * upstream).sum() + (entropy * upstream.square()).sum(), x["hidden"], x["weight"])

    wanted = gradients()
    products.clear()
    budgets(monkeypatch, 3, 7, dtype)
    for a, b in zip(gradients(), wanted, strict=True):
        assert relative_error(a, b) < (1e-12 if dtype == F64 else 2**-7)
    assert products == [4, 5]  # of every 7 rows, those that are no multiple of 3


def test_the_only_product_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the weight's dtype at once, and equal to the fp32 product of the same gradient."""
    x = make(N, D, V, BF16)
    budgets(monkeypatch, 3, 100, BF16)
    tokens, seen = make_tokens(x), []
    add_product = linear.add_product

    def watched(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append((total, dtype, a.float() @ b.float()))
        return add_product(total, a, b, dtype)

    monkeypatch.setattr(linear, "add_product", watched)
    (gradient,) = grads(linear_policy_loss(**x, tokens=tokens, objective=TOKEN).loss, x["weight"])
    assert [(total, dtype) for total, dtype, _ in seen] == [(None, BF16)]
    assert relative_error(gradient, seen[0][2]) < 2**-8


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_close_gaps(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revisual_fast.kernels.superchunk.MOVED_BYTES", 3 * 4 * 8)  # three rows at a time
    generator = torch.Generator().manual_seed(n)
    for share in torch.linspace(0, 1, 12):
        active = torch.rand(n, generator=generator) < share
        k = int(active.sum())
        if not 0 < k < n:
            continue
        before = torch.randn(n, 4, generator=generator, dtype=F64)
        rows = before.clone()
        order = close_gaps(rows, active, k)
        assert sorted(order.tolist()) == active.nonzero()[:, 0].tolist()
        assert torch.equal(rows[:k], before[order])


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's fp32 logits with the superchunk's gradient, or that gradient with dX and dW: never all three."""
    n, d, v, size, superchunk = 1024, 64, 1000, 128, 512
    monkeypatch.setitem(plan.SUPERCHUNK_BYTES, "cpu", superchunk * v * 2)
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", size * v * 4)

    def peak(rows: int) -> int:
        x = make(rows, d, v, BF16)
        tokens = TokenBatch(torch.ones(rows))
        with LiveStorages(x.values()) as live:
            linear_policy_loss(**x, tokens=tokens, objective=PolicyObjective(), backend="torch").loss.backward()
        return live.peak

    small = 64 << 10  # vectors; what softmax needs besides is bounded by the blocks
    monkeypatch.setattr(linear.reference, "BLOCK_BYTES", {"cpu": 4 * v * 4})
    monkeypatch.setattr(linear, "BLOCK_BYTES", 4 << 10)
    logits, gradient, weight = size * v * 4, superchunk * v * 2, v * d
    assert peak(superchunk) < gradient + max(logits, 2 * weight) + 2 * superchunk * d + small
    assert peak(n) < gradient + logits + 4 * weight + 2 * n * d + small
    assert peak(n) > gradient + logits + 4 * weight, "the sum is there while the logits of the next superchunk are"


def order_of(calls: list[str], name: str, of: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return of(*args, **kwargs)

    return called


def test_the_count_is_read_while_the_next_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    superchunk = linear.Superchunk
    monkeypatch.setattr(linear.Head, "logits", order_of(calls, "logits", linear.Head.logits))
    monkeypatch.setattr(superchunk, "take", order_of(calls, "read", superchunk.take))
    monkeypatch.setattr(superchunk, "add", order_of(calls, "rows", superchunk.add))
    x = make(N, D, V, BF16)
    budgets(monkeypatch, 4, 7, BF16)
    linear_policy_loss(**x, tokens=make_tokens(x), objective=TOKEN)
    assert calls == ["logits", "rows"] * 2 + ["logits", "read", "rows", "logits", "rows", "read"]
