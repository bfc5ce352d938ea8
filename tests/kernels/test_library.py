"""The ops under torch.compile and the dispatcher: no graph break, the same results, honest fakes and FLOP formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from revisual_fast import (
    LinearLogprob,
    LinearPolicyLoss,
    PolicyLossFromLogits,
    PolicyObjective,
    TokenBatch,
    library,
    linear_logprob,
    linear_policy_loss,
    policy_loss_from_logits,
)
from revisual_fast.kernels import plan
from tests.numerics import count_gemm_flops, grads, make, make_tokens

OBJECTIVES = {
    "grpo": PolicyObjective.preset("grpo", kl_coef=0.1, entropy_coef=0.1),
    "gspo": PolicyObjective.preset("gspo", clip_low=9.0, clip_high=9.0),
    "corrected": PolicyObjective(rollout_correction="truncate", rollout_level="sequence"),
}


PLAIN = PolicyObjective()


def inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    x = make(dtype=torch.float32)
    hidden, weight = (x[name].detach().requires_grad_(requires_grad) for name in ("hidden", "weight"))
    return hidden, weight, x["targets"], make_tokens(x)


def mask(targets: Tensor, vocab: int = 19, kept: int = 4) -> tuple[Tensor, Tensor]:
    ids = (targets[:, None] + torch.arange(kept) * 3) % vocab
    return torch.arange(0, ids.numel() + 1, kept), ids.flatten()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_linear_policy_loss_compiles_without_a_graph_break(name: str) -> None:
    hidden, weight, targets, tokens = inputs()

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = linear_policy_loss(hidden * 2, weight, targets, tokens, OBJECTIVES[name], temperature=0.9, softcap=9.0)
        return 3 * out.loss, out.logp, out.metrics

    eager = step(hidden, weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grads(compiled[0], hidden, weight), grads(eager[0], hidden, weight))


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_op_compiles_without_a_graph_break(inplace: bool) -> None:
    hidden, weight, targets, tokens = inputs()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return 3 * policy_loss_from_logits(logits, targets, tokens, OBJECTIVES["grpo"], inplace=inplace).loss

    eager = step(hidden, weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grads(compiled, hidden, weight), grads(eager, hidden, weight))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("with_mask", [False, True])
def test_logprob_compiles_without_a_graph_break(with_mask: bool, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.linear.SAVED_BYTES, "cpu", 1 << 20 if keep else 0)
    hidden, weight, targets, _ = inputs()
    sampling_mask = mask(targets) if with_mask else None

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, entropy = linear_logprob(hidden, weight, targets, sampling_mask=sampling_mask)
        return logp.square().sum() - entropy.sum()

    eager = step(hidden, weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grads(compiled, hidden, weight), grads(eager, hidden, weight))


def test_own_functions_compile_without_a_graph_break() -> None:
    hidden, weight, targets, tokens = inputs()
    tokens = TokenBatch(tokens.advantages)

    def own(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        assert tokens.advantages is not None
        return -(tokens.advantages * logp).mean() - 0.1 * entropy.mean()

    for objective in (own, PolicyObjective(surrogate=lambda r: -r.advantage * r.logp)):

        def step(hidden: Tensor, weight: Tensor, objective: Any = objective) -> Tensor:
            return linear_policy_loss(hidden, weight, targets, tokens, objective).loss

        eager, compiled = step(hidden, weight), torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(grads(compiled, hidden, weight), grads(eager, hidden, weight))


def test_inductor() -> None:
    hidden, weight, targets, tokens = inputs()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(torch.tanh(hidden), weight, targets, tokens, OBJECTIVES["grpo"]).loss * 2

    compiled = torch.compile(step, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(compiled, step(hidden, weight))
    torch.testing.assert_close(grads(compiled, hidden, weight), grads(step(hidden, weight), hidden, weight))


def test_lengths_do_not_recompile() -> None:
    """Two compilations, for one length and for any, of every op."""
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, which: str) -> Tensor:
        if which == "logprob":
            return linear_logprob(hidden, weight, targets)[0].sum()
        if which == "logits":
            return policy_loss_from_logits(hidden @ weight.T, targets, TokenBatch(advantages), PLAIN).loss
        return linear_policy_loss(hidden, weight, targets, TokenBatch(advantages), PLAIN).loss

    for which in ("loss", "logprob", "logits"):
        torch.compiler.reset()
        compilations, compiled = 0, torch.compile(step, fullgraph=True, backend=backend)
        for n in (5, 9, 14, 33, 21):
            x = make(n, dtype=torch.float32)
            loss = compiled(x["hidden"], x["weight"], x["targets"], torch.ones(n), which)
            torch.testing.assert_close(loss, step(x["hidden"], x["weight"], x["targets"], torch.ones(n), which))
        assert compilations == 2, which


def test_columns_first_under_inductor() -> None:
    hidden, weight, targets, tokens = inputs()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, _ = linear_logprob(hidden, weight, targets)
        return linear_policy_loss(hidden, weight, targets, tokens, OBJECTIVES["grpo"]).loss + logp.sum()

    turned = (hidden.detach().T.contiguous().T.requires_grad_(), weight.detach().T.contiguous().T.requires_grad_())
    loss = torch.compile(step, fullgraph=True)(*turned)
    torch.testing.assert_close(grads(loss, *turned), grads(step(hidden, weight), hidden, weight))


def arguments(name: str, with_mask: bool) -> tuple[Any, ...]:
    hidden, weight, targets, tokens = inputs(requires_grad=False)
    key, of = OBJECTIVES["grpo"].key, [getattr(tokens, field) for field in library.TOKEN_FIELDS]
    if with_mask:
        key = PolicyObjective().key
    masks = mask(targets) if with_mask else (None, None)
    head = (hidden, weight, None, targets, None, None, *masks)
    vector = torch.ones(14)
    return {
        "linear_policy_loss": (*head, of, key, "float32", [True, True, False], True, "torch"),
        "linear_logprob": (*head, "float32", True, "torch"),
        "linear_logprob_backward": (
            vector,
            None,
            *head,
            hidden.new_empty(0),
            "float32",
            [True, False, False],
            True,
            "torch",
        ),
        "policy_loss_from_logits": (hidden @ weight.T, targets, None, 3.0, *masks, of, key, True, "torch"),
        "policy_loss_from_logits_": (hidden @ weight.T, targets, None, 3.0, *masks, of, key, "torch"),
    }[name]


NAMES = ["linear_policy_loss", "linear_logprob", "linear_logprob_backward", "policy_loss_from_logits"]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "policy_loss_from_logits_"])
def test_schemas_and_fakes(name: str, with_mask: bool) -> None:
    op = getattr(torch.ops.revisual_fast, name)
    torch.library.opcheck(op, arguments(name, with_mask), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", NAMES[:3])
def test_the_formula_is_what_the_op_computes(name: str, with_mask: bool) -> None:
    op, function = getattr(torch.ops.revisual_fast, name), getattr(library, name).function
    of = arguments(name, with_mask)
    formula = count_gemm_flops(lambda: op(*of))
    if with_mask:  # its products are no GEMMs
        assert formula == 2 * 14 * 4 * 6 * {"linear_policy_loss": 3, "linear_logprob": 1}.get(name, 2)
        return
    goal = [
        PolicyObjective(clip_low=9.0, clip_high=9.0, entropy_coef=0.1)
        if isinstance(a, str) and a.startswith("{")
        else a
        for a in of
    ]
    assert formula == count_gemm_flops(lambda: function(*goal))


def test_activation_checkpointing_computes_the_logits_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.linear.SAVED_BYTES, "cpu", 0)
    monkeypatch.setitem(plan.CHUNK_BYTES, "cpu", 2 * 19 * 4)
    hidden, weight, targets, tokens = inputs()
    wide = PolicyObjective(clip_low=9.0, clip_high=9.0)

    def run(checkpointed: bool) -> Tensor:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_policy_loss(hidden, weight, targets, tokens, wide).loss

        if checkpointed:
            return checkpoint(loss, hidden, weight, use_reentrant=False)
        return loss(hidden, weight)

    expected = grads(run(False), hidden, weight)
    torch.testing.assert_close(grads(run(True), hidden, weight), expected)
    assert count_gemm_flops(lambda: run(True).backward()) == 12 * 14 * 6 * 19  # whatever the number of chunks


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets, tokens = inputs()
    loss = linear_policy_loss(hidden, weight, targets, tokens, OBJECTIVES["grpo"]).loss
    (first,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_modules_are_the_functions() -> None:
    hidden, weight, targets, tokens = inputs()
    o = OBJECTIVES["grpo"]
    module = LinearPolicyLoss(o, temperature=0.7)
    expected = linear_policy_loss(hidden, weight, targets, tokens, o, temperature=0.7)
    torch.testing.assert_close(module(hidden, weight, targets, tokens).loss, expected.loss)
    assert "temperature=0.7" in repr(module)
    assert "kl_coef=0.1" in repr(module)
    assert not list(module.parameters())
    with pytest.raises(ValueError, match="must be a PolicyObjective or a callable"):
        LinearPolicyLoss("grpo")  # type: ignore[arg-type]
    logits = hidden @ weight.T
    torch.testing.assert_close(
        PolicyLossFromLogits(o, softcap=5.0)(logits, targets, tokens).loss,
        policy_loss_from_logits(logits, targets, tokens, o, softcap=5.0).loss,
    )
    torch.testing.assert_close(LinearLogprob()(hidden, weight, targets), linear_logprob(hidden, weight, targets))


# Sampling-mask replay through the ops


def masked_logits(hidden: Tensor, weight: Tensor, sampling_mask: tuple[Tensor, Tensor]) -> Tensor:
    indptr, indices = sampling_mask
    kept = torch.zeros(len(hidden), len(weight), dtype=torch.bool)
    kept[torch.repeat_interleave(indptr.diff()), indices] = True
    return (hidden @ weight.T).masked_fill(~kept, -float("inf"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_replay_is_the_policy_loss_of_the_renormalised_distribution(preset: str, backend: str) -> None:
    hidden, weight, targets, tokens = inputs()
    o, sampling_mask = PolicyObjective.preset(preset), mask(targets)
    tokens = replace(tokens, ref_logp=None)
    wanted = policy_loss_from_logits(masked_logits(hidden, weight, sampling_mask), targets, tokens, o)
    out = linear_policy_loss(hidden, weight, targets, tokens, o, sampling_mask=sampling_mask, backend=backend)
    torch.testing.assert_close((out.loss, out.logp, out.entropy), (wanted.loss, wanted.logp, wanted.entropy))
    expected = grads(wanted.loss, hidden, weight)
    torch.testing.assert_close(grads(out.loss, hidden, weight), expected)
    logits = hidden @ weight.T
    for inplace in (False, True):
        same = policy_loss_from_logits(logits * 1, targets, tokens, o, sampling_mask=sampling_mask, inplace=inplace)
        torch.testing.assert_close(torch.autograd.grad(same.loss, (hidden, weight), retain_graph=True), expected)


def test_replay_refuses_what_needs_the_full_vocabulary() -> None:
    hidden, weight, targets, tokens = inputs()
    for field in ("kl_coef", "entropy_coef"):
        o = PolicyObjective(**{field: 0.1})
        with pytest.raises(
            ValueError, match=f"{field}=0.1 with sampling_mask: KL and entropy are defined over the full"
        ):
            linear_policy_loss(hidden, weight, targets, tokens, o, sampling_mask=mask(targets))
