"""A run small enough to be started many times: two stages of the tiny model, a few steps each."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def small_run(tmp_path: Path, tiny_vl: Path) -> Path:
    """The path of a configuration that trains in seconds; its run.dir is ``tmp_path / "run"``."""
    return write_small_run(tmp_path, tiny_vl)


def write_small_run(folder: Path, model: Path) -> Path:
    config = {
        "run": {"dir": str(folder / "run"), "seed": 3, "threads": 1},
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "text": {
                "function": "revisual_fast.data.digits:cold_start",
                "args": {"size": 64},
                "response": "{response}",
                "verifier": "number",
            },
            "digits": {
                "function": "revisual_fast.data.digits:questions",
                "args": {"size": 64},
                "images": "images",
                "verifier": "number",
            },
        },
        "stages": {
            "warm": {"kind": "sft", "data": ["text"], "steps": 3, "batch_size": 8, "optimizer": {"lr": 1e-3}},
            "rl": {
                "kind": "grpo",
                "data": ["digits"],
                "steps": 4,
                "rollout_batch": 4,
                "update_batch": 2,
                "group_size": 4,
                "max_response_tokens": 8,
                "optimizer": {"lr": 1e-4},
                "entropy": {"start": 0.01},
                "objective": {"kl_coef": 0.01},
                "rewards": {"accuracy": {}, "mine": {"function": "rewards.py:score"}},
            },
        },
        "curriculum": ["warm", "rl"],
        "train": {"micro_batch_tokens": 128},
        "checkpoint": {"every": 2, "keep": 2},
        "evaluation": {
            "heldout": {"visual": "digits"},
            "validation": {"visual": "digits"},
            "every": 2,
            "max_samples": 4,
            "max_response_tokens": 8,
        },
        "telemetry": {"progress": False, "samples_every": 1, "plots": False},
    }
    (folder / "rewards.py").write_text(
        "def score(completions):\n    return [sum(map(ord, c.text)) % 7 / 7 for c in completions]\n"
    )
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
