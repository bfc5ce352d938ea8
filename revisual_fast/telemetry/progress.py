"""What a run shows while it goes: bars in a terminal, one plain line every few seconds elsewhere (CI logs, files)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

__all__ = ["Progress"]

_SHOWN = (  # metric, label, how it is written
    ("reward/total", "reward", "{:.3f}"),
    ("reward/accuracy", "accuracy", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("throughput/rollout", "rollout", "{:,.0f} tok/s"),
    ("throughput/update", "update", "{:,.0f} tok/s"),
)


class Progress:
    """One bar per stage with its ETA, the latest metrics and the phase that is running.

    Where ``console`` (default: stdout) is no terminal, a plain line appears every ``interval`` seconds, and one at the
    start and the end of each stage. With ``enabled=False`` only :meth:`message` prints.
    """

    def __init__(self, enabled: bool = True, *, console: Console | None = None, interval: float = 10.0) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._plain = enabled and not self._console.is_terminal
        self._interval = interval
        self._bars = _Bars(self._console) if enabled and self._console.is_terminal else None
        self._task: TaskID | None = None
        self._name, self._total, self._done, self._first = "", 0, 0, 0
        self._started = self._printed = time.monotonic()
        self._limit: float | None = None
        self._metrics: Mapping[str, Any] = {}

    @classmethod
    def silent(cls) -> Progress:
        """One that shows and prints nothing."""
        return cls(False, console=Console(quiet=True))

    def stage(self, name: str, total: int, completed: int = 0, limit: float | None = None) -> None:
        """Begin (or, with ``completed`` steps already done, continue) a stage of ``total`` steps, which ends after
        ``limit`` more seconds at the latest."""
        self._finish_stage()
        self._name, self._total, self._done, self._first = name, total, completed, completed
        self._started = self._printed = time.monotonic()
        self._metrics, self._limit = {}, limit
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task(name, total=total, completed=completed, limit=limit)
            self._bars.status("", self._metrics)
        elif self._plain:
            already = f", {completed} done" if completed else ""
            self.message(f"{name}: {total} steps{already}")

    def phase(self, name: str) -> None:
        """Say what is running now: "rollout", "update", "evaluate visual"; an empty name clears it."""
        if self._bars is not None:
            self._bars.start()
            self._bars.status(name, self._metrics)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; ``metrics["step"]`` counts the stage's steps from 1."""
        self._metrics, self._done = metrics, int(metrics["step"])
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)
            self._bars.status(None, metrics)
        elif self._plain and (self._done >= self._total or time.monotonic() - self._printed >= self._interval):
            self._line()

    def message(self, text: str) -> None:
        """Print ``text`` as it is, above the bars if there are any."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing and leave the bars as they are; safe to call twice."""
        self._finish_stage()
        if self._bars is not None:
            self._bars.status("", self._metrics)
            self._bars.stop()

    def _finish_stage(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.stop_task(self._task)
            self._task = None
        elif self._plain and self._name and self._done < self._total:
            self._line()
        self._name = ""

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        share = self._done / max(self._total, 1)
        parts = [f"{self._name} {self._done}/{self._total} ({share:.0%})", f"{_clock(seconds)} elapsed"]
        if self._first < self._done < self._total:
            rate = seconds / (self._done - self._first)
            parts.append(f"ETA {_clock(_within(self._limit, seconds, rate * (self._total - self._done)))}")
        self.message(", ".join([*parts, *_describe(self._metrics)]))


class _Remaining(TimeRemainingColumn):
    """The time that is left of the steps, or of the stage's limit where that is less."""

    def render(self, task: Task) -> Text:
        left, limit = task.time_remaining, task.fields["limit"]
        if limit is None or task.finished or task.elapsed is None:
            return super().render(task)
        left = _within(limit, task.elapsed, limit if left is None else left)
        return Text(_clock(left), style="progress.remaining")


class _Bars(Bars):
    """rich's bars with one line below them: the phase and the latest metrics."""

    def __init__(self, console: Console) -> None:
        self._phase, self._values = "", Text()
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("[dim]ETA"),
            _Remaining(),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=600,
            expand=True,
        )

    def status(self, phase: str | None, metrics: Mapping[str, Any]) -> None:
        """Set the line below the bars; ``phase=None`` keeps the phase."""
        self._phase = self._phase if phase is None else phase
        self._values = Text("   ".join(_describe(metrics)), style="dim")

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self._phase or self._values:
            phase = Text(f"▸ {self._phase}   " if self._phase else "", style="cyan")
            yield phase + self._values


def _describe(metrics: Mapping[str, Any]) -> list[str]:
    """``["reward 0.512", ...]`` for the metrics that are there; a missing number (None) is shown as such."""
    shown = []
    for key, label, form in _SHOWN:
        if key in metrics:
            value = metrics[key]
            shown.append(f"{label} {'not finite' if value is None else form.format(value)}")
    return shown


def _within(limit: float | None, elapsed: float, left: float) -> float:
    """Of ``left`` seconds those that a limit leaves, ``elapsed`` seconds after it was set."""
    return left if limit is None else max(0.0, min(left, limit - elapsed))


def _clock(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
