"""Numbers on disk survive a kill exactly, trackers fail early, and the progress display fits where it is shown."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from revisual_fast.config import TelemetryConfig
from revisual_fast.telemetry import Progress, Telemetry, TelemetryError, read_jsonl
from revisual_fast.telemetry import progress as progress_module
from revisual_fast.telemetry.sinks import FILES

CONFIG = TelemetryConfig()


def step(number: int, **metrics: float) -> dict[str, Any]:
    return {"stage": "mrl", "step": number, "global_step": number, "loss": 1 / number, **metrics}


def evaluation(number: int) -> dict[str, Any]:
    place = {"stage": "mrl", "step": number, "global_step": number}
    return {**place, "kind": "validation", "name": "visual", "accuracy": 0.5, "n": 10}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def write(telemetry: Telemetry, steps: range) -> None:
    for number in steps:
        telemetry.step(step(number))
        telemetry.evaluation(evaluation(number))
        picture = Image.new("RGB", (4, 4), (number, 0, 0))
        telemetry.sample({"stage": "mrl", "step": number, "prompt": "ä <image>"}, {f"key{number}": picture})


def test_a_step_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    telemetry.step(step(1))
    assert read_jsonl(tmp_path / "metrics.jsonl") == [step(1)]
    telemetry.close()
    telemetry.close()


def test_resume_gives_the_files_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    telemetry = Telemetry(whole, CONFIG, "run")
    write(telemetry, range(1, 7))
    telemetry.close()

    telemetry = Telemetry(killed, CONFIG, "run")
    write(telemetry, range(1, 4))
    state = json.loads(json.dumps(telemetry.state_dict()))  # as a checkpoint stores it
    write(telemetry, range(4, 6))
    telemetry.close()
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "mrl", "st')

    telemetry = Telemetry(killed, CONFIG, "run", resume_from=state)
    assert telemetry.state_dict() == state
    write(telemetry, range(4, 7))
    later = telemetry.state_dict()
    telemetry.close()
    assert contents(killed) == contents(whole)
    assert [later[name] for name in FILES] == [len(content) for content in contents(whole).values()]


def test_a_new_run_empties_the_files_of_an_old_one(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    write(telemetry, range(1, 3))
    telemetry.close()
    Telemetry(tmp_path, CONFIG, "run").close()
    assert set(contents(tmp_path).values()) == {b""}


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    write(telemetry, range(1, 3))
    state = telemetry.state_dict()
    telemetry.close()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(TelemetryError, match=r"metrics\.jsonl has 0 bytes"):
        Telemetry(tmp_path, CONFIG, "run", resume_from=state)


def test_tensorboard_forgets_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, CONFIG, "run")
    write(telemetry, range(1, 3))
    state = telemetry.state_dict()
    telemetry.step(step(3, killed=1.0))
    telemetry.close()
    telemetry = Telemetry(tmp_path, CONFIG, "run", resume_from=state)
    telemetry.step(step(3, resumed=1.0))
    telemetry.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [event.step for event in events.Scalars("validation/visual/accuracy")] == [1, 2]
    tags = events.Tags()["scalars"]
    assert "resumed" in tags
    assert "killed" not in tags or not events.Scalars("killed")
    assert not {"step", "global_step", "validation/visual/n"} & set(tags)


def test_numbers_that_json_cannot_hold_become_null_and_are_named(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    telemetry.step({**step(1), "loss": float("nan"), "optim/grad_norm": float("inf")})
    completions = [{"advantage": 0.5}, {"advantage": float("nan")}]
    telemetry.sample({"stage": "mrl", "step": 1, "completions": completions})
    telemetry.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["loss"] is None
    assert record["optim/grad_norm"] is None
    assert record["nonfinite"] == "loss=nan, optim/grad_norm=inf"
    (sample,) = read_jsonl(tmp_path / "samples.jsonl")
    assert sample["completions"] == [{"advantage": 0.5}, {"advantage": None}]
    assert sample["nonfinite"] == "completions[1].advantage=nan"


def test_a_value_that_is_no_plain_number_is_refused_by_name(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    with pytest.raises(TelemetryError, match="'reward/odd' is a object"):
        telemetry.step({**step(1), "reward/odd": object()})
    telemetry.close()


def test_a_sample_stores_each_picture_once_beside_its_line(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, CONFIG, "run")
    red = Image.new("RGB", (5, 3), "red")
    for number in (1, 2):
        telemetry.sample({"stage": "mrl", "step": number}, {"b": red, "a": Image.new("RGB", (2, 2))})
    telemetry.close()
    assert [s["images"] for s in read_jsonl(tmp_path / "samples.jsonl")] == [["samples/b.png", "samples/a.png"]] * 2
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "samples" / "b.png") as stored:
        assert (stored.size, stored.getpixel((0, 0))) == ((5, 3), (255, 0, 0))


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_missing_tracker_fails_at_the_start_and_touches_nothing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kept": 1}\n')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TelemetryError, match=f"pip install {package}"):
        Telemetry(tmp_path, TelemetryConfig.model_validate({package: "project"}), "run")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"kept": 1}]


def test_trackers_get_the_scalars_and_continue_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        opened.append(arguments)
        return SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)

    for package in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(init=init))
    config = TelemetryConfig(trackio="tp", wandb="wp")
    telemetry = Telemetry(tmp_path, config, "run")
    telemetry.step(step(7))
    state = telemetry.state_dict()
    telemetry.close()
    Telemetry(tmp_path, config, "run", resume_from=state).close()

    assert logged == [({"loss": 1 / 7}, 7)] * 2
    assert [(o["project"], o["name"], o["resume"]) for o in opened] == [
        ("tp", "run", "never"),
        ("wp", "run", "allow"),
        ("tp", "run", "allow"),
        ("wp", "run", "allow"),
    ]
    assert opened[1]["id"] == opened[3]["id"] == state["run_id"]


def test_reading_leaves_out_a_last_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_bytes('{"a": 1}\n{"b": "ä'.encode()[:-1])
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize(("line", "problem"), [("{broken", "not valid JSON"), ("[1]", "expected a JSON object")])
def test_reading_names_any_other_bad_line(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"b": 2}}\n')
    with pytest.raises(TelemetryError, match=rf"metrics\.jsonl:2: {problem}"):
        read_jsonl(path)


METRICS = {"reward/total": 0.5, "reward/accuracy": 0.25, "loss": None, "throughput/rollout": 12345.6}


def plain(**options: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(console=Console(file=out, width=60, force_terminal=False), **options), out


def test_without_a_terminal_progress_is_plain_lines() -> None:
    progress, out = plain(interval=0.0)
    progress.stage("mrl", total=4, completed=1)
    progress.phase("rollout")
    progress.update({"step": 2, **METRICS})
    progress.message("[bold]a path[/bold] that is longer than the sixty columns of this console, on one line")
    progress.update({"step": 4, **METRICS})
    progress.close()
    start, middle, message, end = out.getvalue().splitlines()
    assert start == "mrl: 4 steps, 1 done"
    assert middle.startswith("mrl 2/4 (50%), 0:00:00 elapsed, ETA 0:00:00, reward 0.500, accuracy 0.250")
    assert middle.endswith("loss not finite, rollout 12,346 tok/s")
    assert message.startswith("[bold]a path[/bold]")
    assert end.startswith("mrl 4/4 (100%)")
    assert "ETA" not in end


@pytest.mark.parametrize(
    ("limit", "left"), [(None, "0:01:39"), (200.0, "0:01:39"), (60.0, "0:00:59"), (0.5, "0:00:00")]
)
def test_a_limit_of_time_is_in_the_eta(limit: float | None, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=7.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    progress, out = plain(interval=0.0)
    progress.stage("mrl", total=100, limit=limit)
    clock.now += 1
    progress.update({"step": 1})
    assert out.getvalue().splitlines()[1] == f"mrl 1/100 (1%), 0:00:01 elapsed, ETA {left}"


def test_plain_lines_keep_their_distance() -> None:
    progress, out = plain(interval=3600.0)
    progress.stage("mrl", total=100)
    for number in range(1, 51):
        progress.update({"step": number, **METRICS})
    assert out.getvalue() == "mrl: 100 steps\n"
    progress.close()  # stopped half-way: says where
    assert out.getvalue().splitlines()[1].startswith("mrl 50/100 (50%)")


def test_disabled_progress_prints_messages_only() -> None:
    progress, out = plain(enabled=False, interval=0.0)
    progress.stage("mrl", total=2)
    progress.phase("rollout")
    progress.update({"step": 1, **METRICS})
    progress.message("kept")
    progress.close()
    assert out.getvalue() == "kept\n"


def test_in_a_terminal_progress_draws_bars_phase_and_metrics() -> None:
    out = io.StringIO()
    progress = Progress(console=Console(file=out, width=120, force_terminal=True, color_system=None))
    progress.phase("evaluate visual")
    progress.stage("cold_start", total=2, completed=0)
    progress.update({"step": 2, "loss": 0.25})
    progress.stage("mrl", total=8, completed=2, limit=7200)
    progress.phase("rollout")
    progress.update({"step": 3, **METRICS})
    progress.message("a warning")
    progress.close()
    progress.close()
    shown = out.getvalue()
    for text in ("cold_start", "2/2", "mrl", "3/8", "reward 0.500", "rollout 12,346 tok/s", "a warning", "2:00:00"):
        assert text in shown
