"""The EasyR1 integration against a stand-in with EasyR1's names: EasyR1 itself needs transformers < 5."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from revisual_fast.integrations import SeamError, seams, unpatch
from revisual_fast.integrations.easyr1 import compute_policy_loss, patch_easyr1, unpatch_easyr1
from tests.dropin.easyr1 import standin
from tests.models import tiny
from tests.numerics import relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("verl") is not None, reason="verl is installed, and EasyR1's package has the same name"
)
SETTINGS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_dual": 1.4}
SETTINGS |= {"tau_positive": 1.0, "tau_negative": 1.2}
RESPONSES = (5, 3, 1, 6)


@pytest.fixture
def dp_actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """EasyR1's module, patched."""
    for name, module in standin.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    patch_easyr1()
    yield importlib.import_module("verl.workers.actor.dp_actor")
    unpatch_easyr1()


def batch(prompts: tuple[int, ...] = (4, 7, 2, 5)) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    before, after = max(prompts), max(RESPONSES)
    ids = torch.randint(20, 60, (len(prompts), before + after), generator=rng)
    mask = torch.zeros_like(ids)
    for i, (p, r) in enumerate(zip(prompts, RESPONSES, strict=True)):
        mask[i, before - p : before + r] = 1
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "responses": ids[:, before:],
    }


def run(actor: Any, inputs: Any, temperature: float = 0.7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp = actor._forward_micro_batch(inputs, temperature)
    real = inputs["attention_mask"][:, -logp.shape[1] :]
    actor.actor_module.zero_grad()
    (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp) * real).sum().backward()
    return (logp * real).detach(), {n: p.grad.clone() for n, p in actor.actor_module.named_parameters()}


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_log_probs_and_gradients(dp_actor, kind, padding_free):
    model, inputs = tiny(kind), batch()
    config = standin.config(padding_free=padding_free)
    expected, true = run(standin.DataParallelPPOActor(config, model), inputs)
    actor = dp_actor.DataParallelPPOActor(config, model)
    found, gradients = run(actor, inputs)
    assert relative_error(found, expected) < 1e-5
    for name, gradient in true.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name
    assert actor.log_probs_from_logits is standin.log_probs_from_logits
    assert "forward" not in vars(model.lm_head)


def test_no_logits_and_only_response_rows(dp_actor, monkeypatch):
    from revisual_fast.integrations import easyr1

    rows = []
    original = easyr1.linear_logprob
    monkeypatch.setattr(easyr1, "linear_logprob", lambda x, *a, **k: rows.append(len(x)) or original(x, *a, **k))
    actor, shapes = dp_actor.DataParallelPPOActor(standin.config(), tiny("qwen3")), []
    actor.actor_module.lm_head.register_forward_hook(lambda m, inputs, output: shapes.append(list(output.shape)))
    with torch.no_grad():
        actor._forward_micro_batch(batch(), 1.0)
    assert rows == [sum(RESPONSES)]
    assert shapes == [[1, 33, 1]]


def test_a_head_that_gets_other_rows(dp_actor):
    actor = dp_actor.DataParallelPPOActor(standin.config(), tiny("qwen3"))
    actor.actor_module.model.register_forward_hook(
        lambda m, a, out: type(out)(last_hidden_state=out.last_hidden_state[:, :5])
    )
    with pytest.raises(ValueError, match="the head gets 5 rows, the batch has 33"):
        actor._forward_micro_batch(batch(), 1.0)
    assert "forward" not in vars(actor.actor_module.lm_head)


def test_what_the_head_cannot_be_asked_for_is_left_to_easyr1(dp_actor):
    model, inputs = tiny("qwen3"), batch()
    expected, _ = run(standin.DataParallelPPOActor(standin.config(), model), inputs)
    split = dp_actor.DataParallelPPOActor(standin.config(ulysses_size=2), model)
    with pytest.warns(RuntimeWarning, match="sequence parallelism") as caught:
        found = [run(split, inputs)[0] for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(x, expected) for x in found)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.warns(RuntimeWarning, match="a head that is a Sequential"):
        found, _ = run(dp_actor.DataParallelPPOActor(standin.config(), model), inputs)
    assert torch.equal(found, expected)


def tensors(whole: bool = True) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(3)
    old, logp = (-3 + 0.5 * torch.randn(4, 6, generator=rng) for _ in range(2))
    advantages = torch.randn(4, 1, generator=rng).expand(4, 6) if whole else torch.randn(4, 6, generator=rng)
    mask = torch.arange(6) < torch.tensor(RESPONSES)[:, None]
    mask[0, 2] = False
    return old, logp.requires_grad_(), advantages, mask.long()


