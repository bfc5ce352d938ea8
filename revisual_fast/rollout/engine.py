"""What a stage asks of an engine that generates completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy

__all__ = ["Engine", "EngineError", "NonFiniteLogits", "OnGroup", "RequestError", "Rollout", "Sampling", "Sync"]


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 keep the whole vocabulary.

    With ``masks`` the rollouts say which ids top-p and top-k had kept for each token. What is drawn for a prompt
    depends on ``seed`` and its place among all prompts, also where an engine is asked for a part of them only: every
    ``stride``-th from the ``first`` on.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    masks: bool = False
    first: int = 0
    stride: int = 1

    def place(self, index: int) -> int:
        """Of the prompt that is asked as number ``index``."""
        return self.first + self.stride * index

    @property
    def truncated(self) -> bool:
        """Whether part of the vocabulary may be left out."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class Rollout:
    """One completion, on the CPU."""

    ids: Tensor  # [C] int64, with the eos token if it was reached
    logp: Tensor  # [C] fp32: of the distribution sampled from, after temperature, top-k and top-p
    finish_reason: Literal["stop", "length"]  # the eos token was reached, or the limit
    mask: tuple[Tensor, Tensor] | None = None  # CSR (indptr [C + 1], indices [nnz]) int64: the ids kept for each token
    version: int = 0  # of the weights it was sampled with, as given to update_weights

    @property
    def finished(self) -> bool:
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Sync:
    """One weight update: what was sent to the engine, and how long it took."""

    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0


OnGroup = Callable[[int, list[Rollout]], None]
"""Called with a prompt's index and its completions, in the order in which groups finish; from the calling thread."""


class EngineError(RuntimeError):
    """The engine cannot go on; the message says why and what to change."""


class NonFiniteLogits(EngineError):
    """The model's logits are not numbers: its weights have diverged or are damaged."""


class RequestError(EngineError):
    """The prompt at ``index`` cannot be answered, however often it is asked."""

    def __init__(self, index: int, reason: str, tries: int = 1):
        super().__init__(f"prompt {index}: {reason} (tried {tries} times)")
        self.index, self.reason, self.tries = index, reason, tries


class Engine(Protocol):
    """Calls do not overlap: an engine is asked for one thing at a time, from any one thread."""

    counts: dict[str, int]
    """What has gone wrong so far and was put right: restarts, retries of requests, groups generated again."""

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """``n`` completions for every prompt, in the prompts' order.

        Raises :class:`RequestError` for a prompt that cannot be answered, :class:`EngineError` where the engine cannot
        go on.
        """

    def update_weights(self, policy: Policy, version: int) -> Sync:
        """Sample from ``policy`` as it is now. What was derived from earlier weights is dropped."""

    def sleep(self, level: int = 1) -> None:
        """Give device memory back: 1 keeps the weights on the host, 2 drops them, so that all are sent again."""

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: "weights", "kv_cache", or (None) both."""

    def memory(self) -> int:
        """Bytes that the engine holds outside this process, on its device (or on the host, if that is its device)."""

    def close(self) -> None:
        """Release everything; the engine cannot be used afterwards."""
