"""The folder of a run: who may write into it, and ``run.json``, which says what was run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from revisual_fast.checkpoint import write_text_atomically
from revisual_fast.config import Config
from revisual_fast.doctor import device_name, versions
from revisual_fast.telemetry.report import START

__all__ = ["RunDir"]


FIXED = ("run.seed", "model.", "chat.", "data.")
"""Settings that a resumed run must not change, or it would be another run."""
FREE = ("model.device", ".on_bad_record")


class RunDir:
    """``path`` holds one run. A new one is refused where there is a run already, unless it may ``overwrite`` it.

    Nothing is written or deleted before :meth:`claim`; a start that fails after it is undone by :meth:`give_up`.
    """

    def __init__(self, config: Config, *, resume: bool, overwrite: bool):
        self.config = config
        self.path = Path(config.run.dir)
        self._file = self.path / "run.json"
        if resume and not self._file.exists():
            raise ValueError(f"--resume: there is no run in {self.path}; start it without --resume")
        self._old = self.path.with_name(f".{self.path.name}.overwritten")
        self._fresh = not resume
        self._made = False  # whether the folder is new
        if self._file.exists() and not resume and not overwrite:
            raise ValueError(
                f"run.dir: {self.path} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or give another folder with --set run.dir=..."
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run.dir: {self.path} is a file; give another folder with --set run.dir=...")

    def claim(self) -> None:
        """Make the folder this run's. A run that is overwritten is set aside until :meth:`confirm`."""
        if self._fresh and self._file.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.path.rename(self._old)
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)

    def confirm(self) -> None:
        """The run has started: what it overwrote is deleted."""
        shutil.rmtree(self._old, ignore_errors=True)

    def give_up(self) -> None:
        """The run could not start: what it would have overwritten comes back, and no trace of a run is left."""
        if not self._fresh:
            return
        if self._made:
            shutil.rmtree(self.path)
        if self._old.exists():
            self._old.rename(self.path)

    def model(self, stage: str) -> Path:
        """Where the result of ``stage`` is, in HF format."""
        return self.path / "models" / stage

    def changed_settings(self) -> list[str]:
        """A line for every setting that differs from the one the run was started with.

        Raises ValueError for a change that would make it another run.
        """
        try:
            before = json.loads(self._file.read_text())["config"]
        except (json.JSONDecodeError, KeyError):
            raise ValueError(f"{self._file}: damaged; start the run again with --overwrite") from None
        changes = _changes(before, self._settings(), "")
        for key, change in changes.items():
            if key.startswith(FIXED) and not key.endswith(FREE):
                raise ValueError(f"--resume cannot change {key} ({change}); put it back, or start a new run")
        return [f"changed since the run began: {key}: {change}" for key, change in changes.items()]

    def write(self, state: dict[str, Any], header: list[str], bad_records: dict[str, int]) -> None:
        """Write ``run.json`` anew; ``state`` is the curriculum's."""
        stages = [
            {
                "name": name,
                "kind": "evaluation" if name == START else self.config.stages[name].kind,
                "seconds": state["seconds"][name],
                "steps": state["steps"][name],
                "skipped_steps": state["skipped"][name],
                "finished": name == START or self.config.curriculum.index(name) < state["stage"],
            }
            for name in (START, *self.config.curriculum)
            if name in state["seconds"]
        ]
        run = {
            "config": self._settings(),
            "versions": versions(),
            "device": device_name(self.config.model.device),
            "header": header,
            "stages": stages,
            "bad_records": bad_records,
            "total_seconds": sum(state["seconds"].values()),
        }
        write_text_atomically(self._file, json.dumps(run, indent=1))

    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str) -> dict[str, str]:
    changes: dict[str, str] = {}
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[f"{prefix}{key}"] = f"{old!r} -> {new!r}"
    return changes
