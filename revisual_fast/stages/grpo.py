"""One GRPO step: prompts -> rollouts -> rewards -> advantages -> PAD -> packed forward -> fused loss -> update.

Nothing is computed that cannot change the gradient: sequences that PAD drops and (without KL and entropy terms) those
with zero advantage are gone before the first forward pass, old log-probs are computed only for updates that are not
on-policy, reference log-probs only where the KL coefficient is not 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from revisual_fast.advantages import group_advantages, linear_schedule, pad_select, stagnation
from revisual_fast.config import EntropyConfig, GRPOConfig
from revisual_fast.data.processor import Example
from revisual_fast.data.records import Record
from revisual_fast.losses import PolicyObjective, TokenBatch, aggregation_weights
from revisual_fast.ops import linear_logprob, linear_policy_loss
from revisual_fast.packing import Group, PackedBatch
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import ranged, span
from revisual_fast.rewards import Completion, Rewards, RewardTable
from revisual_fast.rollout.engine import Engine, Rollout, Sampling
from revisual_fast.stages.stage import Stage, StageContext, Stopwatch

__all__ = ["GRPOStage", "build_objective", "build_rewards", "entropy_coefficient"]


def entropy_coefficient(config: EntropyConfig, update: int) -> float:
    """0 while ``update`` < warmup, then start * decay^(update - warmup), not below the floor."""
    if update < config.warmup:
        return 0.0
    return max(config.floor, config.start * config.decay ** (update - config.warmup))


@dataclass
class Sequence:
    """One completion on its way through the step."""

    example: Example
    rollout: Rollout
    advantage: float
    weight: float = 0.0  # of each of its tokens in the loss
    old_logp: Tensor | None = None  # [C] on the CPU
    ref_logp: Tensor | None = None


class GRPOStage(Stage):
    """``reference`` is the frozen policy of the KL term, needed (and only then given) where ``kl_coef`` is not 0."""

    def __init__(self, context: StageContext, stage: GRPOConfig, engine: Engine, reference: Policy | None = None):
        update_batch = stage.update_batch or stage.rollout_batch
        self.n_updates = stage.rollout_batch // update_batch
        super().__init__(context, stage, batch=stage.rollout_batch, updates_per_step=self.n_updates)
        self.grpo = stage
        self.engine = engine
        self.reference = reference
        self.objective = build_objective(stage)
        self.policy.without_dropout()
        if self.objective.kl_coef and reference is None:
            raise ValueError(f"stages.{context.name}: kl_coef is not 0, so a reference policy is needed")
        self.rewards = build_rewards(context.name, stage)
        self.last_sample: tuple[Record, list[dict[str, Any]]] | None = None  # a group of the last step, for the report

    def step(self, clock: Stopwatch) -> dict[str, Any]:
        with clock("data"):
            examples = self.draw(self.grpo.rollout_batch)
        with clock("rollout"):
            rollouts = self._rollout(examples)
        with clock("reward"):
            table = self._score(examples, rollouts)
        sequences, metrics = self._select(examples, rollouts, table)
        with clock("update"):
            metrics |= self._updates(sequences)
        self._throughput(metrics, examples, rollouts, sequences, clock)
        return metrics

    # -- rollout, reward, selection

    def _rollout(self, examples: list[Example]) -> list[list[Rollout]]:
        sampling = Sampling(
            max_tokens=self.grpo.max_response_tokens,
            temperature=self.grpo.sampling.temperature,
            top_p=self.grpo.sampling.top_p,
            top_k=self.grpo.sampling.top_k,
            seed=self.seed("rollout"),
        )
        return self.engine.generate([e.prompt for e in examples], self.grpo.group_size, sampling)

    def _score(self, examples: list[Example], rollouts: list[list[Rollout]]) -> RewardTable:
        return self.rewards(
            [
                Completion(self.processor.decode(r.ids), len(r.ids), r.finished, example.record)
                for example, group in zip(examples, rollouts, strict=True)
                for r in group
            ]
        )

    @ranged("select")
    def _select(
        self, examples: list[Example], rollouts: list[list[Rollout]], table: RewardTable
    ) -> tuple[list[Sequence], dict[str, Any]]:
        """Advantages and PAD; returns the sequences to train on, in groups' order."""
        shape = (len(examples), self.grpo.group_size)
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
        flat = [(e, r) for e, group in zip(examples, rollouts, strict=True) for r in group]
        sequences = [Sequence(flat[i][0], flat[i][1], float(advantages[i])) for i in kept]
        self.last_sample = self._sample(examples[0], rollouts[0], table, advantages, set(kept))
        return sequences, self._rollout_metrics(rollouts, table, shape) | {
            "pad/kept": len(kept) / len(flat),
            "pad/effective": selected.n_effective / selected.n_total,
            "pad/tau": tau,
            "pad/minority_dropped": selected.dropped_minority,
        }

    def _rollout_metrics(
        self, rollouts: list[list[Rollout]], table: RewardTable, shape: tuple[int, int]
    ) -> dict[str, Any]:
        flat = [r for group in rollouts for r in group]
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

    # -- updates

    def _updates(self, sequences: list[Sequence]) -> dict[str, Any]:
        """The step's optimizer updates, each over its share of the kept sequences."""
        size = max(1, math.ceil(len(sequences) / self.n_updates))
        shares = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        batches = [batch for i, share in enumerate(shares) if (batch := self._active(share, self.updates + i))]
        with span("old log-probs"):
            for later in batches[1:]:
                self._fill_logp(later, self.policy, "old_logp")
        if self.reference is not None:
            with span("reference log-probs"):
                for batch in batches:
                    self._fill_logp(batch, self.reference, "ref_logp")
        results = [self._update(batch) for batch in batches]
        missing = self.n_updates - len(results)
        if missing:
            self.skipped += missing
            self.updates += missing
            where = f"{self.context.name}: step {self.steps + 1}"
            self.context.progress.message(f"{where}: {missing} of {self.n_updates} updates had no sequence to train on")
        if not results:
            return {"loss": 0.0}
        combine = {key: max if key.endswith("max") else statistics.fmean for key in results[0]}
        return {key: function([r[key] for r in results]) for key, function in combine.items()}

    def _active(self, share: list[Sequence], update: int) -> list[Sequence]:
        """Weigh the sequences of an update, all of them, then leave out those that cannot change its gradient."""
        lengths = torch.tensor([0, *(len(s.rollout.ids) for s in share)])
        ends = lengths.cumsum(0).to(torch.int32)
        constant = self.objective.constant_length
        weights = aggregation_weights(self.objective.aggregation, int(ends[-1]), ends, constant, dtype=torch.float64)
        for sequence, weight in zip(share, weights[ends[:-1].long()].tolist(), strict=True):
            sequence.weight = weight
        if entropy_coefficient(self.grpo.entropy, update) or self.objective.kl_coef:
            return share
        return [s for s in share if s.advantage != 0]

    def _update(self, sequences: list[Sequence]) -> dict[str, Any]:
        coefficient = entropy_coefficient(self.grpo.entropy, self.updates)
        objective = replace(self.objective, entropy_coef=coefficient)
        loss = torch.zeros((), device=self.policy.device)
        meters = _Meters()
        for members, batch in self._micro_batches(sequences, self.policy):
            out = linear_policy_loss(
                self.policy.hidden(batch),
                self.policy.head_weight,
                batch.targets,
                self._tokens(members, batch),
                objective,
                bias=self.policy.head_bias,
                temperature=self.grpo.sampling.temperature,
            )
            with span("backward"):
                out.loss.backward()
            loss += out.loss.detach()
            meters.add(out.metrics, len(batch.targets))
        value = float(loss)
        metrics = {"loss": value, **meters.read(), "policy/entropy_coef": coefficient}
        return metrics | self.apply_gradients(value)

    def _micro_batches(self, sequences: list[Sequence], policy: Policy) -> Iterator[tuple[list[Sequence], PackedBatch]]:
        """Packed rows of near-equal cost, each with its sequences in the order of ``cu_seqlens``."""
        by_prompt: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            by_prompt.setdefault(id(sequence.example), []).append(sequence)
        members = list(by_prompt.values())
        groups = [Group(m[0].example.prompt, [s.rollout.ids for s in m]) for m in members]
        for micro in self.plan(groups):
            yield [members[g][i] for g, part in micro.parts for i in part], policy.pack(micro.of(groups), self.layout)

    def _tokens(self, members: list[Sequence], batch: PackedBatch) -> TokenBatch:
        device = batch.targets.device
        lengths = torch.tensor([len(s.rollout.ids) for s in members])

        def per_token(values: list[float]) -> Tensor:
            return torch.tensor(values).repeat_interleave(lengths).to(device)

        def joined(name: str) -> Tensor | None:
            parts = [getattr(s, name) for s in members]
            return None if any(p is None for p in parts) else torch.cat(parts).to(device)

        return TokenBatch(
            advantages=per_token([s.advantage for s in members]),
            old_logp=joined("old_logp"),
            ref_logp=joined("ref_logp"),
            cu_seqlens=batch.cu_seqlens,
            weight=per_token([s.weight for s in members]),
        )

    @torch.no_grad()
    def _fill_logp(self, sequences: list[Sequence], policy: Policy, field: str) -> None:
        """Log-probs of ``sequences`` under ``policy`` into their ``field``."""
        is_reference = field == "ref_logp"
        for members, batch in self._micro_batches(sequences, policy):
            with policy.without_adapter() if is_reference else nullcontext():
                logp, _ = linear_logprob(
                    policy.hidden(batch),
                    policy.head_weight,
                    batch.targets,
                    bias=policy.head_bias,
                    temperature=self.grpo.sampling.temperature,
                )
            for sequence, part in zip(members, logp.cpu().split([len(s.rollout.ids) for s in members]), strict=True):
                setattr(sequence, field, part)

    # -- reporting

    def _sample(
        self,
        example: Example,
        rollouts: list[Rollout],
        table: RewardTable,
        advantages: Tensor,
        kept: set[int],
    ) -> tuple[Record, list[dict[str, Any]]]:
        """The step's first group, for the report."""
        completions = [
            {
                "text": self.processor.decode(r.ids),
                "reward": float(table.total[i]),
                "accuracy": float(table.accuracy[i]),
                "advantage": float(advantages[i]),
                "kept": i in kept,
            }
            for i, r in enumerate(rollouts)
        ]
        return example.record, completions

    def _throughput(
        self,
        metrics: dict[str, Any],
        examples: list[Example],
        rollouts: list[list[Rollout]],
        sequences: list[Sequence],
        clock: Stopwatch,
    ) -> None:
        generated = sum(len(r.ids) for group in rollouts for r in group)
        prompts = sum(len(e.prompt.ids) for e in examples)
        trained = sum(len(s.rollout.ids) for s in sequences)
        trained += sum(len(p.ids) for p in {id(s.example): s.example.prompt for s in sequences}.values())
        metrics["throughput/rollout"] = generated / clock.seconds["rollout"]
        metrics["throughput/update"] = trained / clock.seconds["update"]
        metrics["throughput/step"] = (prompts + generated) / sum(clock.seconds.values())


