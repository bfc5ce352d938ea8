"""The cost model against what torch counts, and against attention counted pair by pair."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.vision_utils import get_vision_window_index

from revisual_fast import PolicyObjective, TokenBatch, linear_policy_loss
from revisual_fast.packing import Group, Segments
from revisual_fast.packing.cost import (
    CostModel,
    ModelShape,
    VisionShape,
    attention_flops,
    head_flops,
    text_flops,
    vision_attention_flops,
    vision_linear_flops,
)
from revisual_fast.policy.families.shapes import model_shape
from revisual_fast.policy.model import Policy
from tests.groups import blank_groups, make_groups
from tests.models import TEXT, VISION, tiny, tiny_config

SHAPES = [(9, [(1, 4, 6)], [5, 3, 1]), (7, [], [4, 6]), (8, [(1, 12, 10), (1, 2, 2)], [2])]
GRIDS = [(1, 4, 6), (1, 12, 10), (1, 2, 2), (2, 8, 14)]
LAYOUTS = ("shared", "varlen", "padded")
TOWER = VisionShape(16, 4, 24, 2, 12, 2, 20, window=8, full_blocks=1, gated=True, rms_norm=True)
SMALL = ModelShape(8, 2, 12, 4, 2, 6, 50, vision=TOWER)


def products(run) -> int:
    """FLOPs of the matrix products and convolutions that ``run()`` makes; attention left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(counts.get(op, 0) for op in ("mm", "addmm", "convolution", "convolution_backward"))


def pairs_of(segments: Segments) -> int:
    """Queries and keys that see each other, counted in a [T, T] matrix."""
    sees = torch.zeros(sum(segments.length), sum(segments.length), dtype=torch.bool)
    for s, n, p, k in zip(segments.start, segments.length, segments.prefix_start, segments.prefix_length, strict=True):
        sees[s : s + n, p : p + k] = True
        sees[s : s + n, s : s + n] = torch.ones(n, n).tril().bool()
    return int(sees.sum())


def tower_pairs(config, grid) -> int:
    """Patches that see each other in all blocks, from the windows that transformers cuts."""
    t, h, w = grid
    frame = t * (h * w) ** 2
    if config.vision_config.model_type != "qwen2_5_vl_vision":
        return config.vision_config.depth * frame
    vision = config.vision_config
    _, bounds = get_vision_window_index(torch.tensor([grid]), 2, vision.window_size, vision.patch_size)
    windows = int((bounds.diff() ** 2).sum())
    full = len([i for i in vision.fullatt_block_indexes if i < vision.depth])
    return full * frame + (vision.depth - full) * windows


@pytest.fixture(scope="module", params=[*TEXT, *VISION])
def policy(request) -> Policy:
    policy = Policy(tiny(request.param))
    policy.model.train()
    return policy


def groups_of(policy: Policy) -> list[Group]:
    images = policy.family.visual is not None
    return make_groups(policy.family, [(text, grids if images else [], own) for text, grids, own in SHAPES])


@torch.no_grad()
def test_a_forward_has_the_products_that_torch_counts(policy):
    shape = model_shape(policy.base.config)
    batch = policy.pack(groups_of(policy))
    embeddings = torch.randn(1, len(batch.ids), shape.hidden)
    forward = products(lambda: policy.family.run_text(embeddings, batch.positions, policy.plan(batch)))
    assert forward == text_flops(shape, len(batch.ids))
    assert products(lambda: policy.logits(torch.randn(7, shape.hidden))) == head_flops(shape, 7)
    assert (shape.vision is None) == (policy.family.visual is None)
    for grid in GRIDS if shape.vision else []:
        pixels = torch.randn(grid[0] * grid[1] * grid[2], shape.vision.patch_inputs)
        counted = products(lambda g=grid, x=pixels: policy.family.encode_images(x, torch.tensor([g])))
        assert counted == vision_linear_flops(shape.vision, grid)
        pairs = tower_pairs(policy.base.config, grid)
        assert vision_attention_flops(shape.vision, grid) == 4 * shape.vision.hidden * pairs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_training_pass_has_the_products_that_torch_counts(policy, layout, checkpointing):
    """Exactly; attention, of which torch counts whole rectangles, by its pairs."""
    groups, shape = groups_of(policy), model_shape(policy.base.config)
    batch = policy.pack(groups, layout)
    tokens = TokenBatch(torch.ones(len(batch.targets)), cu_seqlens=batch.cu_seqlens)

    def step() -> None:
        hidden = policy.hidden(batch)
        linear_policy_loss(hidden, policy.head_weight, batch.targets, tokens, PolicyObjective()).loss.backward()

    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    counted = products(step)
    policy.model.gradient_checkpointing_disable()
    policy.model.zero_grad()
    attention = 4 * shape.layers * shape.heads * shape.head_dim * pairs_of(batch.segments)
    for grid in batch.grids.tolist():
        attention += 4 * shape.vision.hidden * tower_pairs(policy.base.config, grid)
    expected = counted + 7 * attention // 2 + checkpointing * attention
    model = CostModel(shape, checkpointing=checkpointing)
    assert sum(model.flops(group, layout) for group in groups) == expected


