"""``python -m bench``: measure, print a short table, append the rows to ``bench/results/<device>/<op>.jsonl``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.checks import failures, said
from bench.harness import Case, DeviceLost, append, measure, release_or_lost, stamp
from bench.problems import DTYPES, OPS, ROUNDS, STEP_ROUNDS, cases, reserve, rounds, within

BUDGET = {"cpu": None, "gpu": 460.0}  # seconds
WARMUP = {"cpu": 0, "gpu": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if one of our own variants fails its check, or a case as a whole; 2 for bad usage."""
    start = time.perf_counter()
    options = _parser().parse_args(arguments)
    for name, least in (("rounds", 1), ("budget", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value}")
    suite = options.suite or ("gpu" if torch.cuda.is_available() else "cpu")
    if suite == "gpu" and not torch.cuda.is_available():
        raise ValueError("--suite gpu needs a CUDA device: run it on one, or use --suite cpu")
    todo = cases(suite, options.op, options.shape, options.dtype, options.case)
    head = stamp(suite, "cpu" if suite == "cpu" else "cuda")
    print(f"device: {head['device']}, {head['threads']} threads, commit {machine.short(head['commit'])}")
    if suite == "cpu":
        free = f"{head['threads']} of {os.cpu_count()} cores"
        print(f"The CPU suite keeps {free} busy: nothing else may run beside it. OMP_NUM_THREADS sets the number.")
    budget = BUDGET[suite] if options.budget is None else options.budget
    good, end = True, None if budget is None else start + budget
    sure = len(todo) if budget is None else len(within(todo, budget))
    for index, case in enumerate(todo):
        if end is not None and time.perf_counter() + reserve([case]) > end:
            print(f"\n--budget does not reach further; left out: {'; '.join(case.title for case in todo[index:])}")
            break
        deadline = None if end is None else end - reserve(todo[index + 1 : sure])
        try:
            good &= _measured(case, head, options.rounds or rounds(suite, case), deadline, options.out)
        except DeviceLost as error:
            left = len(todo) - index - 1
            print(f"\n{case.title}\n  stopped: {error}. {left} cases are left; run them with --op.", flush=True)
            return 1
    print(f"{time.perf_counter() - start:.0f} s in all")
    return int(not good)


def _measured(case: Case, head: dict[str, Any], rounds: int, deadline: float | None, out: Path) -> bool:
    """One case, printed and appended. False if it, or one of our variants, failed."""
    start = time.perf_counter()
    print(f"\n{case.title}", flush=True)
    try:
        problem = OPS[case.op](case)
        rows = measure(problem, head, rounds, 0 if problem.long_calls else WARMUP[head["suite"]], deadline)
    except failures() as error:
        print(f"  the case failed: {said(error)}", flush=True)
        release_or_lost(f"{case.op} itself")
        return False
    path = append(rows, out)
    _print(rows)
    done = max((row["rounds"] for row in rows if row["status"] == "ok"), default=rounds)
    if done < rounds:
        print(f"  --budget: {done} rounds instead of {rounds}")
    print(f"  {time.perf_counter() - start:.0f} s -> {path}", flush=True)
    return not any(row["role"] == "ours" and row["status"] in ("wrong", "failed") for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="revisual-fast bench", description=__doc__)
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="default: gpu where there is CUDA, else cpu")
    parser.add_argument("--op", action="append", default=[], choices=tuple(OPS), help="may be repeated; default all")
    parser.add_argument("--shape", type=_shape, metavar="N,D,V", help="instead of the suite's; not for training steps")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="only those with TEXT in the title, such as 250/96/8"
    )
    names = sorted({name for dtypes in DTYPES.values() for name in dtypes})
    parser.add_argument("--dtype", action="append", default=[], choices=names, help="may be repeated")
    parser.add_argument("--out", type=Path, default=machine.RESULTS, metavar="DIR", help="default: bench/results")
    counts = f"default {ROUNDS['cpu']} (CPU), {ROUNDS['gpu']} (GPU), {STEP_ROUNDS} for training steps"
    parser.add_argument("--rounds", type=int, metavar="n", help=f"timed calls a variant; {counts}")
    seconds = "time for the whole run: towards its end fewer rounds, no more compiling; default 460 (GPU), none (CPU)"
    parser.add_argument("--budget", type=float, metavar="seconds", help=seconds)
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected N,D,V, for example 2048,512,32000; got {text!r}")
    return sizes


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["status"] == "ok":
            peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            times = f"{row['median_s'] * 1e3:9.2f} ms  {row['of_floor']:6.1%} of the floor  {peak:>6} MiB"
        else:
            times = f"{row['status']}: {row['reason']}"
        print(f"  {row['variant']:<40} {times}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"revisual-fast bench: {error}", file=sys.stderr)
        sys.exit(1)
