"""Packing: prompts and completions of different lengths laid end to end in one row, without padding.

Shapes, used everywhere:

- ``T`` tokens in the packed row, ``N`` rows that have a target, ``S`` completions, ``M`` image tokens.
- layout ``shared``: ``[prompt_1 | c_11 .. c_1G | prompt_2 | ...]``. A completion attends to its prompt and to itself:
  a group's prompt (and its image tokens) stands in the row once.
- layout ``varlen``: ``[prompt_1 c_11 | prompt_1 c_12 | ...]``, every completion with its own copy of the prompt.

The last token of a completion predicts nothing and nobody attends to it, so it is a target but not in the row. The last
prompt row predicts the first token of every completion (a gather with repeats, whose backward adds). Positions of a
completion continue at ``max(prompt positions) + 1``, which is the M-RoPE rule and, for text, the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Group", "Layout", "PackedBatch", "PackedPrompt", "Segments", "pack_groups", "split_groups"]

Layout = Literal["shared", "varlen"]
PositionFn = Callable[[Tensor, Tensor], Tensor]
"""(prompt ids [P], image grids [I, 3]) -> positions [3, P]."""


class PackedPrompt(Protocol):
    """What packing needs to know of a prompt; see :class:`revisual_fast.data.processor.Prompt`."""

    ids: Tensor  # [P] int64
    pixel_values: Tensor | None  # [patches, C] of all of the prompt's images
    grids: Tensor  # [I, 3] int64: (t, h, w) in patches
    image_keys: tuple[str, ...]  # [I] equal keys are equal images


@dataclass(frozen=True)
class Group:
    """One prompt and the completions that are trained on (or none, to score or to prefill the prompt)."""

    prompt: PackedPrompt
    completions: Sequence[Tensor]  # each [C_i] int64, C_i >= 1

    def tokens(self, layout: Layout) -> int:
        """Tokens this group takes in the packed row."""
        own = sum(len(c) - 1 for c in self.completions)
        copies = max(1, len(self.completions)) if layout == "varlen" else 1
        return copies * len(self.prompt.ids) + own


@dataclass(frozen=True)
class Segments:
    """Who attends to whom. Segment i's queries are the rows ``[start, start + length)``; its keys are the rows
    ``[prefix_start, prefix_start + prefix_length)`` followed by its own rows, causal from the bottom right."""

    start: tuple[int, ...]
    length: tuple[int, ...]
    prefix_start: tuple[int, ...]
    prefix_length: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    ids: Tensor  # [T] int64
    positions: Tensor  # [4, 1, T] int64: text row, then temporal, height, width
    rows: Tensor  # [N] int64: the row of the hidden states that predicts target n
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int32, on the CPU: completion s owns the targets cu_seqlens[s] .. cu_seqlens[s + 1]
    segments: Segments
    image_rows: Tensor  # [M] int64: rows that take an image feature
    image_index: Tensor  # [M] int64: which feature, counted over the distinct images
    pixel_values: Tensor | None  # of the distinct images
    grids: Tensor  # [distinct images, 3] int64

    def to(self, device: torch.device) -> PackedBatch:
        """Everything but ``cu_seqlens``, of which the loss needs host integers to put whole sequences into chunks."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "cu_seqlens"}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
        return replace(self, **moved)


def pack_groups(
    groups: Sequence[Group],
    *,
    positions: PositionFn,
    image_token_id: int,
    merge_size: int = 2,
    layout: Layout = "shared",
) -> PackedBatch:
    """Lay ``groups`` into one packed row.

    ``positions`` gives a prompt's M-RoPE positions; ``merge_size`` is the vision tower's spatial merge (a grid of
    ``t * h * w`` patches becomes ``t * h * w / merge_size**2`` features). Each distinct image (by key) appears once in
    ``pixel_values``. Raises ValueError for an empty completion or where image tokens and features do not agree.
    """
    row = _Row()
    images = _Images(merge_size)
    for group in groups:
        if any(len(c) == 0 for c in group.completions):
            raise ValueError("a completion must have at least one token")
        features = images.add(group.prompt)
        slots = (group.prompt.ids == image_token_id).nonzero().flatten()
        if len(slots) != len(features):
            raise ValueError(f"the prompt has {len(slots)} image tokens, but its images give {len(features)} features")
        prompt_positions = positions(group.prompt.ids, group.prompt.grids)
        if layout == "shared" and len(group.completions) != 1:
            row.add_shared(group, prompt_positions, slots, features)
        else:
            row.add_varlen(group, prompt_positions, slots, features)
    return row.finish(images)


