"""Our pass over a training step's group, and what its phases take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.inputs import OBJECTIVE
from bench.step_inputs import StepInputs, gradients, set_checkpointing
from revisual_fast import TokenBatch, linear_policy_loss
from revisual_fast.packing import Layout
from revisual_fast.policy.model import Policy


@contextmanager
def checkpointed(x: StepInputs, on: bool | None) -> Iterator[None]:
    """Inside, another choice than the step's."""
    set_checkpointing(x.model, x.step.checkpointing if on is None else on)
    try:
        yield
    finally:
        set_checkpointing(x.model, x.step.checkpointing)


class PackedStep:
    """Our pass over a step's group."""

    def __init__(self, x: StepInputs, layout: Layout = "shared", attention: str = "auto") -> None:
        self.x, self.layout, self.policy = x, layout, Policy(x.model, attention=attention)
        self.lengths = torch.tensor([len(c) for c in x.group.completions])

    def loss(self, done: Callable[[str], None] = lambda name: None) -> Tensor:
        """``done`` is called with the name of every phase at its end."""
        x, policy = self.x, self.policy
        batch = policy.pack([x.group], self.layout)
        advantages = x.advantages.repeat_interleave(self.lengths.to(x.device), output_size=len(batch.targets))
        tokens = TokenBatch(advantages, cu_seqlens=batch.cu_seqlens)
        done("pack")
        hidden = policy.hidden(batch)
        done("forward")
        out = linear_policy_loss(hidden, policy.head_weight, batch.targets, tokens, OBJECTIVE, bias=policy.head_bias)
        done("loss")
        return out.loss

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
        loss = self.loss(done)
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
