"""The sizes of a model, read from its transformers configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from revisual_fast.packing.cost import ModelShape, VisionShape

__all__ = ["model_shape"]

QK_NORM = {"qwen3", "qwen3_vl"}
VISION = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
TEXT = {"qwen2", "qwen3", "llama"}


def model_shape(config: Any) -> ModelShape:
    """Sizes of a model with ``config`` (a transformers configuration). Raises ValueError for other model types."""
    kind = config.model_type
    if kind not in VISION | TEXT:
        raise ValueError(f"model_type {kind!r} has no known shape; known: {', '.join(sorted(VISION | TEXT))}")
    text = config.text_config if kind in VISION else config
    return ModelShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        qk_norm=kind in QK_NORM,
        vision=_vision_shape(kind, config.vision_config) if kind in VISION else None,
    )


def _vision_shape(kind: str, vision: Any) -> VisionShape:
    patch, time = _side(vision.patch_size), _side(vision.temporal_patch_size)
    first = kind == "qwen2_vl"  # there, hidden_size is the width of the features
    hidden = vision.embed_dim if first else vision.hidden_size
    windows = kind == "qwen2_5_vl"
    merge = vision.spatial_merge_size
    return VisionShape(
        hidden=hidden,
        depth=vision.depth,
        intermediate=hidden * vision.mlp_ratio if first else vision.intermediate_size,
        heads=vision.num_heads,
        patch_inputs=vision.in_channels * time * patch**2,
        merge=merge,
        out=vision.hidden_size if first else vision.out_hidden_size,
        window=vision.window_size // merge // patch * merge if windows else 0,
        full_blocks=_below(vision.depth, vision.fullatt_block_indexes) if windows else 0,
        gated=windows,
        rms_norm=windows,
        quick_gelu=vision.hidden_act == "quick_gelu",
        deepstack=_below(vision.depth, vision.deepstack_visual_indexes) if kind == "qwen3_vl" else 0,
    )


def _below(depth: int, blocks: Iterable[int]) -> int:
    """How many of these blocks there are: a configuration may have been cut in depth."""
    return len({block for block in blocks if block < depth})


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"patches that are not square: {size}")
    return size[0]
