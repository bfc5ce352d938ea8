"""Models of every family with random weights, and transformers' padded forward to compare packed rows with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)
from transformers.initialization import no_init_weights

from revisual_fast.packing import Group
from revisual_fast.policy.model import Policy

TEXT = ("llama", "qwen2", "qwen3")
VISION = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
DECODER = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOWER = {"depth": 3, "num_heads": 4, "spatial_merge_size": 2, "initializer_range": 0.1}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_config(model_type: str) -> Any:
    """A configuration of that family; the rotations differ: llama3's, yarn's, plain, in sections, interleaved."""
    text = {**DECODER, "rope_parameters": MROPE}
    if model_type == "llama":
        return LlamaConfig(**DECODER, rope_parameters=LLAMA3)
    if model_type == "qwen2":
        return Qwen2Config(**{**DECODER, "tie_word_embeddings": True}, rope_parameters=YARN)
    if model_type == "qwen3":
        return Qwen3Config(**DECODER, head_dim=32)
    if model_type == "qwen2_vl":
        tower = {**TOWER, "embed_dim": 32, "hidden_size": 64}
        return Qwen2VLConfig(text_config=text, vision_config=tower, **IDS)
    tower = {**TOWER, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    if model_type == "qwen2_5_vl":
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **IDS)
    assert model_type == "qwen3_vl"
    tower |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 36}
    return Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=tower, **IDS)


def cut_config(size: str) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL of 3B or 7B, with two text layers and two vision blocks: one with windows, one without."""
    text = {
        "3B": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 11008},
        "7B": {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944},
    }[size]
    vision = {
        **{"depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
        **{"window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": text["hidden_size"]},
    }
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": {"3B": 151936, "7B": 152064}[size],
            "num_hidden_layers": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config=vision,
        tie_word_embeddings=size == "3B",
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def build(config: Any, std: float, seed: int = 0) -> Any:
    """The model of ``config`` in fp32, every parameter drawn at random (those of norms around 1)."""
    loader: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with no_init_weights():
        model = loader.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, std, generator=rng)
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.add_(1)
    return model


def tiny(model_type: str, seed: int = 0) -> Any:
    """A model of that family with some 100 thousand parameters."""
    return build(tiny_config(model_type), 0.1, seed)


@contextmanager
def as_transformers(policy: Policy) -> Iterator[Any]:
    """The policy's own model, inside running as transformers runs it: one model for both forwards."""
    family = policy.family
    configs = [family.text.config, *([] if family.visual is None else [family.visual.config])]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "sdpa"
    yield policy.base
    for config, name in zip(configs, before, strict=True):
        config._attn_implementation = name


def padded_logp(policy: Policy, groups: Sequence[Group]) -> Tensor:
    """The same from transformers' forward: a row per completion, all padded on the right to the longest."""
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    rows = [torch.cat([p.ids, c]) for p, c in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    pixels = [p.pixel_values for p, _ in pairs if p.pixel_values is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
        inputs["image_grid_thw"] = torch.cat([p.grids for p, _ in pairs])
        inputs["mm_token_type_ids"] = (ids == policy.family.image_token_id).int()
    first = min(len(p.ids) for p, _ in pairs) - 1  # nobody needs the logits before
    with as_transformers(policy) as model:
        logp = model(**inputs, use_cache=False, logits_to_keep=ids.shape[1] - first).logits.log_softmax(-1)
    found = [logp[i, len(p.ids) - 1 - first :][: len(c)] for i, (p, c) in enumerate(pairs)]
    return torch.cat([x.gather(1, c[:, None])[:, 0] for x, (_, c) in zip(found, pairs, strict=True)])


def loss_of(logp: Tensor, seed: int = 1) -> Tensor:
    """A policy gradient's loss of ``logp`` [N], every token with an advantage of its own. All are positive, so that the
    loss is no difference of large numbers."""
    advantages = 0.5 + torch.rand(len(logp), generator=torch.Generator().manual_seed(seed))
    return -(advantages * logp).mean()


def loss_and_gradients(policy: Policy, logp: Tensor) -> tuple[float, dict[str, Tensor]]:
    """:func:`loss_of`, and the gradient of every parameter: zero where the loss does not depend on it."""
    policy.model.zero_grad(set_to_none=True)
    loss = loss_of(logp)
    loss.backward()
    named = list(policy.model.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}
    policy.model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def worst_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference of a gradient, relative to its own norm, and whose it is. A gradient of norm zero has to be
    zero in both."""
    assert got.keys() == expected.keys()
    worst = (0.0, "")
    for name, gradient in expected.items():
        norm, difference = gradient.norm().item(), (got[name] - gradient).norm().item()
        relative = difference / norm if norm else (0.0 if difference == 0 else float("inf"))
        worst = max(worst, (relative, name))
    return worst
