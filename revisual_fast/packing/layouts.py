"""From groups to one packed row, in each of the three layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revisual_fast.packing.batch import Group, Layout, PackedBatch, Prompt, Segments, check_layout

__all__ = ["PositionFn", "pack_groups"]

PositionFn = Callable[[Tensor, Tensor], Tensor]
"""(prompt ids [P], image grids [I, 3]) -> positions [3, P]."""


def pack_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    *,
    positions: PositionFn,
    image_token_id: int | None,
    merge_size: int = 2,
    layout: Layout = "shared",
) -> PackedBatch:
    """Lay ``prompts`` and the ``completions`` of each (``[C] int64``, perhaps none) into one packed row, on the CPU.

    ``positions`` gives a prompt's M-RoPE positions; ``merge_size`` is the vision tower's spatial merge (a grid of
    ``t * h * w`` patches becomes ``t * h * w / merge_size**2`` features); ``image_token_id`` is None for a model that
    sees no images. Each distinct image (by key) appears once. Raises ValueError where there is no prompt, for an empty
    prompt or completion, for one key with two grids, and where image tokens and features do not agree.
    """
    check_layout(layout)
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts come with the completions of {len(completions)}")
    if not prompts:
        raise ValueError("there is nothing to pack: a rank's empty micro-batch has no forward pass")
    row, images = _Row(), _Images(merge_size)
    groups = [Group(p, c) for p, c in zip(prompts, completions, strict=True)]
    width = max((g.tokens("padded") // max(1, len(g.completions)) for g in groups), default=0)
    for group in groups:
        size = len(group.prompt.ids)
        if size == 0 or any(len(c) == 0 for c in group.completions):
            raise ValueError("a prompt and a completion must have at least one token each")
        features = images.add(group.prompt)
        slots = (group.prompt.ids == (-1 if image_token_id is None else image_token_id)).nonzero().flatten()
        if len(slots) != len(features):
            raise ValueError(f"the prompt has {len(slots)} image tokens, but its images give {len(features)} features")
        prompt = _Prompt(group.prompt.ids, positions(group.prompt.ids, group.prompt.grids), slots, features)
        if layout == "shared" and len(group.completions) != 1:
            row.add_shared(prompt, group.completions)
        else:
            row.add_copies(prompt, group.completions, width if layout == "padded" else 0)
    return row.finish(images)


class _Images:
    """Distinct images in order of first appearance."""

    def __init__(self, merge_size: int):
        self.merge_area = merge_size**2
        self.start: dict[str, int] = {}  # key -> first feature
        self.grids: dict[str, Tensor] = {}
        self.pixels: list[Tensor] = []
        self.features = 0

    def add(self, prompt: Prompt) -> Tensor:
        """Register the prompt's images; returns the feature index of each of its image tokens, in order."""
        given = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
        needed = int(prompt.grids.prod(1).sum())
        if given != needed or len(prompt.grids) != len(prompt.image_keys):
            images = f"{len(prompt.image_keys)} image keys, {len(prompt.grids)} grids of {needed} patches"
            raise ValueError(f"the prompt's images do not agree: {images}, {given} patches in pixel_values")
        index, first_patch = [], 0
        for key, grid in zip(prompt.image_keys, prompt.grids, strict=True):
            patches = int(grid.prod())
            count = patches // self.merge_area
            if key not in self.start:
                assert prompt.pixel_values is not None
                self.start[key] = self.features
                self.features += count
                self.pixels.append(prompt.pixel_values[first_patch : first_patch + patches])
                self.grids[key] = grid
            elif not torch.equal(self.grids[key], grid):
                both = f"{self.grids[key].tolist()} and {grid.tolist()}"
                raise ValueError(f"image {key} comes with two grids, {both}: give another size another key")
            index.append(torch.arange(self.start[key], self.start[key] + count))
            first_patch += patches
        return torch.cat(index) if index else torch.empty(0, dtype=torch.long)


class _Prompt:
    """A prompt with what every copy of it needs."""

    def __init__(self, ids: Tensor, positions: Tensor, slots: Tensor, features: Tensor):
        self.ids, self.positions, self.slots, self.features = ids, positions, slots, features
        self.next_position = int(positions.max()) + 1


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

    def add_shared(self, prompt: _Prompt, completions: Sequence[Tensor]) -> None:
        start, size = self._append_prompt(prompt), len(prompt.ids)
        self.segments.append((start, size, 0, 0))
        for completion in completions:
            own = self._append_completion(completion, start + size - 1, prompt.next_position)
            if len(completion) > 1:
                self.segments.append((own, len(completion) - 1, start, size))

    def add_copies(self, prompt: _Prompt, completions: Sequence[Tensor], width: int) -> None:
        """The prompt again in front of every completion, each copy padded to ``width`` rows."""
        for i in range(max(1, len(completions))):
            start = self._append_prompt(prompt)
            if completions:
                self._append_completion(completions[i], self.length - 1, prompt.next_position)
            self.segments.append((start, self.length - start, 0, 0))
            padding = width - (self.length - start)
            if padding > 0:  # sees itself only
                zeros = torch.zeros(3, padding, dtype=torch.long)
                self.segments.append((self._append(zeros[0], zeros), padding, 0, 0))

    def _append(self, ids: Tensor, positions: Tensor) -> int:
        start = self.length
        self.ids.append(ids)
        self.positions.append(positions)
        self.length += len(ids)
        return start

    def _append_prompt(self, prompt: _Prompt) -> int:
        start = self._append(prompt.ids, prompt.positions)
        self.image_rows.append(prompt.slots + start)
        self.image_index.append(prompt.features)
        return start

    def _append_completion(self, completion: Tensor, last_prompt_row: int, next_position: int) -> int:
        """Rows of all but the completion's last token; its targets are predicted by the row before each."""
        own = len(completion) - 1
        start = self._append(completion[:-1], next_position + torch.arange(own).expand(3, -1))
        self.rows.append(torch.cat([torch.tensor([last_prompt_row]), torch.arange(start, start + own)]))
        self.targets.append(completion)
        self.lengths.append(len(completion))
        return start

    def finish(self, images: _Images) -> PackedBatch:
        def cat(parts: list[Tensor], dim: int = 0) -> Tensor:
            return torch.cat(parts, dim) if parts else torch.empty(0, dtype=torch.long)

        mrope = cat(self.positions, 1)  # [3, T]
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return PackedBatch(
            ids=cat(self.ids),
            positions=torch.cat([mrope[:1], mrope])[:, None],
            rows=cat(self.rows),
            targets=cat(self.targets),
            sequence_ids=torch.arange(len(lengths)).repeat_interleave(lengths),
            cu_seqlens=torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32),
            segments=Segments(*map(tuple, zip(*self.segments, strict=True))),
            image_rows=cat(self.image_rows),
            image_index=cat(self.image_index),
            image_keys=tuple(images.start),
            pixel_values=tuple(images.pixels),
            grids=torch.stack(list(images.grids.values())) if images.grids else torch.empty(0, 3, dtype=torch.long),
        )
