"""Objectives: the properties of single formulas, settings, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch
from revisual_fast.losses import (
    PRESETS,
    SURROGATES,
    aggregation_weights,
    loss_gradients,
    segment_ids,
    segment_sum,
    sequence_mean,
    sequence_sum,
)

CPU = torch.device("cpu")


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32 if isinstance(values, tuple) else torch.float64)


def row(o: PolicyObjective, logp: list[float], **fields: Any) -> tuple[list[float], list[float]]:
    """Loss of single rows with weight 1 and dL/dlogp."""
    batch = TokenBatch(
        **{"advantages": None, "weight": torch.ones(len(logp)), **{k: tensor(v) for k, v in fields.items()}}
    )
    tokens, _ = o.prepare(batch, len(logp), torch.float64, CPU)
    value = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss = o.rows(value, torch.zeros_like(value), tokens)
    return loss.tolist(), torch.autograd.grad(loss.sum(), value)[0].tolist()


def logs(*values: float) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).log().tolist()


def test_clip_by_hand() -> None:
    ratio, old, a = logs(0.5, 0.5, 1.5, 1.5, 3.0), [0.0] * 5, [1.0, -1.0, 1.0, -1.0, -1.0]
    clip = PolicyObjective(clip_low=0.2, clip_high=0.28)
    loss, slope = row(clip, ratio, old_logp=old, advantages=a)
    assert loss == pytest.approx([-0.5, 0.8, -1.28, 1.5, 3.0])
    assert slope == pytest.approx([-0.5, 0.0, 0.0, 1.5, 3.0])
    loss, slope = row(replace(clip, delta=2.0), ratio, old_logp=old, advantages=a)
    assert loss == pytest.approx([-0.5, 0.8, -1.28, 1.5, 2.0])
    assert slope == pytest.approx([-0.5, 0.0, 0.0, 1.5, 0.0])
    loss, slope = row(replace(clip, dual_clip=1.2), ratio, old_logp=old, advantages=a)
    assert loss == pytest.approx([-0.5, 0.8, -1.28, 1.2, 1.2])
    assert slope == pytest.approx([-0.5, 0.0, 0.0, 0.0, 0.0])


def test_cispo_keeps_the_gradient_of_clipped_rows() -> None:
    o = PolicyObjective.preset("cispo", clip_high=1.0)
    _, slope = row(o, logs(0.5, 3.0), old_logp=[0.0, 0.0], advantages=[2.0, 2.0])
    assert slope == pytest.approx([-1.0, -4.0])


def test_sapo_is_reinforce_at_ratio_one() -> None:
    _, slope = row(PolicyObjective.preset("sapo"), [-1.0, -2.0], old_logp=[-1.0, -2.0], advantages=[0.7, -0.3])
    assert slope == pytest.approx([-0.7, 0.3])


def test_gmpo_bounds_the_side_that_the_advantage_pushes_to() -> None:
    o, logp = PolicyObjective.preset("gmpo"), [1.0, 0.1, -1.0]
    fields: dict[str, Any] = {"old_logp": [0.0] * 3, "cu_seqlens": (0, 3)}
    mean = math.exp((0.4 + 0.1 - 1.0) / 3)
    loss, slope = row(o, logp, advantages=[2.0] * 3, **fields)
    assert loss == pytest.approx([-2 * mean] * 3)
    assert slope == pytest.approx([0.0, -2 * mean, -2 * mean])
    mean = math.exp((1.0 + 0.1 - 0.4) / 3)
    loss, slope = row(o, logp, advantages=[-2.0], **fields)
    assert loss == pytest.approx([2 * mean] * 3)
    assert slope == pytest.approx([2 * mean, 2 * mean, 0.0])


def test_vespo_weighs_the_log_prob_by_the_sequence_weight() -> None:
    o = PolicyObjective.preset("vespo")
    logp, old = logs(0.6, 0.5), logs(0.3, 0.4)  # W = 2 * 1.25
    phi = {a: math.exp(lam) * 2.5**k * math.exp(-lam * 2.5) for a, k, lam in ((1.0, 2, 3), (-1.0, 3, 2))}
    for a in (1.0, -1.0):
        loss, slope = row(o, logp, old_logp=old, advantages=[a], cu_seqlens=(0, 2))
        assert slope == pytest.approx([-phi[a] * a] * 2)
        assert loss == pytest.approx([-phi[a] * a * x for x in logp])
    _, slope = row(o, logp, advantages=[3.0], cu_seqlens=(0, 2))
    assert slope == pytest.approx([-3.0, -3.0])  # phi(1) = 1


def test_vespo_takes_the_rollout_correction_into_its_weight() -> None:
    o = PolicyObjective.preset("vespo", rollout_correction="truncate", rollout_cap=1.5)
    fields: dict[str, Any] = {"advantages": [1.0], "cu_seqlens": (0, 2), "old_logp": logs(0.5, 0.5)}
    _, slope = row(o, logs(0.5, 0.5), rollout_logp=logs(0.4, 0.1), **fields)
    w = 1.25 * 1.5
    assert slope == pytest.approx([-math.exp(3) * w**2 * math.exp(-3 * w)] * 2)
    _, slope = row(replace(o, rollout_correction="mask"), logs(0.5, 0.5), rollout_logp=logs(0.4, 0.1), **fields)
    assert slope == pytest.approx([0.0, 0.0], abs=1e-12)  # a masked token weighs 1e-8, and k = 2


@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_vespo_is_finite_for_sequences_far_off(shift: float) -> None:
    logp = [-1.0] * 4
    loss, slope = row(
        PolicyObjective.preset("vespo"), logp, old_logp=[-1.0 + shift] * 4, advantages=[1.0, -1.0], cu_seqlens=(0, 2, 4)
    )
    assert loss == pytest.approx([0.0] * 4, abs=1e-12)
    assert slope == pytest.approx([0.0] * 4, abs=1e-12)


def test_off_policy_mask_takes_the_surrogate_of_negative_sequences_that_drifted() -> None:
    o = PolicyObjective(surrogate="reinforce", off_policy_mask=0.5, kl="k1", kl_coef=1.0, entropy_coef=0.0)
    fields: dict[str, Any] = {
        "advantages": [-1.0, -1.0, 1.0],
        "cu_seqlens": (0, 2, 4, 5),
        "ref_logp": [0.0] * 5,
        "old_logp": [0.0, -2.0, -1.9, 0.0, 0.0],
    }
    logp = [-2.0] * 5  # drift: 1, 1.05 and 2 nats a token
    _, slope = row(o, logp, **fields)
    assert slope == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.0])  # KL only; the positive sequence keeps its surrogate
    _, slope = row(replace(o, off_policy_mask=1.0), logp, **fields)
    assert slope == pytest.approx([2.0, 2.0, 1.0, 1.0, 0.0])  # exactly at the threshold stays
    _, slope = row(o, logp, rollout_logp=[-2.0] * 2 + [0.0] * 3, **fields)
    assert slope == pytest.approx([2.0, 2.0, 1.0, 1.0, 0.0])  # the engine's log-probs go first


def test_sequence_ratio_sends_its_gradient_through_the_mean() -> None:
    o = PolicyObjective(level="sequence", clip_low=1.0, clip_high=9.0)
    logp = logs(2.0, 0.5, 3.0)
    loss, slope = row(o, logp, old_logp=[0.0] * 3, advantages=[1.0, 3.0, 1.0], cu_seqlens=(0, 2, 3))
    assert loss == pytest.approx([-1.0, -3.0, -3.0])  # the ratio of the first sequence is sqrt(2 * 0.5) = 1
    assert slope == pytest.approx([-2.0, -2.0, -3.0])  # (1 + 3) / 2 for each of its tokens


def test_kl_forms_at_and_off_the_reference() -> None:
    for kl, at_one in (("k1", -1.0), ("k2", 0.5), ("k3", torch.e - 2)):
        o = PolicyObjective(surrogate="sft", kl=kl, kl_coef=2.0)
        loss, _ = row(o, [-1.0, -2.0], ref_logp=[-1.0, -1.0])
        assert loss == pytest.approx([1.0, 2.0 + 2 * at_one])


def test_masked_rollout_has_no_policy_gradient_but_keeps_its_kl() -> None:
    o = PolicyObjective(rollout_correction="mask", rollout_cap=2.0, kl_coef=1.0, kl="k2")
    fields = {"old_logp": [0.0] * 2, "advantages": [1.0, 1.0], "ref_logp": [-1.0, -1.0]}
    loss, _ = row(o, [0.0, 0.0], rollout_logp=logs(0.4, 0.8), **fields)
    assert loss == pytest.approx([0.5, 0.5 - 1.25])
    loss, _ = row(replace(o, rollout_correction="truncate"), [0.0, 0.0], rollout_logp=logs(0.4, 0.8), **fields)
    assert loss == pytest.approx([0.5 - 2.0, 0.5 - 1.25])


def test_entropy_is_left_out_where_the_loss_does_not_contain_it() -> None:
    logp = torch.zeros(3)
    for o, expected in ((PolicyObjective.preset("sft"), None), (PolicyObjective.preset("sft", entropy_coef=0.3), -0.1)):
        tokens, _ = o.prepare(TokenBatch(None), 3, torch.float32, CPU)
        _, c, e = loss_gradients(o, logp, logp, tokens)
        torch.testing.assert_close(c, torch.full((3,), -1 / 3))
        assert (None if e is None else e.tolist()) == (expected and pytest.approx([expected] * 3))


def test_aggregation_weights() -> None:
    cu = torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32)
    assert aggregation_weights("token_mean", 6).tolist() == pytest.approx([1 / 6] * 6)
    expected = [1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 8, 1 / 8]
    assert aggregation_weights("sequence_mean", 6, cu).tolist() == pytest.approx(expected)
    assert aggregation_weights("sequence_sum", 6, cu).tolist() == pytest.approx([1 / 4] * 6)
    assert aggregation_weights("constant", 6, cu, 10).tolist() == pytest.approx([1 / 40] * 6)
    with pytest.raises(ValueError, match=r"pass tokens\.cu_seqlens"):
        aggregation_weights("sequence_mean", 6)
    with pytest.raises(ValueError, match="needs constant_length"):
        aggregation_weights("constant", 6, cu)
    with pytest.raises(ValueError, match="aggregation='mean' is unknown; it is one of token_mean"):
        aggregation_weights("mean", 6)


def test_segments() -> None:
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    values = torch.arange(5.0, dtype=torch.float64, requires_grad=True)
    assert segment_ids(cu, 5).tolist() == [0, 0, 2, 2, 2]
    assert segment_sum(values, cu).tolist() == [1.0, 0.0, 9.0]
    assert sequence_sum(values, cu).tolist() == [1.0, 1.0, 9.0, 9.0, 9.0]
    assert sequence_mean(values, cu).tolist() == [0.5, 0.5, 3.0, 3.0, 3.0]
    assert torch.autograd.gradcheck(lambda v: sequence_mean(v.square(), cu), values)
    assert torch.autograd.gradgradcheck(lambda v: sequence_sum(v.square(), cu), values)


def test_sums_over_long_sequences_are_as_good_as_plain_torch() -> None:
    """Twice plain torch's error, or one rounding of the result; 70,000 rows added up in fp32 would be off by a lot."""
    values = -torch.rand(70_000, generator=torch.Generator().manual_seed(0)) - 1
    cu = torch.tensor([0, 70_000], dtype=torch.int32)
    exact = values.double().sum()
    rounding = exact.abs() * torch.finfo(torch.float32).eps / 2
    for got, plain in (
        (sequence_sum(values, cu), values.sum()),
        (sequence_mean(values, cu) * 7e4, values.mean() * 7e4),
    ):
        bound = torch.maximum(2 * (plain.double() - exact).abs(), 3 * rounding)  # sum, division, product
        assert (got.double() - exact).abs().max() <= bound