class _Meters:
    """The loss's metrics over an update's micro-batches: means weighted by rows, maxima kept; read once at the end."""

    def __init__(self) -> None:
        self.rows = 0
        self.values: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], rows: int) -> None:
        self.rows += rows
        for key, value in metrics.items():
            so_far = self.values.get(key, torch.zeros_like(value))
            self.values[key] = torch.maximum(so_far, value) if key.endswith("max") else so_far + value * rows

    def read(self) -> dict[str, float]:
        return {f"policy/{k}": float(v) / (1 if k.endswith("max") else self.rows) for k, v in self.values.items()}


def build_rewards(name: str, stage: GRPOConfig) -> Rewards:
    """The rewards of the stage called ``name``. Raises ValueError naming the key that is wrong."""
    where = f"stages.{name}.rewards"
    return Rewards(stage.rewards, max_response_tokens=stage.max_response_tokens, where=where)


def build_objective(stage: GRPOConfig) -> PolicyObjective:
    """The stage's preset with its overrides; the entropy coefficient comes in per update."""
    chosen = stage.objective.model_dump(exclude={"preset"}, exclude_none=True)
    if stage.objective.preset == "dr_grpo" or stage.objective.aggregation == "constant":
        chosen["constant_length"] = stage.max_response_tokens
    return PolicyObjective.preset(stage.objective.preset, **chosen)
