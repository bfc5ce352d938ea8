"""Objectives as a whole: every combination against naive float64 autograd, parts of a batch, a caller's functions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.losses import PRESETS, Rows, loss_gradients, whole_sequences
from tests.numerics import evaluate, grads, loss_batch, make, make_tokens, naive_policy_loss

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.2, "delta": 1.3},
    {"dual_clip": 1.3},
    {"surrogate": "cispo", "clip_high": 0.1},
    {"surrogate": "sapo"},
    {"surrogate": "gmpo", "clip_low": 0.2, "clip_high": 0.3},
    {"surrogate": "vespo"},
    {"surrogate": "reinforce"},
    {"surrogate": "sft"},
]
KL: list[dict[str, Any]] = [{}] + [
    {"kl": kl, "kl_coef": 0.3, "kl_bias_correction": bias} for kl in ("k1", "k2", "k3") for bias in (False, True)
]
CORRECTIONS: list[dict[str, Any]] = [{}] + [
    {"rollout_correction": how, "rollout_cap": 1.1, "rollout_level": level}
    for how in ("truncate", "mask")
    for level in ("token", "sequence")
]
MASKS: list[dict[str, Any]] = [{}, {"off_policy_mask": 0.1}]
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "sequence_sum"},
    {"aggregation": "constant", "constant_length": 7},
]


def excluded(fields: dict[str, Any]) -> bool:
    return (fields.get("surrogate") in ("gmpo", "vespo") and fields["level"] == "sequence") or (
        fields.get("surrogate") == "vespo" and fields.get("rollout_level") == "sequence"
    )


def combinations(*axes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for parts in itertools.product(*axes):
        yield {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "clip")
def test_full_product_against_naive_float64(variant: dict[str, Any], level: str, on_policy: bool) -> None:
    logp, entropy, tokens = loss_batch()
    tokens = replace(tokens, old_logp=None) if on_policy else tokens
    for i, fields in enumerate(combinations([{**variant, "level": level}], KL, CORRECTIONS, AGGREGATIONS, MASKS)):
        if excluded(fields):
            with pytest.raises(ValueError, match=r"leave (level|rollout_level)='token'"):
                PolicyObjective(**fields)
            continue
        o = PolicyObjective(entropy_coef=0.05 * (i % 3 == 0), **fields)
        leaves = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
        expected = naive_policy_loss(*leaves, tokens, o)
        wanted = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
        got = evaluate(o, logp, entropy, tokens)
        torch.testing.assert_close(got, (expected.detach(), *wanted), rtol=1e-9, atol=1e-12, msg=str(fields))


def test_the_product_reaches_both_sides_of_every_bound() -> None:
    """Otherwise the sweep above would pass with a bound that never acts, or always does."""
    logp, _, tokens = loss_batch()
    assert tokens.old_logp is not None
    assert tokens.advantages is not None
    log_ratio, negative = logp - tokens.old_logp, tokens.advantages < 0
    for reached in (
        ~negative & (log_ratio > 0.3),  # clip, gmpo
        negative & (log_ratio < -0.223),
        negative & (log_ratio.exp() > 1.3),  # dual clip, delta
    ):
        assert 0 < reached.sum() < len(logp)
    for off in (tokens, replace(tokens, old_logp=None)):
        masked = PolicyObjective(off_policy_mask=0.1).masked(logp, off)
        assert masked is not None
        assert 0 < masked.sum() < negative.sum()
        weight = PolicyObjective(rollout_correction="mask", rollout_cap=1.1).importance(logp, off)
        assert weight is not None
        assert 0 < (weight == 0).sum() < len(logp)


@pytest.mark.parametrize("name", [*PRESETS, "own"])
@pytest.mark.parametrize("extra", [{}, {"rollout_correction": "truncate"}, {"off_policy_mask": 0.1}], ids=str)
def test_parts_add_up(name: str, extra: dict[str, Any]) -> None:
    """An objective's scope says how a batch may be cut without changing loss or gradients."""
    logp, entropy, tokens = loss_batch((3, 0, 1, 4, 2))
    own = whole_sequences(lambda r: -r.advantage * r.sequence_sum(r.log_ratio).exp())
    fields = {"constant_length": 9, "kl_coef": 0.1, "kl_bias_correction": True, "entropy_coef": 0.1, **extra}
    o = PolicyObjective(surrogate=own, **fields) if name == "own" else PolicyObjective.preset(name, **fields)
    prepared, scope = o.prepare(tokens, len(logp), torch.float64, CPU)
    together = name in ("gspo", "luspo", "gmpo", "vespo", "own") or "off_policy_mask" in extra
    assert scope == ("sequence" if together else "row")
    if together:
        cuts = [(slice(0, 3), slice(0, 4)), (slice(3, 4), slice(4, 8)), (slice(4, 5), slice(8, 10))]
        parts = [(rows, prepared.sequences(sequences, rows)) for sequences, rows in cuts]
    else:
        parts = [(rows, prepared.rows(rows)) for rows in (slice(0, 2), slice(2, 7), slice(7, 10))]
    results = [loss_gradients(o, logp[rows], entropy[rows], part) for rows, part in parts]
    loss, c, e = loss_gradients(o, logp, entropy, prepared)
    torch.testing.assert_close(torch.stack([r[0] for r in results]).sum(), loss)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), c)
    torch.testing.assert_close(torch.cat([r[2] for r in results if r[2] is not None]), e)


