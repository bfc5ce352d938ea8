"""The rewards that come with the package, by the name that a configuration gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from revisual_fast.rewards.accuracy import accuracy, boxed

if TYPE_CHECKING:
    from revisual_fast.rewards import Completion

__all__ = ["BUILTIN", "length", "length_range", "think_format"]

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)


def think_format(completions: Sequence[Completion]) -> list[float]:
    r"""1.0 for exactly one ``<think>...</think>`` and, after it, exactly one complete ``\boxed{}``; else 0.0."""
    return [float(_well_formed(completion.text)) for completion in completions]


def _well_formed(text: str) -> bool:
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    thought = _THINK.search(text)
    return thought is not None and len(boxed(text[thought.end() :])) == 1


def length(completions: Sequence[Completion], *, budget: int, alpha: float = 0.005, delta: float = 0.5) -> list[float]:
    """ReVisual-R1's efficient-length reward, ``clip(alpha (budget - tokens) + delta, 0, 1)``."""
    return [min(max(alpha * (budget - completion.tokens) + delta, 0.0), 1.0) for completion in completions]


def length_range(*, budget: int, alpha: float = 0.005, delta: float = 0.5) -> tuple[float, float]:
    """Up to how many tokens :func:`length` is 1, and from how many on it is 0.

    Raises ValueError if ``alpha`` is not positive or ``delta`` is not between 0 and 1.
    """
    if alpha <= 0 or not 0 <= delta <= 1 or budget <= 0:
        raise ValueError(f"budget {budget} and alpha {alpha} must be positive, delta {delta} between 0 and 1")
    return budget - (1 - delta) / alpha, budget + delta / alpha


BUILTIN: dict[str, Callable[..., Sequence[float]]] = {"accuracy": accuracy, "format": think_format, "length": length}
