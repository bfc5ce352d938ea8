"""Groups of random prompts, images and completions, and their log-probs from the packed forward."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revisual_fast.packing import Group, Layout, Prompt
from revisual_fast.policy.model import Policy

TEXT_IDS = (20, 60)  # ids of ordinary words in the tiny model's vocabulary

Shape = tuple[int, list[tuple[int, int, int]], list[int]]
"""A group: text tokens, image grids, completion lengths."""


def make_prompt(family: Any, text: int, grids: list[tuple[int, int, int]], seed: int, keys: str = "") -> Prompt:
    """``text`` random tokens with the images of ``grids`` between them; ``keys`` has a letter for each image."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(*TEXT_IDS, (text,), generator=rng)
    parts, pixels, names = [words[:1]], [], []
    for i, (t, h, w) in enumerate(grids):
        names.append(keys[i] if keys else f"{seed}/{i}")
        source = torch.Generator().manual_seed(zlib.crc32(names[-1].encode()))
        side = family.model.config.vision_config.patch_size
        pixels.append(torch.randn(t * h * w, 3 * 2 * side * side, generator=source))
        parts += [torch.full((t * h * w // 4,), family.image_token_id), words[1 + i : 2 + i]]
    parts.append(words[1 + len(grids) :])
    shapes = torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
    return Prompt(torch.cat(parts), torch.cat(pixels) if pixels else None, shapes, tuple(names))


def make_groups(family: Any, shapes: Sequence[Shape], seed: int = 0) -> list[Group]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Group(
            make_prompt(family, text, grids, seed + i),
            [torch.randint(*TEXT_IDS, (length,), generator=rng) for length in lengths],
        )
        for i, (text, grids, lengths) in enumerate(shapes)
    ]


def blank_groups(shapes: Sequence[tuple[int, Sequence[int]]]) -> list[Group]:
    """Groups for planning only: (prompt tokens, completion lengths) of zeros, without images."""

    def zeros(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long)

    return [Group(Prompt(zeros(p)), [zeros(c) for c in lengths]) for p, lengths in shapes]


def packed_logp(policy: Policy, groups: list[Group], layout: Layout = "shared") -> Tensor:
    batch = policy.pack(groups, layout)
    logp = policy.logits(policy.hidden(batch)).log_softmax(-1)
    return logp.gather(1, batch.targets[:, None])[:, 0]
