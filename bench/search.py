"""``python -m bench.search``: try settings of the library, one hypothesis at a time.

What is expected is printed before anything of it is measured; what came out follows, as a line for LOG.md, and goes to
``bench/results/<device>/search.jsonl``. Nothing is changed: what wins is written into the tables by hand.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import machine
from bench.checks import failures, said
from bench.harness import DeviceLost, append, release_or_lost, stamp
from bench.report import SEARCH
from bench.tuning import attention, linear, products, rows
from bench.tuning.experiment import Experiment, Row, Step, fastest, steps

EXPERIMENTS: dict[str, Experiment] = {  # the most valuable first; those that share inputs are neighbours
    experiment.name: experiment
    for experiment in (
        rows.CUDA_BLOCKS,
        rows.TRITON_LOSS,
        linear.CHUNK_BYTES,
        linear.CHUNK_BYTES_BF16,
        linear.LOGITS_DTYPE,
        products.LAYOUTS,
        products.OVERLAP,
        attention.BACKENDS,
        rows.TRITON_STATISTICS,
        attention.FORWARD,
        attention.QUERY_GRADIENT,
        attention.KEY_GRADIENTS,
    )
}
BUDGET = {"cpu": None, "cuda": 240.0}  # seconds
ROUNDS = {"cpu": 3, "cuda": 10}
WARMUP = {"cpu": 0, "cuda": 2}
OVERTIME = 1.5  # times an experiment's own estimate, after which its rounds become few
WIDTH = 160  # of LOG.md


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a present setting failed its check, or an experiment as a whole; 2 for bad usage."""
    begun = time.perf_counter()
    options = _parser().parse_args(arguments)
    if options.budget is not None and options.budget < 0:
        raise ValueError(f"--budget must be at least 0 seconds; got {options.budget}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = BUDGET[device] if options.budget is None else options.budget
    end = None if budget is None else begun + budget
    head = stamp("search", device)
    print(f"device: {head['device']}, {head['threads']} threads, commit {machine.short(head['commit'])}")
    good = True
    for name in options.experiment or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        why = experiment.why_not(device)
        if not why and end is not None and time.perf_counter() + experiment.seconds > end:
            why = f"left out, --budget does not reach for its {experiment.seconds:.0f} s"
        print(f"\n{name}: {why}" if why else f"\n{name}", flush=True)
        if why:
            continue
        try:
            good &= _run(experiment, device, head, options.rounds or ROUNDS[device], end, options.out)
        except DeviceLost as error:
            print(f"  stopped: {error}; go on with the next --experiment", flush=True)
            return 1
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    return int(not good)


def _run(experiment: Experiment, device: str, head: Row, rounds: int, end: float | None, out: Path) -> bool:
    """One experiment, printed and appended. False if it, or the setting that the library has, failed."""
    begun, good = time.perf_counter(), True
    deadline = None if end is None else min(end, begun + OVERTIME * experiment.seconds)
    to_come = [axis.name for axis in experiment.axes(device)]
    try:
        for step, measured in steps(experiment, device, head, rounds, WARMUP[device], deadline):
            print("\n".join(outcome(step, measured) if measured else prediction(step)), flush=True)
            if measured:
                append(measured, out, SEARCH)
                to_come.remove(step.axis.name)
                good &= any(row["variant"] == step.present and row["status"] == "ok" for row in measured)
    except failures() as error:
        print(f"  the experiment failed: {said(error)}", flush=True)
        release_or_lost(f"{experiment.name} itself")
        good = False
    left = f", not enough for {' and '.join(to_come)}" if to_come else ""
    print(f"  {time.perf_counter() - begun:.0f} s{left}", flush=True)
    return good


def prediction(step: Step) -> list[str]:
    """What is expected, as it is said before the measurement."""
    said = f"{step.axis.name}: {step.axis.hypothesis}"
    lines = textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="  ")
    for label, seconds in step.predicted.items():
        lines.append(f"    {label:<24} predicted {seconds * 1e3:9.3f} ms  {step.gain(label):5.2f}x")
    return lines + [f"    {label:<24} not tried: {why}" for label, why in step.left_out.items()]


def outcome(step: Step, rows: Sequence[Row]) -> list[str]:
    """A table with the outcome beside the prediction, and the same as an entry of LOG.md."""
    found = {row["variant"]: row for row in rows if row["variant"] in step.settings}
    return [*(f"    {_line(label, found[label])}" for label in step.settings), "", *entry(step, rows)]


def _line(label: str, row: Row) -> str:
    if row["status"] != "ok":
        return f"{label:<24} {row['status']}: {row['reason']}"
    gain = "" if row["gain"] is None else f"{row['gain']:5.2f}x, predicted {row['predicted_gain']:.2f}x"
    spread = f"{row['p20_s'] / row['median_s']:.2f} to {row['p80_s'] / row['median_s']:.2f}"
    return f"{label:<24} measured  {row['median_s'] * 1e3:9.3f} ms  {gain}  (p20 to p80 {spread})"


def entry(step: Step, rows: Sequence[Row]) -> list[str]:
    """Lines for LOG.md: the hypothesis, then what was predicted and what was measured of every setting."""
    found = {row["variant"]: row for row in rows if row["variant"] in step.settings}
    present = found[step.present]
    if present["status"] == "ok":
        base = f"{step.present} {present['median_s'] * 1e3:.3f} ms (predicted {present['predicted_s'] * 1e3:.3f})"
    else:
        base = f"{step.present} {present['status']}"
    others = [_against(label, found[label]) for label in step.settings if label != step.present]
    others += [f"{label} not tried ({why})" for label, why in step.left_out.items()]
    best = fastest(step, rows)
    verdict = "stays" if best == step.present else f"{best} is faster"
    head = f"- **{step.experiment}, {step.axis.name}** ({step.case.title}, {present['device']}). {step.axis.hypothesis}"
    text = f"{head} {'; '.join([base, *others])}. {verdict}."
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _against(label: str, row: Row) -> str:
    if row["status"] != "ok":
        return f"{label} {row['status']}: {row['reason']}"
    measured = "no base to compare with" if row["gain"] is None else f"{row['gain']:.2f}x"
    return f"{label} {measured} (predicted {row['predicted_gain']:.2f}x)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__)
    names = "may be repeated; default all, in this order"
    parser.add_argument("--experiment", action="append", default=[], choices=tuple(EXPERIMENTS), help=names)
    seconds = "time for the whole run; default 240 on CUDA, none on a CPU"
    parser.add_argument("--budget", type=float, metavar="seconds", help=seconds)
    calls = f"timed calls of a setting; default {ROUNDS['cpu']} on a CPU, {ROUNDS['cuda']} on CUDA"
    parser.add_argument("--rounds", type=int, metavar="n", help=calls)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, metavar="DIR", help="default: bench/results")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"python -m bench.search: {error}", file=sys.stderr)
        sys.exit(2)
