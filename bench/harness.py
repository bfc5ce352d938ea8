"""Correct first, then interleaved rounds: how any set of variants of one op becomes rows of results.

A case goes through: inputs and a float64 reference, one call of every variant whose outputs are held against it, one
call under the memory gauge, then rounds in which every variant that passed is called once, the order rotated from round
to round. The two first calls are the warm-up; ``warmup`` adds rounds that are not timed. A variant that fails its check
gets a row that says so, without a time.
"""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import machine
from bench.counts import floor_seconds, percentile

Outputs = dict[str, Tensor]
MARGIN = 2.0  # a variant's error is at most this many times plain torch's
ROUNDING = torch.finfo(torch.float32).eps
SLICE = 1 << 26  # elements compared at a time
ROLES = ("ours", "plain", "peer", "ceiling")


@dataclass(frozen=True)
class Case:
    """One op at one shape; ``d`` is 0 where there is no hidden size, ``v`` where there is no vocabulary."""

    op: str
    n: int
    d: int
    v: int
    dtype: str = "float32"
    device: str = "cpu"

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
    flops: int | None = None  # what it does by design; None = what the op needs
    extra: Callable[[Outputs], dict[str, float]] | None = None  # more figures of a checked call

    def __post_init__(self) -> None:
        assert self.role in ROLES
        assert self.setup or self.reason, f"{self.name} neither runs nor says why not"


@dataclass(frozen=True)
class Problem:
    """A case with everything that is needed to check and time it."""

    case: Case
    variants: Sequence[Variant]
    reference: Callable[[], Outputs]  # float64; may hold "c" = dL/dlogp, the scale of an error of the loss
    flops: int
    bytes: int
    ceilings: dict[str, tuple[Callable[[], Any], int]] = field(default_factory=dict)  # copy, gemm -> (run, amount)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` in float64, in slices; nan where the value has one."""
    reference = reference.reshape(-1)
    value = value.detach().reshape(-1)  # a variant may return a view of another shape
    if value.shape != reference.shape:
        raise ValueError(f"an output has {value.numel()} elements, the reference {reference.numel()}")
    pairs = zip(value.split(SLICE), reference.split(SLICE), strict=True)
    squares = [((v.double() - r.double()).square().sum(), r.double().square().sum()) for v, r in pairs]
    error, size = (sum(float(square) for square in side) for side in zip(*squares, strict=True))
    return (error / max(size, 1e-300)) ** 0.5


def errors_of(outputs: Outputs, reference: Outputs) -> dict[str, float]:
    """Error of every output. A loss is a sum in which errors cancel by luck, so that its own size says nothing: its
    error is taken relative to ``|c| |logp|``, the size that an error of logp times ``c = dL/dlogp`` can reach."""
    errors = {name: relative_error(value, reference[name]) for name, value in outputs.items() if name != "loss"}
    if "loss" in outputs:
        scale = float(reference["c"].double().norm() * reference["logp"].double().norm())
        errors["loss"] = abs(float(outputs["loss"].detach().double() - reference["loss"])) / scale
    return errors


def allowed_errors(names: Sequence[str], plain: dict[str, float]) -> dict[str, float]:
    """``MARGIN`` times plain torch's error, at least one fp32 rounding; the loss is bounded by logp's error."""
    return {name: max(MARGIN * plain["logp" if name == "loss" else name], ROUNDING) for name in names}


