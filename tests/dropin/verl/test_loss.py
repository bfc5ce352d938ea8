"""verl's ppo_loss with its own policy losses and with this package's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import revisual_fast.integrations.verl as integration
from revisual_fast.integrations.verl.loss import NAME, POLICY_LOSSES
from revisual_fast.losses import PolicyObjective, TokenBatch
from tests.dropin.verl.engines import actor, batch_of, rows_of
from tests.numerics import relative_error

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
LOSSES = ("vanilla", "gspo", "sapo", "gpg", "cispo", "geo_mean")
GLOBAL: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 71, "global_batch_size": 12}
LOCAL: dict[str, Any] = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
SETTINGS: dict[str, Any] = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.4, "tau_neg": 1.2}


def make(info: dict[str, Any], weights: str, spread: float = 0.6) -> tuple[Any, dict[str, torch.Tensor]]:
    """A batch, with some response tokens and a whole response masked, and what a model would give for it."""
    data = batch_of(rows_of([(4, [], [5, 3, 4]), (6, [], [2, 7, 1])]), vision=False)
    data["response_mask"][1, 1] = data["response_mask"][4, 3] = data["response_mask"][5, 0] = 0
    if weights == "none":
        del data["rollout_is_weights"]
    elif weights == "sequence":
        data["rollout_is_weights"] = data["rollout_is_weights"][:, :1].expand(-1, 7).clone()
    tu.assign_non_tensor(data, **info)
    rng = torch.Generator().manual_seed(5)
    offsets, total = data["input_ids"].offsets(), data["input_ids"].values().numel()
    values = [-3.5 + spread * torch.randn(total, generator=rng), torch.rand(total, generator=rng)]
    leaves = [torch.nested.nested_tensor_from_jagged(x, offsets).requires_grad_() for x in values]
    return data, dict(zip(("log_probs", "entropy"), leaves, strict=True))


def run(mode: str, aggregation: str, data: Any, output: dict[str, torch.Tensor], **settings: Any) -> Any:
    config = actor(loss_agg_mode=aggregation, policy_loss=PolicyLossConfig(loss_mode=mode), **SETTINGS, **settings)
    loss, metrics = ppo_loss(config, output, data.clone())
    gradients = torch.autograd.grad(loss, list(output.values()), allow_unused=True)
    found = {name: getattr(value, "values", [value])[0] for name, value in metrics.items()}
    return (
        loss.detach(),
        {n: float(x) for n, x in found.items()},
        [None if g is None else g.values() for g in gradients],
    )


def check(ours: Any, verls: Any) -> None:
    assert relative_error(ours[0], verls[0]) < 1e-5
    assert ours[1].keys() == verls[1].keys()
    for name, value in verls[1].items():
        assert ours[1][name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    for a, b in zip(ours[2], verls[2], strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("info", [GLOBAL, LOCAL], ids=["global", "local"])
@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize(
    ("name", "weights"),
    [(n, w) for n in LOSSES for w in ("none", "token", "sequence") if (n, w) != ("gspo", "token")],  # refused, below
)
def test_loss_metrics_and_gradients_are_verls(name, aggregation, info, weights):
    data, output = make(info, weights)
    settings = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.05}
    settings["loss_scale_factor"] = 9 if info is GLOBAL else None
    ours = run(NAME if name == "vanilla" else f"{NAME}_{name}", aggregation, data, output, **settings)
    verls = run(name, aggregation, data, output, **settings)
    assert verls[2][0].abs().max() > 0
    check(ours, verls)


@pytest.mark.parametrize("name", ["vanilla", "sapo", "cispo"])
def test_ratios_that_overflow(name):
    """Log-ratios of a hundred nats in both directions, where exp would be infinite."""
    data, output = make(GLOBAL, "none", spread=60.0)
    verls = run(name, "token-mean", data, output)
    assert all(torch.isfinite(g).all() for g in verls[2])
    check(run(NAME if name == "vanilla" else f"{NAME}_{name}", "token-mean", data, output), verls)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "gpg"])
def test_what_stands_outside_of_the_mask_does_not_matter(name):
    data, output = make(GLOBAL, "sequence")
    mode = NAME if name == "vanilla" else f"{NAME}_{name}"
    before = run(mode, "token-mean", data, output)
    outside = data["response_mask"] == 0
    data["old_log_probs"][outside], data["advantages"][outside] = torch.nan, torch.nan
    after = run(mode, "token-mean", data, output)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert torch.equal(before[2][0], after[2][0])


def test_token_weights_within_one_ratio_are_refused():
    data, output = make(GLOBAL, "token")
    with pytest.raises(ValueError, match="rollout_is_weights differ between the tokens"):
        run(f"{NAME}_gspo", "token-mean", data, output)
    data["advantages"] = torch.randn_like(data["advantages"])
    for name in ("gspo", "geo_mean"):
        with pytest.raises(ValueError, match="advantages differ between the tokens"):
            run(f"{NAME}_{name}", "token-mean", data, output)


def test_a_policy_loss_needs_verls_configuration():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="config="):
        get_policy_loss_fn(NAME)(old_log_prob=x, log_prob=x, advantages=x, response_mask=x)


def test_an_objective_of_this_package_under_a_name_of_its_own():
    objective = PolicyObjective.preset("vespo")
    integration.register_objective("soft", objective)
    data, output = make(GLOBAL, "none")
    loss, metrics, (gradient, _) = run("soft", "token-mean", data, output)
    assert {"actor/ppo_kl", "actor/ratio/max", "actor/pg_loss"} <= metrics.keys()
    logp = output["log_probs"].detach().values().double().requires_grad_()
    responses = [5, 3, 4, 2, 7, 1]
    ends = data["input_ids"].offsets()[1:].tolist()
    cut = torch.cat([logp[e - n - 1 : e - 1] for e, n in zip(ends, responses, strict=True)])
    real = data["attention_mask"][:, -7:].bool()
    cu = torch.tensor([0, *responses]).cumsum(0).int()
    tokens = TokenBatch(
        data["advantages"][real], data["old_log_probs"][real], cu_seqlens=cu, mask=data["response_mask"][real].bool()
    )
    tokens = replace(tokens, weight=torch.full((22,), 2 / 71, dtype=torch.float64))
    prepared, _ = objective.prepare(tokens, 22, torch.float64, logp.device)
    counted = cut * prepared.mask
    expected = objective(counted, torch.zeros_like(cut), prepared)
    assert relative_error(loss, expected.detach()) < 1e-5
    assert relative_error(gradient, torch.autograd.grad(expected, logp)[0]) < 1e-5
    integration.unpatch()
    assert "soft" not in POLICY_LOSS_REGISTRY
    integration.patch()


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("vanilla", {}, "exists already"),
        (NAME, {}, "exists already"),
        ("mine", {"kl_coef": 0.1}, "use_kl_loss"),
        ("mine", {"entropy_coef": 0.1}, "entropy_coeff"),
        ("mine", {"rollout_correction": "mask"}, "computes the weights itself"),
    ],
)
def test_objectives_that_verl_would_add_to_are_refused(name, settings, match):
    with pytest.raises(ValueError, match=match):
        integration.register_objective(name, PolicyObjective(**settings))
    assert "mine" not in POLICY_LOSS_REGISTRY


def test_every_loss_is_registered():
    assert POLICY_LOSSES.keys() == {NAME, *(f"{NAME}_{name}" for name in LOSSES if name != "vanilla")}
    for name, loss in POLICY_LOSSES.items():
        assert get_policy_loss_fn(name) is loss
