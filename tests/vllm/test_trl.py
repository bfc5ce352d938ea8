"""vLLM inside TRL: rollouts and log-probs of its colocated engine, TRL's trainer stock and fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(kind: str, trainer: str, folder: Path) -> list[dict[str, Any]]:
    """What three updates on one batch of rollouts log, in a process of its own: vLLM stays in one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "tests.vllm.trl_run", kind, trainer, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "leaves this to TRL" not in done.stderr
    return json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize("kind", ["text", "images"])
def test_colocated(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl: make test-vllm")
    stock, fast = (run(kind, name, tmp_path / name) for name in ("GRPOTrainer", "FastGRPOTrainer"))
    assert len(stock) == len(fast) == 4
    ratio = "sampling/importance_sampling_ratio/mean"
    assert 0 < stock[0][ratio] < 1
    for ours, theirs in zip(fast, stock, strict=True):
        compared = {n: v for n, v in theirs.items() if "time" not in n and "second" not in n}
        assert ours.keys() >= compared.keys()
        assert {n: ours[n] for n in compared} == pytest.approx(compared, rel=1e-5, abs=1e-6, nan_ok=True)
