"""The curves of a run, drawn from its JSONL files: one figure each, all over the same axis of global steps, and the
most important ones in one picture, over minutes.

Stages are shaded and named. Faint lines are single steps; strong lines are running means over a fortieth of the run,
never across a stage's border. A step without a finite value is a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from revisual_fast.telemetry.sinks import read_jsonl

__all__ = ["OVERVIEW", "plot_overview", "plot_run"]

OVERVIEW = "plots/overview.png"
"""In a run's folder."""

Records = Sequence[Mapping[str, Any]]

COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#846358", "#5c677d")
_INK, _QUIET, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _QUIET,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "revisual-fast",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Band:
    """What ``(start, end]`` of an axis, of global steps or of minutes, is one stage's."""

    stage: str
    start: float
    end: float


def plot_run(run_dir: str | Path) -> dict[str, Path]:
    """Draw every figure that ``run_dir`` has numbers for into ``run_dir/plots``.

    Returns name -> path of the PNG, in the order of the report; an SVG of the same name with a transparent background
    lies beside each. Raises :class:`~revisual_fast.telemetry.sinks.TelemetryError` for a damaged file.
    """
    run_dir = Path(run_dir)
    metrics, evaluations = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "evaluations.jsonl")
    bands = stage_bands(metrics)
    folder = run_dir / "plots"
    paths: dict[str, Path] = {}
    with mpl.rc_context(_STYLE):
        for name, (title, unit, draw) in _FIGURES.items():
            figure = Figure(figsize=(5.6, 3.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            if not draw(axes, metrics, evaluations):
                continue
            _finish(axes, title, unit, bands)
            folder.mkdir(parents=True, exist_ok=True)
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name], dpi=200)
            figure.set_layout_engine(None)  # it stays as it is laid out now
            figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
    return paths


