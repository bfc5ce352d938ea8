"""Engines for tests of what uses them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence

import torch

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import Engine, OnGroup, RequestError, Rollout, Sampling, Sync
from revisual_fast.rollout.hf import HFEngine


class CopyEngine:
    """The embedded engine on a copy of the policy: like one in another process, it sees an update only when told."""

    def __init__(self, eos_token_ids: Sequence[int]):
        self.eos = eos_token_ids
        self.copy: HFEngine | None = None
        self.held: tuple[int, int] | None = None
        self.counts: dict[str, int] = {"restarts": 0}
        self.calls: list[str] = []

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        assert self.copy is not None
        self.calls.append("generate")
        return self.copy.generate(prompts, n, sampling, on_group)

    def update_weights(self, policy: Policy, version: int) -> Sync:
        if self.held == (id(policy), version):
            return Sync()
        self.held = (id(policy), version)
        self.calls.append(f"update {version}")
        self.copy = HFEngine(Policy(copy.deepcopy(policy.model)), self.eos)
        self.copy.update_weights(self.copy.policy, version)
        return Sync(tensors=1, bytes=2**30, seconds=0.5)

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self.calls.append(f"wake {tags}")

    def memory(self) -> int:
        return 2**30

    def close(self) -> None:
        self.calls.append("close")


class ScriptedEngine:
    """Answers at once, without a model: completion i of prompt p is a function of p's ids, i and the seed.

    ``order`` says in which order groups finish; ``failing`` are indices of prompts that cannot be answered.
    """

    def __init__(self, order: str = "forward", failing: Sequence[int] = ()):
        self.order, self.failing = order, failing
        self.counts: dict[str, int] = {}
        self.version = 0
        self.asked: list[tuple[int, Sampling]] = []

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        self.asked.append((len(prompts), sampling))
        for index in self.failing:
            raise RequestError(index, "too long", 3)
        groups = [[self._answer(p, i, sampling) for i in range(n)] for p in prompts]
        indices = range(len(prompts)) if self.order == "forward" else reversed(range(len(prompts)))
        for index in indices:
            if on_group is not None:
                on_group(index, groups[index])
        return groups

    def _answer(self, prompt: Prompt, i: int, sampling: Sampling) -> Rollout:
        number = zlib.crc32(f"{prompt.ids.tolist()} {i} {sampling.seed}".encode())
        ids = torch.tensor([number % 7, number % 11])
        return Rollout(ids, torch.tensor([-0.5, -1.0]), "stop", None, self.version)

    def update_weights(self, policy: Policy, version: int) -> Sync:
        self.version = version
        return Sync()

    def sleep(self, level: int = 1) -> None: ...

    def wake_up(self, tags: Sequence[str] | None = None) -> None: ...

    def memory(self) -> int:
        return 0

    def close(self) -> None: ...


def _are_engines(copying: CopyEngine, scripted: ScriptedEngine) -> list[Engine]:
    """For the type checker."""
    return [copying, scripted]