class _Images:
    """Distinct images in order of first appearance."""

    def __init__(self, merge_size: int):
        self.merge_area = merge_size**2
        self.start: dict[str, int] = {}  # key -> first feature
        self.pixels: list[Tensor] = []
        self.grids: list[Tensor] = []
        self.features = 0

    def add(self, prompt: PackedPrompt) -> Tensor:
        """Register the prompt's images; returns the feature index of each of its image tokens, in order."""
        index, first_patch = [], 0
        for key, grid in zip(prompt.image_keys, prompt.grids, strict=True):
            patches = int(grid.prod())
            count = patches // self.merge_area
            if key not in self.start:
                assert prompt.pixel_values is not None
                self.start[key] = self.features
                self.features += count
                self.pixels.append(prompt.pixel_values[first_patch : first_patch + patches])
                self.grids.append(grid)
            index.append(torch.arange(self.start[key], self.start[key] + count))
            first_patch += patches
        return torch.cat(index) if index else torch.empty(0, dtype=torch.long)


class _Row:
    """The packed row under construction."""

    def __init__(self) -> None:
        self.length = 0
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.lengths: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.image_rows: list[Tensor] = []
        self.image_index: list[Tensor] = []

    def _append(self, ids: Tensor, positions: Tensor) -> int:
        start = self.length
        self.ids.append(ids)
        self.positions.append(positions)
        self.length += len(ids)
        return start

    def _append_prompt(self, group: Group, positions: Tensor, slots: Tensor, features: Tensor) -> int:
        start = self._append(group.prompt.ids, positions)
        self.image_rows.append(slots + start)
        self.image_index.append(features)
        return start

    def _append_completion(self, completion: Tensor, last_prompt_row: int, next_position: int) -> int:
        """Rows of all but the completion's last token; its targets are predicted by the row before each."""
        own = len(completion) - 1
        start = self._append(completion[:-1], next_position + torch.arange(own).expand(3, -1))
        self.rows.append(torch.cat([torch.tensor([last_prompt_row]), torch.arange(start, start + own)]))
        self.targets.append(completion)
        self.lengths.append(len(completion))
        return start

    def add_shared(self, group: Group, positions: Tensor, slots: Tensor, features: Tensor) -> None:
        size = len(group.prompt.ids)
        prompt = self._append_prompt(group, positions, slots, features)
        self.segments.append((prompt, size, 0, 0))
        for completion in group.completions:
            start = self._append_completion(completion, prompt + size - 1, int(positions.max()) + 1)
            if len(completion) > 1:
                self.segments.append((start, len(completion) - 1, prompt, size))

    def add_varlen(self, group: Group, positions: Tensor, slots: Tensor, features: Tensor) -> None:
        size = len(group.prompt.ids)
        for completion in group.completions:
            prompt = self._append_prompt(group, positions, slots, features)
            self._append_completion(completion, prompt + size - 1, int(positions.max()) + 1)
            self.segments.append((prompt, size + len(completion) - 1, 0, 0))
        if not group.completions:
            prompt = self._append_prompt(group, positions, slots, features)
            self.segments.append((prompt, size, 0, 0))

    def finish(self, images: _Images) -> PackedBatch:
        def cat(parts: list[Tensor], dim: int = 0) -> Tensor:
            return torch.cat(parts, dim) if parts else torch.empty(0, dtype=torch.long)

        mrope = cat(self.positions, 1)  # [3, T]
        lengths = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return PackedBatch(
            ids=cat(self.ids),
            positions=torch.cat([mrope[:1], mrope])[:, None],
            rows=cat(self.rows),
            targets=cat(self.targets),
            cu_seqlens=lengths.cumsum(0, dtype=torch.int32),
            segments=Segments(*map(tuple, zip(*self.segments, strict=True))),
            image_rows=cat(self.image_rows),
            image_index=cat(self.image_index),
            pixel_values=torch.cat(images.pixels) if images.pixels else None,
            grids=torch.stack(images.grids) if images.grids else torch.empty(0, 3, dtype=torch.long),
        )


def split_groups(groups: Sequence[Group], budget: int, layout: Layout = "shared") -> list[list[tuple[int, list[int]]]]:
    """Micro-batches of at most ``budget`` packed tokens each, in order, deterministic.

    Returns, per micro-batch, the parts ``(group index, indices of its completions)``. A group is split only where it
    exceeds the budget by itself: then by completions, the prompt repeated; a single completion that exceeds the budget
    makes a micro-batch of its own.
    """
    batches: list[list[tuple[int, list[int]]]] = []
    room = 0
    for g, group in enumerate(groups):
        for part in _parts(group, budget, layout):
            size = Group(group.prompt, [group.completions[i] for i in part]).tokens(layout)
            if not batches or size > room:
                batches.append([])
                room = budget
            batches[-1].append((g, part))
            room -= size
    return batches


def _parts(group: Group, budget: int, layout: Layout) -> list[list[int]]:
    everything = list(range(len(group.completions)))
    if group.tokens(layout) <= budget or len(everything) <= 1:
        return [everything]
    parts: list[list[int]] = []
    for i in everything:
        last = [*parts[-1], i] if parts else []
        if last and Group(group.prompt, [group.completions[j] for j in last]).tokens(layout) <= budget:
            parts[-1] = last
        else:
            parts.append([i])
    return parts
