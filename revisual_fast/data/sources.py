"""Where records come from: JSONL, JSON and parquet files, `datasets`, or a function."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revisual_fast.config import DatasetConfig
from revisual_fast.data.bad import BROKEN_JSON, BadRecordError
from revisual_fast.dotted import check_arguments, load_function

__all__ = ["RawRecord", "read_raw"]


@dataclass(frozen=True)
class RawRecord:
    """A record's fields as they were found, or why there are none."""

    source: str
    """``file.jsonl:17`` (a line, from 1), ``file.json[17]``, ``file.parquet[17]``, ``name[17]`` (a place, from 0)."""
    folder: Path
    """What image paths are relative to if the configuration does not say."""
    fields: Mapping[str, Any] | BadRecordError


def read_raw(name: str, config: DatasetConfig) -> Iterator[RawRecord]:
    """The records of ``data.<name>`` in their order, read one after the other.

    Raises ValueError if there is no such file, data set or function, or a whole file cannot be read.
    """
    if config.function is not None:
        yield from _from_function(name, config)
    elif config.hub is not None:
        yield from _from_hub(name, config)
    else:
        for file in _files(name, config):
            yield from _READERS[file.suffix](file)


def _files(name: str, config: DatasetConfig) -> list[Path]:
    files: list[Path] = []
    for pattern in [config.path] if isinstance(config.path, str) else config.path or []:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"data.{name}.path: no file matches {pattern}")
        files += map(Path, found)
    for file in files:
        if file.suffix not in _READERS:
            raise ValueError(f"data.{name}.path: {file}: cannot read this; known: {', '.join(sorted(_READERS))}")
    return files


def _fields(value: Any) -> Mapping[str, Any] | BadRecordError:
    if isinstance(value, Mapping):
        return value
    return BadRecordError(BROKEN_JSON, f"expected an object with named fields, found {type(value).__name__}")


def _read_jsonl(file: Path) -> Iterator[RawRecord]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            fields: Mapping[str, Any] | BadRecordError
            try:
                fields = _fields(json.loads(line))
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deeply
                fields = BadRecordError(BROKEN_JSON, str(error))
            yield RawRecord(f"{file}:{number}", file.parent, fields)


def _read_json(file: Path) -> Iterator[RawRecord]:
    try:
        records = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error} (one record per line? call the file .jsonl)") from None
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected a list of records, found {type(records).__name__}")
    for i, record in enumerate(records):
        yield RawRecord(f"{file}[{i}]", file.parent, _fields(record))


def _read_parquet(file: Path) -> Iterator[RawRecord]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{file}: parquet needs pyarrow: pip install "revisual-fast[data]"') from None
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a parquet file: {error}") from None
    i = 0
    for batch in parquet.iter_batches(batch_size=256):
        for fields in batch.to_pylist():
            yield RawRecord(f"{file}[{i}]", file.parent, fields)
            i += 1


_READERS = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _from_hub(name: str, config: DatasetConfig) -> Iterator[RawRecord]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f'data.{name}.hub needs datasets: pip install "revisual-fast[data]"') from None
    try:
        dataset = datasets.load_dataset(config.hub, config.hub_config, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # not found, no network, no such split
        raise ValueError(f"data.{name}.hub: cannot load {config.hub!r} (split {config.split!r}): {error}") from error
    i = 0
    for batch in dataset.with_format("arrow").iter(batch_size=256):  # the stored form: images stay encoded
        for fields in batch.to_pylist():
            yield RawRecord(f"{config.hub}[{i}]", Path(), fields)
            i += 1


def _from_function(name: str, config: DatasetConfig) -> Iterator[RawRecord]:
    assert config.function is not None
    function = load_function(config.function, f"data.{name}.function")
    check_arguments(function, config.args, f"data.{name}.args")
    for i, record in enumerate(function(**config.args)):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"data.{name}.function: {config.function} must return mappings, found {type(record).__name__}"
            )
        yield RawRecord(f"{name}[{i}]", Path(), record)
