"""Records: what a line of data becomes, by the templates of its configuration."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from revisual_fast.config import DatasetConfig
from revisual_fast.data.bad import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    MISSING_FIELD,
    MISSING_IMAGE,
    PLACEHOLDERS,
    PROMPT_TOO_LONG,
    RESPONSE_TOO_LONG,
    WRONG_TYPE,
    BadRecordError,
    BadRecords,
)
from revisual_fast.data.images import ImageRef
from revisual_fast.data.sources import RawRecord, read_raw
from revisual_fast.dotted import nearest

__all__ = [
    "PROMPT_TOO_LONG",
    "RESPONSE_TOO_LONG",
    "BadRecordError",
    "BadRecords",
    "Record",
    "load_dataset",
]

TENTH = 10
_PLACEHOLDER = re.compile(r"<image[ _]?(\d*)>")
_LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Record:
    """One question, and what is needed to train on it and to verify an answer."""

    prompt: str
    """The user's text; each ``<image>`` marks where one of ``images`` goes."""
    images: tuple[ImageRef, ...]
    answer: str | None
    response: str | None
    """The target of supervised fine-tuning."""
    verifier: str
    """"math", "choice", "exact" or "number"."""
    options: tuple[str, ...]
    """What there is to choose from, () if the answer is free."""
    source: str
    """Where it comes from: ``path/to/file.jsonl:17``, ``digits[17]``."""
    dataset: str
    """Its data set's name in the configuration."""
    extra: Mapping[str, Any]
    """The original fields without image content, for reward functions and reports."""


def load_dataset(name: str, config: DatasetConfig, bad: BadRecords) -> list[Record]:
    """The usable records of ``config.part`` of ``data.<name>``, at most ``config.limit``; the others go to ``bad``.

    Image files are looked up and their headers read, not decoded. Raises :class:`BadRecordError` as configured, and
    ValueError if the source cannot be read, a template is malformed, or no record is usable.
    """
    builder = _Builder(name, config)
    records: list[Record] = []
    skipped = 0
    for i, raw in enumerate(read_raw(name, config)):
        if config.part != "all" and (i % TENTH == 0) != (config.part == "test"):
            continue
        try:
            records.append(builder.build(raw))
        except BadRecordError as error:
            bad.handle(config.on_bad_record, raw.source, error.reason, error.detail)
            skipped += 1
        if len(records) == config.limit:
            break
    if not records:
        source = config.path or config.hub or config.function
        raise ValueError(f"data.{name}: no usable record in {source}; {skipped} bad ones were skipped")
    return records


class _Template:
    """A template over a record's fields: ``{name}``; literal braces are doubled."""

    def __init__(self, text: str, key: str):
        self.key = key
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{key}: {error} in {text!r}; a literal brace is written twice: {{{{ or }}}}") from None
        self.parts = [(literal, field) for literal, field, _, _ in parts]
        if any(field == "" or spec or conversion for _, field, spec, conversion in parts):
            raise ValueError(f"{key}: {text!r}: braces hold the name of a field; literal braces are doubled")

    def render(self, fields: Mapping[str, Any], empty: str) -> str:
        """The text; ``empty`` is the reason given if it is blank or one of its fields is null."""
        text = "".join(
            literal + ("" if name is None else self._value(fields, name, empty)) for literal, name in self.parts
        )
        if not text.strip():
            raise BadRecordError(empty, f"{self.key} gives no text")
        return text.strip()

    def _value(self, fields: Mapping[str, Any], name: str, empty: str) -> str:
        value = _field(fields, name)
        if value is None:
            raise BadRecordError(empty, f"field {name!r} is null")
        if not isinstance(value, str | int | float):
            hint = f"; say options: {name} to list them as {{options}}" if isinstance(value, list | tuple) else ""
            found = type(value).__name__
            raise BadRecordError(WRONG_TYPE, f"field {name!r} is a {found}, {self.key} needs text or a number{hint}")
        return str(value)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise BadRecordError(MISSING_FIELD, f"there is no field {name!r}{nearest(name, [str(key) for key in fields])}")
    return fields[name]


