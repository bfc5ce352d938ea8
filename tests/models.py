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


def build(config: Any, seed: int = 0) -> Any:
    """The model of ``config`` in fp32, every parameter drawn at random (biases and norms as well)."""
    loader: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = loader.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
            else:
                parameter.normal_(0, 0.1, generator=rng)
    return model


def tiny(model_type: str, seed: int = 0) -> Any:
    """A model of that family with some 100 thousand parameters."""
    return build(tiny_config(model_type), seed)


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
    with as_transformers(policy) as model:
        logp = model(**inputs, use_cache=False).logits.log_softmax(-1)
    found = [logp[i, len(p.ids) - 1 : len(p.ids) - 1 + len(c)] for i, (p, c) in enumerate(pairs)]
    return torch.cat([x.gather(1, c[:, None])[:, 0] for x, (_, c) in zip(found, pairs, strict=True)])


def loss_and_gradients(policy: Policy, logp: Tensor, seed: int = 1) -> tuple[float, dict[str, Tensor]]:
    """A policy gradient's loss of ``logp`` [N], with random advantages, and the gradient of every parameter (zero where
    the loss does not depend on it)."""
    advantages = torch.randn(len(logp), generator=torch.Generator().manual_seed(seed))
    policy.model.zero_grad(set_to_none=True)
    loss = -(advantages * logp).sum() / len(logp)
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in policy.model.named_parameters()}
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
