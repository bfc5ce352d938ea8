"""What the project aims at, and whether the measured rows reach it. A line without rows says "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.machine import peak_flops
from bench.report_step import TRL_STEP, shares

Row = dict[str, Any]
MISSING = "not measured"
CPU_SHAPE = (2048, 512, 32000)
GPU_SHAPE = (8192, 3584, 152064)
GPU_LOGITS = (8192, 0, 151936)
LIGER = "Liger fused linear GRPO"
LIGER_ROWS, LIGER_SEQUENCES = "Liger Triton GRPO", "Liger Triton GSPO"
GRADIENTS = {"d_hidden", "d_weight"}
STEP_PEERS = ("transformers, padded", "TRL GRPOTrainer")
STEP_TARGETS = {"250/96/8, image of 196 tokens": 3.5, "250/512/8, image of 196 tokens": 1.4, "64/512/8, text": 1.1}
ROLLOUT = "tiny-vl, 4 x 512/32/8, image of 196 tokens"
TRL_LABEL = "250/96/8, image of 196 tokens"
STEP_SHAPES = ("1450/500/8, image of 1,190 tokens", "1450/3500/8, image of 1,190 tokens", "250/4500/8, text")
STEP_GPU: dict[str, float | None] = {  # -> least MFU
    **{f"Qwen2.5-VL-7B, {shape}": 0.45 for shape in STEP_SHAPES},
    **{f"Qwen2.5-VL-3B, {shape}": None for shape in STEP_SHAPES},
}
TRL_GPU = tuple(f"Qwen2.5-VL-3B, {shape}" for shape in STEP_SHAPES[:2])


@dataclass(frozen=True)
class Target:
    """One line: what was aimed at, what came out."""

    text: str
    measured: str = MISSING
    verdict: str = ""


def targets(rows: Sequence[Row]) -> list[Target]:
    """All lines; ``rows`` are those of the newest run of each case. What is reached, our default variant reaches: fp32
    logits, no argument given; the others stand beside it, and the fastest baseline that computes no less."""
    return [
        *(line for dtype, factor in (("float32", 1.2), ("bfloat16", 1.0)) for line in _cpu(rows, dtype, factor)),
        *(_step(rows, label, factor) for label, factor in STEP_TARGETS.items()),
        _trl(rows, "cpu", TRL_LABEL, "float32"),
        _rollout(rows),
        *_gpu(rows),
        *(_step_on_gpu(rows, label, least) for label, least in STEP_GPU.items()),
        *(_trl(rows, "cuda", label, "bfloat16") for label in TRL_GPU),
    ]


def _step(rows: Sequence[Row], label: str, factor: float) -> Target:
    """Against the faster of two, each of which has to have a time."""
    here = _step_rows(rows, "cpu", label, "float32")
    text = f"CPU, `grpo_step`, {label}, float32: at least {factor}x the tokens/s of the faster of transformers and TRL"
    missing = [name for name in STEP_PEERS if here and not _named(here, name)]
    if missing:
        return Target(text, f"{' and '.join(missing)} got no time", "missed")
    base = _best(here, lambda row: row["role"] in ("plain", "peer"))
    if base is None:
        return Target(text)
    median = base["median_s"]
    return _against(
        _line(text, here, lambda row: median / row["median_s"], "{:.2f}x", lambda ratio: ratio >= factor), base
    )


def _rollout(rows: Sequence[Row]) -> Target:
    """The embedded engine against the faster way to call ``generate``."""
    here = _step_rows(rows, "cpu", ROLLOUT, "float32", "rollout")
    text = f"CPU, `rollout`, {ROLLOUT}, float32: embedded engine at least 3x the tokens/s of transformers' `generate`"
    base = _best(here, lambda row: row["role"] == "plain")
    mine = [row for row in here if row["variant"] == "revisual-fast"]
    if base is None:
        return Target(text)
    median = base["median_s"]
    return _against(_line(text, mine, lambda row: median / row["median_s"], "{:.2f}x", lambda ratio: ratio >= 3), base)


def _trl(rows: Sequence[Row], kind: str, label: str, dtype: str) -> Target:
    """The fast trainer against TRL's stock one, what packing gives and what the head gives apart."""
    on_cpu = kind == "cpu"
    text = f"CPU, `{TRL_STEP}`, {label}, {dtype}" if on_cpu else f"CUDA, `{TRL_STEP}`, {label}, bf16"
    text += f": `FastGRPOTrainer` {'at least 4x' if on_cpu else 'against'} TRL's stock `GRPOTrainer`, training part"
    found = shares(_step_rows(rows, kind, label, dtype, TRL_STEP))
    if not found:
        return Target(text)
    measured = f"{found['all']:.2f}x: packing {found['packing']:.2f}x, fused head {found['head']:.2f}x"
    return Target(text, measured, ("reached" if found["all"] >= 4 else "missed") if on_cpu else "measured")