def rotated(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: every name once, each round starting one further."""
    for index in range(rounds):
        shift = index % max(len(names), 1)
        yield [*names[shift:], *names[:shift]]


def failures() -> tuple[type[Exception], ...]:
    """What a variant may raise here and be reported for, not the benchmark: it is often code of others."""
    kinds: list[type[Exception]] = [RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError]
    kinds += [ImportError, OSError]
    if importlib.util.find_spec("triton"):
        from triton.errors import TritonError

        kinds.append(TritonError)
    return tuple(kinds)


class Bench:
    """Measures one problem."""

    def __init__(self, problem: Problem, clock: machine.Clock, rounds: int, warmup: int = 0) -> None:
        names = [variant.name for variant in problem.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants of {problem.case.op} share a name: {sorted(names)}")
        self.problem, self.clock, self.rounds, self.warmup = problem, clock, rounds, warmup
        self.calls: dict[str, Call] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> list[dict[str, Any]]:
        """One row a variant, without what is common to all rows of the run."""
        torch.compiler.reset()  # what an earlier case compiled must not count as recompilation of this one
        self._check()
        _release()
        self._memory()
        self._time()
        self.calls.clear()
        _release()
        return list(self.rows.values())

    def _check(self) -> None:
        reference, plain = self.problem.reference(), {}  # type: Outputs, dict[str, dict[str, float]]
        yardsticks = {variant.yardstick for variant in self.problem.variants}
        for variant in sorted(self.problem.variants, key=lambda v: v.name not in yardsticks):
            row = self.rows[variant.name] = self._empty_row(variant)
            if variant.setup is None:
                continue
            try:
                call = variant.setup()
                outputs = _run(call)
                row["errors"] = errors_of(outputs, reference)
                row.update(variant.extra(outputs) if variant.extra else {})
            except failures() as error:
                row.update(status="failed", reason=f"{type(error).__name__}: {str(error).strip()[:300]}")
                _release()
                continue
            plain[variant.name] = row["errors"]
            if variant.yardstick not in plain:
                raise ValueError(f"{variant.name} is bound by {variant.yardstick!r}, which did not run")
            self._judge(row, plain[variant.yardstick])
            if row["status"] == "ok":
                self.calls[variant.name] = call
            del outputs
        self.rows = {variant.name: self.rows[variant.name] for variant in self.problem.variants}

    def _judge(self, row: dict[str, Any], plain: dict[str, float]) -> None:
        errors = row["errors"]
        allowed = row["errors_allowed"] = allowed_errors(list(errors), plain)
        wrong = {name: errors[name] for name in errors if not errors[name] <= allowed[name]}
        row["outputs"] = sorted(errors)
        row["status"] = "wrong" if wrong else "ok"
        row["reason"] = ", ".join(f"{k}: error {e:.2e}, {allowed[k]:.2e} allowed" for k, e in wrong.items())

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
        for name, call in self.calls.items():
            if call.reset:
                call.reset()
            self.rows[name]["peak_bytes"] = self.clock.peak_bytes(call.run)

    def _time(self) -> None:
        runs = dict(self.calls)
        for name, (run, _) in self.problem.ceilings.items():
            runs[f"ceiling: {name}"] = Call(run)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for index, order in enumerate(rotated(list(runs), self.warmup + self.rounds)):
            for name in order:
                reset = runs[name].reset
                if reset:
                    reset()
                seconds = self.clock.seconds(runs[name].run)
                if index >= self.warmup:
                    samples[name].append(seconds)
        rates = {
            name: amount / percentile(samples[f"ceiling: {name}"], 0.5)
            for name, (_, amount) in self.problem.ceilings.items()
        }
        for name in self.calls:
            self.rows[name].update(self._timing(samples[name], rates))

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


def _run(call: Call) -> Outputs:
    if call.reset:
        call.reset()
    return call.run()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def measure(problem: Problem, head: dict[str, Any], rounds: int, warmup: int = 0) -> list[dict[str, Any]]:
    """Complete rows of one case."""
    common = head | {"time": datetime.now(UTC).isoformat(), "case": asdict(problem.case)}
    common |= {"flops": problem.flops, "bytes": problem.bytes}
    clock = machine.clock_for(problem.case.device)
    return [common | row for row in Bench(problem, clock, rounds, warmup).run()]


def append(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Append to ``out/<device>/<op>.jsonl``; rows of one case. Returns the file."""
    path = out / machine.slug(rows[0]["device"]) / f"{rows[0]['case']['op']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
