"""Qwen3-VL: its first text layers take image features of their own (deepstack, arXiv 2406.04334)."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from revisual_fast.policy.families.vision import TowerInputs
from revisual_fast.policy.families.vision_language import VisionLanguage

__all__ = ["Qwen3VL"]


class Qwen3VL(VisionLanguage):
    """``Qwen3VLForConditionalGeneration``."""

    def __init__(self, model: Any):
        super().__init__(model)
        assert self.shape.vision is not None
        self.deepstack = self.shape.vision.deepstack
        self.text._deepstack_process = MethodType(_add_features, self.text)

    def _tower_inputs(self, config: Any) -> TowerInputs:
        return TowerInputs(config.spatial_merge_size, table_side=int(config.num_position_embeddings**0.5))

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        output = self._tower(pixel_values, grids)
        return torch.cat([output.pooler_output, *output.deepstack_features], 1)

    def run_text(
        self, embeddings: Tensor, positions: Tensor, plan: Any, deepstack: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        if deepstack is None:
            return self._run(embeddings, positions, plan)
        rows, features = deepstack
        return self._run(
            embeddings, positions, plan, visual_pos_masks=rows, deepstack_visual_embeds=list(features.unbind(1))
        )


def _add_features(text: Any, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """hidden [1, T, D] plus features [M', D] in the rows ``where`` [M'] int64.

    transformers' own method takes a mask, and indexing with a mask waits for a CUDA device in every layer; it still
    gets the masks that the model's own forward gives it.
    """
    if where.dtype == torch.bool:
        return type(text)._deepstack_process(text, hidden, where, features)
    return hidden.index_add(1, where, features[None].to(hidden.dtype))
