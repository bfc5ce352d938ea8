"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, and the launch tables' entries spill no register."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GATES_TABLE

pytest.importorskip("triton")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each kernel and architecture: variants, registers from the least to the most, bytes spilled."""
    lines = []
    for kernel, sm in dict.fromkeys((row["kernel"], row["sm"]) for row in rows):
        of = [row for row in rows if (row["kernel"], row["sm"]) == (kernel, sm)]
        registers, spilled = [row["reg"] for row in of], max(row["stack"] + row["local"] for row in of)
        used = f"{min(registers)} to {max(registers)} registers, {spilled} bytes spilled"
        lines.append(f"{kernel:26} sm_{sm:<3} {len(of):3} variants, {used}")
    return lines


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent / "compile_gates.py"
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    GATES_TABLE.parent.mkdir(exist_ok=True)
    GATES_TABLE.write_text("\n".join(table(rows)) + "\n")
    assert {row["sm"] for row in rows} == {80, 90, 100}
    kernels = {row["kernel"] for row in rows}
    assert {"statistics_kernel", "gradient_kernel", "loss_kernel"} < kernels
    assert not [row for row in rows if row["stack"] or row["local"]], "registers spill to the stack"
    assert max(row["reg"] for row in rows) <= 255
    room = {80: 99, 90: 227, 100: 227}  # KB of shared memory a program; sm_80 has 163, RTX cards, compiled alike, 99
    assert not [row for row in rows if row["dynamic_shared"] > room[row["sm"]] * 1024]
