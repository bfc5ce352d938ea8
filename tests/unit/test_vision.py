"""The vision towers with indices made once per shape and attention in few calls, against transformers' own forward."""

from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils

from revisual_fast.policy.families import vision
from revisual_fast.policy.families.vision import TowerInputs, Windows
from revisual_fast.policy.model import Policy
from tests.groups import make_groups
from tests.models import VISION, as_transformers, tiny, worst_difference

CPU = torch.device("cpu")
MIXTURES = {
    "one window": [(1, 4, 4)],
    "less than a window": [(1, 2, 2)],
    "no side a multiple of the window": [(1, 6, 10)],
    "equal images": [(1, 8, 6), (1, 8, 6), (1, 8, 6)],
    "different images": [(1, 2, 14), (1, 10, 6), (1, 8, 8), (1, 10, 6), (1, 2, 2)],
    "two frames": [(2, 4, 6), (1, 4, 6), (3, 2, 2)],
}
side = st.integers(1, 20).map(lambda n: 2 * n)
images = st.lists(st.tuples(st.integers(1, 3), side, side), min_size=1, max_size=5)


@cache
def policy_of(family: str) -> Policy:
    return Policy(tiny(family))


def pixels_of(policy: Policy, grids: torch.Tensor) -> torch.Tensor:
    width = 3 * 2 * policy.base.config.vision_config.patch_size**2
    return torch.randn(int(grids.prod(1).sum()), width, generator=torch.Generator().manual_seed(2))


# ---- indices


@settings(max_examples=60, deadline=None)
@given(mixture=images, window=st.sampled_from([28, 56, 112]))
def test_indices_are_those_of_transformers(mixture, window):
    grids = torch.tensor(mixture)
    got = TowerInputs(2, window=window, patch=14, table_side=6)(grids, CPU)
    index, bounds = vision_utils.get_vision_window_index(grids, 2, window, 14)
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grids, 6, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(got["position_ids"], vision_utils.get_vision_position_ids(grids, 2))
    assert torch.equal(got["window_index"], index)
    assert torch.equal(got["interp_indices"], taps)
    assert torch.equal(got["interp_weights"], weights)
    for name, expected in (("seqlen", vision_utils.get_vision_cu_seqlens(grids)), ("window_seqlen", bounds)):
        lengths = expected.diff()
        assert got[f"max_{name}"] == int(lengths.max())
        assert sorted(lengths.tolist()) == [n for count, n in got[f"cu_{name}s"].buckets for _ in range(count)]


def test_a_tower_without_windows_or_table_takes_none():
    assert TowerInputs(2)(torch.tensor([[1, 4, 4]]), CPU).keys() == {"cu_seqlens", "max_seqlen", "position_ids"}


def test_a_shape_is_worked_out_once_and_few_are_kept(monkeypatch):
    made = []
    original = vision.get_vision_position_ids
    monkeypatch.setattr(vision, "get_vision_position_ids", lambda g, m: made.append(g.tolist()[0]) or original(g, m))
    inputs = TowerInputs(2)
    for grids in ([[1, 4, 4], [1, 4, 6]], [[1, 4, 6], [1, 4, 6], [1, 4, 4]]):
        inputs(torch.tensor(grids), CPU)
    assert made == [[1, 4, 4], [1, 4, 6]]
    for width in range(vision.SHAPES):
        inputs(torch.tensor([[1, 2, 2 * width + 8]]), CPU)
    assert inputs.shape.cache_info().currsize == vision.SHAPES
    inputs(torch.tensor([[1, 4, 4]]), CPU)
    assert made.count([1, 4, 4]) == 2, "the least recently used were dropped"


# ---- attention


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_attention_stays_within_windows(lengths, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, sum(lengths), 8, generator=rng, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    windows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = F.scaled_dot_product_attention(q, k, v, windows[:, None] == windows, scale=0.3).transpose(1, 2)
    got = Windows(lengths, CPU).attend(q, k, v, 0.3)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, generator=rng, dtype=torch.float64)
    ours = torch.autograd.grad(got, (q, k, v), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (q, k, v), weight))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 3, 3, 7]])
