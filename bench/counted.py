"""What the counters are taken of: ``bench.counters`` runs this under Nsight Compute.

Every op is checked and timed as in a benchmark first. Then, with nothing else in memory, it runs once between
``cudaProfilerStart`` and ``Stop``, behind a kernel that does nothing but mark where it begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import own
from bench.harness import Bench, Case, Variant, stamp
from bench.machine import clock_for
from bench.tuning.linear import pieces
from bench.tuning.products import chunk_case
from bench.tuning.rows import case_of

MARK = "spin_kernel"
"""What ``torch.cuda._sleep`` launches."""
ROUNDS = 3


@dataclass(frozen=True)
class Target:
    """One variant of one op, and how it went: ``counted``, or why not."""

    case: Case
    variant: str
    logits: str  # dtype
    status: str = ""
    seconds: float | None = None  # median outside of ncu

    @property
    def title(self) -> str:
        return f"{self.case.title}, {self.variant}"

    @property
    def parts(self) -> dict[str, int]:
        """What its main kernels do, in their order, and the fewest bytes that each moves."""
        case = self.case
        if not case.d:
            return {"rows": 2 * getattr(torch, self.logits).itemsize * case.n * case.v}
        names = ("logits = X W^T", "rows", "dX = dZ W", "dW += dZ^T X")
        return {name: int(piece.bytes) for name, piece in zip(names, pieces(case, self.logits), strict=True)}


def targets() -> list[Target]:
    """The rows' kernels at the suite's shape, then one chunk of the loss from hidden states, GEMMs included."""
    logits = case_of("policy_loss_from_logits", "cuda")
    chunk = chunk_case("cuda")
    rows = [f"revisual-fast {name}" for name in ("cuda", "triton", "cuda, one block", "cuda, read twice")]
    found = [Target(logits, name, "bfloat16") for name in rows]
    found += [Target(chunk, f"revisual-fast {backend}", "float32") for backend in ("cuda", "triton")]
    return [*found, Target(chunk, "revisual-fast cuda, bf16 logits", "bfloat16")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.counted", description=__doc__)
    parser.add_argument("--said", type=Path, required=True, metavar="FILE", help="where what was run is written")
    parser.add_argument("--budget", type=float, default=40.0, metavar="seconds", help="no op begins after it")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + options.budget
    found = targets()
    head = stamp("counters", "cuda")
    done: list[Target] = []
    for case in dict.fromkeys(target.case for target in found):
        done += _counted(case, [target for target in found if target.case == case], end)
        options.said.write_text(json.dumps(head | {"targets": [asdict(target) for target in done]}))


def _counted(case: Case, wanted: Sequence[Target], end: float) -> list[Target]:
    if time.perf_counter() > end:
        return [replace(target, status="left out: --budget was used up") for target in wanted]
    rows, variants = checked(case, [target.variant for target in wanted])
    done = []
    for target in wanted:
        row = rows.get(target.variant, {"status": "not there", "reason": "its backend has not been built"})
        if row["status"] != "ok":
            done.append(replace(target, status=f"{row['status']}: {row['reason']}"))
        elif time.perf_counter() > end:
            done.append(replace(target, status="left out: --budget was used up"))
        else:
            count(variants[target.variant])
            done.append(replace(target, status="counted", seconds=row["median_s"]))
        print(f"{target.title}: {done[-1].status}", flush=True)
    return done


def checked(case: Case, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Variant]]:
    """Rows of the benchmark of the variants that exist here, by name, and the variants. What only the check needs is
    given back: ncu saves all memory that is held."""
    problem = getattr(own, case.op)(case)
    chosen = [v for v in problem.variants if v.role == "plain" or v.name in names]
    rows = Bench(replace(problem, variants=chosen), clock_for(case.device), ROUNDS, warmup=1).run()
    return {row["variant"]: row for row in rows}, {v.name: v for v in chosen if v.name in names}


def count(variant: Variant) -> None:
    assert variant.setup is not None, variant.reason
    call = variant.setup()
    call.run()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    call.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
