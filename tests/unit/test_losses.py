"""Objectives: every combination against naive float64 autograd, and the properties of single formulas."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss
from revisual_fast.kernels import reference
from revisual_fast.losses import PRESETS, SURROGATES, aggregation_weights, loss_gradients, segment_ids, segment_sum
from tests.numerics import flops_of, grads, make, make_tokens, naive_logprob, naive_policy_loss

CPU = torch.device("cpu")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of 19 float64 logits a chunk."""
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 5 * 19 * 8)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "delta": 1.5},
    {"dual_clip": 1.3},
    {"surrogate": "cispo", "clip_high": 0.1},
    {"surrogate": "sapo"},
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
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "sequence_sum"},
    {"aggregation": "constant", "constant_length": 7},
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("on_policy", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "clip")
def test_full_product_against_naive_float64(variant: dict[str, Any], level: str, on_policy: bool) -> None:
    x = make()
    tokens = make_tokens(x)
    tokens = replace(tokens, old_logp=None) if on_policy else tokens
    logp, entropy = naive_logprob(**x)
    for i, parts in enumerate(itertools.product(KL, CORRECTIONS, AGGREGATIONS)):
        fields = {name: value for part in parts for name, value in part.items()}
        o = PolicyObjective(level=level, entropy_coef=0.05 * (i % 3 == 0), **variant, **fields)
        expected = naive_policy_loss(logp, entropy, tokens, o)
        loss = linear_policy_loss(**x, tokens=tokens, objective=o).loss
        wanted = torch.autograd.grad(expected, [x["hidden"], x["weight"]], retain_graph=True)
        got = grads(loss, x["hidden"], x["weight"])
        torch.testing.assert_close((loss, *got), (expected, *wanted), rtol=1e-9, atol=1e-12, msg=str(fields))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_ratio_is_exactly_one(level: str) -> None:
    x = make(dtype=torch.float32)
    o = PolicyObjective(level=level)
    tokens = make_tokens(x, old_logp=None)
    out = linear_policy_loss(**x, tokens=tokens, objective=o)
    assert out.metrics["ratio/mean"] == out.metrics["ratio/max"] == 1
    assert out.metrics["clip_fraction"] == 0
    known = linear_policy_loss(**x, tokens=replace(tokens, old_logp=linear_logprob(**x)[0]), objective=o)
    torch.testing.assert_close(
        *[grads(each.loss, x["hidden"], x["weight"]) for each in (out, known)], rtol=1e-5, atol=1e-7
    )


