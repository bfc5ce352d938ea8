"""One GRPO step: prompts -> rollouts -> rewards -> advantages -> PAD -> updates. What PAD drops is never run."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from revisual_fast.advantages import group_advantages, linear_schedule, pad_select, stagnation
from revisual_fast.config import GRPOConfig
from revisual_fast.data.records import Record
from revisual_fast.distributed import world
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import ranged
from revisual_fast.rewards import Rewards, RewardTable
from revisual_fast.rollout.saved import from_tensors, to_tensors
from revisual_fast.rollout.session import EngineSession
from revisual_fast.stages.collect import Batch, Collector, ScoredGroup
from revisual_fast.stages.mismatch import mismatch_metrics
from revisual_fast.stages.stage import StageContext, Stopwatch
from revisual_fast.stages.updates import PolicyStage, Sequence

__all__ = ["GRPOStage", "build_rewards"]


class GRPOStage(PolicyStage):
    """``session`` holds the engine that generates."""

    def __init__(
        self, context: StageContext, stage: GRPOConfig, session: EngineSession, reference: Policy | None = None
    ):
        super().__init__(context, stage, reference)
        self.rewards = build_rewards(context.name, stage)
        self.collector = Collector(
            session,
            self.policy,
            stage,
            self.rewards,
            self.processor,
            name=context.name,
            draw=self.draw,
            position=lambda: self.position,
            seed=lambda step, purpose: self.seed(purpose, step),
            overlap=context.config.rollout.async_ == "one_step",
        )
        self.last_sample: tuple[Record, list[dict[str, Any]]] | None = None  # a group of the last step, for the report

    def step(self, clock: Stopwatch) -> dict[str, Any]:
        with clock("rollout"):
            batch = self.collector.collect(self.steps, last=self.steps + 1 >= self.total_steps)
        sequences, metrics = self._select(batch)
        self.differences = []
        with clock("update"):
            metrics |= self._updates(sequences)
        differences = [x for part in world().gather([d.cpu() for d in self.differences]) for x in part]
        metrics |= mismatch_metrics(differences) | self._engine_metrics(batch, sequences)
        self._throughput(metrics, batch, sequences, clock)
        return metrics

    # -- rollout and selection

    def _engine_metrics(self, batch: Batch, sequences: list[Sequence]) -> dict[str, float]:
        """What the engine did for this step, and how old its weights were."""
        session = self.collector.session
        sync = session.taken()
        counts: Counter[str] = Counter()
        for theirs in world().gather(session.engine.counts):
            counts.update(theirs)
        ages = [self.steps - s.rollout.version for s in sequences] or [0]
        return {
            "staleness/mean": statistics.fmean(ages),
            "staleness/max": max(ages),
            "resample/tries": batch.tries,
            "resample/groups": len(batch.drawn),
            "resample/filled": batch.filled,
            "time/generation": batch.seconds,
            "time/reward": batch.reward_seconds,
            "sync/tensors": sync.tensors,
            "sync/gib": sync.bytes / 2**30,
            "time/sync": sync.seconds,
            "memory/engine_awake": session.awake / 2**30,
            "memory/engine_asleep": session.asleep / 2**30,
            **{f"engine/{name}": count for name, count in counts.items()},
        }

    @ranged("select")
    def _select(self, batch: Batch) -> tuple[list[Sequence], dict[str, Any]]:
        """Advantages and PAD; returns the sequences to train on, in groups' order."""
        groups, shape = batch.groups, (len(batch.groups), self.grpo.group_size)
        table = RewardTable.joined([group.table for group in groups])
        rewards = table.total.view(shape)
        advantages = group_advantages(rewards, eps=self.grpo.advantage.eps, scale=self.grpo.advantage.scale)
        pad, progress = self.grpo.pad, self.steps / max(1, self.total_steps - 1)
        tau = linear_schedule(pad.tau_start, pad.tau_end, progress)
        selected = pad_select(
            advantages,
            mode=pad.mode,
            rho=pad.rho,
            t_low=pad.t_low,
            t_high=pad.t_high,
            tau=tau,
            generator=torch.Generator().manual_seed(self.seed("pad")),
            outcomes=table.accuracy,
            group_sizes=[shape[1]] * shape[0],
        )
        if selected.dropped_minority:
            self.context.progress.message(
                f"{self.context.name}: step {self.steps + 1}: pad dropped {selected.dropped_minority} samples of the "
                "rarer outcome of their group for an advantage above its upper threshold"
            )
        kept = selected.indices.tolist()
        flat = [(group.example, r) for group in groups for r in group.rollouts]
        sequences = [Sequence(flat[i][0], flat[i][1], float(advantages[i])) for i in kept]
        self.last_sample = self._sample(groups[0], advantages, set(kept))
        return sequences, self._rollout_metrics(batch.drawn) | {
            "pad/kept": len(kept) / len(flat),
            "pad/effective": selected.n_effective / selected.n_total,
            "pad/tau": tau,
            "pad/minority_dropped": selected.dropped_minority,
        }

    def _rollout_metrics(self, groups: list[ScoredGroup]) -> dict[str, Any]:
        flat = [r for group in groups for r in group.rollouts]
        table, shape = RewardTable.joined([group.table for group in groups]), (len(groups), self.grpo.group_size)
        lengths = torch.tensor([len(r.ids) for r in flat], dtype=torch.float32)
        return {
            "reward/total": float(table.total.mean()),
            **{f"reward/{name}": float(values.mean()) for name, values in table.components.items()},
            "response/length_mean": float(lengths.mean()),
            "response/length_max": float(lengths.max()),
            "response/truncated": sum(not r.finished for r in flat) / len(flat),
            "stagnation/accuracy": stagnation(table.accuracy.view(shape)),
            "stagnation/reward": stagnation(table.total.view(shape)),
        }

    # -- reporting

    def _sample(self, group: ScoredGroup, advantages: Tensor, kept: set[int]) -> tuple[Record, list[dict[str, Any]]]:
        """The step's first group, for the report."""
        completions = [
            {
                "text": self.processor.decode(r.ids),
                "reward": float(group.table.total[i]),
                "accuracy": float(group.table.accuracy[i]),
                "advantage": float(advantages[i]),
                "kept": i in kept,
                "staleness": self.steps - r.version,
            }
            for i, r in enumerate(group.rollouts)
        ]
        return group.example.record, completions

    @staticmethod
    def _throughput(metrics: dict[str, Any], batch: Batch, sequences: list[Sequence], clock: Stopwatch) -> None:
        generated = sum(len(r.ids) for group in batch.drawn for r in group.rollouts)
        prompts = sum(len(group.example.prompt.ids) for group in batch.drawn)
        trained = sum(len(s.rollout.ids) for s in sequences)
        trained += sum(len(p.ids) for p in {id(s.example): s.example.prompt for s in sequences}.values())
        metrics["throughput/rollout"] = generated / batch.seconds
        metrics["throughput/update"] = trained / clock.seconds["update"]
        metrics["throughput/step"] = (prompts + generated) / sum(clock.seconds.values())

    # -- state

    def settle(self) -> None:
        position = self.collector.settle()
        if position is not None:
            self.position = position

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """With overlap also the batch that is generated for the next step, once it is there."""
        self.settle()
        state, tensors = super().saved()
        ahead = self.collector.ahead
        if ahead is None or ahead.future.exception() is not None:
            return state, tensors
        assert ahead.step == self.steps
        batch = ahead.future.result()
        places = {id(record): i for i, record in enumerate(self.context.records)}
        order = {id(group): i for i, group in enumerate(batch.drawn)}
        state["ahead"] = {
            "settings": self._sampled_with(),
            "step": ahead.step,
            "start": ahead.start,
            "records": [places[id(group.example.record)] for group in batch.drawn],
            "groups": [order[id(group)] for group in batch.groups],
            "numbers": [batch.tries, batch.filled, batch.seconds, batch.reward_seconds, batch.end],
        }
        rollouts = to_tensors([r for group in batch.drawn for r in group.rollouts])
        return state, tensors | {f"ahead.{name}": tensor for name, tensor in rollouts.items()}

    def _sampled_with(self) -> dict[str, Any]:
        """The settings that rollouts depend on, as JSON has them."""
        keys = {"sampling", "rollout_batch", "group_size", "max_response_tokens", "resample", "data"}
        return self.grpo.model_dump(mode="json", include=keys)

    def load_saved(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        ahead = state.get("ahead")
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith("ahead.")}
        super().load_saved(
            {name: value for name, value in state.items() if name != "ahead"},
            {name: tensor for name, tensor in tensors.items() if name not in mine},
        )
        if ahead is None:
            return
        if not self.collector.overlap or ahead["settings"] != self._sampled_with():
            where = f"{self.context.name}: step {self.steps + 1}"
            self.context.progress.message(f"{where}: its rollouts were made with other settings and are made again")
            self.position = ahead["start"]
            return
        rollouts = from_tensors({name.removeprefix("ahead."): tensor for name, tensor in mine.items()})
        examples = [self.processor.encode(self.context.records[i]) for i in ahead["records"]]
        drawn = self.collector.rebuild(examples, rollouts)
        batch = Batch([drawn[i] for i in ahead["groups"]], drawn, *ahead["numbers"])
        self.collector.restore(ahead["step"], ahead["start"], batch)


def build_rewards(name: str, stage: GRPOConfig) -> Rewards:
    """The rewards of the stage called ``name``. Raises ValueError naming the key that is wrong."""
    where = f"stages.{name}.rewards"
    return Rewards(stage.rewards, max_response_tokens=stage.max_response_tokens, where=where)
