"""What both kinds of stage share: drawing examples, micro-batches, the guarded optimizer step, and their state."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revisual_fast.config import Config, SFTConfig, StageBase
from revisual_fast.data.processor import Example, Processor
from revisual_fast.data.records import PROMPT_TOO_LONG, RESPONSE_TOO_LONG, BadRecords, Record
from revisual_fast.data.sampler import Sampler
from revisual_fast.distributed import world
from revisual_fast.kernels.plan import CHUNK_BYTES, SUPERCHUNK_BYTES
from revisual_fast.optim import Optimizer, held_bytes, lr_factor
from revisual_fast.packing import (
    Activations,
    CostModel,
    Group,
    MicroBatch,
    activation_bytes,
    plan_micro_batches,
    readable_bytes,
)
from revisual_fast.policy.attention import repeats_heads
from revisual_fast.policy.liger import use_liger
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import span
from revisual_fast.seeds import seed_for
from revisual_fast.telemetry import Progress

__all__ = ["NonFiniteError", "Stage", "StageContext", "Stopwatch"]


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass
class StageContext:
    """What a stage works with."""

    name: str
    config: Config
    policy: Policy
    processor: Processor
    records: list[Record]
    bad_records: BadRecords
    progress: Progress


@dataclass
class Stopwatch:
    """Seconds and memory per phase of one step; each phase is also a range for profilers."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes: on CUDA the most that torch had allocated, else what this process holds (Linux only)."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.progress.phase(phase)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with span(phase):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()
        if held is not None:
            self.memory[phase] = max(held, self.memory.get(phase, 0))


