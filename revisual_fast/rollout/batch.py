"""What the embedded engine decodes: which sequences, from which prompts, and when they leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revisual_fast.packing import Group, Prompt, plan_micro_batches, to_device
from revisual_fast.policy.attention import KeepingPlan
from revisual_fast.ranges import ranged
from revisual_fast.rollout.decode import DecodePlan, Prefilled
from revisual_fast.rollout.engine import NonFiniteLogits, OnGroup, Rollout, Sampling
from revisual_fast.rollout.sample import Drawn, sample
from revisual_fast.seeds import seed_for

if TYPE_CHECKING:
    from revisual_fast.rollout.hf import HFEngine

__all__ = ["Batch"]

LEAVING = 0.25
"""Share of finished sequences from which on they are dropped from the cache, which copies it."""


@dataclass
class _Sequence:
    """One completion. Its tokens come in blocks, one each time that sequences leave."""

    prompt: int
    birth: int  # the step of its first token
    length: int = 0  # tokens, once it is finished
    stopped: bool = False
    ids: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # one for each token

    def rollout(self, version: int) -> Rollout:
        ids, logp = (torch.cat(x)[: self.length].clone() for x in (self.ids, self.logp))
        if logp.isnan().any():
            raise NonFiniteLogits(
                f"prompt {self.prompt}: the model's logits are not numbers; its weights have diverged or are damaged: "
                "go back to an earlier checkpoint, with a lower learning rate"
            )
        mask = None
        if self.kept:
            kept = self.kept[: self.length]
            counts = torch.tensor([0, *(len(x) for x in kept)])
            mask = (counts.cumsum(0), torch.cat(kept))
        return Rollout(ids, logp, "stop" if self.stopped else "length", mask, version)


class Batch:
    """One call of ``generate``. ``sequences`` are those of the cache's rows, the ``n`` of a prompt side by side."""

    def __init__(
        self, engine: HFEngine, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None
    ):
        self.engine, self.policy, self.prompts, self.n = engine, engine.policy, prompts, n
        self.sampling, self.on_group = sampling, on_group
        self.eos = torch.tensor(engine.eos, dtype=torch.long, device=self.policy.device)
        self.waiting = deque(range(len(prompts)))
        self.sequences: list[_Sequence] = []
        self.plan = DecodePlan(sampling.max_tokens)
        self.noise = torch.empty(0)  # [R, max_tokens] fp64: what each token is drawn by
        self.step = 0
        self.finished = 0  # sequences of the cache
        self.since: list[Drawn] = []  # the steps since sequences last left or came
        self.flags: deque[_Flags] = deque()
        self.lag = 1 if self.policy.device.type == "cuda" else 0  # steps that the host may know less than the device
        self.groups: list[list[_Sequence]] = [[] for _ in prompts]
        self.rollouts: list[list[Rollout]] = [[] for _ in prompts]

    def run(self) -> list[list[Rollout]]:
        while self.waiting or self.sequences:
            logits = []
            if self.sequences:
                logits.append(self._decode())
            if not self.since and (chosen := self._next()):
                logits.append(self._prefill(chosen))
            self._draw(torch.cat(logits))
            if self._ripe():
                self._leave()
        return self.rollouts

    # -- prompts come in

    def _next(self) -> list[int]:
        """Prompts that there is room for, taken from those waiting."""
        lengths = [len(self.prompts[p].ids) for p in self.waiting]
        plan = self.plan
        beside = (plan.rows, len(plan.lengths), plan.longest)
        count = self.engine.fitting(lengths, *beside, self.n, self.sampling.max_tokens)
        return [self.waiting.popleft() for _ in range(count)]

    @ranged("prefill")
    def _prefill(self, chosen: list[int]) -> Tensor:
        """Logits [prompts * n, V] of the first tokens of the chosen prompts' completions, which join the batch."""
        policy = self.policy
        groups = [Group(self.prompts[p], []) for p in chosen]
        (parts,) = plan_micro_batches(groups, self.engine.prefill_tokens, cost=lambda group: len(group.prompt.ids))
        last, top, kept = [], [], []  # type: list[Tensor], list[Tensor], list[dict[int, tuple[Tensor, Tensor]]]
        for part in parts:
            batch = policy.pack(part.of(groups))
            prefill = KeepingPlan(policy.plan(batch))
            states = policy.states(batch, prefill)
            last.append(states[to_device(batch.segments.cu_q[1:].long() - 1, policy.device)])
            kept.append(prefill.kept)
            top += [p.max() for p in batch.positions[:, 0].amax(0).split(batch.segments.length)]
        order = [g for part in parts for g, _ in part.parts]  # in which the prompts were prefilled
        lengths = torch.tensor([len(groups[g].prompt.ids) for g in order])
        place = torch.tensor(order).argsort()  # of each chosen prompt in that order
        starts = (lengths.cumsum(0) - lengths)[place]
        on_device = to_device(place, policy.device)
        next_position = torch.stack(top)[on_device] + 1
        self.plan.admit(Prefilled(kept, starts.tolist(), lengths[place].tolist(), next_position), self.n)
        self._join(chosen)
        return policy.logits(torch.cat(last)[on_device]).repeat_interleave(self.n, 0)

    def _join(self, chosen: list[int]) -> None:
        noise = []
        for p in chosen:
            self.groups[p] = [_Sequence(p, self.step) for _ in range(self.n)]
            self.sequences += self.groups[p]
            if self.sampling.temperature > 0:
                source = torch.Generator().manual_seed(seed_for(self.sampling.seed, self.sampling.place(p)))
                drawn = torch.rand(self.sampling.max_tokens, self.n, dtype=torch.float64, generator=source)
                noise.append(drawn.t())
        if noise:
            new = to_device(torch.cat(noise), self.policy.device)
            self.noise = torch.cat([self.noise, new]) if len(self.noise) else new
        birth = torch.tensor([s.birth for s in self.sequences])
        self.birth = to_device(birth, self.policy.device)  # [R] int64
        self.end = int(birth.min()) + self.sampling.max_tokens  # the step at which the first have all their tokens

    # -- a step

    @ranged("decode")
    def _decode(self) -> Tensor:
        """Logits [R, V] of the next tokens."""
        policy = self.policy
        hidden = policy.family.run_text(policy.family.embedding(self.token)[None], self.plan.positions(), self.plan)
        return policy.logits(hidden)

    def _draw(self, logits: Tensor) -> None:
        """The next token of every sequence. The host gets to know who has ended."""
        uniform = self.noise
        if self.sampling.temperature > 0:
            uniform = self.noise.gather(1, (self.step - self.birth)[:, None])[:, 0]
        drawn = sample(logits, self.sampling, uniform)
        self.since.append(drawn)
        self.token = drawn.token
        self.plan.advance()
        if len(self.eos):
            self.flags.append(_Flags(self.step, (drawn.token[:, None] == self.eos).any(-1)))
        self.step += 1

    def _ripe(self) -> bool:
        """Whether some should leave: their share is large enough, or some have all their tokens."""
        while len(self.flags) > self.lag:
            self._read(self.flags.popleft())
        return self.step == self.end or self.finished >= max(1, LEAVING * len(self.sequences))

    def _read(self, flags: _Flags) -> None:
        for row in flags.rows():
            sequence = self.sequences[row]
            if not sequence.length:
                sequence.length, sequence.stopped = flags.step - sequence.birth + 1, True
                self.finished += 1

    # -- finished sequences go

    @ranged("collect")
    def _leave(self) -> None:
        while self.flags:
            self._read(self.flags.popleft())
        for s in self.sequences:
            if not s.length and self.step - s.birth == self.sampling.max_tokens:
                s.length = self.sampling.max_tokens
        self._store()
        gone = dict.fromkeys(s.prompt for s in self.sequences if s.length)
        rows = [row for row, s in enumerate(self.sequences) if not s.length]
        self.sequences, self.finished = [self.sequences[row] for row in rows], 0
        if rows:
            self._shrink(rows)
        else:
            self.plan = DecodePlan(self.sampling.max_tokens)
            self.noise = self.noise[:0]
        for p in gone:
            if all(s.length for s in self.groups[p]):
                self.rollouts[p] = [s.rollout(self.engine.version) for s in self.groups[p]]
                self.groups[p] = []
                if self.on_group:
                    self.on_group(p, self.rollouts[p])

    def _store(self) -> None:
        """What was drawn since the last time, to the sequences."""
        ids, logp = (torch.stack(x, 1).cpu() for x in zip(*((d.token, d.logp) for d in self.since), strict=True))
        for i, s in enumerate(self.sequences):
            s.ids.append(ids[i])
            s.logp.append(logp[i])
        for drawn in self.since:
            if drawn.kept is not None:
                counts, indices = (x.cpu() for x in drawn.kept)
                for s, kept in zip(self.sequences, indices.split(counts.tolist()), strict=True):
                    s.kept.append(kept)
        self.since = []

    def _shrink(self, rows: list[int]) -> None:
        self.plan.keep(rows)
        chosen = to_device(torch.tensor(rows), self.policy.device)
        self.token, self.birth = self.token[chosen], self.birth[chosen]
        if len(self.noise):
            self.noise = self.noise[chosen]
        self.end = min(s.birth for s in self.sequences) + self.sampling.max_tokens


class _Flags:
    """Which rows ended in a step, on the way to the host."""

    def __init__(self, step: int, ended: Tensor):  # [R] bool
        self.step, self.event = step, None
        if ended.is_cuda:
            host = torch.empty(ended.shape, dtype=torch.bool, pin_memory=True)
            ended = host.copy_(ended, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        self.ended = ended

    def rows(self) -> list[int]:
        """Waits for the step."""
        if self.event is not None:
            self.event.synchronize()
        return self.ended.nonzero()[:, 0].tolist()
