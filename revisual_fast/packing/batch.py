"""What packing takes and gives: prompts with their completions, and the packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["Group", "Layout", "PackedBatch", "Prompt", "Segments", "to_device"]

Layout = Literal["shared", "varlen", "padded"]
ON_HOST = ("cu_seqlens", "grids")
"""What :meth:`PackedBatch.to` leaves where it is."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From the host to CUDA nothing waits: a copy from page-locked memory queues behind the
    work that is under way."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_layout(layout: str) -> None:
    """Raises ValueError for a layout that there is not."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r} is unknown; it is one of {', '.join(get_args(Layout))}")


@dataclass
class Prompt:
    """What the model reads: ids, and the patches of the images that the image tokens among them stand for."""

    ids: Tensor
    """[P] int64, one image token per feature, which is a merged patch."""
    pixel_values: Tensor | None = None
    """[patches, channels * temporal * patch * patch] of all images, one after the other; None without images."""
    grids: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))
    """[I, 3] int64: time, height, width in patches; no rows without images."""
    image_keys: tuple[str, ...] = ()
    """[I]: a name for each image's content, such as its SHA-256. Equal keys are equal images."""


@dataclass(frozen=True)
class Group:
    """One prompt and the completions that are trained on (or none, to score or to prefill the prompt)."""

    prompt: Prompt
    completions: Sequence[Tensor]  # each [C_i] int64, C_i >= 1

    def tokens(self, layout: Layout) -> int:
        """Rows this group takes in the packed row; padded: where no other group of the batch is longer."""
        check_layout(layout)
        prompt, own = len(self.prompt.ids), [len(c) - 1 for c in self.completions]
        copies = max(1, len(own))
        if layout == "padded":
            return copies * (prompt + max(own, default=0))
        return (copies if layout == "varlen" else 1) * prompt + sum(own)


@dataclass(frozen=True)
class Segments:
    """Who attends to whom. Segment i's queries are the rows ``[start, start + length)``; its keys are the rows
    ``[prefix_start, prefix_start + prefix_length)`` followed by its own rows, causal from the bottom right.

    Segments stand in the order of the rows and cover every row once. All of it lies on the host.
    """

    start: tuple[int, ...]  # [B]
    length: tuple[int, ...]
    prefix_start: tuple[int, ...]
    prefix_length: tuple[int, ...]

    @property
    def fields(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """start, length, prefix_start, prefix_length."""
        return self.start, self.length, self.prefix_start, self.prefix_length

    @property
    def keys(self) -> tuple[int, ...]:
        """[B]: how many keys each segment attends to."""
        return tuple(p + n for p, n in zip(self.prefix_length, self.length, strict=True))

    @cached_property
    def cu_q(self) -> Tensor:
        """[B + 1] int32: bounds of the segments' queries."""
        return torch.tensor([0, *accumulate(self.length)], dtype=torch.int32)

    @cached_property
    def cu_k(self) -> Tensor:
        """[B + 1] int32: bounds of the segments' keys in :attr:`key_rows`."""
        return torch.tensor([0, *accumulate(self.keys)], dtype=torch.int32)

    @cached_property
    def key_rows(self) -> Tensor:
        """[L] int64: the packed row of every segment's keys, one segment after the other."""
        fields = zip(*self.fields, strict=True)
        parts = [x for s, n, p, k in fields for x in (torch.arange(p, p + k), torch.arange(s, s + n))]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class PackedBatch:
    """One packed row. Beware of two kinds of bounds: ``cu_seqlens`` are those of the completions' targets, as the loss
    takes them; attention's are ``segments.cu_q`` and ``segments.cu_k``."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [4, 1, T] int64: text row, then temporal, height, width
    rows: Tensor  # [N] int64: the row of the hidden states that predicts target n
    targets: Tensor  # [N] int64
    sequence_ids: Tensor  # [N] int64: the completion that target n belongs to
    cu_seqlens: Tensor  # [S + 1] int32, on the host: completion s owns the targets cu_seqlens[s] .. cu_seqlens[s + 1]
    segments: Segments  # B of them: cu_q [B + 1], cu_k [B + 1], key_rows [L]
    image_rows: Tensor  # [M] int64: rows that take an image feature
    image_index: Tensor  # [M] int64: which feature, counted over the distinct images
    image_keys: tuple[str, ...]  # of the distinct images
    pixel_values: tuple[Tensor, ...]  # of the distinct images, each [patches, C], on the host
    grids: Tensor  # [distinct images, 3] int64: (t, h, w) in patches, on the host

    def to(self, device: torch.device) -> PackedBatch:
        """Everything but what the host needs: whole sequences go into chunks of the loss, grids become indices, and
        pixels are only moved where the vision tower has to see them."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in ON_HOST}
        moved: dict[str, Any] = {k: to_device(v, device) for k, v in tensors.items()}
        return replace(self, **moved)
