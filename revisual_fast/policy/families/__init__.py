"""Model families: the only modules that name transformers' model internals."""

from __future__ import annotations

from revisual_fast.policy.families.base import Family, TextOnly
from revisual_fast.policy.families.qwen2_5_vl import Qwen2_5VL
from revisual_fast.policy.families.qwen2_vl import Qwen2VL
from revisual_fast.policy.families.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "Family", "Qwen2VL", "Qwen2_5VL", "Qwen3VL", "TextOnly", "family_for"]

FAMILIES: dict[str, type[Family]] = {
    "llama": TextOnly,
    "qwen2": TextOnly,
    "qwen2_5_vl": Qwen2_5VL,
    "qwen2_vl": Qwen2VL,
    "qwen3": TextOnly,
    "qwen3_vl": Qwen3VL,
}


def family_for(model_type: str) -> type[Family]:
    """The family of transformers' ``config.model_type``. Raises ValueError where there is none."""
    if model_type not in FAMILIES:
        why = " (a mixture of experts)" if "moe" in model_type else ""
        raise ValueError(f"model_type {model_type!r}{why} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
