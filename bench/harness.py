"""Correct first, then interleaved rounds: how any set of variants of one op becomes rows of results.

A case goes through: inputs and a float64 reference, one call of every variant whose outputs are held against it, one
call under the memory gauge, then rounds in which every variant that passed is called once, the order rotated from round
to round. The two first calls (one, where calls are long) are the warm-up; ``warmup`` adds rounds that are not timed. A
variant that fails its check, or fails later, gets a row that says so, without a time. What has much to compile is
checked after the others, and left out if the deadline has passed by then.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import machine
from bench.checks import Outputs, allowed_errors, errors_of, failures, recompile_limit_is_an_error, said
from bench.counts import floor_seconds, percentile

MIN_ROUNDS = 3  # timed, however little time is left
CEILING = "ceiling: "
ROLES = ("ours", "plain", "peer", "ceiling")


@dataclass(frozen=True)
class Case:
    """One op at one shape; ``d`` is 0 where there is no hidden size, ``v`` where there is no vocabulary. ``label`` says
    what these sizes cannot say of some ops."""

    op: str
    n: int
    d: int
    v: int
    dtype: str = "float32"
    device: str = "cpu"
    label: str = ""

    @property
    def title(self) -> str:
        return f"{self.op}  {self.label or f'N={self.n} D={self.d} V={self.v}'} {self.dtype}"

    @property
    def fields(self) -> dict[str, Any]:
        """What a row says of the case."""
        return {name: value for name, value in asdict(self).items() if name != "label" or value}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Call(NamedTuple):
    """``run`` is timed; ``reset`` is called before each run, untimed, where a run destroys its input."""

    run: Callable[[], Outputs]
    reset: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to compute an op. Without ``setup`` it cannot run here, and ``reason`` says why."""

    name: str
    role: str  # ours | plain | peer | ceiling
    setup: Callable[[], Call] | None = None
    reason: str = ""
    note: str = ""
    yardstick: str = "eager"  # the plain-torch variant whose error bounds this one's
    values_yardstick: str = ""  # another one for loss, logp and entropy
    flops: int | None = None  # what it does by design; None = what the op needs
    extra: Callable[[Outputs, Outputs], dict[str, Any]] | None = None  # (outputs, reference) -> more figures
    slow_start: bool = False  # its first call compiles or tunes for long

    def __post_init__(self) -> None:
        assert self.role in ROLES
        assert self.setup or self.reason, f"{self.name} neither runs nor says why not"

    @property
    def yardsticks(self) -> tuple[str, str]:
        """For the gradients, and for loss, logp and entropy."""
        return self.yardstick, self.values_yardstick or self.yardstick


@dataclass(frozen=True)
class Problem:
    """A case with everything that is needed to check and time it."""

    case: Case
    variants: Sequence[Variant]
    reference: Callable[[], Outputs]  # float64; may hold "c" = dL/dlogp, the scale of an error of the loss
    flops: int
    bytes: int
    ceilings: dict[str, tuple[Callable[[], Any], int]] = field(default_factory=dict)  # copy, gemm -> (run, amount)
    errors: Callable[[Outputs, Outputs], dict[str, float]] = errors_of  # (outputs, reference) -> name -> error
    long_calls: bool = False  # seconds each: the call that is checked is the one under the memory gauge as well


