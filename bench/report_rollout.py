"""Rollouts in RESULTS.md: tokens generated per second, and what bringing vLLM's weights up to date takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
ROLLOUT, SYNC = "rollout", "weight_sync"


def rollout_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of one case's table, the head first, the fastest first; speeds are those of the faster ``generate`` = 1."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_s"])
    base = next((row for row in timed if row["role"] == "plain"), None)
    on_gpu = rows[0]["device_kind"] == "cuda"
    lines = [["engine", "tokens/s, transformers = 1", "p20 to p80", "peak memory", "predicted by FLOPs"]]
    lines[0] += ["tokens/s"] if on_gpu else []
    for row in timed:
        median = row["median_s"]
        speed = f"{base['median_s'] / median:.2f}x" if base else "no baseline"
        peak = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        predicted = f"{base['flops_variant'] / row['flops_variant']:.2f}x" if base else ""
        cells = [_name(row), _strong(row, speed), f"{row['p20_s'] / median:.2f} to {row['p80_s'] / median:.2f}"]
        lines.append([*cells, peak, predicted, *([f"{row['case']['n'] / median:,.0f}"] if on_gpu else [])])
    return lines


def sync_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Against a copy of the same bytes; on CUDA also seconds for each GB."""
    timed = [row for row in rows if row["status"] == "ok"]
    base = next((row["median_s"] for row in timed if row["role"] == "plain"), None)
    on_gpu = rows[0]["device_kind"] == "cuda"
    lines = [["way", "time, a copy = 1", "p20 to p80", *(["seconds per GB"] if on_gpu else [])]]
    for row in timed:
        median = row["median_s"]
        cells = [_name(row), _strong(row, f"{median / base:.1f}x" if base else "no baseline")]
        cells.append(f"{row['p20_s'] / median:.2f} to {row['p80_s'] / median:.2f}")
        lines.append([*cells, *([f"{median / (row['bytes'] / 2 / 1e9):.3f}"] if on_gpu else [])])
    return lines


def _name(row: Row) -> str:
    return _strong(row, row["variant"]) + (f" ({row['note']})" if row["note"] else "")


def _strong(row: Row, text: str) -> str:
    return f"**{text}**" if row["role"] == "ours" else text
