"""A run on two ranks is the run on one; it stops, is resumed and fails as one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from revisual_fast.config_file import load_config
from revisual_fast.curriculum import train
from tests.integration.conftest import write_small_run
from tests.integration.test_resume import assert_same_run, deterministic
from tests.ranks import torchrun

CLOSE = 1e-4  # of sums in another order, after AdamW has divided gradients near 0 by their size, and after some steps


def on_two(config: Path, *more: str) -> str:
    done = torchrun("revisual_fast", "train", str(config), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_vl):
    """The folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    said = on_two(write_small_run(folder, tiny_vl))
    assert said.count("ranks: 2") == said.count("held-out visual accuracy") / 3 == 1, "one rank speaks"
    return folder / "run"


def texts(run: Path) -> list[str]:
    return [c["text"] for row in deterministic(run / "samples.jsonl") for c in row["completions"]]


def last_row(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_two_ranks_train_as_one(two, tmp_path, tiny_vl):
    train(load_config(write_small_run(tmp_path, tiny_vl), []))
    one = tmp_path / "run"
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        for mine, theirs in zip(deterministic(one / file), deterministic(two / file), strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                near = value if isinstance(value, str) else pytest.approx(value, rel=CLOSE, abs=1e-5)
                assert theirs[key] == near, (file, mine["global_step"], key)
    texts = [
        [c["text"] for row in deterministic(run / "samples.jsonl") for c in row["completions"]] for run in (one, two)
    ]
    assert texts[0] == texts[1], "every completion is drawn by the same numbers"
    for stage in ("warm", "rl"):
        ours, theirs = (load_file(run / "models" / stage / "model.safetensors") for run in (one, two))
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() <= 1e-3 * tensor.abs().max(), name


def test_a_stop_of_one_rank_stops_and_saves_and_the_rest_is_the_same(two, tmp_path, tiny_vl):
    config = write_small_run(tmp_path, tiny_vl)
    done = torchrun("tests.ranks", "stopped", str(config), "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stopped after rl step 2; saved") == 2
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())][-1] == "step-00000005"
    on_two(config, "--resume")
    assert_same_run(tmp_path / "run", two)


def test_one_rank_goes_on_where_two_were_stopped(two, tmp_path, tiny_vl):
    config = write_small_run(tmp_path, tiny_vl)
    done = torchrun("tests.ranks", "stopped", str(config), "5")
    assert done.returncode == 0, done.stdout + done.stderr
    train(load_config(config, []), resume=True)
    last, expected = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (tmp_path / "run", two)
    )
    assert last["step"] == expected["step"] == 4
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_failure_on_one_rank_ends_all(tmp_path, tiny_vl):
    config = write_small_run(tmp_path, tiny_vl)
    (tmp_path / "rewards.py").write_text(
        "import os\n\n\ndef score(completions):\n    if os.environ['RANK'] == '1':\n"
        "        raise LookupError('the judge is out')\n    return [0.0] * len(completions)\n"
    )
    done = torchrun("revisual_fast", "train", str(config), "--set", "evaluation.heldout={}")
    assert done.returncode != 0
    assert "rank 1: LookupError: the judge is out" in done.stderr


def test_bf16_and_more_ranks_than_prompts(tmp_path, tiny_vl):
    config = write_small_run(tmp_path, tiny_vl)
    settings = ("model.dtype=bfloat16", "stages.rl.rollout_batch=1", "stages.rl.update_batch=1", "stages.rl.steps=2")
    on_two(config, *(word for setting in settings for word in ("--set", setting)))
    rows = deterministic(tmp_path / "run/metrics.jsonl")
    assert [row["stage"] for row in rows] == ["warm"] * 3 + ["rl"] * 2
    assert all(row["loss"] is not None for row in rows)