def test_windows_that_are_in_order_are_not_moved(lengths):
    assert Windows(lengths, CPU).order is None


def test_a_tower_used_without_its_inputs_says_so():
    policy = policy_of("qwen2_vl")
    with pytest.raises(ValueError, match="needs the tower's cu_seqlens as Windows"):
        policy.family.visual(pixels_of(policy, torch.tensor([[1, 4, 4]])), grid_thw=torch.tensor([[1, 4, 4]]))


# ---- the towers


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("family", VISION)
def test_features_and_gradients_are_those_of_transformers(family, mixture):
    policy = policy_of(family)
    grids = torch.tensor(mixture)
    pixels = pixels_of(policy, grids)
    named = dict(policy.family.visual.named_parameters())

    def gradients(features):
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
        found = torch.autograd.grad(features, list(named.values()), weight)
        return dict(zip(named, found, strict=True))

    got = policy.family.encode_images(pixels, grids)
    with as_transformers(policy) as model:
        output = model.model.visual(pixels, grid_thw=grids)
    expected = torch.cat([output.pooler_output, *(getattr(output, "deepstack_features", None) or [])], 1)
    assert got.shape == (int(grids.prod(1).sum()) // 4, 64 * (1 + policy.family.deepstack))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    worst, name = worst_difference(gradients(got), gradients(expected))
    assert worst <= 1e-5, f"{name}: relative difference {worst:.1e}"


@pytest.mark.parametrize("family", VISION)
def test_a_layer_makes_few_calls_however_many_windows_there_are(family, monkeypatch):
    policy = policy_of(family)
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    grids = torch.tensor([[1, 18, 22]] * 4)  # 4 * 30 windows of 2 x 2 merged patches, those at the borders smaller
    policy.family.encode_images(pixels_of(policy, grids), grids)
    layers = policy.base.config.vision_config.depth
    if family == "qwen2_5_vl":
        assert len(calls) == 1 + 3 * (layers - 1), "one layer has no windows; lengths 16, 8 and 4 in the others"
    else:
        assert len(calls) == layers


@pytest.mark.parametrize("family", VISION)
def test_no_layer_waits_for_the_device(family):
    """On the meta device nothing has a value, so whoever asks for one raises."""
    policy = Policy(deepcopy(tiny(family)).to("meta"))
    shape = [(9, [(1, 6, 10), (1, 4, 4)], [4, 3])]
    (group,) = make_groups(policy.family, shape)
    features = policy.family.encode_images(group.prompt.pixel_values.to("meta"), group.prompt.grids)
    batch = policy.pack([group])
    deepstack = None
    if policy.family.deepstack:
        deep = features[:, 64:].unflatten(1, (policy.family.deepstack, 64))
        deepstack = batch.image_rows, deep

    class Plan:
        def attend(self, layer, query, key, value, scaling):
            return query.transpose(1, 2)

    embeddings = torch.empty(1, len(batch.ids), 64, device="meta", requires_grad=True)
    hidden = policy.family.run_text(embeddings, batch.positions, Plan(), deepstack)
    (hidden.sum() + features.sum()).backward()
    assert all(p.grad is not None for p in policy.family.visual.parameters())


@pytest.mark.parametrize("name", VISION)
def test_patches_are_embedded_by_a_product_as_by_the_convolution(name):
    """An adapter around the convolution is not passed by."""
    policy, other = Policy(tiny(name)), tiny(name)
    mine, theirs = policy.family.visual.patch_embed, other.model.visual.patch_embed
    shape = theirs.proj.weight[0].shape
    pixels = torch.randn(12, shape.numel(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(pixels), theirs(pixels), rtol=1e-4, atol=1e-4)
    mine(pixels).square().sum().backward()
    theirs(pixels).square().sum().backward()
    torch.testing.assert_close(mine.proj.weight.grad, theirs.proj.weight.grad, rtol=1e-4, atol=1e-3)
    mine.proj.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(mine(pixels), theirs(pixels) + 1, rtol=1e-4, atol=1e-4)
