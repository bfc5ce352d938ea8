"""Model families: the only modules that name transformers' model internals."""

from __future__ import annotations

from revisual_fast.policy.families.qwen2_5_vl import Qwen2_5VL

__all__ = ["FAMILIES", "Qwen2_5VL", "family_for"]

FAMILIES = {"qwen2_5_vl": Qwen2_5VL}


def family_for(model_type: str) -> type[Qwen2_5VL]:
    """The family of transformers' ``config.model_type``. Raises ValueError where there is none."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
