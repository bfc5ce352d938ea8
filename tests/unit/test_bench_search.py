"""The search: prediction before outcome, and what is wrong gets no time."""

import json
from dataclasses import replace

import pytest
import torch

from bench import machine, report, search
from bench.harness import Call, Case, DeviceLost, Problem, Variant
from bench.tuning.experiment import Axis, Experiment, Piece, Trial

ANSWER = torch.arange(1, 9, dtype=torch.float64)
CASE = Case("linear_policy_loss", 16, 8, 40)


# a search


class FakeClock:
    """A call takes as long as its outputs say."""

    def seconds(self, run):
        out = run()
        return float(out["cost"][0]) if isinstance(out, dict) else 1.0

    def peak_bytes(self, run):
        run()
        return 1 << 20


COST = {"a": {1: 8.0, 2: 4.0, 3: 2.0}, "b": {0: 0.0, 1: -1.0}}


def experiment(broken=(), axes=None, **fields):
    """Two coordinates; settings with ``a=3`` are wrong, those in ``broken`` raise."""

    def candidate(setting):
        def run():
            if setting in broken:
                raise RuntimeError("out of registers")
            y = ANSWER.float() * (2 if setting["a"] == 3 else 1)
            return {"y": y, "cost": torch.tensor([COST["a"][setting["a"]] + COST["b"][setting["b"]]])}

        return Variant("", "ours", lambda: Call(run))

    eager = Variant("eager", "plain", lambda: Call(lambda: {"y": ANSWER.float() * (1 + 1e-5), "cost": torch.ones(1)}))
    problem = Problem(
        *(CASE, [eager], lambda: {"y": ANSWER, "cost": torch.ones(1)}, 600, 30, {"copy": (lambda: None, 100)}),
        errors=lambda outputs, reference: {"y": float((outputs["y"] - reference["y"]).norm() / reference["y"].norm())},
    )
    axes = axes or [Axis("a", (2, 3, 4), "Two is twice as fast."), Axis("b", (1,), "One saves a second.")]
    return Experiment(
        "fake",
        start=lambda device: {"a": 1, "b": 0},
        axes=lambda device: axes,
        trial=lambda device: Trial(problem, candidate, lambda setting: [Piece(bytes=800 / setting["a"])]),
        seconds=5,
        pruned=lambda setting: "does not fit" if setting["a"] == 4 else "",
        **fields,
    )


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """``run(experiment, *options)`` -> (exit code, rows, what was printed)."""
    monkeypatch.setattr(machine, "clock_for", lambda device: FakeClock())

    def command(of, *options):
        monkeypatch.setattr(search, "EXPERIMENTS", {"fake": of})
        code = search.main(["--out", str(tmp_path), "--rounds", "2", *options])
        files = list(tmp_path.glob("*/*.jsonl"))
        assert [path.name for path in files] in ([], ["search.jsonl"])
        found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return code, found, capsys.readouterr().out

    return command


def test_prediction_and_outcome_of_every_setting(run, tmp_path):
    code, found, said = run(experiment())
    assert code == 0
    first = {row["variant"]: row for row in found if row["coordinate"] == "a"}
    assert {name: row["status"] for name, row in first.items()} == {
        "eager": "ok",
        "a=1": "ok",
        "a=2": "ok",
        "a=3": "wrong",
    }
    assert "median_s" not in first["a=3"], "the fastest, and wrong"
    assert (first["a=3"]["gain"], first["a=3"]["predicted_gain"]) == (None, pytest.approx(3))
    assert (first["a=2"]["gain"], first["a=2"]["predicted_gain"]) == (2.0, 2.0)
    assert first["a=1"]["predicted_s"] == 8.0, "800 bytes at the 100 a second that the copy was measured at"
    assert first["a=2"]["setting"] == {"a": 2, "b": 0}
    assert "setting" not in first["eager"]
    for name in ("experiment", "hypothesis", "present", "left_out", "case", "device", "commit", "versions", "run"):
        assert name in first["a=1"]
    assert first["a=1"]["left_out"] == {"a=4": "does not fit"}
    second = {row["variant"]: row for row in found if row["coordinate"] == "b"}
    assert second["b=1"]["setting"] == {"a": 2, "b": 1}, "goes on from the winner"
    assert second["b=1"]["gain"] == pytest.approx(4 / 3)
    assert said.index("predicted") < said.index("measured")
    assert said.index("b=1                      predicted") > said.index("a=2                      measured")
    assert "a=4                      not tried: does not fit" in said
    assert not report.load(tmp_path), "settings that were tried are no results"


def test_the_entry_for_the_log(run):
    _, _, said = run(experiment())
    entry = said[said.index("- **fake, a**") : said.index("  b: One saves")]
    text = " ".join(entry.split())
    assert "Two is twice as fast. a=1 8000.000 ms (predicted 8000.000);" in text
    assert "a=2 2.00x (predicted 2.00x);" in text
    assert "a=3 wrong: y: error 1.00e+00" in text
    assert "a=4 not tried (does not fit). a=2 is faster." in text
    assert all(len(line) <= search.WIDTH for line in entry.splitlines())


def test_a_setting_that_fails_is_a_line_and_the_present_one_an_exit_code(run):
    code, found, said = run(experiment(broken=[{"a": 2, "b": 0}]))
    assert code == 0
    assert "a=2                      failed: RuntimeError: out of registers" in said
    assert {row["setting"]["a"] for row in found if row["variant"] == "b=1"} == {1}, "goes on from the present one"
    code, found, said = run(experiment(broken=[{"a": 1, "b": 0}]))
    assert code == 1
    assert "no base to compare with" in said
    assert "a=1 failed" in said


def test_noise_is_no_gain(run, monkeypatch):
    monkeypatch.setitem(COST, "a", {1: 8.0, 2: 7.95, 3: 1.0})
    _, found, said = run(experiment())
    assert "stays." in said
    assert {row["setting"]["a"] for row in found if row["variant"] == "b=1"} == {1}


def test_what_cannot_run_here_or_in_time_is_named(run, monkeypatch):
    code, found, said = run(experiment(why_not=lambda device: "needs more of it"))
    assert (code, found) == (0, [])
    assert "fake: needs more of it" in said
    code, found, said = run(experiment(), "--budget", "3")
    assert (code, found) == (0, [])
    assert "fake: left out, --budget does not reach for its 5 s" in said
    monkeypatch.setattr(search, "OVERTIME", 0.0)
    _, found, said = run(experiment(), "--budget", "1000")
    assert not found
    assert "not enough for a and b" in said


def test_a_search_that_fails_or_loses_the_device(run, monkeypatch):
    def fail(device):
        raise MemoryError("no room")

    code, _, said = run(replace(experiment(), trial=fail))
    assert code == 1
    assert "the experiment failed: MemoryError: no room" in said

    def lose(*arguments):
        raise DeviceLost("a=2 broke the CUDA context")

    monkeypatch.setattr(search, "steps", lose)
    code, _, said = run(experiment())
    assert code == 1
    assert "stopped: a=2 broke" in said


def test_bad_usage():
    with pytest.raises(ValueError, match="--budget must be at least 0"):
        search.main(["--budget", "-1"])
