"""Qwen2-VL: every layer of its vision tower attends to a whole image."""

from __future__ import annotations

from revisual_fast.policy.families.vision_language import VisionLanguage

__all__ = ["Qwen2VL"]


class Qwen2VL(VisionLanguage):
    """``Qwen2VLForConditionalGeneration``."""