def check(found: Any, expected: Any, logp: torch.Tensor) -> None:
    assert relative_error(found[0].detach(), expected[0].detach()) < 1e-5
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-9)
    gradients = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (found[0], expected[0])]
    assert gradients[1].norm() > 0
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("average", ["token", "seq"])
@pytest.mark.parametrize("kind", ["default", "gspo", "gspo_token", "cispo", "sapo"])
def test_loss_metrics_and_gradient(dp_actor, kind, average):
    assert dp_actor.compute_policy_loss is compute_policy_loss
    old, logp, advantages, mask = tensors()
    settings = {**SETTINGS, "loss_type": kind, "loss_avg_mode": average}
    expected = standin.compute_policy_loss(old, logp, advantages, mask, **settings)
    check(dp_actor.compute_policy_loss(old, logp, advantages, mask, **settings), expected, logp)
    old[mask == 0] = torch.nan
    check(dp_actor.compute_policy_loss(old, logp, advantages, mask, **settings), expected, logp)


@pytest.mark.parametrize("kind", ["default", "cispo", "sapo"])
def test_an_advantage_for_each_token(dp_actor, kind):
    old, logp, advantages, mask = tensors(whole=False)
    settings = {**SETTINGS, "loss_type": kind, "loss_avg_mode": "token"}
    expected = standin.compute_policy_loss(old, logp, advantages, mask, **settings)
    check(dp_actor.compute_policy_loss(old, logp, advantages, mask, **settings), expected, logp)


@pytest.mark.parametrize("kind", ["gspo", "gspo_token"])
def test_ratios_of_responses_with_an_advantage_for_each_token_are_left_to_easyr1(dp_actor, kind):
    old, logp, advantages, mask = tensors(whole=False)
    settings = {**SETTINGS, "loss_type": kind, "loss_avg_mode": "token"}
    expected = standin.compute_policy_loss(old, logp, advantages, mask, **settings)
    with pytest.warns(RuntimeWarning, match=f"{kind} with different advantages"):
        found = dp_actor.compute_policy_loss(old, logp, advantages, mask, **settings)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(("name", "value"), [("loss_type", "ppo"), ("loss_avg_mode", "batch")])
def test_unknown_modes(dp_actor, name, value):
    settings = {**SETTINGS, "loss_type": "default", "loss_avg_mode": "token", name: value}
    with pytest.raises(ValueError, match=f"{name}='{value}' is unknown"):
        dp_actor.compute_policy_loss(*tensors(), **settings)


def test_in_and_out_and_in_again(dp_actor):
    actor = dp_actor.DataParallelPPOActor
    patched = actor._forward_micro_batch
    patch_easyr1()
    assert actor._forward_micro_batch is patched
    unpatch_easyr1()
    unpatch_easyr1()
    assert dp_actor.compute_policy_loss is standin.compute_policy_loss
    assert actor._forward_micro_batch is standin.DataParallelPPOActor._forward_micro_batch
    patch_easyr1()
    unpatch("easyr1")
    assert dp_actor.compute_policy_loss is standin.compute_policy_loss
    patch_easyr1()
    assert dp_actor.compute_policy_loss is compute_policy_loss


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: delattr(m, "compute_policy_loss"), "dp_actor:compute_policy_loss is not there"),
        (lambda m: setattr(m, "compute_policy_loss", lambda old_log_prob, log_prob: None), "compute_policy_loss takes"),
        (lambda m: setattr(m.DataParallelPPOActor, "_forward_micro_batch", lambda self, batch: None), "batch takes"),
        (
            lambda m: setattr(m.DataParallelPPOActor, "_forward_micro_batch", lambda self, micro_batch, temperature: 0),
            "does not use actor_module",
        ),
    ],
)
def test_a_seam_that_has_moved_is_named(dp_actor, change, match):
    unpatch_easyr1()
    change(dp_actor)
    with pytest.raises(SeamError, match=match):
        patch_easyr1()
    assert not seams.patched("easyr1")


def test_without_easyr1():
    with pytest.raises(SeamError, match=r"this is not EasyR1.*verl\.workers\.actor\.dp_actor is not there"):
        patch_easyr1()


def test_the_example_says_what_is_missing():
    example = Path(__file__).parents[3] / "examples/easyr1_train.py"
    assert len(example.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install -e EasyR1" in done.stderr