def _step_on_gpu(rows: Sequence[Row], label: str, least: float | None) -> Target:
    """Our fastest variant, whatever it is called; without ``least`` there is no figure that it has to reach. Counted
    are the FLOPs that the step needs, not what a variant computes more often."""
    here = _step_rows(rows, "cuda", label, "bfloat16")
    aim = "and MFU" if least is None else f"and at least {least:.0%} MFU"
    text = f"CUDA, `grpo_step`, {label}, bf16: tokens/s of the faster of transformers and TRL, {aim}"
    base = _best(here, lambda row: row["role"] in ("plain", "peer"))
    found = _best(here, lambda row: row["role"] == "ours")
    if base is None or found is None:
        return Target(text)
    rate, peak = found["flops"] / found["median_s"], peak_flops(found["device"])
    shares = [f"{rate / found['ceiling_gemm_flops_per_s']:.0%} of the measured GEMM rate"]
    shares += [f"MFU {rate / peak:.0%}"] if peak else []
    speed = f"{base['median_s'] / found['median_s']:.2f}x ({found['variant']})"
    reached = least is not None and peak is not None and rate / peak >= least
    verdict = "measured" if least is None or peak is None else "reached" if reached else "missed"
    return Target(text, f"against {base['variant']}: {speed}, {', '.join(shares)}", verdict)


def _step_rows(rows: Iterable[Row], kind: str, label: str, dtype: str, op: str = "grpo_step") -> list[Row]:
    """The rows of one labelled case, of its newest run."""
    wanted = (op, label, dtype)
    cases = [row for row in rows if row["device_kind"] == kind]
    return _newest([row for row in cases if tuple(row["case"].get(k) for k in ("op", "label", "dtype")) == wanted])


def _cpu(rows: Sequence[Row], dtype: str, factor: float) -> list[Target]:
    here = _of(rows, "cpu", "linear_policy_loss", CPU_SHAPE, dtype)
    what = f"CPU, `linear_policy_loss`, N=2048 D=512 V=32,000, {dtype}"
    eager, trl, liger = (_named(here, name) for name in ("eager", "TRL ChunkedLogProbFunction", LIGER))
    return [
        _speed(f"{what}: at least {factor}x eager torch with the same outputs", here, eager, factor),
        _memory(f"{what}: at most a quarter of eager torch's peak memory", here, eager),
        _speed(f"{what}: at least 4x TRL's chunked log-prob, which is untuned for CPUs", here, trl, 4.0),
        _speed(f"{what}: at least 1.25x Liger's fused linear GRPO, the faster of its settings", here, liger, 1.25),
    ]


def _gpu(rows: Sequence[Row]) -> list[Target]:
    what = "Hopper, N=8192 D=3584 V=152,064, bf16: `linear_policy_loss`"
    what_logits = "Hopper, N=8192 V=151,936, bf16: `policy_loss_from_logits`"
    what_gspo, what_statistics = f"{what_logits} with GSPO", "Hopper, N=8192 V=151,936, bf16: `logits_statistics`"
    hopper = [row for row in rows if any(name in row["device"] for name in ("H100", "H200", "H20", "GH200"))]
    linear = _of(hopper, "cuda", "linear_policy_loss", GPU_SHAPE, "bfloat16")
    logits, gspo, statistics = (
        _of(hopper, "cuda", op, GPU_LOGITS, "bfloat16")
        for op in ("policy_loss_from_logits", "policy_loss_from_logits_gspo", "logits_statistics")
    )
    liger = _named(logits, LIGER_ROWS)
    peer = _best(linear, lambda row: row["role"] == "peer" and set(row["outputs"]) >= GRADIENTS)
    peer_of_logits = _best(logits, lambda row: row["role"] == "peer" and "d_logits" in row["outputs"])
    return [
        _share(f"{what} at least 90% of the measured GEMM rate, 6 N D V counted", linear, "of_gemm", 0.9),
        _speed(f"{what} at least 1.25x the fastest peer that computes the same gradient", linear, peer, 1.25),
        _speed(f"{what_logits} at least 1.3x Liger's", logits, liger, 1.3),
        _exact(f"{what}, identical policies, fp32 logits: largest abs(ratio - 1) below 1e-5", linear),
        _share(f"{what_logits} at least 90% of the copy bandwidth, 4 bytes a logit counted", logits, "of_copy", 0.9),
        _line(f"{what_logits} at most 157 ns a token", logits, _ns_a_token, "{:.0f} ns", lambda ns: ns <= 157),
        _speed(f"{what_logits} faster than every peer with a gradient", logits, peer_of_logits, 1.0),
        _speed(f"{what_logits} at least 1.5x Liger's GRPO kernel", logits, liger, 1.5),
        _speed(f"{what_gspo} at least 2x Liger's", gspo, _named(gspo, LIGER_SEQUENCES), 2.0),
        _share(
            f"{what_statistics} at least 90% of the copy bandwidth, 2 bytes a logit counted", statistics, "of_copy", 0.9
        ),
    ]


def _ns_a_token(row: Row) -> float:
    return row["median_s"] / row["case"]["n"] * 1e9


