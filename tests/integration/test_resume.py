"""A run that is killed and resumed ends with the same bits as one that is not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from revisual_fast.cli import main
from revisual_fast.config import Config
from revisual_fast.config_file import load_config
from revisual_fast.curriculum import Curriculum, Interrupted, train
from revisual_fast.stages.stage import Stage
from tests.integration.conftest import write_small_run

KILL_ONCE = '''
import os, pathlib, signal

def score(completions):
    """As the other reward; the call of this number kills the process."""
    counter = pathlib.Path(__file__).with_name("calls")
    calls = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(calls))
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(map(ord, c.text)) % 7 / 7 for c in completions]
'''


def command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "revisual_fast", "train", str(config), *more]


def run(config: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(config, *more), env=environment, capture_output=True, text=True, timeout=240)


def deterministic(path: Path) -> list[dict]:
    """The lines of a JSONL file without what was measured in seconds and bytes, and what became of the engine."""
    measured = ("time/", "throughput/", "memory/", "sync/", "engine/", "seconds")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    for stage in ("warm", "rl"):
        a, b = (load_file(d / "models" / stage / "model.safetensors") for d in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), f"{stage}: {name}"
    for file in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert deterministic(one / file) == deterministic(other / file), file


@pytest.fixture(scope="module")
def uninterrupted(tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(write_small_run(folder, tiny_vl))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def train_and_stop(config: Config, steps: int) -> None:
    """Train as far as step ``steps`` of the stage rl, where the run is asked to stop."""
    step = Curriculum._train_step

    def watched(self: Curriculum, name: str, stage: Stage) -> None:
        step(self, name, stage)
        self.stop.requested = (name, stage.steps) == ("rl", steps)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Curriculum, "_train_step", watched)
        with pytest.raises(Interrupted):
            train(config)


def assert_continues_exactly(path: Path, folder: Path, settings: list[str]) -> None:
    """A run that is stopped after three steps of the stage rl and resumed is one that is not stopped."""
    train(load_config(path, [*settings, f"run.dir={folder / 'straight'}"]))
    broken = load_config(path, [*settings, f"run.dir={folder / 'broken'}"])
    train_and_stop(broken, 3)
    train(broken, resume=True)
    assert_same_run(folder / "straight", folder / "broken")


def test_a_frozen_tower_whose_features_are_kept_continues_exactly(small_run, tmp_path):
    """The resumed run has to encode again what the other one still has, in other company."""
    assert_continues_exactly(small_run, tmp_path, ["stages.rl.freeze_vision=true", "stages.rl.steps=6"])


@pytest.mark.parametrize("at", [6, 14], ids=["after no rl checkpoint", "after one"])  # of 4 groups a step
def test_killed_during_a_step(small_run, uninterrupted, tmp_path, at):
    (tmp_path / "rewards.py").write_text(KILL_ONCE.format(at=at))
    killed = run(small_run)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(small_run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    assert_same_run(uninterrupted, tmp_path / "run")


def test_killed_between_steps_of_the_first_stage_and_again(small_run, uninterrupted, tmp_path):
    """The process is stopped as soon as a line of metrics says that a step is over."""
    for already in (1, 4):
        process = subprocess.Popen(
            command(small_run, *(["--resume"] if already > 1 else [])),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= already):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
    resumed = run(small_run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(uninterrupted, tmp_path / "run")


def test_ctrl_c_saves_and_exits_with_130(small_run, uninterrupted, tmp_path):
    process = subprocess.Popen(
        command(small_run), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with --resume" in out
    resumed = run(small_run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_finished_run_is_neither_mixed_with_another_nor_changed(small_run, uninterrupted, capsys):
    arguments = ["train", str(small_run), "--set", f"run.dir={uninterrupted}"]
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "already holds a run" in said
    assert "--resume" in said
    assert main([*arguments, "--resume", "--set", "train.micro_batch_tokens=64"]) == 0
    assert "changed since the run began: train.micro_batch_tokens: 128 -> 64" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_resume_without_a_run_is_an_error(small_run, capsys):
    assert main(["train", str(small_run), "--resume"]) == 1
    assert "there is no run" in capsys.readouterr().err


def test_lora_in_bf16_with_dropout_continues_exactly(small_run, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    settings = ["model.lora={rank: 4, dropout: 0.3}", "model.dtype=bfloat16", "stages.rl.optimizer.lr=1e-2"]

    def configured(folder: str) -> Config:
        return load_config(small_run, [*settings, f"run.dir={tmp_path / folder}"])

    train(configured("straight"))
    step = Curriculum._train_step

    def stop_after_two(self: Curriculum, name: str, stage: Stage) -> None:
        step(self, name, stage)
        self.stop.requested = stage.steps == 2

    with monkeypatch.context() as patched:
        patched.setattr(Curriculum, "_train_step", stop_after_two)
        for resume in (False, True):
            with pytest.raises(Interrupted):
                train(configured("broken"), resume=resume)
    train(configured("broken"), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