def plot_overview(run_dir: str | Path) -> Path | None:
    """Draw reward, accuracy, stagnation and throughput into one picture, :data:`OVERVIEW`, and return its path; a
    quarter that there are no numbers for stays empty, and without any there is no picture. Stages are as wide as the
    time that their steps took. Raises as :func:`plot_run`.
    """
    run_dir = Path(run_dir)
    metrics, evaluations = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "evaluations.jsonl")
    minutes = _clock(metrics)
    bands = [Band(band.stage, minutes(band.start), minutes(band.end)) for band in stage_bands(metrics)]
    metrics, evaluations = (
        [{**record, "global_step": minutes(record["global_step"])} for record in records]
        for records in (metrics, evaluations)
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.2, 7.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        FigureCanvasAgg(figure)
        drawn = False
        for i, name in enumerate(("reward", "accuracy", "stagnation", "throughput"), start=1):
            title, unit, draw = _FIGURES[name]
            axes = figure.add_subplot(2, 2, i)
            if draw(axes, metrics, evaluations):
                _finish(axes, title, unit, bands, "minutes of training steps")
                drawn = True
            else:
                axes.remove()
        if not drawn:
            return None
        path = run_dir / OVERVIEW
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return path


def _clock(metrics: Records) -> Callable[[float], float]:
    """The minutes that the steps up to a global step took, evaluations and checkpoints left out."""
    steps = [0.0, *(record["global_step"] for record in metrics)]
    minutes = np.cumsum([0.0, *((record.get("time/step") or 0.0) / 60 for record in metrics)])
    return lambda step: float(np.interp(step, steps, minutes))


def stage_bands(metrics: Records) -> list[Band]:
    """The span of each stage on the axis of global steps, in the order the stages ran."""
    spans: dict[str, tuple[int, int]] = {}
    for record in metrics:
        step = int(record["global_step"])
        first, last = spans.get(record["stage"], (step, step))
        spans[record["stage"]] = (min(first, step), max(last, step))
    return [Band(stage, first - 1, last) for stage, (first, last) in spans.items()]


def _finish(axes: Axes, title: str, unit: str, bands: list[Band], along: str = "global step") -> None:
    """Stage bands, title, legend and the common axis, of what ``along`` says."""
    if bands:
        axes.set_xlim(bands[0].start, max(band.end for band in bands))
    raised = _name_bands(axes, bands)
    axes.xaxis.set_major_locator(MaxNLocator(integer=along == "global step", nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"))
    axes.set_xlabel(along)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=30 if raised else 18)
    axes.set_title(unit, loc="right", fontsize=8.5, color=_QUIET, pad=30 if raised else 18)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
        axes.legend(handles, labels, **place, ncols=min(len(labels), 4), handlelength=1.6)


def _name_bands(axes: Axes, bands: list[Band]) -> bool:
    """Shade and name the stages; True if every second name had to be raised because a stage is narrow."""
    left, right = axes.get_xlim()
    narrow = any((band.end - band.start) / (right - left) < 0.017 * len(band.stage) for band in bands)
    for i, band in enumerate(bands):
        axes.axvspan(band.start, band.end, color="#8793a6", alpha=0.12 if i % 2 else 0.04, lw=0, zorder=0)
        axes.annotate(
            band.stage,
            ((band.start + band.end) / 2, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 17 if narrow and i % 2 else 5),
            textcoords="offset points",
            ha="center",
            va="baseline",
            fontsize=8,
            color=_QUIET,
        )
    return narrow and len(bands) > 1


def _series(metrics: Records, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """stage -> (global steps, values) of the metric ``key``; a value that is null is nan."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in metrics:
        if key in record:
            value = record[key]
            found.setdefault(record["stage"], []).append((record["global_step"], np.nan if value is None else value))
    return {s: (np.array([p[0] for p in points]), np.array([p[1] for p in points])) for s, points in found.items()}


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last ``window`` values; nan is left out and stays a gap. ``values`` [n] -> [n]."""
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    count = np.cumsum(finite)
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _curve(axes: Axes, metrics: Records, key: str, label: str, colour: str, width: float = 1.9) -> bool:
    """Draw the metric ``key``; False if no step has it."""
    series = _series(metrics, key)
    window = max(1, len(metrics) // 40)
    for i, (steps, values) in enumerate(series.values()):
        lone = "o" if len(steps) == 1 else ""
        if window > 1:
            axes.plot(steps, values, color=colour, lw=0.8, alpha=0.22)
        mean = _running_mean(values, window)
        axes.plot(steps, mean, color=colour, lw=width, marker=lone, ms=4, label="" if i else label)
    return bool(series)


def _draw_reward(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    parts = sorted({key for record in metrics for key in record if key.startswith("reward/")} - {"reward/total"})
    for i, key in enumerate(parts):
        _curve(axes, metrics, key, key.removeprefix("reward/"), COLOURS[1 + i % (len(COLOURS) - 1)], width=1.2)
    return _curve(axes, metrics, "reward/total", "total", COLOURS[0], width=2.3) or bool(parts)


def _draw_accuracy(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    drawn = _curve(axes, metrics, "reward/accuracy", "train rollouts", "#9aa3b2", width=1.4)
    labelled: set[str] = set()
    names = sorted({record["name"] for record in evaluations})
    styles: tuple[tuple[str, dict[str, Any]], ...] = (
        ("validation", {"ls": "-", "marker": "o", "ms": 3, "lw": 1.6}),
        ("heldout", {"marker": "D", "ms": 6, "lw": 0, "mec": "white", "mew": 0.8}),
    )
    for kind, style in styles:
        for i, name in enumerate(names):
            results = [r for r in evaluations if (r["kind"], r["name"]) == (kind, name) and r["accuracy"] is not None]
            steps, values = [r["global_step"] for r in results], [r["accuracy"] for r in results]
            label = "" if name in labelled else name
            if results:
                axes.plot(steps, values, label=label, color=COLOURS[i % len(COLOURS)], clip_on=False, **style)
                labelled.add(name)
    axes.set_ylim(0, 1)
    return drawn or bool(labelled)


def _draw_stagnation(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    axes.set_ylim(0, 1)
    accuracy = _curve(axes, metrics, "stagnation/accuracy", "equal accuracy", COLOURS[0])
    return _curve(axes, metrics, "stagnation/reward", "equal reward", COLOURS[1]) or accuracy


def _draw_throughput(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    phases = ("rollout", "update", "step")
    drawn = [_curve(axes, metrics, f"throughput/{p}", p, COLOURS[i]) for i, p in enumerate(phases)]
    axes.set_ylim(bottom=0)
    return any(drawn)


def _draw_mismatch(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    _curve(axes, metrics, "mismatch/p99", "99 of 100 below", COLOURS[1], width=1.2)
    _curve(axes, metrics, "mismatch/p01", "99 of 100 above", COLOURS[2], width=1.2)
    return _curve(axes, metrics, "mismatch/mean", "mean", COLOURS[0])


def _draw_loss(axes: Axes, metrics: Records, evaluations: Records) -> bool:
    return _curve(axes, [r for r in metrics if "reward/total" not in r], "loss", "loss", COLOURS[0])


def _single(key: str, colour: str) -> Callable[[Axes, Records, Records], bool]:
    def draw(axes: Axes, metrics: Records, evaluations: Records) -> bool:
        drawn = _curve(axes, metrics, key, key, colour)
        if drawn:
            axes.set_ylim(bottom=0)
        return drawn

    return draw


_FIGURES: dict[str, tuple[str, str, Callable[[Axes, Records, Records], bool]]] = {
    "accuracy": ("Accuracy", "dots: validation · diamonds: held out", _draw_accuracy),
    "reward": ("Reward", "mean over completions", _draw_reward),
    "stagnation": ("Stagnation", "share of groups whose completions tie", _draw_stagnation),
    "entropy": ("Entropy", "nats per token", _single("policy/entropy", COLOURS[3])),
    "length": ("Response length", "mean tokens", _single("response/length_mean", COLOURS[4])),
    "throughput": ("Throughput", "tokens per second", _draw_throughput),
    "mismatch": ("Trainer against engine", "difference of log-probs, nats", _draw_mismatch),
    "grad_norm": ("Gradient norm", "before clipping", _single("optim/grad_norm", COLOURS[6])),
    "loss": ("Cross-entropy", "supervised stages, nats per token", _draw_loss),
}
