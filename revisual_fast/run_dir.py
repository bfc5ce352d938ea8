"""The folder of a run: who may write into it, and ``run.json``, which says what was run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from revisual_fast.config import Config
from revisual_fast.doctor import device_name, versions

__all__ = ["START", "RunDir"]

START = "start"
"""Name of the evaluation before any training."""


class RunDir:
    """``path`` holds one run. A new one is refused where there is a run already, unless it may ``overwrite`` it."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool):
        self.config = config
        self.path = Path(config.run.dir)
        self._file = self.path / "run.json"
        if resume and not self._file.exists():
            raise ValueError(f"--resume: there is no run in {self.path}; start it without --resume")
        if self._file.exists() and not resume:
            if not overwrite:
                raise ValueError(
                    f"run.dir: {self.path} already holds a run; continue it with --resume, replace it by --overwrite, "
                    "or give another folder with --set run.dir=..."
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def model(self, stage: str) -> Path:
        """Where the result of ``stage`` is, in HF format."""
        return self.path / "models" / stage

    def changed_settings(self) -> list[str]:
        """A line for every setting that differs from the one the run was started with."""
        return _changes(json.loads(self._file.read_text())["config"], self._settings(), "")

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
        temporary = self.path / ".run.json.writing"
        temporary.write_text(json.dumps(run, indent=1))
        temporary.replace(self._file)

    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"changed since the run began: {prefix}{key}: {old!r} -> {new!r}")
    return lines
