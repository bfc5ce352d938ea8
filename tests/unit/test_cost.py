"""The cost model against what torch counts, and against attention counted pair by pair."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.vision_utils import get_vision_window_index

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.packing import Group
from revisual_fast.packing.cost import (
    CostModel,
    ModelShape,
    VisionShape,
    attention_flops,
    head_flops,
    text_flops,
    vision_attention_flops,
    vision_flops,
    vision_linear_flops,
)
from revisual_fast.policy.families.shapes import model_shape
from revisual_fast.policy.model import Policy
from tests.groups import make_groups
from tests.models import TEXT, VISION, tiny

SHAPES = [(9, [(1, 4, 6)], [5, 3, 1]), (7, [], [4, 6])]
IMAGES = [(1, 4, 6), (1, 12, 10)]
PRODUCTS = ("mm", "addmm", "convolution", "convolution_backward")


def products(run) -> int:
    """FLOPs of the matrix products and convolutions that ``run()`` makes; attention left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op).split(".")[-1] in PRODUCTS)


def without_attention(shape: ModelShape) -> ModelShape:
    """A model whose attention costs nothing, and everything else what it did."""
    return replace(shape, vision=shape.vision and replace(shape.vision, depth=shape.vision.depth))


@pytest.fixture(scope="module", params=[*TEXT, *VISION])
def policy(request) -> Policy:
    return Policy(tiny(request.param))


def groups_of(policy: Policy) -> list[Group]:
    config = policy.base.config
    shapes = [(text, grids if policy.family.visual is not None else [], own) for text, grids, own in SHAPES]
    return make_groups(policy.family, shapes)


@torch.no_grad()
def test_a_forward_has_the_flops_that_torch_counts(policy):
    shape = model_shape(policy.base.config)
    batch = policy.pack(groups_of(policy))
    features = policy.image_features(batch)
    embeddings = policy.embed(batch, features if not policy.family.deepstack else None if features is None else features[:, :64].contiguous())
    assert products(lambda: policy.family.run_text(embeddings, batch.positions, policy.plan(batch))) == text_flops(
        shape, len(batch.ids)
    )
    hidden = torch.randn(7, shape.hidden)
    assert products(lambda: policy.logits(hidden)) == head_flops(shape, 7)


@torch.no_grad()
def test_the_vision_tower_has_the_flops_that_torch_counts(policy):
    shape = model_shape(policy.base.config).vision
    assert (shape is None) == (policy.family.visual is None)
    if shape is not None:
        for grid in IMAGES:
            pixels = torch.randn(grid[1] * grid[2], shape.patch_inputs)
            counted = products(lambda g=grid, p=pixels: policy.family.encode_images(p, torch.tensor([g])))
            assert counted == vision_linear_flops(shape, grid)
