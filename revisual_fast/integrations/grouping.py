"""From a padded batch, as other trainers hold it, to groups for the packer, and from packed values back to it.

``B`` rows of a prompt, padded on the left, and a completion, padded on the right; ``P`` and ``C`` columns. Rows with
the same prompt and the same images become one group, wherever they stand in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from revisual_fast.packing import Group, Prompt

__all__ = ["GroupedRows", "Images", "content_hashes", "group_rows", "scatter"]


@dataclass(frozen=True)
class Images:
    """The images of all rows, one row after the other."""

    pixel_values: Tensor  # [patches, C], all images' patches end to end
    grids: Tensor  # [I, 3] int64: time, height, width in patches
    per_row: Sequence[int]  # [B]: how many images each row has


@dataclass(frozen=True)
class GroupedRows:
    """Groups and, for each of their completions in order, where it stood."""

    groups: list[Group]
    rows: list[list[int]]  # of each group: the row of each of its completions
    shape: tuple[int, int]  # (B, C)
    mask: Tensor  # [B, C] bool, on the host: the tokens of completions

    def index(self, rows: Sequence[int]) -> Tensor:
        """[N] int64, on the host: the places in a flat ``[B, C]`` of the tokens of ``rows``, in their order."""
        places = [r * self.shape[1] + self.mask[r].nonzero().flatten() for r in rows]
        return torch.cat(places) if places else torch.empty(0, dtype=torch.long)


def scatter(values: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """values [N] in the ``places`` [N] int64 of a flat ``shape``, 0 elsewhere. Differentiable."""
    return values.new_zeros(prod(shape)).scatter(0, places, values).view(*shape)


def group_rows(
    input_ids: Tensor,  # [B, P + C] int64
    attention_mask: Tensor,  # [B, P + C]: 0 = padding
    completion_length: int,  # C
    images: Images | None = None,
) -> GroupedRows:
    """Group the rows of a padded batch by prompt and images, in the order of first appearance.

    A row whose completion has no token (masked as truncated) is in no group. One copy to the host, and with images a
    second one. Raises ValueError for a row without a prompt, and where images and ``per_row`` do not agree.
    """
    ids, real = torch.stack((input_ids, attention_mask.to(input_ids.dtype))).cpu()
    real = real.bool()
    split = ids.shape[1] - completion_length
    mask = real[:, split:]
    members: dict[tuple[bytes, tuple[str, ...]], list[int]] = {}
    prompts: dict[tuple[bytes, tuple[str, ...]], Prompt] = {}
    for row, (tokens, own) in enumerate(zip(ids[:, :split], _images(images, len(ids)), strict=True)):
        prompt_ids = tokens[real[row, :split]]
        if len(prompt_ids) == 0:
            raise ValueError(f"row {row} has no prompt: attention_mask is 0 in all of its first {split} columns")
        if not mask[row].any():
            continue
        key = (prompt_ids.numpy().tobytes(), own.image_keys)
        if key not in prompts:
            prompts[key] = Prompt(prompt_ids, own.pixel_values, own.grids, own.image_keys)
        members.setdefault(key, []).append(row)
    groups = [Group(prompts[k], [ids[r, split:][mask[r]] for r in rows]) for k, rows in members.items()]
    return GroupedRows(groups, list(members.values()), (len(ids), completion_length), mask)


def _images(images: Images | None, n_rows: int) -> Iterator[Prompt]:
    """The images of each row, as a prompt without ids."""
    nothing = torch.empty(0, dtype=torch.long)
    if images is None:
        yield from (Prompt(nothing) for _ in range(n_rows))
        return
    grids = images.grids.cpu()
    patches = grids.prod(1).tolist()
    if len(images.per_row) != n_rows or sum(images.per_row) != len(grids) or sum(patches) != len(images.pixel_values):
        raise ValueError(
            f"images do not agree: {len(images.per_row)} rows with {sum(images.per_row)} images, {len(grids)} grids of "
            f"{sum(patches)} patches, {len(images.pixel_values)} patches in pixel_values; one count for each of "
            f"{n_rows} rows"
        )
    parts = images.pixel_values.split(patches)
    keys = [f"{g.tolist()}:{h}" for g, h in zip(grids, content_hashes(parts), strict=True)]
    for end, count in zip(accumulate(images.per_row), images.per_row, strict=True):
        own = slice(end - count, end)
        pixels = images.pixel_values[sum(patches[: end - count]) : sum(patches[:end])] if count else None
        yield Prompt(nothing, pixels, grids[own], tuple(keys[own]))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LINE = 4096


def content_hashes(parts: Sequence[Tensor]) -> list[str]:
    """A name for the content of each tensor, computed where it lies; equal for equal dtype, bits and order.

    Two sums of the elements' bits times odd numbers that are drawn once, modulo 2**64 (multilinear hashing,
    arXiv 1202.4961): whole numbers, so no order of addition changes them. One copy to the host for all of ``parts``.
    """
    if not parts:
        return []
    return [f"{a & _WORD:016x}{b & _WORD:016x}" for a, b in torch.stack([_hash(part) for part in parts]).tolist()]


_WORD = 2**64 - 1


def _hash(part: Tensor) -> Tensor:
    """[2] int64. Lines first, then their sums, so that a few thousand factors serve an image of any size."""
    bits = part.detach().contiguous().flatten().view(_BITS[part.element_size()]).to(torch.int64)
    lines = torch.nn.functional.pad(bits, (0, -len(bits) % _LINE)).view(-1, _LINE)
    columns, rows = _factors(_LINE, 2, bits.device), _factors(len(lines), 3, bits.device)
    return torch.stack([((lines * columns[i]).sum(1) * rows[i]).sum() for i in range(2)])


@lru_cache(16)
def _factors(n: int, seed: int, device: torch.device) -> Tensor:
    """[2, n] odd int64, the same in every process."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randint(-(2**62), 2**62, (2, max(n, 1)), generator=rng) * 2 + 1).to(device, non_blocking=True)
