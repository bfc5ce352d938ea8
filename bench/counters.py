"""``python -m bench.counters``: Nsight Compute's counters of the main kernels, as a table.

The report (for ncu-ui), its CSV, ncu's messages and the table go to ``--out``. ``--again`` makes the table from what
lies there, without ncu and without a GPU. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, ncu
from bench.counted import MARK, Target
from bench.harness import Case
from bench.ncu import Kernel

OUT = machine.ROOT / "build" / "counters"
REPORT, CSV, SAID, LOG, TABLE = "counters.ncu-rep", "counters.csv", "counters.json", "ncu.log", "counters.md"
ATTEMPTS = 3  # each of which may name counters that this ncu does not have
ROWS = re.compile(r"loss_kernel$")
PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|^Kernel\d?$", re.IGNORECASE)
BUSY = 5.0  # percent of the tensor pipe, from which on a kernel is a product, whatever its name
NOTE = (
    "Kernel by kernel, caches flushed before each, clocks as they were; so times are not those of an op, which stand"
    " beside its name. `warps`: active, of what registers and shared memory allow. Stalls: share of a warp's time "
    "between two instructions."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if nothing was counted."""
    options = _parser().parse_args(arguments)
    if not options.again:
        profile(options.ncu, options.out, options.budget)
    csv, said = options.out / CSV, options.out / SAID
    for path in (csv, said):
        if not path.exists():
            raise ValueError(f"{path} does not exist: run without --again, or give the folder with --out")
    run = json.loads(said.read_text())
    text = page(run, ncu.parse(csv.read_text()))
    (options.out / TABLE).write_text(text)
    print(text)
    print(f"in {options.out}: {TABLE}, {CSV}, {REPORT}")
    return 0 if any(target["status"] == "counted" for target in run["targets"]) else 1


def profile(program: str, out: Path, budget: float) -> None:
    """Run ``bench.counted`` under ncu and write report and CSV. Counters that ncu does not have are left out. Raises
    ValueError with ncu's own words."""
    found = shutil.which(program)
    if found is None:
        raise ValueError(f"{program} is not there: Nsight Compute comes with the CUDA toolkit; --ncu gives its path")
    if not torch.cuda.is_available():
        raise ValueError("counters are those of a CUDA device, and there is none")
    out.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, CSV, SAID):
        (out / name).unlink(missing_ok=True)
    metrics = list(ncu.METRICS)
    for _ in range(ATTEMPTS):
        said = _count(found, metrics, out, budget)
        unknown = ncu.unknown_metrics(said, metrics)
        if not unknown:
            break
        print(f"this ncu has no {', '.join(unknown)}; again without", flush=True)
        metrics = [name for name in metrics if name not in unknown]
    if not (out / REPORT).exists():
        raise ValueError(f"ncu wrote no report: {ncu.explained(said)}; all it said is in {out / LOG}")
    done = subprocess.run(ncu.import_command(found, str(out / REPORT)), capture_output=True, text=True, check=False)
    (out / CSV).write_text(done.stdout)
    if done.returncode:
        raise ValueError(f"ncu cannot read its report {out / REPORT}: {ncu.explained(done.stdout + done.stderr)}")


def _count(program: str, metrics: Sequence[str], out: Path, budget: float) -> str:
    """One run; returns what ncu said."""
    command = [sys.executable, "-m", "bench.counted", "--said", str(out / SAID), "--budget", str(budget)]
    begun = time.perf_counter()
    environment = os.environ | {"REVISUAL_FAST_NVTX": "0"}  # ncu would turn the ranges on, which need a package
    with (out / LOG).open("w") as log:
        profiled = ncu.profile_command(program, metrics, str((out / REPORT).with_suffix("")), command)
        done = subprocess.run(profiled, cwd=machine.ROOT, env=environment, stdout=log, stderr=log, check=False)
    print(f"ncu: exit code {done.returncode} after {time.perf_counter() - begun:.0f} s", flush=True)
    return (out / LOG).read_text()


# the page


def page(run: Mapping[str, Any], kernels: Sequence[Kernel]) -> str:
    """Markdown: a table of every op that was counted, where it comes from, and what was not counted. Raises ValueError
    if marks are missing."""
    found = [Target(**(target | {"case": Case(**target["case"])})) for target in run["targets"]]
    counted = [target for target in found if target.status == "counted"]
    groups = split(kernels)
    if len(groups) != len(counted):
        raise ValueError(f"{len(counted)} ops were run, but {len(groups)} marks ({MARK}) stand among the kernels")
    pairs = zip(counted, groups, strict=True)
    tables = ncu.table((_title(target), labelled(target, group)) for target, group in pairs)
    kept = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version != "none")
    lines = [
        tables,
        "",
        f"{run['device']}, {run['started'][:10]}, commit {machine.short(run['commit'])}; {kept}. {NOTE}",
    ]
    lines += [f"- {target.title}: {target.status}" for target in found if target.status != "counted"]
    return "\n".join(lines) + "\n"


def _title(target: Target) -> str:
    return target.title if target.seconds is None else f"{target.title}: {target.seconds * 1e3:.3f} ms"


def split(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels behind each mark; what stands before the first belongs to nothing."""
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        if MARK in kernel.name:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    return groups


def labelled(target: Target, kernels: Sequence[Kernel]) -> list[tuple[str, int | None, Kernel]]:
    """What each kernel does and the fewest bytes for it; of the products by their order, if there are three of them."""
    parts = target.parts
    products = [name for name in parts if name != "rows"]
    found = [kernel for kernel in kernels if is_product(kernel)]
    names = iter(products if len(found) == len(products) else ["a product"] * len(found))
    out: list[tuple[str, int | None, Kernel]] = []
    for kernel in kernels:
        what = "rows" if ROWS.search(kernel.short) else next(names) if is_product(kernel) else ""
        out.append((what, parts.get(what), kernel))
    return out


def is_product(kernel: Kernel) -> bool:
    return bool(PRODUCT.search(kernel.short)) or kernel.values.get(ncu.TENSOR, 0.0) >= BUSY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: build/counters")
    parser.add_argument("--again", action="store_true", help="make the table from what lies in --out")
    parser.add_argument("--ncu", default="ncu", metavar="PATH", help="where Nsight Compute is; default: on PATH")
    seconds = "no op begins after it; default 40, about a minute with the start of everything"
    parser.add_argument("--budget", type=float, default=40.0, metavar="seconds", help=seconds)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"python -m bench.counters: {error}", file=sys.stderr)
        sys.exit(2)
