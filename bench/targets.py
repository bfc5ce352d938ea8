"""What the project aims at, and whether the measured rows reach it. A line without rows says "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MISSING = "not measured"
CPU_SHAPE = (2048, 512, 32000)
GPU_SHAPE = (8192, 3584, 152064)
GPU_LOGITS = (8192, 0, 151936)
GRADIENTS = {"d_hidden", "d_weight"}


@dataclass(frozen=True)
class Target:
    """One line: what was aimed at, what came out."""

    text: str
    measured: str = MISSING
    verdict: str = ""


def targets(rows: Sequence[Row]) -> list[Target]:
    """All lines; ``rows`` are the newest of each variant."""
    return [
        *(line for dtype, factor in (("float32", 1.2), ("bfloat16", 1.0)) for line in _cpu(rows, dtype, factor)),
        *_gpu(rows),
    ]


def _cpu(rows: Sequence[Row], dtype: str, factor: float) -> list[Target]:
    here = _of(rows, "cpu", "linear_policy_loss", CPU_SHAPE, dtype)
    mine = _best(here, lambda row: row["role"] == "ours")
    what = f"CPU, `linear_policy_loss`, N=2048 D=512 V=32,000, {dtype}"
    eager = _best(here, lambda row: row["variant"] == "eager")
    trl = _best(here, lambda row: row["variant"].startswith("TRL"))
    liger = _best(here, lambda row: row["variant"] == "Liger fused linear GRPO")
    return [
        _speed(f"{what}: at least {factor}x eager torch with the same outputs", mine, eager, factor),
        _memory(f"{what}: at most a quarter of eager torch's peak memory", mine, eager),
        _speed(f"{what}: at least 4x TRL's chunked log-prob, which is untuned for CPUs", mine, trl, 4.0),
        _speed(f"{what}: at least 1.25x Liger's fused linear GRPO", mine, liger, 1.25),
    ]


def _gpu(rows: Sequence[Row]) -> list[Target]:
    what = "Hopper, N=8192 D=3584 V=152,064, bf16: `linear_policy_loss`"
    what_logits = "Hopper, N=8192 V=151,936, bf16: `policy_loss_from_logits`"
    linear = [row for row in _of(rows, "cuda", "linear_policy_loss", GPU_SHAPE, "bfloat16") if _hopper(row)]
    logits = [row for row in _of(rows, "cuda", "policy_loss_from_logits", GPU_LOGITS, "bfloat16") if _hopper(row)]
    mine = _best(linear, lambda row: row["role"] == "ours")
    peer = _best(linear, lambda row: row["role"] == "peer" and set(row["outputs"]) >= GRADIENTS)
    own_logits = _best(logits, lambda row: row["role"] == "ours")
    liger = _best(logits, lambda row: row["variant"] == "Liger Triton GRPO")
    fp32 = _best(linear, lambda row: row["role"] == "ours" and "bf16 logits" not in row["variant"])
    share = Target(f"{what} at least 85% of the measured GEMM rate, 6 N D V counted")
    if mine:
        share = Target(share.text, f"{mine['of_gemm']:.1%} ({mine['variant']})", _verdict(mine["of_gemm"] >= 0.85))
    exact = Target(f"{what}, identical policies, fp32 logits: largest abs(ratio - 1) below 1e-5")
    if fp32 and "ratio_error" in fp32:
        exact = Target(exact.text, f"{fp32['ratio_error']:.1e}", _verdict(fp32["ratio_error"] < 1e-5))
    return [
        share,
        _speed(f"{what} at least 1.25x the fastest peer that computes the same gradient", mine, peer, 1.25),
        _speed(f"{what_logits} at least 1.3x Liger's", own_logits, liger, 1.3),
        exact,
    ]


def _hopper(row: Row) -> bool:
    return any(name in row["device"] for name in ("H100", "H200", "H20", "GH200"))


def _of(rows: Iterable[Row], kind: str, op: str, shape: tuple[int, int, int], dtype: str) -> list[Row]:
    wanted = (op, *shape, dtype)
    cases = [row for row in rows if row["device_kind"] == kind]
    return [row for row in cases if tuple(row["case"][name] for name in ("op", "n", "d", "v", "dtype")) == wanted]


def _best(rows: Iterable[Row], which: Callable[[Row], bool]) -> Row | None:
    """The fastest of those that were timed."""
    chosen = [row for row in rows if row["status"] == "ok" and which(row)]
    return min(chosen, key=lambda row: row["median_s"], default=None)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _speed(text: str, mine: Row | None, other: Row | None, factor: float) -> Target:
    if mine is None or other is None or mine["run"] != other["run"]:
        return Target(text)
    ratio = other["median_s"] / mine["median_s"]
    return Target(text, f"{ratio:.2f}x ({mine['variant']} against {other['variant']})", _verdict(ratio >= factor))


def _memory(text: str, mine: Row | None, other: Row | None) -> Target:
    if mine is None or other is None or not mine["peak_bytes"] or not other["peak_bytes"]:
        return Target(text)
    ratio = mine["peak_bytes"] / other["peak_bytes"]
    return Target(text, f"{ratio:.3f} of it ({mine['variant']})", _verdict(ratio <= 0.25))
