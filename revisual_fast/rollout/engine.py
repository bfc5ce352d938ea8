"""What a stage asks of an engine that generates completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from revisual_fast.packing import Prompt

__all__ = ["Engine", "Rollout", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 keep the whole vocabulary."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    ids: Tensor  # [C] int64 on the CPU, with the eos token if it was reached
    logp: Tensor  # [C] fp32 on the CPU: log-probs under the engine's sampling distribution before top-p and top-k
    finished: bool  # ended with eos, not by max_tokens


class Engine(Protocol):
    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Rollout]]:
        """``n`` completions for every prompt, in the prompts' order. The same seed gives the same completions."""
