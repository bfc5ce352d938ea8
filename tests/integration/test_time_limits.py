"""Limits of time, by a clock that goes on by a minute with every step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from revisual_fast import curriculum
from revisual_fast.cli import main
from revisual_fast.curriculum import Curriculum
from revisual_fast.telemetry import Progress, read_jsonl
from tests.integration.test_resume import assert_same_run


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1e6)
    step = Curriculum._train_step

    def timed(self: Curriculum, *args: object) -> None:
        step(self, *args)
        clock.now += 60

    monkeypatch.setattr(Curriculum, "_train_step", timed)
    monkeypatch.setattr(curriculum, "time", SimpleNamespace(perf_counter=lambda: clock.now))


def train(config: Path, folder: Path, *more: str) -> int:
    return main(["train", str(config), "--set", f"run.dir={folder}", *more])


def steps(run: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_jsonl(run / "metrics.jsonl")]


def test_a_stage_ends_when_its_minutes_are_over_and_the_next_one_begins(minutes, small_run, tmp_path, capsys):
    limits = ["--set", "stages.warm.max_minutes=2", "--set", "stages.rl.max_minutes=3.5"]
    assert train(small_run, tmp_path / "run", *limits) == 0
    assert steps(tmp_path / "run") == [("warm", 1), ("warm", 2), *(("rl", i) for i in (1, 2, 3, 4))]
    said = capsys.readouterr().out
    assert "warm: at most 2 minutes" in said
    assert "warm: ends after step 2 of 3: its 2 minutes are over" in said
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["complete"]
    assert [(s["name"], s["steps"], s["seconds"]) for s in report["stages"]] == [
        ("start", 0, 0),
        ("warm", 2, 120),
        ("rl", 4, 240),
    ]
    assert all(stage["heldout"] for stage in report["stages"])


def test_a_run_stops_when_its_minutes_are_over_and_continues_exactly(minutes, small_run, tmp_path, capsys):
    assert train(small_run, tmp_path / "straight") == 0
    run = tmp_path / "run"
    assert train(small_run, run, "--set", "run.max_minutes=4.5") == 124
    said = capsys.readouterr().out
    assert "at most 4.5 minutes, then the run is saved and stops" in said
    assert "stopped after rl step 2: run.max_minutes (4.5) are over; saved" in said
    assert steps(run) == steps(tmp_path / "straight")[:5]
    report = json.loads((run / "report.json").read_text())
    assert (report["complete"], report["missing"]) == (False, ["stage rl: not finished, 2 steps of 4 so far"])

    assert train(small_run, run, "--set", "run.max_minutes=4.5", "--resume") == 1
    assert "the run has taken 5.0 of its 4.5 minutes" in capsys.readouterr().err
    assert train(small_run, run, "--set", "run.max_minutes=5.5", "--resume") == 124  # not 5.5 minutes from here
    assert steps(run) == steps(tmp_path / "straight")[:6]
    assert train(small_run, run, "--resume") == 0
    assert_same_run(tmp_path / "straight", run)


def test_time_of_a_stage_is_kept_over_a_resumption(minutes, small_run, tmp_path, capsys, monkeypatch):
    left = []
    monkeypatch.setattr(Progress, "stage", lambda self, name, total, done, seconds: left.append((name, done, seconds)))
    limits = ["--set", "stages.rl.max_minutes=3"]
    assert train(small_run, tmp_path / "run", *limits, "--set", "run.max_minutes=5") == 124
    assert train(small_run, tmp_path / "run", *limits, "--resume") == 0
    assert left == [("warm", 0, 300), ("rl", 0, 120), ("rl", 2, 60)]
    assert "rl: ends after step 3 of 4: its 3 minutes are over" in capsys.readouterr().out
    again = ["--set", "stages.rl.max_minutes=9", "--resume"]
    assert train(small_run, tmp_path / "run", *again) == 1
    assert "stage rl is finished, so this has no effect on it" in capsys.readouterr().err
