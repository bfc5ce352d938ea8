"""Pictures of one device: a roofline, how near every variant comes to what the measured ceilings allow; and the
speed-up of packing over the prompt's share of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report_step import SHARE, STEP, TRL_STEP, share_points

Row = dict[str, Any]
INK, GRID = "#2b2b2b", "#dddddd"
COLOURS = {"ours": "#d1495b", "plain": "#8d99ae", "peer": "#30638e"}
LABELS = {"ours": "revisual-fast", "plain": "plain torch", "peer": "other packages"}
MARKERS = {"ours": "o", "plain": "s", "peer": "^"}
APART = (  # not in the roofline: too short for a share of the roof to mean anything, or a whole training step
    *("group_advantages", "pad_selection", "gather_rows"),
    *("gather_kv", "pack_embeddings", "mrope", STEP, SHARE, TRL_STEP),
)
BAR_INCHES, ROOF_INCHES = 0.23, 3.4
MIN_BAND = 1.2
XLABEL = "share of the roof: the time that the measured GEMM rate and copy bandwidth allow, over the median time"


def roofline(cases: Mapping[str, Sequence[Row]], path: Path) -> bool:
    """Above, the roofline of the cases with matrix products, by number; below, each timed variant's share of its roof.

    False, and no file, if nothing was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = _timed(cases)
    if not timed:
        return False
    heights = [len(rows) * BAR_INCHES + 0.45 for rows in timed.values()]
    figure, axes = plt.subplots(
        len(timed) + 1,
        1,
        figsize=(9.5, ROOF_INCHES + sum(heights) + 0.5),
        layout="constrained",
        gridspec_kw={"height_ratios": [ROOF_INCHES, *heights]},
    )
    _roof(axes[0], timed)
    for number, (axis, (name, rows)) in enumerate(zip(axes[1:], timed.items(), strict=True), 1):
        _bars(axis, f"{number}  {name}", rows)
    axes[-1].set_xlabel(XLABEL, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _timed(cases: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    out = {}
    for name, rows in cases.items():
        timed = [row for row in rows if row["status"] == "ok" and row["case"]["op"] not in APART]
        if timed:
            out[name] = sorted(timed, key=lambda row: -row["of_floor"])
    return out


def ridge(row: Row) -> float | None:
    """FLOPs a byte from which on the measured GEMM rate is the limit; None where no products are counted."""
    if not row["ceiling_gemm_flops_per_s"] or not row["flops"]:
        return None
    return row["ceiling_gemm_flops_per_s"] / row["ceiling_copy_bytes_per_s"]


def _roof(axis: Any, timed: Mapping[str, Sequence[Row]]) -> None:
    """The variants of a case have the same x: they are spread sideways over a band, by speed."""
    points: list[tuple[float, float, str]] = []
    centres, band = _bands(timed.values())
    for number, rows in enumerate(timed.values(), 1):
        if number not in centres:
            continue
        x = centres[number]
        points += [(x * f, row["of_gemm"], row["role"]) for f, row in zip(_spread(rows, band), rows, strict=True)]
        axis.axvspan(x / band, x * band, color=GRID, alpha=0.45, linewidth=0)
        axis.annotate(str(number), (x, 1.4), fontsize=8, color=INK, ha="center", va="bottom")
    for x, y, role in points:
        axis.plot(x, y, MARKERS[role], color=COLOURS[role], markersize=5, alpha=0.85)
    low = min((x for x, _, _ in points), default=0.1) / 3
    high = max((x for x, _, _ in points), default=10.0) * 3
    bottom = min([0.1, *(y / 2 for _, y, _ in points)])
    axis.plot([low, min(max(low, 1), high), high], [min(low, 1), min(high, 1), min(high, 1)], color=INK, linewidth=1)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, 3))
    label = "arithmetic intensity / ridge point; the variants of a case are spread over its band, bands are moved apart"
    axis.set_xlabel(label, fontsize=8)
    axis.set_ylabel("FLOP/s, measured GEMM rate = 1", fontsize=8)
    axis.set_yticks([y for y in (0.001, 0.01, 0.1, 1.0) if y >= bottom])
    axis.tick_params(labelsize=8)
    axis.grid(color=GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    for role in COLOURS:
        axis.plot([], [], MARKERS[role], color=COLOURS[role], label=LABELS[role])
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=3, frameon=False, fontsize=8)
    row = next(iter(timed.values()))[0]
    axis.set_title(f"{row['device']}, host threads: {row['threads']}", fontsize=10, loc="left", color=INK)


