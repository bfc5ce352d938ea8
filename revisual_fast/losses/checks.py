"""Checks of arguments, with what is allowed in the message."""

from __future__ import annotations

from collections.abc import Iterable


def one_of(name: str, value: object, known: Iterable[object], also: str = "") -> None:
    """Raises ValueError if ``value`` is not one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(map(str, known))}{also}")


def at_least(name: str, value: float | None, bound: float, or_equal: bool = False) -> None:
    """Raises ValueError if ``value`` is neither None nor above ``bound``."""
    if value is not None and not (value > bound or (or_equal and value == bound)):
        raise ValueError(f"{name} must be {'>=' if or_equal else '>'} {bound}; got {value!r}")