def _of(rows: Iterable[Row], kind: str, op: str, shape: tuple[int, int, int], dtype: str) -> list[Row]:
    """The rows of one case, of its newest run if it was measured on several devices."""
    wanted = (op, *shape, dtype)
    cases = [row for row in rows if row["device_kind"] == kind]
    found = [row for row in cases if tuple(row["case"][name] for name in ("op", "n", "d", "v", "dtype")) == wanted]
    return _newest(found)


def _newest(found: list[Row]) -> list[Row]:
    newest = max((row["time"], row["run"]) for row in found)[1] if found else ""
    return [row for row in found if row["run"] == newest]


def _best(rows: Iterable[Row], which: Callable[[Row], bool]) -> Row | None:
    """The fastest of those that were timed."""
    chosen = [row for row in rows if row["status"] == "ok" and which(row)]
    return min(chosen, key=lambda row: row["median_s"], default=None)


def _named(rows: Iterable[Row], name: str) -> Row | None:
    """A baseline, in the fastest of its settings that computes what the plain name does."""
    whole = (name, *(f"{name}, {setting}" for setting in ("one chunk", "one chunk, TF32")))
    return _best(rows, lambda row: row["variant"] in whole)


def _ours(rows: Iterable[Row]) -> tuple[Row | None, dict[str, Row]]:
    """The default variant, on its fastest backend, and the others by the setting their name ends in."""
    mine = [row for row in rows if row["role"] == "ours"]
    settings = {row["variant"].partition(", ")[2] for row in mine} - {""}
    default = _best(mine, lambda row: ", " not in row["variant"])
    others: dict[str, Row] = {}
    for setting in sorted(settings):
        best = _best([row for row in mine if row["variant"].endswith(f", {setting}")], lambda row: True)
        others |= {setting: best} if best else {}
    return default, others


def _line(
    text: str, rows: Sequence[Row], figure: Callable[[Row], float | None], form: str, reached: Callable[[float], bool]
) -> Target:
    """``figure`` of our variants. A default that was run and got no time is a miss, not a gap."""
    mine, others = _ours(rows)
    bad = [row for row in rows if row["role"] == "ours" and row["status"] in ("wrong", "failed")]
    broken = [f"{row['variant']}: {row['status']}" for row in bad if ", " not in row["variant"]]
    if mine is None and broken:
        return Target(text, "; ".join(broken), "missed")
    value = figure(mine) if mine else None
    if mine is None or value is None:
        return Target(text)
    said = [f"{form.format(value)} ({mine['variant']})"]
    said += [f"{name}: {form.format(found)}" for name, row in others.items() if (found := figure(row)) is not None]
    return Target(text, "; ".join(said), "reached" if reached(value) else "missed")


def _beside(target: Target, rows: Sequence[Row], say: Callable[[Row, Row], str]) -> Target:
    """With a clause on the fastest baseline that has the same outputs."""
    mine, _ = _ours(rows)
    if mine is None or target.measured == MISSING:
        return target
    same = _best(rows, lambda row: row["role"] in ("plain", "peer") and set(row["outputs"]) >= set(mine["outputs"]))
    clause = f"{same['variant']}, {say(mine, same)}" if same else "none was timed"
    return replace(target, measured=f"{target.measured}; fastest baseline with the same outputs: {clause}")


def _speed(text: str, rows: Sequence[Row], other: Row | None, factor: float) -> Target:
    if other is None:
        return Target(text)
    base = other["median_s"]
    found = _line(text, rows, lambda row: base / row["median_s"], "{:.2f}x", lambda ratio: ratio >= factor)
    return _beside(_against(found, other), rows, lambda mine, same: f"{same['median_s'] / mine['median_s']:.2f}x")


def _memory(text: str, rows: Sequence[Row], other: Row | None) -> Target:
    if other is None or not other["peak_bytes"]:
        return Target(text)

    def share(row: Row, base: Row = other) -> float | None:
        return row["peak_bytes"] / base["peak_bytes"] if row["peak_bytes"] and base["peak_bytes"] else None

    found = _against(_line(text, rows, share, "{:.3f}", lambda ratio: ratio <= 0.25), other)
    return _beside(found, rows, lambda mine, same: f"{share(mine, same) or float('nan'):.3f} of its memory")


def _share(text: str, rows: Sequence[Row], ceiling: str, least: float) -> Target:
    found = _line(text, rows, lambda row: row[ceiling], "{:.1%}", lambda share: share >= least)
    return _beside(found, rows, lambda mine, same: f"{same[ceiling]:.1%}")


def _exact(text: str, rows: Sequence[Row]) -> Target:
    found = _line(text, rows, lambda row: row.get("ratio_error"), "{:.1e}", lambda error: error < 1e-5)
    mine, _ = _ours(rows)
    if mine is None or "ratio_error_float64" not in mine:
        return found
    return replace(found, measured=f"{found.measured}; against float64 log-probs: {mine['ratio_error_float64']:.1e}")


def _against(target: Target, other: Row) -> Target:
    if target.measured == MISSING:
        return target
    return replace(target, measured=f"against {other['variant']}: {target.measured}")
