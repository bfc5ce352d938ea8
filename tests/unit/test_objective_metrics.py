"""What is reported of a policy loss, and that its names can be known beforehand."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from revisual_fast.losses import PRESETS, PolicyObjective, TokenBatch, loss_gradients
from revisual_fast.objective_metrics import metric_names, policy_metrics
from tests.numerics import loss_batch

CPU = torch.device("cpu")


def metrics(o: Any, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    prepared = o.prepare(tokens, len(logp), logp.dtype, CPU)[0] if isinstance(o, PolicyObjective) else tokens
    return policy_metrics(o, logp, entropy, prepared)


def test_values() -> None:
    logp, entropy, tokens = loss_batch()
    o = PolicyObjective(rollout_correction="truncate", rollout_cap=1.1)
    assert tokens.old_logp is not None
    assert tokens.ref_logp is not None
    assert tokens.rollout_logp is not None
    assert tokens.advantages is not None
    ratio, d = (logp - tokens.old_logp).exp(), tokens.ref_logp - logp
    importance = (tokens.old_logp - tokens.rollout_logp).exp().clamp(max=1.1)
    clipped = ((tokens.advantages > 0) & (ratio > 1.2)) | ((tokens.advantages < 0) & (ratio < 0.8))
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
    torch.testing.assert_close(metrics(o, logp, entropy, tokens), expected)


@pytest.mark.parametrize("name", [*PRESETS, "own"])
def test_names_follow_from_settings_and_fields(name: str) -> None:
    logp, entropy, tokens = loss_batch()
    extras: list[dict[str, Any]] = [{}, {"off_policy_mask": 0.1}, {"rollout_correction": "mask"}]
    for extra, missing in itertools.product(extras, [(), ("old_logp",), ("ref_logp",), ("rollout_logp",)]):
        if (name == "own" and extra) or ("rollout_correction" in extra and "rollout_logp" in missing):
            continue
        o: Any = PolicyObjective.preset(name, constant_length=5, **extra) if name != "own" else lambda *_: logp.sum()
        some = replace(tokens, **dict.fromkeys(missing, None))
        found = metrics(o, logp, entropy, some)
        assert tuple(found) == metric_names(o, some)
        assert all(v.ndim == 0 and v.dtype == logp.dtype and not v.requires_grad for v in found.values())
        assert {k.split("/")[0] for k in found} - {"entropy", "ratio", "kl"} == {
            *(
                ["clip_fraction"]
                if name in ("grpo", "dapo", "bnpo", "dr_grpo", "gspo", "luspo", "cispo", "gmpo")
                else []
            ),
            *(["masked_sequences"] if "off_policy_mask" in extra else []),
            *(["importance"] if "rollout_correction" in extra else []),
        }


@pytest.mark.parametrize("bounds", [{}, {"delta": 1.3}, {"dual_clip": 1.4}, {"delta": 1.6, "dual_clip": 1.4}])
def test_clip_fraction_is_the_share_of_rows_without_gradient(bounds: dict[str, Any]) -> None:
    logp, entropy, tokens = loss_batch((60, 140))
    for o in (PolicyObjective(**bounds), PolicyObjective.preset("gmpo", clip_low=0.3)):
        prepared, _ = o.prepare(tokens, len(logp), logp.dtype, CPU)
        _, c, _ = loss_gradients(o, logp, entropy, prepared)
        share = policy_metrics(o, logp, entropy, prepared)["clip_fraction"].item()
        assert 0 < share < 1
        assert share == pytest.approx((c == 0).double().mean().item())


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo"])
def test_on_policy_nothing_is_clipped_or_masked(name: str) -> None:
    logp, entropy, tokens = loss_batch()
    o = PolicyObjective.preset(name, off_policy_mask=0.1)
    found = metrics(o, logp, entropy, replace(tokens, old_logp=None, rollout_logp=None))
    assert found["ratio/mean"] == found["ratio/max"] == 1
    assert found["clip_fraction"] == found["masked_sequences"] == 0


def test_masked_sequences_counts_sequences_not_rows() -> None:
    logp = torch.zeros(9)
    cu = torch.tensor([0, 6, 6, 8, 9], dtype=torch.int32)
    tokens = TokenBatch(torch.tensor([-1.0, -1.0, 1.0, 1.0]), logp + 0.5, cu_seqlens=cu)
    found = metrics(PolicyObjective(off_policy_mask=0.4), logp, logp, tokens)
    assert found["masked_sequences"] == 0.25  # the first; the second is empty, the others are positive
    found = metrics(PolicyObjective(off_policy_mask=0.6), logp, logp, tokens)
    assert found["masked_sequences"] == 0


def test_no_rows_give_zeros() -> None:
    none = torch.zeros(0)
    tokens = TokenBatch(none, none, none, none, torch.zeros(1, dtype=torch.int32))
    for name in PRESETS:
        o = PolicyObjective.preset(name, off_policy_mask=0.1, rollout_correction="mask", constant_length=2)
        found = metrics(o, none, none, tokens)
        assert dict.fromkeys(found, 0.0) == {k: v.item() for k, v in found.items()}


def test_fields_of_the_batch_are_not_changed() -> None:
    logp, entropy, tokens = loss_batch()
    before = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    copies = {k: v if v is None else v.clone() for k, v in before.items()}
    metrics(PolicyObjective(dual_clip=1.2, off_policy_mask=0.1), logp, entropy, tokens)
    for key, value in before.items():
        assert value is copies[key] is None or torch.equal(value, copies[key])
