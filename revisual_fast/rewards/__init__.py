"""Rewards: named components, each logged apart, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revisual_fast.config import RewardConfig
from revisual_fast.data.records import Record
from revisual_fast.dotted import check_arguments, load_function, nearest
from revisual_fast.rewards.builtin import BUILTIN, length, length_range

__all__ = ["Completion", "RewardTable", "Rewards"]


@dataclass(frozen=True)
class Completion:
    """One answer of the policy."""

    text: str
    """Without special tokens."""
    tokens: int
    """Its length, the end-of-sequence token included."""
    finished: bool
    """Whether it ended by itself, rather than at the limit."""
    record: Record


@dataclass(frozen=True)
class RewardTable:
    """The rewards of N completions."""

    components: dict[str, Tensor]
    """Name -> [N] fp32, not weighted."""
    total: Tensor
    """[N] fp32: the weighted sum."""
    accuracy: Tensor
    """[N] fp32: the component ``accuracy``, not weighted."""

    @classmethod
    def joined(cls, tables: Sequence[RewardTable]) -> RewardTable:
        """One table for the completions of all ``tables`` (at least one), in order."""
        components = {name: torch.cat([t.components[name] for t in tables]) for name in tables[0].components}
        return cls(components, torch.cat([t.total for t in tables]), torch.cat([t.accuracy for t in tables]))


class Rewards:
    """The rewards of a stage.

    A component is a built-in reward or the user's ``function(completions: list[Completion], **args)``, which returns a
    finite number for each completion. A stage asks for the completions of one prompt at a time. ``where`` is the
    configuration key of ``components``, for messages. Raises ValueError for an unknown name, a function that cannot be
    loaded, and arguments that it does not take.
    """

    def __init__(self, components: dict[str, RewardConfig], *, max_response_tokens: int, where: str = "rewards"):
        if "accuracy" not in components:
            raise ValueError(f"{where}: there must be a component named accuracy (weight 0 is allowed)")
        self.max_response_tokens = max_response_tokens
        self._where = where
        self._weights = {name: config.weight for name, config in components.items()}
        self._args = {name: dict(config.args) for name, config in components.items()}
        self._functions = {name: self._load(name, config) for name, config in components.items()}
        self._described = {name: config.function or "built in" for name, config in components.items()}

    def _load(self, name: str, config: RewardConfig) -> Callable[..., Sequence[float]]:
        where = f"{self._where}.{name}"
        if config.function is not None:
            function = load_function(config.function, f"{where}.function")
        elif name in BUILTIN:
            function = BUILTIN[name]
        else:
            raise ValueError(
                f"{where}: there is no built-in reward of this name{nearest(name, list(BUILTIN))}; "
                f"for your own, say {where}.function: file.py:function"
            )
        if function is length:
            _need_budget(self._args[name], f"{where}.args")
        check_arguments(function, self._args[name], f"{where}.args", positional=1)
        if function is length:
            self._length_range(name)
        return function

    def _length_range(self, name: str) -> tuple[float, float]:
        try:
            return length_range(**self._args[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._where}.{name}.args: {error}") from None

    def __call__(self, completions: list[Completion]) -> RewardTable:
        """The table for N ``completions``. Raises ValueError if a component does not give N finite numbers."""
        components = {name: self._component(name, completions) for name in self._functions}
        total = torch.zeros(len(completions))
        for name, values in components.items():
            total += self._weights[name] * values
        return RewardTable(components, total, components["accuracy"])

    def _component(self, name: str, completions: list[Completion]) -> Tensor:
        given: Any = self._functions[name](completions, **self._args[name])
        where = f"reward {name} ({self._described[name]})"
        try:
            values = torch.as_tensor(given, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where}: must return a number for each completion: {error}") from None
        if values.shape != (len(completions),):
            shape = tuple(values.shape)
            raise ValueError(f"{where}: must return {len(completions)} numbers, one for each completion; found {shape}")
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            source = completions[bad[0]].record.source
            raise ValueError(f"{where}: {values[bad[0]].item()} for a completion of {source}; it must be finite")
        return values

    def header(self) -> list[str]:
        """Lines for a run's header: each component, its weight, and where a length reward moves."""
        lines = []
        for name, weight in self._weights.items():
            lines.append(f"reward {name}: weight {weight:g}, {self._described[name]}")
            if self._functions[name] is length:
                lines[-1] += f"; {self._length_text(name)}"
        return lines

    def _length_text(self, name: str) -> str:
        start, end = self._length_range(name)
        top = min(1.0, end / (end - start))
        text = f"{top:.3g} up to {max(start, 0):g} tokens, falling to 0 at {end:g}"
        limit = self.max_response_tokens
        if start >= limit:
            return f"{text}: never moves, as responses end at {limit} (lower args.budget)"
        if end > limit:
            return f"{text}: moves only from {max(start, 0):g} to {limit}, where responses end"
        return text


def _need_budget(args: Mapping[str, Any], where: str) -> None:
    if "budget" not in args:
        found = f"; found only {', '.join(map(repr, args))}" if args else ""
        raise ValueError(
            f"{where}.budget: give the number of tokens that an answer may take, well below max_response_tokens "
            f"(a limit is no budget: a reward that begins to fall there never moves){found}"
        )
