"""Checkpoints appear complete or not at all, and hold no pickle."""

import ast
from pathlib import Path

import pytest
import torch

from revisual_fast.checkpoint import Checkpoints, write_atomically


def save(checkpoints: Checkpoints, step: int, fail: bool = False) -> Path:
    def save_model(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(f"{step}")
        if fail:
            raise OSError("disk full")

    return checkpoints.save(step, save_model, {"exp_avg/w": torch.full((3,), float(step))}, {"step": step})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = save(checkpoints, 7)
    tensors, state = checkpoints.load(path)
    assert state == {"step": 7}
    assert torch.equal(tensors["exp_avg/w"], torch.full((3,), 7.0))
    assert (path / "model" / "config.json").read_text() == "7"


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 100, 1000):
        save(checkpoints, step)
    assert [p.name for p in checkpoints.all()] == ["step-00000100", "step-00001000"]
    assert checkpoints.latest() == checkpoints.all()[-1]
    assert not [p for p in checkpoints.folder.iterdir() if p.name.startswith(".")]


def test_one_that_fails_half_way_leaves_the_one_before_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    with pytest.raises(OSError, match="disk full"):
        save(checkpoints, 2, fail=True)
    assert [p.name for p in checkpoints.all()] == ["step-00000001"]
    save(checkpoints, 2)
    assert checkpoints.load(checkpoints.latest())[1] == {"step": 2}


def test_what_a_killed_process_left_half_written_is_not_taken_for_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    (checkpoints.folder / ".step-00000009.writing" / "model").mkdir(parents=True)
    assert checkpoints.latest() is None
    save(checkpoints, 9)
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-00000009"]


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = save(checkpoints, 4)
    path.rename(path.with_name(f".{path.name}.replaced"))  # the process died before the new one had its name
    (checkpoints.folder / f".{path.name}.writing").mkdir()
    (checkpoints.folder / ".step-00000003.deleting").mkdir()
    checkpoints.recover()
    assert [p.name for p in checkpoints.folder.iterdir()] == [path.name]
    assert checkpoints.load(path)[1] == {"step": 4}


def test_a_directory_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "model", lambda folder: (folder / "old").touch())
    write_atomically(tmp_path / "model", lambda folder: (folder / "new").touch())
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]


def test_nothing_in_the_package_unpickles_files():
    """Only the messages between the trainer and an engine process of its own are pickled; they never lie on a disk."""
    root = Path(__file__).parents[2]
    for path in {*root.glob("revisual_fast/**/*.py")} - {root / "revisual_fast/rollout/vllm/process.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "joblib", "dill"} & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, path
