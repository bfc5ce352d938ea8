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
from bench.harness import append, measure, stamp
from bench.problems import DTYPES, OPS, cases

RESULTS = machine.ROOT / "bench" / "results"
ROUNDS = {"cpu": 5, "gpu": 20}
WARMUP = {"cpu": 0, "gpu": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if one of our own variants fails its check, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {options.rounds}")
    suite = options.suite or ("gpu" if torch.cuda.is_available() else "cpu")
    if suite == "gpu" and not torch.cuda.is_available():
        raise ValueError("--suite gpu needs a CUDA device: run it on one, or use --suite cpu")
    device = "cpu" if suite == "cpu" else "cuda"
    rounds = options.rounds or ROUNDS[suite]
    head = stamp(suite, device)
    print(f"device: {head['device']}, {head['threads']} threads, commit {head['commit']}")
    if suite == "cpu":
        free = f"{head['threads']} of {os.cpu_count()} cores"
        print(f"The CPU suite keeps {free} busy: nothing else may run beside it. OMP_NUM_THREADS sets the number.")
    ours_failed = False
    for case in cases(suite, options.op, options.shape, options.dtype):
        start = time.perf_counter()
        rows = measure(OPS[case.op](case), head, rounds, WARMUP[suite])
        path = append(rows, options.out)
        _print(rows)
        print(f"  {time.perf_counter() - start:.0f} s in all -> {path}", flush=True)
        ours_failed |= any(row["role"] == "ours" and row["status"] in ("wrong", "failed") for row in rows)
    return int(ours_failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="revisual-fast bench", description=__doc__)
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="default: gpu where there is CUDA, else cpu")
    parser.add_argument("--op", action="append", default=[], choices=tuple(OPS), help="may be repeated; default all")
    parser.add_argument("--shape", type=_shape, metavar="N,D,V", help="instead of the suite's shapes")
    names = sorted({name for dtypes in DTYPES.values() for name in dtypes})
    parser.add_argument("--dtype", action="append", default=[], choices=names, help="may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--rounds", type=int, metavar="n", help="timed calls a variant; default 5 (CPU), 20 (GPU)")
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected N,D,V, for example 2048,512,32000; got {text!r}")
    return sizes


def _print(rows: Sequence[dict[str, Any]]) -> None:
    case = rows[0]["case"]
    print(f"\n{case['op']}  N={case['n']} D={case['d']} V={case['v']} {case['dtype']}")
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
