"""Checkpoints: a directory in HF format plus the optimizer and the trainer's state, written atomically.

``<run>/checkpoints/step-00000120/`` holds ``model/`` (safetensors and tokenizer, loads with ``from_pretrained``),
``optimizer.safetensors`` and ``state.json``. It is written under a temporary name, flushed to disk and renamed, so a
directory with a proper name is complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from revisual_fast.ranges import ranged

__all__ = ["Checkpoints", "write_atomically", "write_text_atomically"]


class Checkpoints:
    """The checkpoints of one run; keeps the newest ``keep``."""

    def __init__(self, run_dir: Path, keep: int):
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def recover(self) -> None:
        """Clear up what a killed process left: half-written directories go, a replaced one whose successor is missing
        comes back."""
        for leftover in self.folder.glob(".step-*"):
            proper = leftover.with_name(leftover.name[1:].rpartition(".")[0])
            if leftover.suffix == ".replaced" and not proper.exists():
                leftover.rename(proper)
            else:
                shutil.rmtree(leftover)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def path(self, global_step: int) -> Path:
        return self.folder / f"step-{global_step:08d}"

    def latest(self) -> Path | None:
        found = self.all()
        return found[-1] if found else None

    @ranged("checkpoint")
    def save(
        self,
        global_step: int,
        save_model: Callable[[Path], None],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint and delete those beyond the newest ``keep``; ``save_model`` writes into a folder."""

        def fill(folder: Path) -> None:
            save_model(folder / "model")
            save_file({k: v.contiguous() for k, v in optimizer.items()}, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=1))

        path = self.path(global_step)
        write_atomically(path, fill)
        for old in self.all()[: -self.keep]:
            _remove(old)
        return path

    @staticmethod
    def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer tensors and state of the checkpoint at ``path``."""
        return load_file(path / "optimizer.safetensors"), json.loads((path / "state.json").read_text())


def write_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory ``path`` appear complete or not at all; one that is there already is replaced."""
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for folder, _, files in os.walk(temporary):
        for file in files:
            _fsync(Path(folder) / file)
        _fsync(Path(folder))
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    _fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Make the file ``path`` hold all of ``text`` or what it held before."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _remove(path: Path) -> None:
    """Take away the proper name first: a half-deleted directory must not look complete."""
    doomed = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
