"""Qwen2.5-VL: most layers of its vision tower attend within windows, and the tower has RMSNorms and SwiGLU MLPs too."""

from __future__ import annotations

from typing import Any

from revisual_fast.policy.families.vision import TowerInputs
from revisual_fast.policy.families.vision_language import VisionLanguage

__all__ = ["Qwen2_5VL"]


class Qwen2_5VL(VisionLanguage):
    """``Qwen2_5_VLForConditionalGeneration``."""

    def _tower_inputs(self, config: Any) -> TowerInputs:
        return TowerInputs(config.spatial_merge_size, window=config.window_size, patch=config.patch_size)

    def _mlps(self) -> list[Any]:
        return [*super()._mlps(), *(block.mlp for block in self.visual.blocks)]
