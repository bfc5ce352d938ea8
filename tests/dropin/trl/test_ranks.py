"""Data-parallel training: gradients go through the wrapper."""

import os
import subprocess
import sys
from pathlib import Path

from tests.dropin.trl.runs import saved
from tests.models import tiny_config


def test_two_ranks(tmp_path):
    saved(tiny_config("qwen2_5_vl"), tmp_path)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    command += ["-m", "tests.dropin.trl.ranks", str(tmp_path)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ranks agree") == 2
