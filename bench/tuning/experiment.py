"""An experiment: what is expected of a setting, said before it is measured, and what came out.

A setting is a point on some coordinates. It starts where the tables of the library stand; one coordinate is moved at a
time, and the fastest setting whose outputs passed is where the next coordinate starts from. The prediction is a time:
counted FLOPs and bytes at the rates of the ceilings, measured just before; the gains that count are formed within the
interleaved rounds of one coordinate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench import machine
from bench.checks import Outputs
from bench.counts import floor_seconds, percentile
from bench.harness import Call, Case, Problem, Variant, measure

Setting = dict[str, Any]
Row = dict[str, Any]
Setup = Callable[[], Call]
MARGIN = 0.01  # a setting that gains less stays where it is
CEILING_CALLS = 5  # before an experiment, the first of which is the warm-up


class Piece(NamedTuple):
    """Work that is done at one time: no faster than its FLOPs or its bytes allow, whichever takes longer; ``share`` of
    that rate is expected."""

    flops: float = 0.0
    bytes: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Axis:
    """A coordinate: the values to be tried besides the present one, and what is expected of them."""

    name: str
    values: Sequence[Any]
    hypothesis: str


@dataclass(frozen=True)
class Trial:
    """An experiment on a device. The variants of ``problem`` are the yardsticks and are not tried themselves."""

    problem: Problem
    candidate: Callable[[Setting], Variant]
    work: Callable[[Setting], Sequence[Piece]]  # one piece after the other


@dataclass(frozen=True)
class Experiment:
    """``seconds`` is what it takes on a GPU, about: one that the rest of a budget is not enough for is left out."""

    name: str
    start: Callable[[str], Setting]  # of "cpu" or "cuda"
    axes: Callable[[str], Sequence[Axis]]
    trial: Callable[[str], Trial]
    seconds: float
    why_not: Callable[[str], str] = lambda device: ""  # empty if it can run there
    pruned: Callable[[Setting], str] = lambda setting: ""  # empty, or why a setting is not tried


@dataclass(frozen=True)
class Step:
    """One coordinate of one experiment, before it is measured."""

    experiment: str
    axis: Axis
    settings: Mapping[str, Setting]  # label -> setting, the present one first
    left_out: Mapping[str, str]  # label -> why
    predicted: Mapping[str, float]  # label -> seconds
    case: Case

    @property
    def present(self) -> str:
        return next(iter(self.settings))

    def gain(self, label: str) -> float:
        """Predicted, over the present setting: 1.1 is a tenth faster."""
        return self.predicted[self.present] / self.predicted[label]


def under(setup: Setup, setting: Callable[[], AbstractContextManager[Any]]) -> Setup:
    """``setup`` with a setting that is in force while it, and each of its calls, runs, and at no other time."""

    def patched() -> Call:
        with setting():
            call = setup()

        def run() -> Outputs:
            with setting():
                return call.run()

        return Call(run, call.reset)

    return patched


def steps(
    experiment: Experiment, device: str, head: Row, rounds: int, warmup: int, deadline: float | None
) -> Iterator[tuple[Step, list[Row]]]:
    """Each coordinate twice: without rows as soon as the prediction stands, then with those that came out. A row is one
    of ``bench.harness`` with the prediction, the outcome and, where it is a candidate, its setting. Past the deadline
    no further coordinate is begun."""
    trial, present = experiment.trial(device), experiment.start(device)
    rates = ceiling_rates(trial.problem)
    for axis in experiment.axes(device):
        if deadline is not None and time.perf_counter() > deadline:
            return
        step = prepared(experiment, axis, present, trial, rates)
        yield step, []
        candidates = [replace(trial.candidate(setting), name=name) for name, setting in step.settings.items()]
        problem = replace(trial.problem, variants=[*trial.problem.variants, *candidates])
        rows = measure(problem, head | said_before(step), rounds, warmup, deadline)
        settled(step, rows)
        yield step, rows
        present = step.settings[fastest(step, rows)]


def ceiling_rates(problem: Problem) -> dict[str, float]:
    """Amount a second of each ceiling, before anything else is measured."""
    clock = machine.clock_for(problem.case.device)
    rates = {}
    for name, (run, amount) in problem.ceilings.items():
        samples = [clock.seconds(run) for _ in range(CEILING_CALLS)]
        rates[name] = amount / percentile(samples[1:], 0.5)
    return rates


def prepared(experiment: Experiment, axis: Axis, present: Setting, trial: Trial, rates: Mapping[str, float]) -> Step:
    values = [present[axis.name], *(value for value in axis.values if value != present[axis.name])]
    all_settings = {f"{axis.name}={value}": present | {axis.name: value} for value in values}
    why = {label: experiment.pruned(setting) for label, setting in list(all_settings.items())[1:]}
    left_out = {label: reason for label, reason in why.items() if reason}
    settings = {label: setting for label, setting in all_settings.items() if label not in left_out}
    predicted = {label: seconds(trial.work(setting), rates) for label, setting in settings.items()}
    return Step(experiment.name, axis, settings, left_out, predicted, trial.problem.case)


def seconds(pieces: Sequence[Piece], rates: Mapping[str, float]) -> float:
    """Of pieces one after the other."""
    floors = [(floor_seconds(p.flops, p.bytes, rates.get("gemm"), rates["copy"]), p.share) for p in pieces]
    return sum(floor / share for floor, share in floors)


def said_before(step: Step) -> Row:
    """What all rows of a step say."""
    return {
        "experiment": step.experiment,
        "coordinate": step.axis.name,
        "hypothesis": step.axis.hypothesis,
        "present": step.present,
        "left_out": dict(step.left_out),
    }


def settled(step: Step, rows: Sequence[Row]) -> None:
    """Write prediction and outcome into the rows of the candidates. ``gain`` is None where nothing was timed."""
    timed = {row["variant"]: row["median_s"] for row in rows if row["status"] == "ok"}
    for row in rows:
        label = row["variant"]
        if label in step.settings:
            both = label in timed and step.present in timed
            row |= {"setting": step.settings[label], "predicted_s": step.predicted[label]}
            row |= {"predicted_gain": step.gain(label), "gain": timed[step.present] / timed[label] if both else None}


def fastest(step: Step, rows: Sequence[Row]) -> str:
    """The label to go on with: the fastest of the right ones, if it gains more than ``MARGIN`` and its slow calls are
    faster than the present setting's median; else the present one."""
    timed = {row["variant"]: row for row in rows if row["variant"] in step.settings and row["status"] == "ok"}
    if step.present not in timed:
        return step.present
    base = timed[step.present]["median_s"]
    best = min(timed, key=lambda label: timed[label]["median_s"])
    clear = timed[best]["median_s"] < base * (1 - MARGIN) and timed[best]["p80_s"] < base
    return best if clear else step.present