def test_presets() -> None:
    for name in PRESETS:
        assert PolicyObjective.preset(name, entropy_coef=0.5).entropy_coef == 0.5
    facts = {
        n: (o.surrogate, o.level, o.clip_low, o.clip_high, o.aggregation)
        for n, o in ((n, PolicyObjective.preset(n)) for n in PRESETS)
    }
    assert facts["grpo"] == ("clip", "token", 0.2, 0.2, "sequence_mean")
    assert facts["dapo"] == ("clip", "token", 0.2, 0.28, "token_mean")
    assert facts["bnpo"] == ("clip", "token", 0.2, 0.2, "token_mean")
    assert facts["dr_grpo"] == ("clip", "token", 0.2, 0.2, "constant")
    assert facts["gspo"] == ("clip", "sequence", 3e-4, 4e-4, "sequence_mean")
    assert facts["luspo"][:2] + facts["luspo"][-1:] == ("clip", "sequence", "sequence_sum")
    assert facts["cispo"] == ("cispo", "token", 0.2, 4.0, "token_mean")
    assert facts["sapo"][0::4] == ("sapo", "token_mean")
    assert facts["gmpo"] == ("gmpo", "token", 0.4, 0.4, "sequence_mean")
    assert facts["vespo"][0::4] == ("vespo", "token_mean")
    vespo = PolicyObjective.preset("vespo")
    assert (vespo.vespo_k_pos, vespo.vespo_lambda_pos, vespo.vespo_k_neg, vespo.vespo_lambda_neg) == (2, 3, 3, 2)
    sapo = PolicyObjective.preset("sapo")
    assert (sapo.sapo_tau_pos, sapo.sapo_tau_neg) == (1.0, 1.05)
    with pytest.raises(ValueError, match=r"preset='ppo' is unknown; it is one of grpo, dapo"):
        PolicyObjective.preset("ppo")
    with pytest.raises(ValueError, match=r"has no \['beta'\]; it has \['surrogate'"):
        PolicyObjective.preset("grpo", beta=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surrogate": "ppo"}, f"one of {', '.join(SURROGATES)} or a callable"),
        ({"level": "turn"}, "one of token, sequence"),
        ({"kl": "k4"}, "one of k1, k2, k3"),
        ({"rollout_correction": "clip"}, "one of None, truncate, mask"),
        ({"rollout_level": "turn"}, "one of token, sequence"),
        ({"aggregation": "sum"}, "one of token_mean"),
        ({"clip_low": -0.1}, "clip_low must be >= 0"),
        ({"clip_high": float("nan")}, "clip_high must be >= 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
        ({"delta": 0.0}, "delta must be > 0"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"entropy_coef": float("nan")}, "entropy_coef must be finite"),
        ({"rollout_cap": 0.0}, "rollout_cap must be > 0"),
        ({"constant_length": 0}, "constant_length must be > 0"),
        ({"sapo_tau_neg": 0.0}, "sapo_tau_neg must be > 0"),
        ({"off_policy_mask": 0.0}, "off_policy_mask must be > 0"),
        ({"vespo_k_pos": -1.0}, "vespo_k_pos must be >= 0"),
        ({"vespo_lambda_neg": 0.0}, "vespo_lambda_neg must be > 0"),
        ({"surrogate": "gmpo", "level": "sequence"}, "weighs whole sequences by itself: leave level='token'"),
        ({"surrogate": "vespo", "level": "sequence"}, "weighs whole sequences by itself: leave level='token'"),
        (
            {"surrogate": "vespo", "rollout_correction": "mask", "rollout_level": "sequence"},
            "multiplies the tokens' corrections: leave rollout_level='token'",
        ),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**fields)


