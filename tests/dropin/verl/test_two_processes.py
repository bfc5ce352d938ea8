"""An FSDP2 group of two processes, one with images and one without: they have to call the same modules in one order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from tests.dropin.verl.engines import save

HERE = Path(__file__).parent


def test_a_group_of_two_of_which_one_cannot_pack(tmp_path):
    """Out of step they would wait for each other for ever, or gather weights of different modules."""
    save("qwen2_5_vl", tmp_path / "model")
    command = [sys.executable, str(HERE / "two_processes.py")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
