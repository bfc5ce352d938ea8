"""The page of the integration and its example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="needs verl: make test-dropin")
from verl.trainer.ppo.core_algos import get_policy_loss_fn

import revisual_fast.integrations.verl as integration
from revisual_fast.integrations.verl.loss import POLICY_LOSSES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/integrations/verl.md").read_text()


def test_the_pages_code_runs_and_its_losses_are_all():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert get_policy_loss_fn("vespo").objective(None).surrogate == "vespo"
    integration.unpatch()
    integration.patch()
    named = re.search(r"\*\*Losses\*\*: `(\w+)`, and `(\w+)`, (.*?), with", PAGE)
    assert named is not None
    first, second, others = named.groups()
    assert {first, second, *(first + name for name in re.findall(r"`(\w+)`", others))} == POLICY_LOSSES.keys()


def test_the_example_learns(tmp_path):
    example = ROOT / "examples/verl_grpo.py"
    assert len(example.read_text().splitlines()) <= 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(example)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [int(share) for share in re.findall(r"step \d+: (\d+)% of the tokens are 7", done.stdout)]
    assert len(said) == 20
    assert said[-1] > 30 > 10 > said[0]
