"""Packed rows against transformers' own padded forward, for every family: loss and all gradients, and who sees whom.

The gradients are compared as vectors, each relative to its own norm, in fp32. Both sides round some hundred times along
the way: mostly the worst gradient differs by about 1e-6. The bound is 1e-5.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revisual_fast.packing import Group
from revisual_fast.policy.model import Policy
from tests.groups import make_groups, packed_logp
from tests.models import TEXT, VISION, loss_and_gradients, padded_logp, tiny, worst_difference

TOLERANCE = 1e-5
LAYOUTS = ("shared", "varlen", "padded")
ARRANGEMENTS = {
    "text": [(6, [], [3, 5, 1]), (4, [], [2, 2])],
    "one text each": [(5, [], [6]), (1, [], [3]), (9, [], [1])],
    "completions of one token": [(6, [], [1, 1, 1])],
    "prompts without completions": [(3, [], []), (5, [], [6, 2]), (4, [], [])],
    "one image": [(7, [(1, 6, 10)], [4, 9, 2])],
    "two images of different sizes": [(9, [(1, 2, 2), (1, 8, 6)], [5, 1, 7])],
    "an image at the end": [(2, [(1, 4, 4), (1, 2, 6)], [3, 2])],
    "mixed": [(5, [(1, 2, 4)], [3, 6]), (8, [], [4]), (6, [(1, 4, 10)], [1])],
    "an image without completions": [(9, [(1, 6, 6)], [3]), (4, [(1, 2, 2)], [])],
}
CASES = [
    (family, name)
    for family in TEXT + VISION
    for name, shapes in ARRANGEMENTS.items()
    if family in VISION or not any(images for _, images, _ in shapes)
]


@cache
def policy_of(family: str) -> Policy:
    return Policy(tiny(family))


def assert_equal(policy: Policy, groups: list[Group], layout: str) -> None:
    expected_loss, expected = loss_and_gradients(policy, padded_logp(policy, groups))
    loss, gradients = loss_and_gradients(policy, packed_logp(policy, groups, layout))
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE, abs=0)
    worst, name = worst_difference(gradients, expected)
    assert worst <= TOLERANCE, f"{name}: relative difference {worst:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_loss_and_every_gradient_equal_the_padded_forward(family, name, layout):
    policy = policy_of(family)
    assert_equal(policy, make_groups(policy.family, ARRANGEMENTS[name]), layout)


lengths = st.lists(st.integers(1, 12), max_size=5)
grids = st.lists(st.sampled_from([(1, 2, 2), (1, 2, 4), (1, 4, 4), (1, 6, 10)]), max_size=2)
shapes = st.lists(st.tuples(st.integers(6, 14), grids, lengths), min_size=1, max_size=4)
"""Prompts of a few tokens are left out: where all of a softmax's keys are nearly alike, the gradients of queries, keys
and their biases cancel, and what remains is rounding (up to 2e-5 of their norm)."""


@pytest.mark.parametrize("family", TEXT + VISION)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes=shapes, last=st.integers(1, 12), seed=st.integers(0, 99))
def test_random_group_shapes(family, shapes, last, seed):
    policy = policy_of(family)
    shapes = [(text, images if family in VISION else [], own) for text, images, own in shapes]
    text, images, own = shapes[-1]
    groups = make_groups(policy.family, [*shapes[:-1], (text, images, [*own, last])], seed)
    for layout in LAYOUTS:
        assert_equal(policy, groups, layout)


def differing(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set((before != after).nonzero().flatten().tolist())


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TEXT + VISION)
def test_a_changed_token_changes_no_other_sequence_by_a_bit(family, layout):
    policy = policy_of(family)
    image = [(1, 4, 4)] if family in VISION else []
    first, second = make_groups(policy.family, [(7, image, [4, 9, 5]), (5, image, [6, 3])])
    before = packed_logp(policy, [first, second], layout)

    changed = first.completions[1].clone()
    changed[3] += 1
    other = Group(first.prompt, [first.completions[0], changed, first.completions[2]])
    after = packed_logp(policy, [other, second], layout)
    assert differing(before, after) == set(range(4 + 3, 4 + 9)), "its own sequence, from the changed token on"

    other = Group(replace(first.prompt, ids=first.prompt.ids.clone()), first.completions)
    other.prompt.ids[-1] += 1
    after = packed_logp(policy, [other, second], layout)
    assert differing(before, after) == set(range(18)), "the group of the changed prompt"


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", VISION)
def test_a_changed_image_changes_no_other_group_by_a_bit(family, layout):
    policy = policy_of(family)
    first, second = make_groups(policy.family, [(7, [(1, 4, 4)], [4, 9, 5]), (5, [(1, 4, 4)], [6, 3])])
    before = packed_logp(policy, [first, second], layout)
    prompt = replace(second.prompt, pixel_values=second.prompt.pixel_values + 1, image_keys=("another",))
    after = packed_logp(policy, [first, Group(prompt, second.completions)], layout)
    assert differing(before, after) == set(range(18, 27))


@pytest.mark.parametrize("family", TEXT + VISION)
def test_gradient_checkpointing_changes_no_bit(family):
    policy = Policy(tiny(family))
    image = [(1, 6, 10)] if family in VISION else []
    groups = make_groups(policy.family, [(7, image, [4, 9, 1]), (5, [], [6, 3])])
    loss, gradients = loss_and_gradients(policy, packed_logp(policy, groups))
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradients(policy, packed_logp(policy, groups))
    assert again == loss
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
