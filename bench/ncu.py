"""Nsight Compute: which counters are asked for, its command line, what it writes, and a table of that.

Names are those of compute capability 9.0. With ``--page raw`` a CSV has a column a metric: a row of names, one of
units, then a row a kernel; lines of ncu's own (``==PROF== ...``) may stand around it. A counter that ncu does not have
is ``n/a`` there, or an error of the run that names it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
L2_HITS = "lts__t_sector_hit_rate.pct"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
WARPS, WARPS_AT_MOST = "sm__warps_active.avg.pct_of_peak_sustained_active", "sm__maximum_warps_per_active_cycle_pct"
REGISTERS = "launch__registers_per_thread"
SHARED = ("launch__shared_mem_per_block_dynamic", "launch__shared_mem_per_block_static")
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected"),
    *("short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
METRICS: tuple[str, ...] = (TIME, READ, WRITTEN, DRAM, L2_HITS, ISSUE, TENSOR, WARPS, WARPS_AT_MOST, REGISTERS, *SHARED)
METRICS += tuple(STALL.format(name) for name in STALLS)

SECOND = {
    "ns": 1e-9,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "nsecond": 1e-9,
    "usecond": 1e-6,
    "msecond": 1e-3,
    "second": 1.0,
}
BYTE = {f"{prefix}byte": 1000.0**power for power, prefix in enumerate(["", "K", "M", "G", "T"])}
SCALE = SECOND | BYTE
"""To seconds and bytes; all other units are taken as they are."""

FIXES = {  # what ncu says -> what helps
    "ERR_NVGPUCTRPERM": "the driver keeps counters for administrators: run as root (in a container, with --cap-add "
    "SYS_ADMIN), or load the driver with NVreg_RestrictProfilingToAdminUsers=0",
    "driver resource was unavailable": "something else uses the counters, for example DCGM: stop it",
}


@dataclass(frozen=True)
class Kernel:
    """One launch. ``values`` has what was counted, in seconds, bytes and percent; what was not is absent."""

    name: str  # as ncu demangles it
    block: str
    grid: str
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """Without types and arguments: ``cluster_loss_kernel``; of CUTLASS, whose kernels share a name, the first of
        its types."""
        name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", self.name)
        plain = re.split(r"[<(]", name)[0].split("::")[-1].split()[-1]
        cutlass = re.search(r"<(cutlass\w*)", name)
        return f"{plain}<{cutlass[1]}>" if cutlass and plain.startswith("Kernel") else plain

    @property
    def bytes(self) -> float | None:
        """Of DRAM, read and written."""
        both = [self.values[name] for name in (READ, WRITTEN) if name in self.values]
        return sum(both) if len(both) == 2 else None

    def stalls(self, count: int = 3) -> list[tuple[str, float]]:
        """The most frequent reasons why a warp did not issue, each with its share of a warp's time, 0 to 1."""
        found = {name: self.values[STALL.format(name)] for name in STALLS if STALL.format(name) in self.values}
        total = sum(found.values())
        found.pop("selected", None)  # it issued
        ordered = sorted(found.items(), key=lambda item: -item[1])
        return [(name, value / total) for name, value in ordered[:count] if value > 0]


def profile_command(ncu: str, metrics: Sequence[str], report: str, command: Sequence[str]) -> list[str]:
    """Count in what the command does between ``cudaProfilerStart`` and ``Stop``, into ``<report>.ncu-rep``, leaving
    clocks as they are. Caches are flushed before every pass, ncu's default."""
    return [
        *(ncu, "--target-processes", "application-only", "--profile-from-start", "off", "--replay-mode", "kernel"),
        *("--clock-control", "none", "--metrics", ",".join(metrics), "--force-overwrite", "--export", report),
        *command,
    ]


def import_command(ncu: str, report: str) -> list[str]:
    """The CSV of a report; needs no GPU."""
    return [ncu, "--import", report, "--csv", "--page", "raw", "--print-units", "base"]


def unknown_metrics(said: str, asked: Sequence[str]) -> list[str]:
    """Those of ``asked`` that ncu's error says it cannot find; it may name them as a regular expression."""
    lines = [line.replace("\\", "") for line in said.splitlines() if re.search("(?i)failed to find metric", line)]
    return [name for name in asked if any(_names(line, name) for line in lines)]


