"""What the families with a vision tower share: M-RoPE positions, and a tower that is told what it would compute.

Its patches are embedded by a convolution whose stride is as wide as its kernel. That is a product of matrices, for
which libraries are several times quicker.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from revisual_fast.policy.families import vision
from revisual_fast.policy.families.base import Family

__all__ = ["VisionLanguage"]


class VisionLanguage(Family):
    """A model whose image tokens take features of a vision tower. The tower's attention becomes :mod:`.vision`'s."""

    loader = AutoModelForImageTextToText

    def __init__(self, model: Any):
        super().__init__(model)
        self.image_token_id: int = model.config.image_token_id
        self.merge_size = model.config.vision_config.spatial_merge_size
        self.tower_inputs = self._tower_inputs(model.config.vision_config)
        self.visual.config._attn_implementation = vision.NAME
        self.visual.patch_embed.forward = partial(_embed_patches, self.visual)

    def _tower_inputs(self, config: Any) -> vision.TowerInputs:
        """What this family's tower takes besides the pixels; ``config`` is the vision config."""
        return vision.TowerInputs(config.spatial_merge_size)

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    def attentions(self) -> list[Any]:
        return [*super().attentions(), *(block.attn for block in self.visual.blocks)]

    def _tower(self, pixel_values: Tensor, grids: Tensor) -> Any:
        """The tower's output: pixel_values [patches, C], grids [I, 3] on the CPU."""
        tower = self.visual
        return tower(pixel_values.to(tower.dtype), grid_thw=grids, **self.tower_inputs(grids, pixel_values.device))

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        return self._tower(pixel_values, grids).pooler_output

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE positions of a prompt with images: ids [P], grids [I, 3] -> [3, P] int64.

        Text counts on in all three axes; an image of a grid (t, h, w) spans t, h / merge, w / merge from the next free
        position, and the text after it goes on at the largest position + 1 (Qwen2-VL, arXiv 2409.12191, section 2.1).
        """
        slots = (ids == self.image_token_id).nonzero().flatten().tolist()
        parts: list[Tensor] = []
        row = used = position = 0  # rows, image tokens and positions so far
        for t, h, w in grids.tolist():
            t, h, w = t, h // self.merge_size, w // self.merge_size
            text = slots[used] - row
            parts.append((torch.arange(text) + position).expand(3, -1))
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + position + text)
            row, used, position = row + text + t * h * w, used + t * h * w, position + text + max(t, h, w)
        parts.append((torch.arange(len(ids) - row) + position).expand(3, -1))
        return torch.cat(parts, 1)


def _embed_patches(tower: Any, pixel_values: Tensor) -> Tensor:
    """[patches, C] -> [patches, D]; by the module's own forward where there is more to it, such as an adapter, and
    where somebody has the tower do as transformers does."""
    embed, proj = tower.patch_embed, tower.patch_embed.proj
    hooks = (proj._forward_hooks, proj._forward_pre_hooks, proj._backward_hooks, proj._backward_pre_hooks)
    if type(proj) is not nn.Conv3d or any(hooks) or tower.config._attn_implementation != vision.NAME:
        return type(embed).forward(embed, pixel_values)
    return F.linear(pixel_values.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