@pytest.mark.usefixtures("small_chunks")
def test_own_surrogate_and_own_objective() -> None:
    x = make()
    tokens = make_tokens(x)

    def surrogate(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
        return -advantage * logp

    def objective(logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        assert tokens.advantages is not None
        return -(tokens.advantages * logp).mean() - 0.1 * entropy.mean()

    reinforce = PolicyObjective(surrogate="reinforce", entropy_coef=0.1)
    expected = linear_policy_loss(**x, tokens=tokens, objective=reinforce)
    wanted = grads(expected.loss, x["hidden"], x["weight"])
    for own, flops in ((replace(reinforce, surrogate=surrogate), 6), (objective, 8)):
        out = linear_policy_loss(**x, tokens=tokens, objective=own)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(grads(out.loss, x["hidden"], x["weight"]), wanted)
        assert flops_of(x, own, tokens) == flops
        torch.testing.assert_close(out.metrics["kl"], expected.metrics["kl"])


def test_own_functions_with_a_wrong_shape() -> None:
    x = make()
    tokens = make_tokens(x)
    with pytest.raises(ValueError, match="scalar loss"):
        linear_policy_loss(**x, tokens=tokens, objective=lambda logp, entropy, tokens: -logp)
    bad = PolicyObjective(surrogate=lambda ratio, logp, advantage, o: -logp.sum())
    with pytest.raises(ValueError, match="one loss a row"):
        linear_policy_loss(**x, tokens=tokens, objective=bad)
    with pytest.raises(ValueError, match="PolicyObjective or a callable"):
        linear_policy_loss(**x, tokens=tokens, objective="grpo")  # type: ignore[arg-type]


def test_metrics() -> None:
    x = make()
    tokens = make_tokens(x)
    o = PolicyObjective(rollout_correction="truncate", rollout_cap=1.1)
    out = linear_policy_loss(**x, tokens=tokens, objective=o)
    assert all(value.ndim == 0 and not value.requires_grad for value in out.metrics.values())
    assert not out.logp.requires_grad
    assert not out.entropy.requires_grad
    logp, entropy = naive_logprob(**x)
    assert tokens.old_logp is not None
    assert tokens.ref_logp is not None
    assert tokens.rollout_logp is not None
    ratio, d = (logp - tokens.old_logp).exp(), tokens.ref_logp - logp
    importance = (tokens.old_logp - tokens.rollout_logp).exp().clamp(max=1.1)
    a = tokens.advantages
    assert a is not None
    clipped = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert 0 < clipped.double().mean() < 1
    expected = {
        "entropy": entropy.mean(),
        "ratio/mean": ratio.mean(),
        "ratio/max": ratio.max(),
        "clip_fraction": clipped.double().mean(),
        "kl": (d.exp() - d - 1).mean(),
        "importance/mean": importance.mean(),
        "importance/max": importance.max(),
    }
    torch.testing.assert_close(out.metrics, {name: value.detach() for name, value in expected.items()})
    bare = linear_policy_loss(**x, tokens=TokenBatch(tokens.advantages), objective=PolicyObjective(surrogate="sapo"))
    assert set(bare.metrics) == {"entropy", "ratio/mean", "ratio/max"}


@pytest.mark.parametrize("bounds", [{}, {"delta": 1.3}, {"dual_clip": 1.4}, {"delta": 1.6, "dual_clip": 1.4}])
def test_clip_fraction_is_the_share_of_rows_without_gradient(bounds: dict[str, Any]) -> None:
    x = make(200, seed=9)
    tokens = make_tokens(x, seed=9)
    o = PolicyObjective(**bounds)
    out = linear_policy_loss(**x, tokens=tokens, objective=o)
    (d_hidden,) = grads(out.loss, x["hidden"])
    assert out.metrics["clip_fraction"].item() == pytest.approx((d_hidden == 0).all(-1).double().mean().item())


def test_explicit_weight_and_micro_batches_add_up() -> None:
    x = make()
    tokens, o = make_tokens(x), PolicyObjective.preset("grpo", kl_coef=0.1)
    whole = linear_policy_loss(**x, tokens=tokens, objective=o).loss
    prepared, _ = o.prepare(tokens, 14, torch.float64, x["hidden"].device)
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 6), slice(6, 14)):
        part = prepared.rows(rows)
        out = linear_policy_loss(x["hidden"][rows], x["weight"], x["targets"][rows], part, o)
        parts = parts + out.loss
    torch.testing.assert_close(parts, whole)
    both = [grads(loss, x["hidden"], x["weight"]) for loss in (parts, whole)]
    torch.testing.assert_close(*both)


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
    ids = segment_ids(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5)
    assert ids.tolist() == [0, 0, 2, 2, 2]
    assert segment_sum(torch.arange(5.0), ids, 3).tolist() == [1.0, 0.0, 9.0]


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
    sapo = PolicyObjective.preset("sapo")
    assert (sapo.sapo_tau_pos, sapo.sapo_tau_neg) == (1.0, 1.05)
    with pytest.raises(ValueError, match=r"preset='vespo' is unknown; it is one of grpo, dapo"):
        PolicyObjective.preset("vespo")
    with pytest.raises(ValueError, match=r"has no \['beta'\]; it has \['surrogate'"):
        PolicyObjective.preset("grpo", beta=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surrogate": "gmpo"}, f"one of {', '.join(SURROGATES)} or a callable"),
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
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**fields)


def test_an_objective_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyObjective().kl_coef = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({}, {"advantages": None}, "needs tokens.advantages"),
        ({"kl_coef": 0.1}, {}, "needs tokens.ref_logp: pass it, or set kl_coef=0"),
        ({"rollout_correction": "mask"}, {}, "needs tokens.rollout_logp"),
        ({"level": "sequence"}, {}, "needs tokens.cu_seqlens"),
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
