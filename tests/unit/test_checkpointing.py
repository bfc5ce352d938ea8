"""Gradient checkpointing of packed rows: the same gradients, every layer computed once more and no oftener."""

from collections import Counter

import pytest
import torch

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.config import ModelConfig
from revisual_fast.packing import Layout
from revisual_fast.policy.load import load_policy
from revisual_fast.policy.model import Policy
from tests.groups import make_groups
from tests.memory import LiveStorages
from tests.models import TEXT, VISION, tiny

SHAPES = [(9, [(1, 4, 6), (1, 2, 2)], [5, 3, 1]), (7, [], [4, 6]), (6, [(1, 6, 4)], [8])]
LAYOUTS: tuple[Layout, ...] = ("shared", "varlen")


def groups_of(policy: Policy):
    images = policy.family.visual is not None
    return make_groups(policy.family, [(text, grids if images else [], own) for text, grids, own in SHAPES])


def train(policy: Policy, layout: Layout = "shared") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one packed row."""
    policy.model.zero_grad()
    batch = policy.pack(groups_of(policy), layout)
    advantages = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(3))
    tokens = TokenBatch(advantages, cu_seqlens=batch.cu_seqlens)
    out = linear_policy_loss(policy.hidden(batch), policy.head_weight, batch.targets, tokens, PolicyObjective())
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[*TEXT, *VISION])
def policy(request) -> Policy:
    policy = Policy(tiny(request.param))
    policy.model.train()
    return policy


def checkpointed(policy: Policy) -> Policy:
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


class Calls(Counter):
    """How often each layer runs, and each layer's attention."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        visual = policy.family.visual
        towers = {"text": policy.family.text.layers, "vision": [] if visual is None else visual.blocks}
        for tower, layers in towers.items():
            for i, layer in enumerate(layers):
                layer.register_forward_pre_hook(lambda *_, key=(tower, i): self.update([key]))
        make = policy.plan

        def counted(batch):
            plan = make(batch)
            attend = plan.attend
            plan.attend = lambda layer, *args: (self.update([("attention", layer)]), attend(layer, *args))[1]
            return plan

        monkeypatch.setattr(policy, "plan", counted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_are_the_same_to_the_last_bit(policy, layout):
    loss, gradients = train(policy, layout)
    again, recomputed = train(checkpointed(policy), layout)
    assert loss == again
    assert recomputed.keys() == gradients.keys()
    assert len(gradients) == len(list(policy.model.parameters())), "every parameter takes part"
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_every_layer_runs_once_more_for_a_packed_row(policy, monkeypatch):
    calls = Calls(policy, monkeypatch)
    train(policy)
    assert set(calls.values()) == {1}
    layers = len(calls)
    calls.clear()
    train(checkpointed(policy))
    assert set(calls.values()) == {2}
    assert len(calls) == layers


def test_a_frozen_tower_is_not_computed_again(monkeypatch):
    policy = Policy(tiny("qwen2_5_vl"))
    policy.model.train()
    policy.freeze_vision()
    calls = Calls(checkpointed(policy), monkeypatch)
    train(policy)
    assert {n for (part, _), n in calls.items() if part == "vision"} == {3}, "once for each image"
    assert {n for (part, _), n in calls.items() if part != "vision"} == {2}


def test_a_pass_without_gradient_runs_once(policy, monkeypatch):
    calls = Calls(checkpointed(policy), monkeypatch)
    with torch.no_grad():
        policy.hidden(policy.pack(groups_of(policy)))
    assert set(calls.values()) == {1}


def test_less_is_kept(policy):
    kept = []
    for _ in range(2):
        with LiveStorages([*policy.model.parameters(), *policy.model.buffers()]) as live:
            hidden = policy.hidden(policy.pack(groups_of(policy)))
            kept.append(live.now)
        del hidden
        checkpointed(policy)
    assert kept[1] < kept[0] / 3


def test_the_setting_switches_it_on(tiny_vl, monkeypatch):
    config = ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu", gradient_checkpointing=True)
    policy = load_policy(tiny_vl, config)
    calls = Calls(policy, monkeypatch)
    train(policy)
    assert set(calls.values()) == {2}
