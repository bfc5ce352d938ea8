"""The pages and examples of the integrations that need no environment of their own: their code runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "integrations"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["liger.md", "transformers.md"])
def test_a_page_runs(page: str) -> None:
    names: dict[str, Any] = {}
    for code in blocks(page):
        exec(code, names)
    trained = names["hidden"] if page == "liger.md" else names["model"].lm_head.weight
    assert trained.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["openrlhf", "swift"])
def test_a_patch_says_what_is_missing(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is here")
    names: dict[str, Any] = {}
    with pytest.raises(ImportError, match="pip install"):
        exec(blocks(f"{name}.md")[0], names)
    if name == "swift":  # the other one imports transformers first
        done = example("swift_grpo.py")
        assert done.returncode == 1
        assert "pip install" in done.stderr


def example(name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "examples" / name], env=environment, capture_output=True, text=True)


def test_ligers_example() -> None:
    done = example("liger_grpo_loss.py")
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("liger_kernel") is not None:
        assert all(float(error) < 1e-5 for error in re.findall(r"differ by (\S+) of", done.stdout))
        assert len(done.stdout.splitlines()) == 4


def test_an_example_has_at_most_forty_lines() -> None:
    for name in ("liger_grpo_loss", "transformers_scoring", "openrlhf_actor", "swift_grpo"):
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 40