def resident_bytes() -> int | None:
    """What this process holds in memory, where the kernel tells (Linux)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


class Stage:
    """One stage of the curriculum. A subclass says in :meth:`step` what a step is."""

    def __init__(self, context: StageContext, stage: StageBase, *, batch: int, updates_per_step: int = 1):
        self.context = context
        self.policy = context.policy
        self.processor = context.processor
        self.stage = stage
        if not context.records:
            raise ValueError(f"stages.{context.name}.data: no usable records in {', '.join(stage.data)}")
        self.sampler = Sampler(len(context.records), seed_for(context.config.run.seed, context.name, "order"))
        self.total_steps = self._total_steps(batch)
        self.total_updates = self.total_steps * updates_per_step
        if stage.freeze_vision:
            self.policy.freeze_vision()
        self.held = self._held()
        self.optimizer = Optimizer(self.policy.model.named_parameters(), stage.optimizer, self.policy.family.is_vision)
        self.layout = context.config.train.layout
        self.cost, self.activations = self._estimates()
        self.largest = 0  # tokens of a micro-batch above the budget
        self.position = 0  # records drawn so far, bad ones included
        self.steps = 0
        self.updates = 0
        self.skipped = 0  # optimizer updates left out
        self.nonfinite_in_a_row = 0

    def _held(self) -> int:
        """Bytes on a rank's device besides activations. Raises ValueError where the device has not got them."""
        held, device = held_bytes(self.policy.model.parameters(), world().size), self.policy.device
        there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        if there is not None and held >= there:
            raise ValueError(
                f"stages.{self.context.name}: weights, gradients and AdamW's state take {readable_bytes(held)}, and "
                f"{device} has {readable_bytes(there)}: use several GPUs (torchrun), model.lora, or a smaller model"
            )
        return held

    def describe(self) -> str:
        """What a step takes in memory, for the run's header."""
        budget = self.context.config.train.micro_batch_tokens
        held = f"weights, gradients and AdamW's state: {readable_bytes(self.held)}"
        return f"{held}; {self.activations.describe(budget)}"

    def _estimates(self) -> tuple[CostModel, Activations]:
        """FLOPs of a group and bytes of activations, as this stage trains."""
        policy, model = self.policy, self.context.config.model
        trained = {
            "head_trained": policy.head_weight.requires_grad,
            "vision_trained": policy.vision_trained,
            "checkpointing": model.gradient_checkpointing,
        }
        activations = activation_bytes(
            policy.family.shape,
            dtype_bytes=policy.head_weight.itemsize,
            liger=use_liger(model.liger_kernels, policy.device)[0],
            attention=policy.attention,
            heads_repeated=repeats_heads(policy.attention, policy.device),
            lora_rank=None if model.lora is None else model.lora.rank,
            chunk_bytes=CHUNK_BYTES[policy.device.type],
            superchunk_bytes=SUPERCHUNK_BYTES.get(policy.device.type, 0),
            **trained,
        )
        cached = not policy.vision_trained and model.vision_cache_mib > 0  # the rollout has encoded the images
        cost = CostModel(shape=policy.family.shape, text_trained=model.lora is None, vision_cached=cached, **trained)
        return cost, activations

    def _total_steps(self, batch: int) -> int:
        limit = self.context.config.train.max_steps or math.inf
        epochs = self.stage.epochs or 0.0
        steps = self.stage.steps or math.ceil(epochs * len(self.context.records) / batch)
        return int(min(steps, limit))

    def step(self, clock: Stopwatch) -> dict[str, Any]:
        """One step; returns its metrics."""
        raise NotImplementedError

    def run_step(self) -> dict[str, Any]:
        """One step with its seeds, counters and clock."""
        torch.manual_seed(self.seed("torch"))
        start = time.perf_counter()
        clock = Stopwatch(self.context.progress)
        with span("step", payload=self.steps + 1):
            metrics = self.step(clock)
        self.steps += 1
        metrics |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        metrics |= {f"memory/{phase}": held / 2**30 for phase, held in clock.memory.items()}
        metrics["time/step"] = time.perf_counter() - start
        metrics["updates/skipped"] = self.skipped
        return metrics

    def seed(self, purpose: str, step: int | None = None) -> int:
        """The seed of ``purpose`` in the current step, or another."""
        return seed_for(self.context.config.run.seed, self.context.name, self.steps if step is None else step, purpose)

    def draw(self, count: int) -> list[Example]:
        """The next ``count`` usable examples in sampling order, the same on all ranks; bad records are handled as
        configured."""
        examples: list[Example] = []

        def work() -> tuple[int, list[str]]:
            examples.extend(self._draw(count))
            return self.position, [example.record.source for example in examples]

        world().same(work, "records")
        return examples

    def _draw(self, count: int) -> list[Example]:
        examples: list[Example] = []
        rejected = 0
        while len(examples) < count:
            record = self.context.records[self.sampler.index(self.position)]
            self.position += 1
            example = self._encode(record)
            if example is not None:
                examples.append(example)
                rejected = 0
            elif (rejected := rejected + 1) >= len(self.context.records):
                raise ValueError(f"stages.{self.context.name}.data: every record is bad; see the counts in the report")
        return examples

    def _encode(self, record: Record) -> Example | None:
        bad, policy = self.context.bad_records, self.context.config.data[record.dataset].on_bad_record
        sft = isinstance(self.stage, SFTConfig)
        example = self.processor.encode_or_report(record, bad, policy, with_response=sft)
        if example is None:
            return None
        tokens, limit = len(example.prompt.ids), self.stage.max_prompt_tokens
        if tokens > limit:
            bad.handle(policy, record.source, PROMPT_TOO_LONG, f"{tokens} tokens, max_prompt_tokens is {limit}")
            return None
        if isinstance(self.stage, SFTConfig):
            assert example.response is not None
            tokens += len(example.response)
            if tokens > self.stage.max_length:
                detail = f"{tokens} tokens with the prompt, max_length is {self.stage.max_length}"
                bad.handle(policy, record.source, RESPONSE_TOO_LONG, detail)
                return None
        return example

    def plan(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """This rank's micro-batches of ``groups``, each a packed row within ``train.micro_batch_tokens``, but for a
        completion that does not fit with its prompt; the largest so far is told."""
        budget, ranks = self.context.config.train.micro_batch_tokens, world()
        plans = plan_micro_batches(groups, budget, cost=self.cost, layout=self.layout, ranks=ranks.size)
        own = [micro for micro in plans[ranks.rank] if micro.parts]
        largest = max((micro.tokens for plan in plans for micro in plan), default=0)
        if largest > max(budget, self.largest):
            self.largest = largest
            self.context.progress.message(
                f"{self.context.name}: a prompt with one response takes {largest} tokens, more than "
                f"train.micro_batch_tokens ({budget}), and is a micro-batch by itself"
            )
        return own

    def apply_gradients(self, loss: float) -> dict[str, float]:
        """The optimizer step for an accumulated gradient; skipped and counted where loss or gradient is not finite.
        ``loss`` is that of all ranks."""
        factor = lr_factor(self.stage.optimizer, self.updates, self.total_updates)
        self.updates += 1
        if math.isfinite(loss):
            with self.policy.writing:
                norm = self.optimizer.step(factor)
        else:
            self.optimizer.zero_grad()
            norm = math.nan
        if math.isfinite(norm):
            self.nonfinite_in_a_row = 0
        else:
            self.skipped += 1
            self.nonfinite_in_a_row += 1
            limit = self.context.config.train.max_nonfinite
            count = f"{self.nonfinite_in_a_row} of {limit}"
            self.context.progress.message(f"{self.context.name}: non-finite loss or gradient, skipped ({count})")
            if self.nonfinite_in_a_row >= limit:
                raise NonFiniteError(
                    f"{limit} updates in a row had a non-finite loss or gradient (train.max_nonfinite)"
                )
        return {"optim/lr": self.stage.optimizer.lr * factor, "optim/grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """The stage's place, JSON-able; seeds and schedules are functions of it."""
        names = ("position", "steps", "updates", "skipped", "nonfinite_in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def settle(self) -> None:
        """Wait for whatever is under way beside the step, so that engine and place are at rest."""

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a checkpoint needs besides the model."""
        self.settle()
        return self.state_dict(), self.optimizer.state_tensors()

    def load_saved(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`saved` gave."""
        self.load_state_dict(state)
        self.optimizer.load_state_tensors(tensors)
