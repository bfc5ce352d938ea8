"""Our pass over a training step's group, and what its phases take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.checks import Outputs
from bench.inputs import OBJECTIVE
from bench.step_inputs import StepInputs, accumulated, build, gradients, set_checkpointing
from revisual_fast import TokenBatch, linear_policy_loss
from revisual_fast.packing import Group, Layout
from revisual_fast.policy.liger import apply_liger
from revisual_fast.policy.model import Policy


@contextmanager
def checkpointed(x: StepInputs, on: bool | None) -> Iterator[None]:
    """Inside, another choice than the step's."""
    set_checkpointing(x.model, x.step.checkpointing if on is None else on)
    try:
        yield
    finally:
        set_checkpointing(x.model, x.step.checkpointing)


def with_liger(x: StepInputs) -> StepInputs:
    """The step with a model of its own, of the same weights, whose layers are liger-kernel's, as our trainer has them
    on CUDA where liger-kernel is installed."""
    model = build(x.model.config, x.model.dtype, str(x.device), x.step.checkpointing)
    model.load_state_dict(x.model.state_dict())
    apply_liger(Policy(model).family)
    return replace(x, model=model)


class PackedStep:
    """Our passes over a step's group: one, or one for every ``size`` of its completions, each with the prompt."""

    def __init__(
        self, x: StepInputs, layout: Layout = "shared", attention: str = "auto", size: int | None = None
    ) -> None:
        self.x, self.layout, self.policy = x, layout, Policy(x.model, attention=attention)
        self.members = x.parts(size or x.step.group)

    def gradients(self) -> Outputs:
        """Of every parameter."""
        return accumulated(self.x.model, [partial(self.loss, members) for members in self.members])

    def loss(self, members: slice, done: Callable[[str], None] = lambda name: None) -> Tensor:
        """``members``' part of the loss; ``done`` is called with the name of every phase at its end."""
        x, policy = self.x, self.policy
        batch = policy.pack([Group(x.group.prompt, x.group.completions[members])], self.layout)
        tokens = TokenBatch(x.advantages[members], cu_seqlens=batch.cu_seqlens, weight=self._weight(len(batch.targets)))
        done("pack")
        hidden = policy.hidden(batch)
        done("forward")
        out = linear_policy_loss(hidden, policy.head_weight, batch.targets, tokens, OBJECTIVE, bias=policy.head_bias)
        done("loss")
        return out.loss

    def _weight(self, count: int) -> Tensor:
        return torch.full((count,), 1 / sum(self.x.step.lengths), device=self.x.device)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of a call of its own, the device waited for in between: ``pack``, ``forward``, ``loss``
        (the head's gradients included), ``backward``; and ``vision``, the tower's share of the forward pass."""
        found: dict[str, float] = {}
        start = time.perf_counter()

        def done(name: str) -> None:
            nonlocal start
            _wait(self.x.device)
            now = time.perf_counter()
            found[name], start = now - start, now

        _wait(self.x.device)
        start = time.perf_counter()
        loss = self.loss(slice(None), done)
        gradients(self.x.model, loss)
        done("backward")
        if self.x.step.grid is not None:
            batch = self.policy.pack([self.x.group], self.layout)
            done("vision")
            self.policy.image_features(batch)
            done("vision")
        return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
