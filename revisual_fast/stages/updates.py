"""The optimizer updates of a GRPO step: packed forward -> fused loss -> update.

Nothing is computed that cannot change the gradient: sequences with zero advantage are gone before the first forward
pass (without KL and entropy terms), old log-probs are computed only for updates that are not on-policy, and not at all
where the engine's are taken, reference log-probs only where the KL coefficient is not 0.
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

from revisual_fast.config import EntropyConfig, GRPOConfig
from revisual_fast.data.processor import Example
from revisual_fast.distributed import World, world
from revisual_fast.losses import PolicyObjective, TokenBatch, aggregation_weights
from revisual_fast.ops import linear_logprob, linear_policy_loss
from revisual_fast.packing import Group, PackedBatch, to_device
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import span
from revisual_fast.rollout.engine import Rollout
from revisual_fast.stages.stage import Stage, StageContext

__all__ = ["PolicyStage", "Sequence", "build_objective", "entropy_coefficient"]


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


class PolicyStage(Stage):
    """A stage that trains on sequences with an advantage.

    ``reference`` is the frozen policy of the KL term, needed (and only then given) where ``kl_coef`` is not 0.
    """

    def __init__(self, context: StageContext, stage: GRPOConfig, reference: Policy | None):
        update_batch = stage.update_batch or stage.rollout_batch
        self.n_updates = stage.rollout_batch // update_batch
        super().__init__(context, stage, batch=stage.rollout_batch, updates_per_step=self.n_updates)
        self.grpo = stage
        self.reference = reference
        self.objective = build_objective(stage)
        self.policy.without_dropout()
        if self.objective.kl_coef and reference is None:
            raise ValueError(f"stages.{context.name}: kl_coef is not 0, so a reference policy is needed")
        self.differences: list[Tensor] = []  # trainer - engine log-probs of this step's tokens

    def _updates(self, sequences: list[Sequence]) -> dict[str, Any]:
        """The step's optimizer updates, each over its share of the kept sequences."""
        size = max(1, math.ceil(len(sequences) / self.n_updates))
        shares = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        batches = [batch for i, share in enumerate(shares) if (batch := self._active(share, self.updates + i))]
        if self.grpo.old_logp == "engine":
            for sequence in (s for batch in batches for s in batch):
                sequence.old_logp = sequence.rollout.logp
        else:
            with span("old log-probs"):
                for later in batches[1:]:
                    self._fill_logp(later, self.policy, "old_logp")
                    mine = world().share(later)
                    self.differences += [s.old_logp - s.rollout.logp for s in mine if s.old_logp is not None]
        if self.reference is not None:
            with span("reference log-probs"):
                for batch in batches:
                    self._fill_logp(batch, self.reference, "ref_logp")
        results = [self._update(batch, first=batch is batches[0]) for batch in batches]
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

    def _update(self, sequences: list[Sequence], *, first: bool) -> dict[str, Any]:
        """One optimizer update; the ``first`` of a step runs with the weights that the step began with."""
        coefficient = entropy_coefficient(self.grpo.entropy, self.updates)
        objective = replace(self.objective, entropy_coef=coefficient)
        loss = torch.zeros((), device=self.policy.device)
        meters = _Meters()
        for members, batch in self._micro_batches(sequences, self.policy):
            tokens, masks = self._tokens(members, batch), self._masks(members, batch)  # copied before the forward pass
            out = linear_policy_loss(
                self.policy.hidden(batch),
                self.policy.head_weight,
                batch.targets,
                tokens,
                objective,
                bias=self.policy.head_bias,
                temperature=self.grpo.sampling.temperature,
                sampling_mask=masks,
            )
            with span("backward"):
                out.loss.backward()
            loss += out.loss.detach()
            if first:
                assert tokens.rollout_logp is not None
                self.differences.append(out.logp - tokens.rollout_logp)
            meters.add(out.metrics, len(batch.targets))
        value = float(world().sum(loss))
        metrics = {"loss": value, **meters.read(world()), "policy/entropy_coef": coefficient}
        return metrics | self.apply_gradients(value)

    def _micro_batches(self, sequences: list[Sequence], policy: Policy) -> Iterator[tuple[list[Sequence], PackedBatch]]:
        """This rank's packed rows, of near-equal cost, each with its sequences in the order of ``cu_seqlens``."""
        by_prompt: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            by_prompt.setdefault(id(sequence.example), []).append(sequence)
        members = list(by_prompt.values())
        groups = [Group(m[0].example.prompt, [s.rollout.ids for s in m]) for m in members]
        for micro in self.plan(groups):
            yield [members[g][i] for g, part in micro.parts for i in part], policy.pack(micro.of(groups), self.layout)

    def _tokens(self, members: list[Sequence], batch: PackedBatch) -> TokenBatch:
        """Everything in one copy to the device."""
        lengths = torch.tensor([len(s.rollout.ids) for s in members])
        given = {
            "advantages": torch.tensor([s.advantage for s in members]).repeat_interleave(lengths),
            "weight": torch.tensor([s.weight for s in members]).repeat_interleave(lengths),
            "rollout_logp": torch.cat([s.rollout.logp for s in members]),
        }
        for name in ("old_logp", "ref_logp"):
            parts = [getattr(s, name) for s in members]
            if all(part is not None for part in parts):
                given[name] = torch.cat(parts)
        fields = to_device(torch.stack(list(given.values())), batch.targets.device).unbind()
        return TokenBatch(cu_seqlens=batch.cu_seqlens, **dict(zip(given, fields, strict=True)))

    @staticmethod
    def _masks(members: list[Sequence], batch: PackedBatch) -> tuple[Tensor, Tensor] | None:
        """The ids that sampling kept for every target of the batch, CSR; None where it kept all or is not asked for."""
        masks = [s.rollout.mask for s in members]
        if any(mask is None for mask in masks):
            return None
        counts = torch.cat([mask[0].diff() for mask in masks if mask is not None])
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        indices = torch.cat([mask[1] for mask in masks if mask is not None])
        return to_device(indptr, batch.targets.device), to_device(indices, batch.targets.device)

    @torch.no_grad()
    def _fill_logp(self, sequences: list[Sequence], policy: Policy, field: str) -> None:
        """Log-probs of ``sequences`` under ``policy`` into their ``field``, each computed on one rank."""
        is_reference = field == "ref_logp"
        places = {id(sequence): i for i, sequence in enumerate(sequences)}
        passes: list[tuple[list[Sequence], Tensor]] = []
        for members, batch in self._micro_batches(sequences, policy):
            with policy.without_adapter() if is_reference else nullcontext():
                logp, _ = linear_logprob(
                    policy.hidden(batch),
                    policy.head_weight,
                    batch.targets,
                    bias=policy.head_bias,
                    temperature=self.grpo.sampling.temperature,
                    sampling_mask=self._masks(members, batch),
                )
            passes.append((members, logp))
        mine: dict[int, Tensor] = {}
        for members, logp in passes:  # read when all of them are under way
            parts = logp.cpu().split([len(s.rollout.ids) for s in members])
            mine |= {places[id(s)]: part.clone() for s, part in zip(members, parts, strict=True)}  # not views: pickled
        for found in world().gather(mine):
            for place, part in found.items():
                setattr(sequences[place], field, part)


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

    def read(self, ranks: World) -> dict[str, float]:
        """Of all ranks, which have added the same metrics or none."""
        values = torch.stack(list(self.values.values())).tolist() if self.values else []  # one look at the device
        every = ranks.gather((self.rows, dict(zip(self.values, values, strict=True))))
        rows = sum(count for count, _ in every)
        found: dict[str, list[float]] = {}
        for _, theirs in every:
            for name, value in theirs.items():
                found.setdefault(name, []).append(value)
        return {f"policy/{k}": max(v) if k.endswith("max") else sum(v) / rows for k, v in found.items()}


def build_objective(stage: GRPOConfig) -> PolicyObjective:
    """The stage's preset with its overrides; the entropy coefficient comes in per update."""
    chosen = stage.objective.model_dump(exclude={"preset"}, exclude_none=True)
    if stage.objective.preset == "dr_grpo" or stage.objective.aggregation == "constant":
        chosen["constant_length"] = stage.max_response_tokens
    return PolicyObjective.preset(stage.objective.preset, **chosen)