def test_an_objective_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyObjective().kl_coef = 1.0  # type: ignore[misc]


def test_the_key_rebuilds_the_objective() -> None:
    for name in PRESETS:
        o = PolicyObjective.preset(name, kl_coef=0.1 + 0.2, constant_length=7, off_policy_mask=1 / 3)
        again = PolicyObjective.from_key(o.key)
        assert again == o
        assert again.key == o.key
        assert again is PolicyObjective.from_key(o.key)
        assert "key" not in repr(o)
    assert PolicyObjective(delta=2).key == PolicyObjective(delta=2.0).key
    assert PolicyObjective(kl_coef=1e-300).key != PolicyObjective().key
    assert replace(PolicyObjective(), kl_coef=1.0).key == PolicyObjective(kl_coef=1.0).key
    assert PolicyObjective(delta=math.inf) == PolicyObjective.from_key(PolicyObjective(delta=math.inf).key)
    own = PolicyObjective(surrogate=lambda r: r.logp)
    assert own.key == ""
    with pytest.raises(ValueError, match="callable surrogate has no key"):
        PolicyObjective.from_key(own.key)
    with pytest.raises(ValueError, match="has no"):
        PolicyObjective.preset("grpo", key="x")


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({}, {"advantages": None}, "needs tokens.advantages"),
        ({"kl_coef": 0.1}, {}, "needs tokens.ref_logp: pass it, or set kl_coef=0"),
        ({"rollout_correction": "mask"}, {}, "needs tokens.rollout_logp"),
        ({"level": "sequence"}, {}, "needs tokens.cu_seqlens: level='sequence' needs to know"),
        ({"surrogate": "gmpo"}, {}, "needs tokens.cu_seqlens: surrogate='gmpo' needs to know"),
        ({"off_policy_mask": 0.1}, {"old_logp": [0.0] * 3}, "needs tokens.cu_seqlens: off_policy_mask needs to know"),
        ({"aggregation": "sequence_mean"}, {}, "counts sequences"),
        ({}, {"advantages": [1.0, 2.0]}, r"tokens.advantages must be \[3\] \(or \[S\] with cu_seqlens\)"),
        ({}, {"old_logp": [1.0]}, r"tokens.old_logp must be \[3\], one value a row; got \[1\]"),
        ({}, {"weight": [[1.0] * 3]}, r"tokens.weight must be \[3\]"),
        ({}, {"cu_seqlens": [0, 2]}, "must rise from 0 to N = 3"),
        ({}, {"cu_seqlens": [0, 2, 1, 3]}, "must rise from 0 to N = 3"),
        ({}, {"cu_seqlens": [0.0, 3.0]}, r"must be \[S\+1\] int32"),
    ],
)
def test_batches_that_do_not_fit(fields: dict[str, Any], tokens: dict[str, Any], message: str) -> None:
    values = {"advantages": [1.0] * 3, **tokens}
    batch = TokenBatch(**{name: v if v is None else torch.tensor(v) for name, v in values.items()})
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**fields).prepare(batch, 3, torch.float32, CPU)


def test_advantages_per_sequence_are_spread_over_its_rows() -> None:
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    tokens = TokenBatch(torch.tensor([1.0, -1.0]), cu_seqlens=cu).expanded(3, torch.float32, CPU)
    assert tokens.advantages is not None
    assert tokens.advantages.tolist() == [1.0, 1.0, -1.0]
