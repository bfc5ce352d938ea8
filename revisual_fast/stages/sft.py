"""Supervised fine-tuning: cross-entropy on the responses, through the same packed rows and fused loss as RL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revisual_fast.config import SFTConfig
from revisual_fast.data.processor import Example
from revisual_fast.distributed import world
from revisual_fast.losses import PolicyObjective, TokenBatch
from revisual_fast.ops import linear_policy_loss
from revisual_fast.packing import Group
from revisual_fast.ranges import span
from revisual_fast.stages.stage import Stage, StageContext, Stopwatch

__all__ = ["SFTStage"]


class SFTStage(Stage):
    """Each step: ``batch_size`` records, mean cross-entropy over their response tokens, one optimizer update."""

    def __init__(self, context: StageContext, stage: SFTConfig):
        super().__init__(context, stage, batch=stage.batch_size)
        self.batch_size = stage.batch_size
        self.objective = PolicyObjective.preset("sft")

    def step(self, clock: Stopwatch) -> dict[str, Any]:
        with clock("data"):
            examples = self.draw(self.batch_size)
            groups = [Group(e.prompt, [_response(e)]) for e in examples]
        with clock("update"):
            metrics = self._update(groups)
        tokens = sum(group.tokens(self.layout) for group in groups)
        metrics["throughput/update"] = tokens / clock.seconds["update"]
        return metrics

    def _update(self, groups: list[Group]) -> dict[str, Any]:
        targets = sum(len(c) for group in groups for c in group.completions)
        loss = torch.zeros((), device=self.policy.device)
        for micro in self.plan(groups):
            batch = self.policy.pack(micro.of(groups), self.layout)
            weight = torch.full(batch.targets.shape, 1 / targets, device=self.policy.device)
            out = linear_policy_loss(
                self.policy.hidden(batch),
                self.policy.head_weight,
                batch.targets,
                TokenBatch(advantages=None, weight=weight),
                self.objective,
                bias=self.policy.head_bias,
            )
            with span("backward"):
                out.loss.backward()
            loss += out.loss.detach()
        value = float(world().sum(loss))
        return {"loss": value, **self.apply_gradients(value)}


def _response(example: Example) -> Tensor:
    assert example.response is not None, "the stage encodes with responses"
    return example.response
