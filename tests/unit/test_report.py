"""The report says what the files of a run say, stands alone, and survives runs with pieces missing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from revisual_fast.telemetry import TelemetryError, plot_run, write_report
from revisual_fast.telemetry.plots import Band, _clock, _running_mean, _series, plot_overview, stage_bands
from revisual_fast.telemetry.stages import stage_totals

CONFIG = {
    "curriculum": ["cold_start", "mrl"],
    "stages": {"cold_start": {"kind": "sft", "steps": 3}, "mrl": {"kind": "grpo", "steps": 6}},
    "evaluation": {"heldout": {"visual": "digits", "v1.5 text": "sums"}},
    "train": {"max_steps": None},
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def heldout(stage: str, global_step: int, visual: float | None, text: float) -> list[dict[str, Any]]:
    place = {"stage": stage, "step": global_step, "global_step": global_step, "kind": "heldout", "seconds": 1.5}
    return [{**place, "name": "visual", "accuracy": visual}, {**place, "name": "v1.5 text", "accuracy": text}]


def grpo_step(number: int) -> dict[str, Any]:
    shares = {"reward/total": 0.1 * number, "reward/accuracy": 0.1 * number, "reward/format": 0.9}
    stagnation = {"stagnation/accuracy": 0.5, "stagnation/reward": 0.25}
    others = {"policy/entropy": None if number == 2 else 0.5, "response/length_mean": 20.0, "loss": 0.0}
    speed = {"throughput/rollout": 100.0 * number, "time/generation": float(number), "time/step": 2.0}
    return {"stage": "mrl", "step": number, "global_step": 3 + number, **shares, **stagnation, **others, **speed}


def sample(number: int, images: list[str]) -> dict[str, Any]:
    right = {
        "text": "<think> 1 + 1 </think> \\boxed{2}",
        "reward": 1.1,
        "accuracy": 1.0,
        "advantage": 0.7,
        "kept": True,
    }
    wrong = {"text": "<script>alert(1)</script>", "reward": 0.1, "accuracy": 0.0, "advantage": None, "kept": False}
    prompt = f"<image> question {number} & more"
    return {
        "stage": "mrl",
        "step": number,
        "prompt": prompt,
        "images": images,
        "answer": "2",
        "completions": [right, wrong],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of three supervised and six GRPO steps."""
    folder = tmp_path / "my-run"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (28, 28), "white").save(folder / "samples" / "k.png")
    Image.new("RGB", (2000, 1000), "white").save(folder / "samples" / "large.png")
    sft = [
        {"stage": "cold_start", "step": i, "global_step": i, "loss": 3.0 / i, "time/step": 1.0, "time/update": 1.0}
        | {"throughput/update": 50.0}
        for i in range(1, 4)
    ]
    write_lines(folder / "metrics.jsonl", [*sft, *(grpo_step(i) for i in range(1, 7))])
    tests = [*heldout("start", 0, 0.0, 0.01), *heldout("cold_start", 3, 0.2, 0.9), *heldout("mrl", 9, 0.8, 0.95)]
    middle = {"stage": "mrl", "step": 3, "global_step": 6, "kind": "validation", "name": "visual", "accuracy": 0.5}
    write_lines(folder / "evaluations.jsonl", [*tests, middle])
    images = ["samples/k.png", "samples/large.png"]
    write_lines(folder / "samples.jsonl", [sample(i, images) for i in range(1, 7)])
    stages = [
        {"name": "start", "kind": "evaluation", "seconds": 3.5, "steps": 0, "skipped_steps": 0},
        {"name": "cold_start", "kind": "sft", "seconds": 61.0, "steps": 3, "skipped_steps": 0, "finished": True},
        {"name": "mrl", "kind": "grpo", "seconds": 12.5, "steps": 6, "skipped_steps": 2, "finished": True},
    ]
    run = {"config": CONFIG, "versions": {"torch": "2.13.0"}, "device": "CPU", "header": ["backend: torch"]}
    bad = {"bad_records": {"empty answer": 4}}
    (folder / "run.json").write_text(json.dumps({**run, **bad, "stages": stages, "total_seconds": 80.0}))
    return folder