def rotated(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: every name once, each round starting one further."""
    for index in range(rounds):
        shift = index % max(len(names), 1)
        yield [*names[shift:], *names[:shift]]


class DeviceLost(Exception):
    """The CUDA context is gone, for example after an illegal memory access: this process measures nothing more."""


class Bench:
    """Measures one problem, until ``deadline`` (of ``time.perf_counter``) if there is one."""

    def __init__(
        self, problem: Problem, clock: machine.Clock, rounds: int, warmup: int = 0, deadline: float | None = None
    ) -> None:
        names = [variant.name for variant in problem.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants of {problem.case.op} share a name: {sorted(names)}")
        unknown = {name for variant in problem.variants for name in variant.yardsticks} - set(names)
        if unknown:
            raise ValueError(f"no variant of {problem.case.op} is called {sorted(unknown)}, the yardstick of others")
        self.problem, self.clock, self.rounds, self.warmup, self.deadline = problem, clock, rounds, warmup, deadline
        self.calls: dict[str, Call] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> list[dict[str, Any]]:
        """One row a variant, without what is common to all rows of the run. Raises DeviceLost."""
        torch.compiler.reset()  # what an earlier case compiled must not count as recompilation of this one
        with recompile_limit_is_an_error():
            self._check()
            _release()
            if not self.problem.long_calls:
                self._memory()
            self._time()
        self.calls.clear()
        _release()
        return list(self.rows.values())

    @contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except failures() as error:
            self.rows[name].update(status="failed", reason=said(error))
            self.calls.pop(name, None)
        else:
            return
        release_or_lost(name)

    def _check(self) -> None:
        reference, plain = self.problem.reference(), {}  # type: Outputs, dict[str, dict[str, float]]
        self.rows = {variant.name: self._empty_row(variant) for variant in self.problem.variants}
        for variant in sorted(self.problem.variants, key=lambda variant: variant.slow_start):
            if variant.setup is None:
                continue
            if variant.slow_start and self._late():
                self.rows[variant.name].update(status="left out", reason="the time of --budget was used up before it")
            else:
                with self._drop_if_it_fails(variant.name):
                    plain[variant.name] = self._errors(variant, variant.setup(), reference)
        for variant in self.problem.variants:
            if variant.name in self.calls:
                self._judge(variant, plain)

    def _errors(self, variant: Variant, call: Call, reference: Outputs) -> dict[str, float]:
        row = self.rows[variant.name]
        if call.reset:
            call.reset()
        outputs = self._gauged(call, row) if self.problem.long_calls else call.run()
        row["errors"] = self.problem.errors(outputs, reference)
        row.update(variant.extra(outputs, reference) if variant.extra else {})
        self.calls[variant.name] = call
        return row["errors"]

    def _gauged(self, call: Call, row: dict[str, Any]) -> Outputs:
        kept: list[Outputs] = []
        row["peak_bytes"] = self.clock.peak_bytes(lambda: kept.append(call.run()))
        return kept[0]

    def _judge(self, variant: Variant, plain: dict[str, dict[str, float]]) -> None:
        row = self.rows[variant.name]
        missing = [name for name in variant.yardsticks if name not in plain]
        if missing:
            row.update(status="failed", reason=f"nothing to judge it by: {missing[0]} did not run")
        else:
            errors, (gradients, values) = row["errors"], variant.yardsticks
            allowed = row["errors_allowed"] = allowed_errors(list(errors), plain[gradients], plain[values])
            wrong = {name: errors[name] for name in errors if not errors[name] <= allowed[name]}
            row["outputs"] = sorted(errors)
            row["status"] = "wrong" if wrong else "ok"
            row["reason"] = ", ".join(f"{k}: error {e:.2e}, {allowed[k]:.2e} allowed" for k, e in wrong.items())
        if row["status"] != "ok":
            del self.calls[variant.name]

    def _empty_row(self, variant: Variant) -> dict[str, Any]:
        flops = self.problem.flops
        return {
            "variant": variant.name,
            "role": variant.role,
            "status": "unavailable",
            "reason": variant.reason,
            "note": variant.note,
            "flops_variant": flops if variant.flops is None else variant.flops,
        }

    def _memory(self) -> None:
        for name, call in list(self.calls.items()):
            with self._drop_if_it_fails(name):
                if call.reset:
                    call.reset()
                self.rows[name]["peak_bytes"] = self.clock.peak_bytes(call.run)

    def _time(self) -> None:
        ceilings = {f"{CEILING}{name}": Call(run) for name, (run, _) in self.problem.ceilings.items()}
        samples: dict[str, list[float]] = {name: [] for name in [*self.calls, *ceilings]}
        for index, order in enumerate(rotated(list(samples), self.warmup + self.rounds)):
            if self._late() and index >= self.warmup + MIN_ROUNDS:
                break
            for name in order:
                seconds = None
                if name in ceilings:
                    seconds = self._seconds(ceilings[name])
                elif name in self.calls:
                    with self._drop_if_it_fails(name):
                        seconds = self._seconds(self.calls[name])
                if seconds is not None and index >= self.warmup:
                    samples[name].append(seconds)
        amounts = {name: amount for name, (_, amount) in self.problem.ceilings.items()}
        rates = {name: amount / percentile(samples[f"{CEILING}{name}"], 0.5) for name, amount in amounts.items()}
        for name in self.calls:
            self.rows[name].update(self._timing(samples[name], rates))

    def _late(self) -> bool:
        return self.deadline is not None and time.perf_counter() > self.deadline

    def _seconds(self, call: Call) -> float:
        if call.reset:
            call.reset()
        return self.clock.seconds(call.run)

    def _timing(self, samples: list[float], rates: dict[str, float]) -> dict[str, Any]:
        median = percentile(samples, 0.5)
        flops, n_bytes, gemm = self.problem.flops, self.problem.bytes, rates.get("gemm")
        return {
            "rounds": len(samples),
            "median_s": median,
            "p20_s": percentile(samples, 0.2),
            "p80_s": percentile(samples, 0.8),
            "samples_s": samples,
            "ceiling_copy_bytes_per_s": rates["copy"],
            "ceiling_gemm_flops_per_s": gemm,
            "of_copy": n_bytes / median / rates["copy"],
            "of_gemm": flops / median / gemm if gemm else None,
            "of_floor": floor_seconds(flops, n_bytes, gemm, rates["copy"]) / median,
        }


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_or_lost(name: str) -> None:
    """After a failure: on CUDA it may be one that no later call survives."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        _release()
    except RuntimeError as error:
        raise DeviceLost(f"{name} broke the CUDA context, this process can measure no more ({said(error)})") from error


def stamp(suite: str, device: str) -> dict[str, Any]:
    """What every row of a run carries: when, on what, with which versions and commit."""
    now = datetime.now(UTC)
    return {
        "run": now.strftime("%Y%m%dT%H%M%S.%fZ"),
        "started": now.isoformat(timespec="seconds"),
        "suite": suite,
        "device": machine.device_name(device),
        "device_kind": device,
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }


def measure(
    problem: Problem, head: dict[str, Any], rounds: int, warmup: int = 0, deadline: float | None = None
) -> list[dict[str, Any]]:
    """Complete rows of one case; past the deadline only ``MIN_ROUNDS`` rounds are timed."""
    common = head | {"time": datetime.now(UTC).isoformat(), "case": problem.case.fields}
    common |= {"flops": problem.flops, "bytes": problem.bytes}
    clock = machine.clock_for(problem.case.device)
    rows = Bench(problem, clock, rounds, warmup, deadline).run()
    common |= {"load": machine.load()} if problem.case.device == "cuda" else {}
    return [common | row for row in rows]


def append(rows: Sequence[dict[str, Any]], out: Path, name: str = "") -> Path:
    """Append to ``out/<device>/<name>.jsonl``, by default named after the op; rows of one case. Returns the file."""
    path = out / machine.slug(rows[0]["device"]) / f"{name or rows[0]['case']['op']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
