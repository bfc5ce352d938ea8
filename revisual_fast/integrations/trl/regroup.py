"""Completions of one prompt into the same micro-batch, within what one optimizer step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

__all__ = ["regrouped"]

Batch = dict[str, Any]


def regrouped(batches: Sequence[Batch], window: int) -> list[Batch]:
    """The same rows in as many micro-batches of the same sizes, those of every ``window`` dealt anew.

    A micro-batch is what TRL hands to ``compute_loss``: tensors with a row for each completion, numbers for all, lists.
    """
    out: list[Batch] = []
    for first in range(0, len(batches), window):
        out += _dealt(batches[first : first + window])
    return out


def _dealt(batches: Sequence[Batch]) -> list[Batch]:
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    split = [split_pixel_values_by_grid(batch) for batch in batches]
    merged = {name: _merged([batch[name] for batch in split]) for name in split[0]}
    keys = [tuple(row) for row in torch.cat([merged["prompt_ids"], merged["prompt_mask"]], 1).tolist()]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(range(len(keys)), key=lambda i: (first[keys[i]], i))
    parts = torch.tensor(order).split(sizes)
    return [unsplit_pixel_values_by_grid({n: _taken(v, part, len(keys)) for n, v in merged.items()}) for part in parts]


def _merged(values: Sequence[Any]) -> Any:
    """Of micro-batches; what is one number or None is the same for all."""
    if isinstance(values[0], Tensor) and values[0].ndim > 0:
        return torch.cat(list(values))
    return [x for value in values for x in value] if isinstance(values[0], list) else values[0]


def _taken(value: Any, rows: Tensor, n_rows: int) -> Any:
    if isinstance(value, Tensor) and value.ndim > 0:
        assert len(value) == n_rows, "a tensor with other than one row for each completion"
        return value[rows.to(value.device)]
    return [value[i] for i in rows.tolist()] if isinstance(value, list) else value