def change_run(run_dir: Path, **changes: Any) -> None:
    path = run_dir / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Page(HTMLParser):
    """Checks that tags nest, and collects everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(run_dir: Path) -> tuple[dict[str, Any], Page]:
    json_path, html_path = write_report(run_dir)
    assert (json_path.name, html_path.name) == ("report.json", "report.html")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(json_path.read_text(), parse_constant=refuse), Page(html_path.read_text())


def test_report_json_of_a_finished_run(run_dir: Path) -> None:
    report, _ = report_of(run_dir)
    assert [(s["name"], s["seconds"], s["steps"]) for s in report["stages"]] == [
        ("start", 3.5, 0),
        ("cold_start", 61.0, 3),
        ("mrl", 12.5, 6),
    ]
    assert [s["heldout"] for s in report["stages"]] == [
        {"visual": 0.0, "v1.5 text": 0.01},
        {"visual": 0.2, "v1.5 text": 0.9},
        {"visual": 0.8, "v1.5 text": 0.95},
    ]
    assert report["stages"][0]["tokens_per_second"] == {}
    assert report["stages"][1]["tokens_per_second"] == {"update": 50.0}
    # tokens over seconds, not a mean of rates: sum(100 i * i) / sum(i)
    assert report["stages"][2]["tokens_per_second"] == {"rollout": pytest.approx(100 * 91 / 21)}
    assert report["stages"][2]["skipped_steps"] == 2
    assert (report["total_seconds"], report["device"], report["versions"]) == (80.0, "CPU", {"torch": "2.13.0"})
    assert report["bad_records"] == {"empty answer": 4}
    assert report["complete"] is True
    assert report["missing"] == []


def test_html_stands_alone_and_shows_the_run(run_dir: Path) -> None:
    _, page = report_of(run_dir)
    assert page.loads
    assert all(load.startswith("data:image/") for load in page.loads)
    html = (run_dir / "report.html").read_text()
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    for text in ("my-run", "complete", "cold_start", "0.950", "4 × empty answer", "backend: torch", "2.13.0"):
        assert text in page.text
    assert "<think> 1 + 1 </think> \\boxed{2}" in page.text
    assert "<script>alert(1)</script>" in page.text  # as text: Page refuses a script
    assert "<image> question 6 & more" in page.text
    assert "Not in this report" not in page.text


def test_html_shows_first_middle_and_last_samples_with_small_pictures(run_dir: Path) -> None:
    _, page = report_of(run_dir)
    shown = [number for number in range(1, 7) if f"question {number} " in page.text]
    assert shown == [1, 3, 6]
    pictures = [load for load in page.loads if not load.startswith("data:image/svg")]
    assert [load[:15] for load in pictures] == ["data:image/png;", "data:image/jpeg"] * 3


def test_plots_are_drawn_for_what_there_is(run_dir: Path) -> None:
    paths = plot_run(run_dir)
    expected = ["accuracy", "reward", "stagnation", "entropy", "length", "throughput", "loss"]
    assert list(paths) == expected
    for path in paths.values():
        assert path.parent == run_dir / "plots"
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.convert("L").getextrema()[0] < 128  # something is drawn
    svg = (run_dir / "plots" / "reward.svg").read_bytes()
    plot_run(run_dir)
    assert (run_dir / "plots" / "reward.svg").read_bytes() == svg


def test_the_table_in_markdown(run_dir: Path) -> None:
    report_of(run_dir)
    text = (run_dir / "report.md").read_text()
    lines = text.splitlines()
    assert lines[:5] == ["# my-run", "", "9 steps · 1 min 20 s · CPU", "", "![Curves of the run](plots/overview.png)"]
    rows = {row[0]: row[1:] for line in lines if line.startswith("| ") for row in [line.strip("| ").split(" | ")]}
    assert rows["steps"] == ["0", "3", "6"]
    assert rows["time"] == ["3.5 s", "1 min 01 s", "12.5 s"]
    assert rows["tokens trained"] == ["–", "150", "–"]
    assert rows["tokens generated"] == ["–", "–", "9,100"]  # sum(100 i * i)
    assert rows["tokens per second, rollout"] == ["–", "–", "433"]
    assert rows["cross-entropy"] == ["–", "3.000 → 1.000", "–"]  # not the loss of a policy
    assert rows["reward"] == ["–", "–", "0.100 → 0.600"]
    assert rows["response, tokens"] == ["–", "–", "20 → 20"]
    assert rows["held-out accuracy, v1.5 text"] == ["0.010", "0.900", "0.950"]
    assert "responses cut off" not in rows  # nothing is known of it


def test_trends_are_means_over_tenths_of_the_steps() -> None:
    steps = [{"reward/total": float(i), "policy/entropy": None if i == 24 else float(i)} for i in range(25)]
    trends = stage_totals(steps)["trends"]
    assert trends == {"reward/total": [1.0, 23.0], "policy/entropy": [1.0, 22.0]}
    assert stage_totals([]) == {"tokens": {}, "tokens_per_second": {}, "trends": {}}


def test_the_overview_goes_by_minutes(run_dir: Path, tmp_path: Path) -> None:
    metrics = [{"stage": "a", "global_step": 1, "time/step": 30.0}, {"stage": "b", "global_step": 2, "time/step": 90.0}]
    assert [_clock(metrics)(step) for step in (0, 1, 2)] == [0.0, 0.5, 2.0]
    path = plot_overview(run_dir)
    assert path == run_dir / "plots" / "overview.png"
    with Image.open(path) as image:
        quarters = [image.convert("L").crop(box) for box in ((0, 0, 840, 540), (840, 540, 1680, 1080))]
        assert all(quarter.getextrema()[0] < 128 for quarter in quarters)
    assert plot_overview(tmp_path / "nothing") is None


def test_a_killed_run_says_how_far_it_came(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:25])
    stages = json.loads((run_dir / "run.json").read_text())["stages"]
    stages[2] |= {"finished": False, "steps": 4, "seconds": 1.0}  # what the last checkpoint knew
    config = {**CONFIG, "curriculum": ["cold_start", "mrl", "trl"]}
    change_run(run_dir, stages=stages, config=config, total_seconds=65.5)
    kept = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    write_lines(run_dir / "evaluations.jsonl", [e for e in kept if e["stage"] != "mrl"])
    report, page = report_of(run_dir)
    assert report["complete"] is False
    assert report["missing"] == ["stage mrl: not finished, 5 steps of 6 so far", "stage trl: not started"]
    assert (report["stages"][2]["steps"], report["stages"][2]["seconds"]) == (5, 10.0)
    assert report["total_seconds"] == 3.5 + 61.0 + 10.0
    assert "incomplete" in page.text
    assert "stage trl: not started" in page.text


@pytest.mark.parametrize("content", [None, '{"config": {'])
def test_without_run_json_the_metrics_tell_the_stages(content: str | None, run_dir: Path) -> None:
    (run_dir / "run.json").unlink()
    if content is not None:
        (run_dir / "run.json").write_text(content)
    report, page = report_of(run_dir)
    assert [(s["name"], s["seconds"], s["steps"]) for s in report["stages"]] == [
        ("start", 3.0, 0),
        ("cold_start", 6.0, 3),
        ("mrl", 15.0, 6),
    ]
    assert report["complete"] is False
    assert report["missing"][0].startswith("run.json")
    assert "device unknown" in page.text


def test_an_empty_folder_still_gives_a_report(tmp_path: Path) -> None:
    report, page = report_of(tmp_path)
    assert [stage["name"] for stage in report["stages"]] == ["start"]
    assert any("metrics.jsonl" in line for line in report["missing"])
    assert not page.loads


def test_missing_evaluations_samples_and_pictures_are_named(run_dir: Path) -> None:
    (run_dir / "samples" / "k.png").unlink()
    write_lines(run_dir / "evaluations.jsonl", heldout("cold_start", 3, None, 0.9)[:1])
    report, page = report_of(run_dir)
    assert "stage start: no held-out accuracy for v1.5 text, visual" in report["missing"]
    assert "stage cold_start: no held-out accuracy for v1.5 text" in report["missing"]
    assert report["stages"][1]["heldout"] == {"visual": None}
    assert "samples/k.png is not there" in page.text
    (run_dir / "samples.jsonl").unlink()
    report, page = report_of(run_dir)
    assert any(line.startswith("samples.jsonl") for line in report["missing"])
    assert "Sample rollouts" not in page.text


def test_a_damaged_file_is_named(run_dir: Path) -> None:
    (run_dir / "evaluations.jsonl").write_text("oops\n{}\n")
    with pytest.raises(TelemetryError, match=r"evaluations\.jsonl:1"):
        write_report(run_dir)


def test_bands_and_series_follow_the_steps() -> None:
    records = [{"stage": "a", "global_step": 1, "x": 1.0}, {"stage": "a", "global_step": 2, "x": None}]
    records += [{"stage": "b", "global_step": 3}, {"stage": "b", "global_step": 4, "x": 4.0}]
    assert stage_bands(records) == [Band("a", 0, 2), Band("b", 2, 4)]
    series = _series(records, "x")
    np.testing.assert_array_equal(series["a"][1], [1.0, np.nan])
    np.testing.assert_array_equal(series["b"][0], [4])


def test_running_mean_looks_back_and_keeps_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 6.0, 8.0])
    np.testing.assert_allclose(_running_mean(values, 3), [1.0, 1.5, np.nan, 4.0, 7.0])
    np.testing.assert_array_equal(_running_mean(values, 1), values)
    np.testing.assert_allclose(_running_mean(values, 99)[-1], 17 / 4)