def test_cutting_sequences_rebases_their_boundaries() -> None:
    _, _, tokens = loss_batch((3, 0, 1, 4))
    part = tokens.sequences(slice(1, 4), slice(3, 8))
    assert part.cu_seqlens is not None
    assert part.old_logp is not None
    assert part.cu_seqlens.tolist() == [0, 0, 1, 5]
    assert part.cu_seqlens.dtype == torch.int32
    assert tokens.old_logp is not None
    assert torch.equal(part.old_logp, tokens.old_logp[3:])
    assert part.weight is None


def test_without_anything_to_compare_to_the_mask_keeps_row_scope_and_every_row() -> None:
    logp, entropy, tokens = loss_batch()
    bare = TokenBatch(tokens.advantages)
    plain = PolicyObjective()
    o = replace(plain, off_policy_mask=1e-3)
    assert o.prepare(bare, len(logp), torch.float64, CPU)[1] == "row"
    torch.testing.assert_close(evaluate(o, logp, entropy, bare), evaluate(plain, logp, entropy, bare), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*PRESETS])
def test_on_policy_equals_known_old_logp(name: str) -> None:
    logp, entropy, tokens = loss_batch()
    o = PolicyObjective.preset(name, kl_coef=0.1, constant_length=5)
    on = replace(tokens, old_logp=None)
    assert torch.equal(o.ratio(logp, on), torch.ones_like(logp))
    known = replace(tokens, old_logp=logp)
    torch.testing.assert_close(evaluate(o, logp, entropy, on), evaluate(o, logp, entropy, known))


# A caller's own functions


