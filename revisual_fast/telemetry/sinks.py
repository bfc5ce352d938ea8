"""Where a run's numbers go: three JSONL files and TensorBoard always, trackio and wandb if the configuration asks.

The JSONL files are strict JSON. A number that JSON cannot hold (nan, inf) is written as ``null``, and the line gets a
key ``"nonfinite"`` that says what it was: ``{"loss": null, "nonfinite": "loss=nan"}``. TensorBoard and the trackers get
the number itself.

Resuming is exact: a checkpoint holds the length of each file (:meth:`Telemetry.state_dict`), and a resumed run cuts the
files back to it, so that lines written after the checkpoint by a killed run vanish. TensorBoard is told to purge the
same steps. trackio and wandb cannot forget: they keep what the killed run sent and continue the same run.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from revisual_fast.config import TelemetryConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FILES", "Telemetry", "TelemetryError", "read_jsonl"]

FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
_NOT_SCALARS = ("step", "global_step", "n")


class TelemetryError(ValueError):
    """A tracker that cannot be used, a file that cannot be continued or a value that cannot be stored."""


class Sink(Protocol):
    """A place for scalars besides the JSONL files."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Telemetry:
    """Writes one run's metrics, evaluations and sample rollouts.

    ``resume_from`` is the ``state_dict()`` of the checkpoint that the run continues from. ``None`` starts a new run:
    the three files in ``run_dir`` are emptied. Raises :class:`TelemetryError`, before it touches anything, if a
    configured tracker is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TelemetryConfig,
        run_name: str,
        resume_from: Mapping[str, Any] | None = None,
    ) -> None:
        packages = {
            package: (_require(package), project)
            for package, project in (("trackio", config.trackio), ("wandb", config.wandb))
            if project is not None
        }
        state = _new_run() if resume_from is None else resume_from
        self._dir = Path(run_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._run_id = str(state["run_id"])
        self._trackers: list[Sink] = []
        if "trackio" in packages:
            package, project = packages["trackio"]
            resume = "never" if resume_from is None else "allow"
            self._trackers.append(_Tracker(package.init(project=project, name=run_name, resume=resume)))
        if "wandb" in packages:
            package, project = packages["wandb"]
            run = package.init(project=project, name=run_name, id=self._run_id, dir=str(self._dir), resume="allow")
            self._trackers.append(_Tracker(run))
        self._files: dict[str, BinaryIO] = {}
        self._board: Sink | None = None
        self.load_state_dict(state)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Store one training step: a flat mapping with ``stage``, ``step``, ``global_step`` and the metrics."""
        self._append("metrics.jsonl", metrics)
        self._scalars("", metrics)

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """Store one evaluation: ``stage``, ``step``, ``global_step``, ``kind``, ``name``, ``accuracy``, ``n``, ..."""
        self._append("evaluations.jsonl", result)
        self._scalars(f"{result['kind']}/{result['name']}/", result)

    def sample(self, sample: Mapping[str, Any], images: Mapping[str, Image] | None = None) -> None:
        """Store one sample rollout: ``stage``, ``step``, ``prompt``, ``answer``, ``completions``.

        ``images`` (key -> picture) are stored once each as ``samples/<key>.png``; ``sample["images"]`` defaults to
        their paths relative to ``run_dir``, in that order.
        """
        images = images or {}
        for key, image in images.items():
            _save_png(self._dir / "samples" / f"{key}.png", image)
        self._append("samples.jsonl", {"images": [f"samples/{key}.png" for key in images], **sample})

    def state_dict(self) -> dict[str, Any]:
        """Lengths of the files in bytes, all of them on disk (fsync), and the last step; holds only JSON types."""
        assert self._files, "state_dict() after close()"
        for file in self._files.values():
            os.fsync(file.fileno())
        for sink in self._sinks():
            sink.flush()
        lengths = {name: file.tell() for name, file in self._files.items()}
        return {**lengths, "global_step": self._global_step, "run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to ``state``: cut the files to its lengths and purge later steps from TensorBoard."""
        self._close_local()
        self._global_step = int(state["global_step"])
        self._files = {name: _cut(self._dir / name, int(state[name])) for name in FILES}
        self._board = _TensorBoard(self._dir / "tensorboard", purge_step=self._global_step + 1)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        self._close_local()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def _close_local(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        self._files, self._board = {}, None

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        nonfinite: list[str] = []
        line = _strict(dict(record), "", nonfinite)
        if nonfinite:
            line["nonfinite"] = ", ".join(nonfinite)
        file = self._files[name]
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()

    def _scalars(self, prefix: str, record: Mapping[str, Any]) -> None:
        self._global_step = max(self._global_step, int(record["global_step"]))
        values = {
            f"{prefix}{key}": float(value)
            for key, value in record.items()
            if isinstance(value, int | float) and key not in _NOT_SCALARS
        }
        for sink in self._sinks():
            sink.scalars(values, int(record["global_step"]))

    def _sinks(self) -> list[Sink]:
        return [*([self._board] if self._board else []), *self._trackers]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file, ``[]`` if there is none. A last line cut short by a kill is left out.

    Raises :class:`TelemetryError` naming file and line if any other line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):  # no newline after it: the process died while writing
                break
            raise TelemetryError(
                f"{path}:{number}: not valid JSON ({error}); delete the line to read the rest"
            ) from None
        if isinstance(record, dict):
            records.append(record)
        elif record is not None:
            raise TelemetryError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
    return records


def _new_run() -> dict[str, Any]:
    return {**dict.fromkeys(FILES, 0), "global_step": -1, "run_id": uuid.uuid4().hex[:12]}


def _require(package: str) -> Any:
    """The imported tracker ``package``."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise TelemetryError(
            f"telemetry.{package} is set but {package} is not installed: run `pip install {package}`, "
            f"or set telemetry.{package} to null"
        ) from None


def _cut(path: Path, length: int) -> BinaryIO:
    """Open ``path`` for appending after its first ``length`` bytes."""
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise TelemetryError(
            f"{path} has {size} bytes, but the checkpoint was written when it had {length}: "
            "restore the file, or start again in an empty run.dir"
        )
    file = path.open("ab")
    file.truncate(length)
    file.seek(length)  # truncate leaves the position where it was, and state_dict() reads it
    return file


def _strict(value: Any, where: str, nonfinite: list[str]) -> Any:
    """``value`` in strict JSON's types; names of nan and inf go to ``nonfinite``."""
    if isinstance(value, Mapping):
        return {str(k): _strict(v, f"{where}.{k}" if where else str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v, f"{where}[{i}]", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(f"{where}={value}")
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TelemetryError(f"metric {where!r} is a {type(value).__name__}: give a plain number, text, list or mapping")


def _save_png(path: Path, image: Image) -> None:
    """Write ``image`` unless it is there; a kill leaves no half-written picture."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)


class _TensorBoard:
    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """A run of trackio or wandb; both have the same two methods."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self._run.finish()
