"""The example on real pictures, TRL's trainer and the fast one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("stock", [True, False])
def test_it_trains_and_compares(shared_data, stock):
    command = [sys.executable, "examples/trl_grpo_vlm.py", *(["--stock"] if stock else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'grad_norm'") == 3, "three steps"
    assert "leaves this to TRL" not in done.stderr
    said = re.search(r"([\d.]+) times as fast, gradients within (\S+) of TRL's", done.stdout)
    assert (said is None) == stock
    if said:
        assert float(said[2]) < 1e-5
