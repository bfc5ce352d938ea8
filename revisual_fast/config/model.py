"""The sections on the model: what is loaded and how prompts are written for it."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from revisual_fast.config.base import Count, Positive, PositiveFloat, Section, Share, Strings

__all__ = ["ChatConfig", "LoraConfig", "ModelConfig"]


class LoraConfig(Section):
    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Share = 0.0
    target_modules: Strings = r".*\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"  # of the text tower


class ModelConfig(Section):
    path: str | None = None
    """A directory or hub id that transformers can load; with ``init``, null is ``run.dir``/start."""
    init: Literal["tiny-vl", "smollm2-vl"] | None = None
    """Build this model there if nothing is there yet; new weights are drawn with ``run.seed``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    gradient_checkpointing: bool = False
    liger_kernels: Literal["auto"] | bool = "auto"
    """RMSNorm, SwiGLU and RoPE by liger-kernel; auto: where it is installed and the device is CUDA."""
    attention: Literal["auto", "flash", "varlen", "triton", "sdpa"] = "auto"
    """Attention over packed rows (docs/packing.md); auto: flash-attn's or torch's varlen kernel if it runs, or SDPA."""
    vision_cache_mib: Count = 2048
    """Image features of a frozen vision tower are kept up to this size, on the model's device; 0: none."""
    lora: LoraConfig | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    trust_remote_code: Literal[False] = False

    @model_validator(mode="after")
    def _start(self) -> ModelConfig:
        if not self.path and self.init is None:
            raise ValueError("give path (a directory or hub id), init (tiny-vl, smollm2-vl) or both")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} must be at most max_pixels {self.max_pixels}")
        return self


class ChatConfig(Section):
    system: str | None = None
    """System prompt put before every prompt."""
    prefix: str = ""
    """Text before every prompt."""
    suffix: str = ""
    """Text after every prompt."""