def _names(line: str, metric: str) -> bool:
    base = metric.split(".")[0]
    return re.search(rf"(?<!\w){re.escape(base)}(?!\w)", line) is not None


def explained(said: str) -> str:
    """ncu's errors and, where it is known, what helps."""
    errors = [line for line in said.splitlines() if line.startswith("==ERROR==")] or said.splitlines()[-3:]
    fixes = [fix for sign, fix in FIXES.items() if sign in said]
    return " ".join([*errors, *(f"({fix})" for fix in fixes)]) or "it said nothing"


def parse(text: str) -> list[Kernel]:
    """The kernels of a CSV, in order. Raises ValueError if there is no table in it, or one of another page."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if begin is None:
        raise ValueError(f"no table of Nsight Compute in this: {explained(text)[:500]}")
    head, *rows = [row for row in csv.reader(lines[begin:]) if row and not row[0].startswith("==")]
    if "Metric Name" in head or "Kernel Name" not in head:
        raise ValueError("this table has no column for each metric: write it with `ncu --csv --page raw`")
    units = dict.fromkeys(head, "")
    if rows and not rows[0][0]:
        units, rows = dict(zip(head, rows[0], strict=False)), rows[1:]
    return [_kernel(dict(zip(head, row, strict=False)), units) for row in rows]


def _kernel(row: Mapping[str, str], units: Mapping[str, str]) -> Kernel:
    found = {name: number(row[name], units.get(name, "")) for name in METRICS if name in row}
    values = {name: value for name, value in found.items() if value is not None}
    return Kernel(row["Kernel Name"], row.get("Block Size", ""), row.get("Grid Size", ""), values)


def number(text: str, unit: str) -> float | None:
    """``1,234.5`` of ``Kbyte/block`` -> 1234500.0; None for what is no number, such as ``n/a`` and ``(!) n/a``."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value * SCALE.get(unit.split("/")[0], 1.0) if value == value else None


# the table


HEAD: tuple[str, ...] = ("what", "kernel", "time", "DRAM bytes", "fewest", "DRAM peak", "L2 hits", "warps", "registers")
HEAD += ("shared memory", "issue slots", "tensor pipe", "most frequent stalls")
SMALL = 0.01  # of an op's time: kernels below are one line together


def table(groups: Iterable[tuple[str, Sequence[tuple[str, int | None, Kernel]]]]) -> str:
    """Markdown. Each group is an op and its kernels: what a kernel does ("" if that is not known), the fewest bytes
    that it can move (None likewise), the kernel."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for op, kernels in groups:
        total = sum(kernel.values.get(TIME, 0.0) for _, _, kernel in kernels)
        lines.append(_line([f"**{op}**", f"{len(kernels)} kernels", _ms(total), *[""] * (len(HEAD) - 3)]))
        large = [of for of in kernels if of[0] or of[2].values.get(TIME, total) >= SMALL * total]
        lines += [_line(_cells(*of)) for of in large]
        rest = sum(of[2].values.get(TIME, 0.0) for of in kernels if of not in large)
        if len(large) < len(kernels):
            lines.append(_line(["", f"{len(kernels) - len(large)} smaller", _ms(rest), *[""] * (len(HEAD) - 3)]))
    return "\n".join(lines)


def _cells(what: str, fewest: int | None, kernel: Kernel) -> list[str]:
    moved, shared = kernel.bytes, [kernel.values[name] for name in SHARED if name in kernel.values]
    warps = [_percent(kernel.values.get(name)) for name in (WARPS, WARPS_AT_MOST)]
    return [
        what,
        f"`{kernel.short}`",
        _ms(kernel.values.get(TIME)),
        "n/a" if moved is None else f"{moved / 1e9:.3f} GB",
        "" if fewest is None else f"{fewest / 1e9:.3f} GB" + (f", {moved / fewest:.2f}x" if moved is not None else ""),
        *(_percent(kernel.values.get(name)) for name in (DRAM, L2_HITS)),
        f"{warps[0]} of {warps[1]}",
        f"{kernel.values[REGISTERS]:.0f}" if REGISTERS in kernel.values else "n/a",
        f"{sum(shared) / 1024:.1f} KiB" if shared else "n/a",
        *(_percent(kernel.values.get(name)) for name in (ISSUE, TENSOR)),
        ", ".join(f"{name} {share:.0%}" for name, share in kernel.stalls()) or "n/a",
    ]


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value * 1e3:.3f} ms"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}%"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
