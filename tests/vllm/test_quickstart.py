"""The quickstart's multimodal stage with completions of vLLM."""

from pathlib import Path

from revisual_fast.config_file import load_config
from revisual_fast.curriculum import train
from revisual_fast.telemetry import read_jsonl

STEPS = 5


def test_five_steps_of_multimodal_rl(tmp_path: Path) -> None:
    settings = [
        f"run.dir={tmp_path / 'run'}",
        "curriculum=[cold_start, mrl]",
        "stages.cold_start.steps=60",  # enough to answer at all, so that there is something to reinforce
        f"stages.mrl.steps={STEPS}",
        "rollout.engine=vllm",
        "rollout.check_weights=true",
        "evaluation.max_samples=16",
        "telemetry.progress=false",
    ]
    train(load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", settings))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "mrl"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["engine/restarts"] == 0 for row in rows)
    assert all(row["staleness/max"] == 0 for row in rows)
    assert all(row["sync/tensors"] > 0 for row in rows), "every update is sent"
    for row in rows:
        # fp32 on both sides, after any number of updates: what differs is rounding, of two implementations
        assert max(abs(row["mismatch/min"]), abs(row["mismatch/max"])) < 1e-3
        assert row["mismatch/kl"] < 1e-6
    assert rows[-1]["policy/entropy"] != rows[0]["policy/entropy"], "the policy moves"
    assert (tmp_path / "run" / "models" / "mrl" / "model.safetensors").exists()