def _bands(cases: Iterable[Sequence[Row]]) -> tuple[dict[int, float], float]:
    """Intensity over ridge point of each numbered case with products, moved right where bands would overlap, and half
    of a band's width as a factor."""
    limits = {number: (rows[0], ridge(rows[0])) for number, rows in enumerate(cases, 1)}
    found = {number: row["flops"] / row["bytes"] / limit for number, (row, limit) in limits.items() if limit}
    if not found:
        return {}, MIN_BAND
    band = max(MIN_BAND, (max(found.values()) / min(found.values())) ** 0.03)
    centres: dict[int, float] = {}
    free = 0.0
    for number, x in sorted(found.items(), key=lambda item: item[1]):
        centres[number] = max(x, free)
        free = centres[number] * band**2.2
    return centres, band


def _spread(rows: Sequence[Row], band: float) -> list[float]:
    """Factors between ``1 / band`` and ``band``, evenly apart on a log axis."""
    return [band ** (2 * (index + 1) / (len(rows) + 1) - 1) for index in range(len(rows))]


def _bars(axis: Any, name: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import PercentFormatter

    for y, row in enumerate(rows):
        share, colour = row["of_floor"], COLOURS[row["role"]]
        axis.hlines(y, 0, share, color=colour, linewidth=2)
        axis.plot(share, y, MARKERS[row["role"]], color=colour, markersize=5)
        label = {"textcoords": "offset points", "va": "center", "fontsize": 7, "color": INK}
        axis.annotate(f"{share:.0%}", (share, y), (6, 0), **label)
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, max(1.08, 1.12 * max(row["of_floor"] for row in rows)))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{name}: {bound(rows[0])}", fontsize=8, loc="left", color=INK)


def bound(row: Row) -> str:
    """What limits the case on this device, from the counted FLOPs and bytes and the measured ceilings."""
    limit = ridge(row)
    if limit is None:
        return "bound by memory"
    intensity = row["flops"] / row["bytes"]
    side = "the matrix units" if intensity >= limit else "memory"
    return f"bound by {side}, {_figure(intensity)} FLOPs a byte against a ridge of {_figure(limit)}"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def packing_speedup(cases: Mapping[str, Sequence[Row]], path: Path) -> bool:
    """Speed-up of packing over padding against the prompt's share, beside the one that FLOPs predict.

    False, and no file, if it was not measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = next((rows for rows in cases.values() if rows[0]["case"]["op"] == SHARE), [])
    points = share_points(rows)
    if not points:
        return False
    figure, axis = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    x = [point["share"] for point in points]
    axis.fill_between(
        x, [p["low"] for p in points], [p["high"] for p in points], color=COLOURS["ours"], alpha=0.2, lw=0
    )
    axis.plot(x, [p["measured"] for p in points], "o-", color=COLOURS["ours"], label="measured; band: all rounds")
    axis.plot(x, [p["predicted"] for p in points], "--", color=INK, label="predicted by the FLOP model")
    axis.axhline(1, color=COLOURS["plain"], linewidth=1)
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.set_xlabel("share of the prompt in prompt + response", fontsize=8)
    axis.set_ylabel("tokens trained per second, padded forward = 1", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color=GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False, fontsize=8)
    row = rows[0]
    title = f"{row['case']['label']}, {row['case']['dtype']}; {row['device']}, host threads: {row['threads']}"
    axis.set_title(title, fontsize=9, loc="left", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
