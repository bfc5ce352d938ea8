"""What the steps of a stage come to, and the same as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["PHASES", "duration", "markdown_table", "stage_totals"]

Record = Mapping[str, Any]

PHASES = ("rollout", "update", "step")
NOTHING = "–"
_TRENDS = {  # metric -> its row in the table
    "loss": "cross-entropy",
    "reward/total": "reward",
    "reward/accuracy": "accuracy of rollouts",
    "reward/format": "format",
    "stagnation/accuracy": "groups of equal accuracy",
    "stagnation/reward": "groups of equal reward",
    "policy/entropy": "entropy, nats a token",
    "response/length_mean": "response, tokens",
    "response/truncated": "responses cut off",
}
_NOTE = (
    "a → b: means over the first and the last tenth of a stage's steps. Tokens per second are a stage's tokens over "
    "its seconds in that phase; *step* counts prompts and responses once, over the whole step."
)


def stage_totals(steps: Sequence[Record]) -> dict[str, Any]:
    """Over the ``steps`` of one stage (its lines in metrics.jsonl).

    ``tokens``: those generated ("rollout") and trained on ("update"). ``tokens_per_second``: phase -> all tokens over
    all seconds of that phase, for the phases that the steps have. ``trends``: metric -> [mean over the first tenth of
    the steps, over the last tenth], at least one step each, for those of :data:`_TRENDS` that the steps have (``loss``
    in supervised stages only).
    """
    work = {phase: totals for phase in PHASES if (totals := _tokens_and_seconds(steps, phase))}
    return {
        "tokens": {phase: round(tokens) for phase, (tokens, _) in work.items() if phase != "step"},
        "tokens_per_second": {phase: tokens / seconds for phase, (tokens, seconds) in work.items()},
        "trends": {key: trend for key in _TRENDS if (trend := _trend(steps, key))},
    }


def _tokens_and_seconds(steps: Sequence[Record], phase: str) -> tuple[float, float] | None:
    spent = "generation" if phase == "rollout" else phase  # a step may wait for less than was generated, or more
    pairs = [(s.get(f"throughput/{phase}"), s.get(f"time/{spent}")) for s in steps]
    known = [(rate, seconds) for rate, seconds in pairs if rate is not None and seconds]
    return (sum(rate * seconds for rate, seconds in known), sum(seconds for _, seconds in known)) if known else None


def _trend(steps: Sequence[Record], key: str) -> list[float] | None:
    of_policy = any("reward/total" in s for s in steps)
    values = [value for s in steps if (value := s.get(key)) is not None]
    if not values or (key == "loss" and of_policy):  # a policy's loss says nothing
        return None
    tenth = math.ceil(len(values) / 10)
    return [sum(part) / tenth for part in (values[:tenth], values[-tenth:])]


def markdown_table(stages: Sequence[Record], tests: Iterable[Record]) -> str:
    """A row for each number, a column for each of the report's ``stages``; ``tests`` are the held-out evaluations."""
    sizes = {test["name"]: test.get("n") for test in tests}
    rows = [("steps", [f"{s['steps']:,}" for s in stages]), ("time", [duration(s["seconds"]) for s in stages])]
    rows.append(("tokens trained", [_count(s["tokens"].get("update")) for s in stages]))
    rows.append(("tokens generated", [_count(s["tokens"].get("rollout")) for s in stages]))
    rows += [(f"tokens per second, {p}", [_count(s["tokens_per_second"].get(p)) for s in stages]) for p in PHASES]
    rows += [(label, [_arrow(s["trends"].get(key)) for s in stages]) for key, label in _TRENDS.items()]
    for name, size in sizes.items():
        of = f" (n = {size:,})" if size else ""
        rows.append((f"held-out accuracy, {name}{of}", [_decimal(s["heldout"].get(name)) for s in stages]))
    lines = [["", *(s["name"] for s in stages)], ["---", *["---:"] * len(stages)]]
    lines += [[label, *cells] for label, cells in rows if set(cells) != {NOTHING}]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_NOTE}\n"


def duration(seconds: float) -> str:
    """``3.9 s``, ``2 min 06 s``, ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _arrow(trend: Sequence[float] | None) -> str:
    """``0.125 → 0.250``; of larger numbers three figures, as ``102 → 97.4``."""
    if trend is None:
        return NOTHING
    return " → ".join(f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}" for value in trend)
