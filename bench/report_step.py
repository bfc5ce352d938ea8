"""Training steps in RESULTS.md: speed is tokens trained per second, beside what the counted FLOPs predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.machine import peak_flops

Row = dict[str, Any]
STEP, SHARE, TRL_STEP = "grpo_step", "grpo_step_share", "trl_step"
STEPS = (STEP, TRL_STEP)
TRL, TRL_HEAD, TRL_FAST = "TRL GRPOTrainer", "GRPOTrainer with patch_trl()", "FastGRPOTrainer"


def step_columns(on_gpu: bool) -> list[str]:
    """Between memory and error of a step's table."""
    return ["predicted by FLOPs", "of GEMM rate", *(["tokens/s", "MFU"] if on_gpu else [])]


def step_cells(row: Row, base: Row | None, on_gpu: bool) -> list[str]:
    """Rates are those of a variant's own FLOPs. MFU refers to the device's published peak."""
    rate = row["flops_variant"] / row["median_s"]
    cells = [f"{base['flops_variant'] / row['flops_variant']:.2f}x" if base else ""]
    cells.append(f"{rate / row['ceiling_gemm_flops_per_s']:.0%}")
    if on_gpu:
        peak = peak_flops(row["device"])
        cells += [f"{row['case']['n'] / row['median_s']:,.0f}", f"{rate / peak:.0%}" if peak else "peak unknown"]
    return cells


def phase_line(rows: Sequence[Row]) -> str:
    """What the phases of our default's pass take, as shares of their sum; empty where they were not measured."""
    row = next((row for row in rows if row["variant"] == "revisual-fast" and row.get("phases_s")), None)
    if row is None:
        return ""
    phases = dict(row["phases_s"])
    vision = phases.pop("vision", 0.0)
    whole = sum(phases.values())
    parts = [f"{name} {seconds / whole:.0%}" for name, seconds in phases.items()]
    tower = f"; the vision tower's forward pass alone {vision / whole:.0%}" if vision else ""
    return f"Phases of revisual-fast, the device waited for after each: {', '.join(parts)}{tower}."


def share_points(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Of every share of the prompt that was measured: ``prompt``, ``response``, ``share``, ``measured`` speed-up of
    packing over padding, its ``low`` and ``high`` from the rounds, and the ``predicted`` one."""
    timed = {(row["role"], row["prompt"], row["response"]): row for row in rows if row["status"] == "ok"}
    points = []
    for (role, prompt, response), packed in timed.items():
        padded = timed.get(("plain", prompt, response))
        if role != "ours" or padded is None:
            continue
        ratios = sorted(a / b for a, b in zip(padded["samples_s"], packed["samples_s"], strict=True))
        points.append(
            {
                "prompt": prompt,
                "response": response,
                "share": prompt / (prompt + response),
                "measured": padded["median_s"] / packed["median_s"],
                "low": ratios[0],
                "high": ratios[-1],
                "predicted": padded["flops_variant"] / packed["flops_variant"],
            }
        )
    return sorted(points, key=lambda point: point["share"])


def share_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the table over the prompt's share, the head first."""
    lines = [
        ["prompt / response", "share of the prompt", "speed-up of packing", "lowest to highest", "predicted by FLOPs"]
    ]
    for p in share_points(rows):
        sizes = f"{p['prompt']:.0f} / {p['response']:.0f}"
        rounds = f"{p['low']:.2f} to {p['high']:.2f}"
        lines.append([sizes, f"{p['share']:.0%}", f"**{p['measured']:.2f}x**", rounds, f"{p['predicted']:.2f}x"])
    return lines


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """Speed-ups: ``all`` of the fast trainer over TRL's, of which ``head`` is the fused head's and ``packing`` the
    rest. Empty where one of the three has no time."""
    times = {row["variant"]: row["median_s"] for row in rows if row["status"] == "ok"}
    if not {TRL, TRL_HEAD, TRL_FAST} <= times.keys():
        return {}
    return {
        "all": times[TRL] / times[TRL_FAST],
        "head": times[TRL] / times[TRL_HEAD],
        "packing": times[TRL_HEAD] / times[TRL_FAST],
    }