class _Builder:
    """Makes records by one data set's configuration."""

    def __init__(self, name: str, config: DatasetConfig):
        self.name = name
        self.config = config
        self.prompt = _Template(config.prompt, f"data.{name}.prompt")
        self.answer = None if config.answer is None else _Template(config.answer, f"data.{name}.answer")
        self.response = None if config.response is None else _Template(config.response, f"data.{name}.response")
        self.image_fields = [config.images] if isinstance(config.images, str) else config.images or []
        self.replace = [(self._pattern(i, pattern), put) for i, (pattern, put) in enumerate(config.replace)]

    def _pattern(self, i: int, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise ValueError(f"data.{self.name}.replace[{i}]: {pattern!r} is no regular expression: {error}") from None

    def build(self, raw: RawRecord) -> Record:
        if isinstance(raw.fields, BadRecordError):
            raise raw.fields
        fields, options = raw.fields, self._options(raw.fields)
        shown = fields if self.config.options is None else {**fields, "options": _listed(options)}
        prompt, images = _place(self.prompt.render(shown, EMPTY_PROMPT), self._images(fields, raw.folder))
        return Record(
            prompt=prompt,
            images=images,
            answer=self.answer.render(fields, EMPTY_ANSWER) if self.answer else None,
            response=self._response(fields),
            verifier=self.config.verifier,
            options=options,
            source=raw.source,
            dataset=self.name,
            extra={key: value for key, value in fields.items() if not _holds_image(value)},
        )

    def _options(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        if self.config.options is None:
            return ()
        values = _field(fields, self.config.options)
        plain = isinstance(values, list | tuple) and all(isinstance(v, str | int | float) for v in values)
        if not plain or len(values) > len(_LETTERS):
            detail = f"field {self.config.options!r} must be a list of at most {len(_LETTERS)} texts or numbers"
            raise BadRecordError(WRONG_TYPE, detail)
        return tuple(str(value).strip() for value in values)

    def _images(self, fields: Mapping[str, Any], folder: Path) -> tuple[ImageRef, ...]:
        """An empty list means that the record has no image; nulls alone mean that its images are missing."""
        root = folder if self.config.image_root is None else Path(self.config.image_root)
        values: list[Any] = []
        for name in self.image_fields:
            value = _field(fields, name)
            values += value if isinstance(value, list | tuple) else [value]
        present = [value for value in values if value is not None]
        if values and not present:
            raise BadRecordError(MISSING_IMAGE, f"{' and '.join(map(repr, self.image_fields))}: null")
        return tuple(ImageRef.of(value, root) for value in present)

    def _response(self, fields: Mapping[str, Any]) -> str | None:
        if self.response is None:
            return None
        text = self.response.render(fields, EMPTY_RESPONSE)
        for pattern, put in self.replace:
            text = pattern.sub(put, text)
        if not text.strip():
            raise BadRecordError(EMPTY_RESPONSE, f"nothing is left after data.{self.name}.replace")
        return text


def _listed(options: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))


def _place(text: str, images: tuple[ImageRef, ...]) -> tuple[str, tuple[ImageRef, ...]]:
    """The text with one ``<image>`` per image, and the images in that order.

    Without a placeholder the images go in front. A numbered placeholder (``<image2>``) takes the image of its number
    where it stands first and is left as it is after that. Where there is one image only, several numbered placeholders
    name parts of it (MATH-Vision): it goes where the first one stands.
    """
    marks = list(_PLACEHOLDER.finditer(text))
    if not marks:
        return "<image>" * len(images) + text, images
    numbers = [mark[1] for mark in marks]
    if not any(numbers):
        slots, order = marks, list(range(len(images)))
    elif len(images) == 1 and all(numbers):
        slots, order = marks[:1], [0]
    else:
        first = dict(zip(reversed(numbers), reversed(marks), strict=True))
        slots = sorted(first.values(), key=lambda mark: mark.start())
        order = [int(mark[1] or 0) - 1 for mark in slots]
    if sorted(order) != list(range(len(images))) or len(slots) != len(images):
        hint = "" if images else "; say images: FIELD if the record has any"
        detail = f"{len(images)} images, but the text has {', '.join(mark[0] for mark in marks)}{hint}"
        raise BadRecordError(PLACEHOLDERS, detail)
    for mark in reversed(slots):
        text = f"{text[: mark.start()]}<image>{text[mark.end() :]}"
    return text, tuple(images[i] for i in order)


def _holds_image(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_image, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_image, value))
    return isinstance(value, bytes | Image.Image)