@settings(deadline=None)
@given(prompt=st.integers(1, 20), own=st.lists(st.integers(1, 12), max_size=5), layout=st.sampled_from(LAYOUTS))
def test_attention_is_counted_pair_by_pair(prompt, own, layout):
    from revisual_fast.packing import pack_groups

    (group,) = blank_groups([(prompt, own)])
    batch = pack_groups(
        [group.prompt],
        [group.completions],
        positions=lambda ids, grids: torch.arange(len(ids)).expand(3, -1),
        image_token_id=None,
        layout=layout,
    )
    free = replace(SMALL, hidden=0, vocab=0, vision=None)  # only attention costs anything
    flops = CostModel(free, gradient=False).flops(group, layout)
    assert flops == 4 * free.layers * free.heads * free.head_dim * pairs_of(batch.segments)


def test_a_segment_sees_its_prefix_and_itself():
    assert attention_flops(SMALL, 3, 10) == 4 * 2 * 4 * 6 * (3 * 10 + 1 + 2 + 3)


def image_group(keys: str) -> Group:
    (group,) = blank_groups([(30, [4, 7])])
    group.prompt.image_keys = tuple(keys)
    group.prompt.grids = torch.tensor([[1, 6, 10]] * len(keys))
    return group


def test_an_image_counts_once_and_only_where_its_tower_runs():
    plain, one, twice, two = (image_group(keys) for keys in ("", "a", "aa", "ab"))
    grid = (1, 6, 10)
    forward = vision_linear_flops(TOWER, grid) + vision_attention_flops(TOWER, grid)

    def images(group: Group, **options) -> int:
        model = CostModel(SMALL, **options)
        assert len({model.flops(group, layout) - model.flops(plain, layout) for layout in LAYOUTS}) == 1
        return model.flops(group) - model.flops(plain)

    assert images(two) == 2 * images(one) == 2 * images(twice)
    assert images(one) > 3 * forward - 2 * 60 * 12 * 16
    assert images(one, vision_cached=True) == images(one), "a tower that changes cannot be cached"
    assert images(one, vision_trained=False) == images(one, gradient=False) == forward
    assert images(one, vision_trained=False, vision_cached=True) == 0


def test_what_is_frozen_costs_less():
    (group,) = blank_groups([(30, [4, 7])])
    rows, head = group.tokens("shared"), head_flops(SMALL, 11)
    full = CostModel(SMALL).flops(group)
    assert full - CostModel(SMALL, head_trained=False).flops(group) == head
    assert full - CostModel(SMALL, text_trained=False).flops(group) == text_flops(SMALL, rows)
    assert CostModel(SMALL, gradient=False, checkpointing=True).flops(group) < full / 3 + 1


def test_images_without_a_tower_are_refused():
    with pytest.raises(ValueError, match="no vision tower"):
        CostModel(replace(SMALL, vision=None)).flops(image_group("a"))


def test_shapes_are_read_from_configurations():
    shape = model_shape(tiny_config("qwen3"))
    assert (shape.head_dim, shape.qk_norm, shape.vision) == (32, True, None)
    assert not model_shape(tiny_config("qwen2")).qk_norm
    vision = model_shape(tiny_config("qwen2_vl")).vision
    assert (vision.hidden, vision.intermediate, vision.out, vision.window) == (32, 128, 64, 0)
    assert model_shape(tiny_config("qwen3_vl")).vision.deepstack == 2
    config = tiny_config("qwen2_5_vl")
    assert (model_shape(config).vision.window, model_shape(config).vision.full_blocks) == (4, 1)
    config.vision_config.fullatt_block_indexes = [1, 7, 15]
    assert model_shape(config).vision.full_blocks == 1, "blocks that a cut in depth has taken away"


def test_an_unknown_model_type_is_refused():
    config = tiny_config("llama")
    config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match=r"gpt_neox.*known: llama"):
        model_shape(config)
