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

KILL_ONCE = '''
import os, pathlib, signal

def score(completions):
    """As the other reward; in the step that TRIGGER names the process is killed, once."""
    counter = pathlib.Path(__file__).with_name("calls")
    calls = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(calls))
    if calls == {at} :
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(map(ord, c.text)) % 7 / 7 for c in completions]
'''


def command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "revisual_fast", "train", str(config), *more]


def run(config: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(config, *more), env=environment, capture_output=True, text=True, timeout=240)


def deterministic(path: Path) -> list[dict]:
    """The lines of a JSONL file without what is measured in seconds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/")) and k != "seconds"} for row in rows
    ]


def assert_same_run(one: Path, other: Path) -> None:
    for stage in ("warm", "rl"):
        a, b = (load_file(d / "models" / stage / "model.safetensors") for d in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), f"{stage}: {name}"
    for file in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert deterministic(one / file) == deterministic(other / file), file


@pytest.fixture
def uninterrupted(small_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "uninterrupted"
    done = run(small_run, "--set", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("at", [2, 4], ids=["after no rl checkpoint", "after one"])
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


def test_a_finished_run_is_not_overwritten_by_accident(small_run, uninterrupted):
    folder = f"run.dir={uninterrupted}"
    again = run(small_run, "--set", folder)
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    assert "--resume" in again.stderr
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    resumed = run(small_run, "--set", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_resume_without_a_run_is_an_error(small_run):
    resumed = run(small_run, "--resume")
    assert resumed.returncode == 1
    assert "there is no run" in resumed.stderr
