"""The sections on data and on evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from revisual_fast.config.base import Positive, Section, Strings

__all__ = ["DatasetConfig", "EvaluationConfig"]


class DatasetConfig(Section):
    path: Strings | None = None
    """JSONL, JSON or parquet file(s), relative to the configuration file; globs allowed."""
    hub: str | None = None
    """A `datasets` id (or a local directory that `datasets.load_dataset` takes)."""
    hub_config: str | None = None
    split: str = "train"
    function: str | None = None
    """``package.module:function`` or ``file.py:function`` that returns an iterable of records (mappings)."""
    args: dict[str, Any] = Field(default_factory=dict)
    prompt: str = "{problem}"
    """A template over the record's fields. ``<image>`` in the result says where an image goes (default: in front)."""
    answer: str | None = "{answer}"
    response: str | None = None
    """A template for the target of supervised fine-tuning."""
    images: Strings | None = None
    """The field(s) that hold images: a path, bytes, a list of these, or what `datasets` makes of an image."""
    image_root: str | None = None
    """Folder that image paths are relative to; default: the folder of the data file."""
    options: str | None = None
    """The field that holds a question's answer options; ``{options}`` in ``prompt`` lists them by letter."""
    replace: list[Annotated[tuple[str, str], Field(strict=False)]] = Field(default_factory=list)
    """Regular expressions and what to put for them, applied to the response."""
    verifier: Literal["math", "choice", "exact", "number"] = "math"
    part: Literal["all", "train", "test"] = "all"
    """For data without a split of its own. test: every tenth record (the 1st, the 11th, ...); train: the others."""
    limit: Positive | None = None
    on_bad_record: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if sum(source is not None for source in (self.path, self.hub, self.function)) != 1:
            raise ValueError("give exactly one of path, hub, function")
        for key, owner in (("args", "function"), ("hub_config", "hub"), ("split", "hub"), ("image_root", "images")):
            if key in self.model_fields_set and getattr(self, owner) is None:
                raise ValueError(f"{key} has no effect without {owner}; remove it")
        return self


class EvaluationConfig(Section):
    heldout: dict[str, str] = Field(default_factory=dict)
    """Name in the report -> dataset. Evaluated greedily before training and after every stage."""
    validation: dict[str, str] = Field(default_factory=dict)
    """Name -> dataset, evaluated every ``every`` steps."""
    every: Positive | None = None
    max_samples: Positive | None = None
    max_response_tokens: Positive = 1024