def test_own_surrogate_and_own_objective() -> None:
    x = make()
    tokens = make_tokens(x)

    def surrogate(r: Rows) -> Tensor:
        return -r.advantage * r.logp

    def objective(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        assert tokens.advantages is not None
        return -(tokens.advantages * logp).mean() - 0.1 * entropy.mean()

    reinforce = PolicyObjective(surrogate="reinforce", entropy_coef=0.1)
    expected = linear_policy_loss(**x, tokens=tokens, objective=reinforce)
    wanted = grads(expected.loss, x["hidden"], x["weight"])
    for own in (replace(reinforce, surrogate=surrogate), objective):
        out = linear_policy_loss(**x, tokens=tokens, objective=own)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(grads(out.loss, x["hidden"], x["weight"]), wanted)
        torch.testing.assert_close(out.metrics["kl"], expected.metrics["kl"])


def test_own_surrogate_sees_what_the_built_in_ones_see() -> None:
    """gmpo and vespo by hand on the public Rows, with everything else of the objective around them."""
    logp, entropy, tokens = loss_batch()

    @whole_sequences
    def geometric(r: Rows) -> Tensor:
        high = r.log_ratio.clamp(max=r.objective.clip_high)
        return -r.advantage * r.sequence_mean(torch.where(r.advantage < 0, r.log_ratio.clamp(min=-0.4), high)).exp()

    shared: dict[str, Any] = {"kl_coef": 0.1, "rollout_correction": "mask", "off_policy_mask": 0.1, "clip_high": 0.4}
    expected = evaluate(PolicyObjective.preset("gmpo", **shared), logp, entropy, tokens)
    got = evaluate(PolicyObjective(geometric, aggregation="sequence_mean", **shared), logp, entropy, tokens)
    torch.testing.assert_close(got, expected)


def test_own_surrogate_may_use_the_entropy() -> None:
    logp, entropy, tokens = loss_batch()
    _, _, e = evaluate(PolicyObjective(lambda r: -r.advantage * r.logp * r.entropy), logp, entropy, tokens)
    torch.testing.assert_close(e, -tokens.advantages * logp / len(logp))  # type: ignore[operator]


def test_sums_over_a_sequence_need_whole_ones() -> None:
    logp, entropy, tokens = loss_batch()
    unmarked = PolicyObjective(lambda r: r.sequence_sum(r.logp))
    with pytest.raises(ValueError, match=r"mark it, surrogate=revisual_fast.losses.whole_sequences"):
        evaluate(unmarked, logp, entropy, tokens)
    loss, _, _ = evaluate(replace(unmarked, level="sequence"), logp, entropy, tokens)
    assert loss.isfinite()
    marked = PolicyObjective(whole_sequences(lambda r: r.sequence_sum(r.logp)))
    with pytest.raises(ValueError, match="cu_seqlens: surrogate='a function' needs to know"):
        evaluate(marked, logp, entropy, replace(tokens, cu_seqlens=None))


def test_own_functions_with_a_wrong_shape() -> None:
    logp, entropy, tokens = loss_batch()
    with pytest.raises(ValueError, match="scalar loss"):
        loss_gradients(lambda logp, entropy, tokens: -logp, logp, entropy, tokens)
    with pytest.raises(ValueError, match="one loss a row"):
        evaluate(PolicyObjective(surrogate=lambda r: -r.logp.sum()), logp, entropy, tokens)
    x = make()
    with pytest.raises(ValueError, match="PolicyObjective or a callable"):
        linear_policy_loss(**x, tokens=make_tokens(x), objective="grpo")  # type: ignore[arg-type]


# Empty batches, and CUDA


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]])
@pytest.mark.parametrize("name", [*PRESETS])
def test_no_rows(name: str, cu: list[int]) -> None:
    none = torch.zeros(0)
    tokens = TokenBatch(none, none, none, none, torch.tensor(cu, dtype=torch.int32))
    extra: dict[str, Any] = {"rollout_correction": "mask", "off_policy_mask": 0.1, "constant_length": 3}
    loss, c, _ = evaluate(PolicyObjective.preset(name, kl_coef=0.1, **extra), none, none, tokens)
    assert loss == 0
    assert c.shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*PRESETS])
def test_on_cuda_without_sync_and_deterministic(name: str) -> None:
    logp, entropy, tokens = loss_batch((700, 0, 1, 2000, 33))
    extra: dict[str, Any] = {"rollout_correction": "mask", "off_policy_mask": 0.01, "constant_length": 3}
    o = PolicyObjective.preset(name, kl_coef=0.1, kl_bias_correction=True, **extra)
    expected = evaluate(o, logp, entropy, tokens)
    fields = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    tokens = TokenBatch(**{k: v if v is None else v.cuda() for k, v in fields.items()})
    logp, entropy = logp.cuda(), entropy.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [evaluate(o, logp, entropy, tokens) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([t.cpu() for t in runs[0]], list(expected))
    for again in runs[1:]:
        torch.testing.assert_close(again, runs[0], rtol=0, atol=0)
