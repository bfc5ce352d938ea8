"""The estimate of activation memory against the storages that are alive during a training pass on the CPU."""

from unittest import mock

import pytest
import torch

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.kernels.plan import CHUNK_BYTES
from revisual_fast.packing import Group, PackedBatch
from revisual_fast.packing.cost import ModelShape
from revisual_fast.packing.memory import Activations, activation_bytes
from revisual_fast.policy.families.shapes import model_shape
from revisual_fast.policy.model import Policy
from tests import models
from tests.groups import make_groups
from tests.memory import LiveStorages

DECODER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
TOWER = {"hidden_size": 192, "intermediate_size": 400, "out_hidden_size": 256}
GRIDS = [(1, 16, 16), (1, 12, 20)]


def medium(model_type: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A model of that family, so large that nothing constant matters."""
    with mock.patch.dict(models.DECODER, DECODER, vocab_size=1024), mock.patch.dict(models.TOWER, depth=4):
        config = models.tiny_config(model_type)
    if hasattr(config, "vision_config"):
        tower = {"embed_dim": 192, "hidden_size": 256} if model_type == "qwen2_vl" else TOWER
        for name, size in tower.items():
            setattr(config.vision_config, name, size)
        config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    if model_type == "qwen3_vl":
        config.text_config.head_dim = 32
    policy = Policy(models.build(config, std=0.05).to(dtype))
    policy.model.train()
    return policy


def batch_of(policy: Policy, images: bool) -> PackedBatch:
    shapes = [(150, [grid] if images else [], [90, 60, 70, 110]) for grid in GRIDS]
    return policy.pack(make_groups(policy.family, shapes))


def train(policy: Policy, batch: PackedBatch) -> int:
    """A forward and backward pass; returns the bytes at its peak, weights and their gradients left out."""
    parameters = list(policy.model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    tokens = TokenBatch(torch.ones(len(batch.targets)), cu_seqlens=batch.cu_seqlens)
    with LiveStorages([*parameters, *gradients, *policy.model.buffers()]) as live:
        out = linear_policy_loss(
            policy.hidden(batch), policy.head_weight, batch.targets, tokens, PolicyObjective(), bias=policy.head_bias
        )
        out.loss.backward()
    return live.peak


def estimate(policy: Policy, batch: PackedBatch, checkpointing: bool) -> int:
    activations = activation_bytes(
        model_shape(policy.base.config),
        dtype_bytes=policy.head_weight.dtype.itemsize,
        checkpointing=checkpointing,
        attention="sdpa",
        vision_trained=policy.vision_trained,
        chunk_bytes=CHUNK_BYTES["cpu"],
    )
    buckets = policy.plan(batch).buckets
    gathered = {
        "queries": sum(len(b.query_index) for b in buckets),
        "keys": sum(len(b.keys.index) for b in buckets),
    }
    patches = int(batch.grids.prod(1).sum())
    return activations.peak(len(batch.ids), len(batch.targets), patches, **gathered)
