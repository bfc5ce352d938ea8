"""The command, as a user meets it."""

import json

import pytest

from revisual_fast.cli import main
from tests.processes import run_code


def test_train_then_eval_and_report(small_run, tmp_path, capsys):
    assert main(["train", str(small_run), "--set", "train.max_steps=1", "--set", "curriculum=[warm]"]) == 0
    said = capsys.readouterr().out
    assert f"report: {tmp_path}/run/report.html" in said
    assert "backends: linear_logprob torch" in said, "the header says what runs where"
    heldout = json.loads((tmp_path / "run/report.json").read_text())["stages"][-1]["heldout"]["visual"]
    assert main(["eval", str(small_run), "--model", str(tmp_path / "run/models/warm")]) == 0
    assert f"visual: accuracy {heldout:.4f}, n 4" in capsys.readouterr().out
    (tmp_path / "run/report.html").unlink()
    assert not (tmp_path / "run/plots").exists(), "telemetry.plots is false here"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/plots/overview.png").exists()


def test_a_run_draws_its_pictures_by_itself(small_run, tmp_path):
    settings = ["--set", "train.max_steps=1", "--set", "curriculum=[warm]", "--set", "telemetry.plots=true"]
    assert main(["train", str(small_run), *settings]) == 0
    assert "plots/overview.png" in (tmp_path / "run/report.md").read_text()
    assert "data:image/svg+xml" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such configuration file"),
        (["train", "CONFIG", "--set", "stages.rl.stepz=3"], "unknown key 'stages.rl.stepz'; did you mean 'steps'?"),
        (["train", "CONFIG", "--set", "run.dir=CONFIG"], "is a file"),
        (["train", "CONFIG", "--resume"], "there is no run"),
        (["init", "tiny-vl", "FOLDER"], "is not an empty folder"),
        (["eval", "CONFIG", "--set", "evaluation.heldout={}"], "evaluation.heldout is empty"),
    ],
)
def test_what_a_user_got_wrong_is_one_line_and_exit_code_1(small_run, tmp_path, capsys, arguments, message):
    names = {"CONFIG": str(small_run), "FOLDER": str(tmp_path)}
    for placeholder, name in names.items():
        arguments = [argument.replace(placeholder, name) for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("revisual-fast: ")
    assert message in error
    assert "Traceback" not in error


def test_help_needs_no_torch():
    run_code("import sys; from revisual_fast.cli import _parser; _parser(); assert 'torch' not in sys.modules")
