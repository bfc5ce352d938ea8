"""Packed rows: what lies where in each layout, and what is refused. Parity and leaks: test_parity.py."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revisual_fast.packing import Group, PackedBatch, Prompt, Segments, pack_groups
from revisual_fast.policy.model import Policy
from tests.groups import blank_groups, make_groups, make_prompt

LAYOUTS = ["shared", "varlen", "padded"]


@pytest.fixture(scope="module")
def policy(tiny_policy: Policy) -> Policy:
    return tiny_policy


def test_the_shared_layout_holds_the_prompt_once_and_never_the_last_token(policy):
    (group,) = make_groups(policy.family, [(7, [(1, 4, 4)], [4, 9, 1])])
    shared, varlen = policy.pack([group]), policy.pack([group], "varlen")
    prompt = len(group.prompt.ids)
    assert len(shared.ids) == prompt + 3 + 8 == group.tokens("shared")
    assert len(varlen.ids) == 3 * prompt + 3 + 8 == group.tokens("varlen")
    assert shared.rows[[0, 4, 13]].tolist() == [prompt - 1] * 3, "the last prompt row predicts every first token"
    assert shared.cu_seqlens.tolist() == [0, 4, 13, 14]
    assert shared.sequence_ids.tolist() == [0] * 4 + [1] * 9 + [2]


def test_the_padded_layout_is_a_rectangle_whose_padding_nobody_sees(policy):
    groups = make_groups(policy.family, [(7, [(1, 2, 2)], [4, 9]), (3, [], [1]), (2, [], [])])
    batch = policy.pack(groups, "padded")
    width = max(len(g.prompt.ids) + len(c) - 1 for g in groups for c in g.completions)
    assert len(batch.ids) == 4 * width
    assert groups[0].tokens("padded") == 2 * width
    real = {(len(groups[0].prompt.ids) + 3), (len(groups[0].prompt.ids) + 8), 3, 2}
    starts = [n * width for n in range(4)]
    assert {n for s, n in zip(batch.segments.start, batch.segments.length, strict=True) if s in starts} == real
    assert set(batch.segments.prefix_length) == {0}


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=4)), min_size=1, max_size=4
)  # prompt, completions


@settings(deadline=None)
@given(shapes=shapes, layout=st.sampled_from(LAYOUTS))
def test_every_target_is_predicted_by_the_row_before_it_and_segments_cover_the_row_once(shapes, layout):
    groups = [
        Group(
            Prompt(1000 * g + torch.arange(p)),
            [1000 * g + 100 * (i + 1) + torch.arange(n) for i, n in enumerate(lengths)],
        )
        for g, (p, lengths) in enumerate(shapes)
    ]
    batch = pack(groups, layout)
    segments = batch.segments
    ends = [s + n for s, n in zip(segments.start, segments.length, strict=True)]
    assert [0, *ends] == [*segments.start, len(batch.ids)], "in order, without a gap"
    if layout != "padded":
        assert len(batch.ids) == sum(g.tokens(layout) for g in groups)
    sequences = [(g, c) for g in groups for c in g.completions]
    assert torch.equal(batch.targets, torch.cat([c for _, c in sequences] or [torch.empty(0, dtype=torch.long)]))
    seen = visible(segments)
    for n, (row, target) in enumerate(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)):
        group, completion = sequences[int(batch.sequence_ids[n])]
        before = int(n - batch.cu_seqlens[batch.sequence_ids[n]])
        context = [*group.prompt.ids.tolist(), *completion[:before].tolist()]
        assert batch.ids[seen[row]].tolist() == context, f"what predicts {target}"
        assert batch.positions[0, 0, seen[row]].tolist() == list(range(len(context)))


@settings(deadline=None)
@given(shapes=shapes)
def test_bounds_and_key_rows_describe_the_segments(shapes):
    segments = pack(blank_groups(shapes), "shared").segments
    keys = segments.key_rows.split(segments.cu_k.diff().tolist())
    for i, mine in enumerate(keys):
        own = range(segments.start[i], segments.start[i] + segments.length[i])
        prefix = range(segments.prefix_start[i], segments.prefix_start[i] + segments.prefix_length[i])
        assert mine.tolist() == [*prefix, *own]
    assert segments.cu_q.tolist() == [0, *itertools.accumulate(segments.length)]


def pack(groups: list[Group], layout: str) -> PackedBatch:
    return pack_groups(
        [g.prompt for g in groups],
        [g.completions for g in groups],
        positions=lambda ids, grids: torch.arange(len(ids)).expand(3, -1),
        image_token_id=None,
        layout=layout,
    )


def visible(segments: Segments) -> dict[int, list[int]]:
    """Row -> the rows it attends to."""
    found = {}
    fields = (segments.start, segments.length, segments.prefix_start, segments.prefix_length)
    for s, n, p, k in zip(*fields, strict=True):
        found |= {row: [*range(p, p + k), *range(s, row + 1)] for row in range(s, s + n)}
    return found


def test_equal_images_are_encoded_once(policy):
    one = make_prompt(policy.family, 6, [(1, 2, 2), (1, 2, 4)], 1, keys="ab")
    two = make_prompt(policy.family, 6, [(1, 2, 4), (1, 2, 2)], 2, keys="bc")
    batch = policy.pack([Group(one, []), Group(two, [])])
    assert batch.grids.tolist() == [[1, 2, 2], [1, 2, 4], [1, 2, 2]]
    assert batch.image_keys == ("a", "b", "c")
    assert batch.image_index.tolist() == [0, 1, 2, 1, 2, 3]
    assert [len(pixels) for pixels in batch.pixel_values] == [4, 8, 4]


def test_image_tokens_without_an_image_are_refused(policy):
    broken = Prompt(torch.tensor([25, policy.family.image_token_id]))
    with pytest.raises(ValueError, match="1 image tokens, but its images give 0"):
        policy.pack([Group(broken, [])])


def test_one_key_for_two_sizes_is_refused(policy):
    one = make_prompt(policy.family, 6, [(1, 2, 2)], 1, keys="a")
    two = make_prompt(policy.family, 6, [(1, 2, 4)], 2, keys="a")
    with pytest.raises(ValueError, match=r"image a comes with two grids, \[1, 2, 2\] and \[1, 2, 4\]"):
        policy.pack([Group(one, []), Group(two, [])])


def test_nothing_is_refused(policy):
    with pytest.raises(ValueError, match="nothing to pack"):
        policy.pack([])


def test_empty_prompts_and_completions_are_refused(policy):
    (group,) = make_groups(policy.family, [(5, [], [2])])
    with pytest.raises(ValueError, match="at least one token"):
        policy.pack([Group(group.prompt, [torch.empty(0, dtype=torch.long)])])
    with pytest.raises(ValueError, match="at least one token"):
        policy.pack(blank_groups([(0, [3])]))


@pytest.mark.parametrize(
    ("lost", "said"), [("pixel_values", "0 patches"), ("grids", "0 grids"), ("image_keys", "0 image keys")]
)
def test_images_of_which_a_part_is_missing_are_refused(policy, lost, said):
    prompt = make_prompt(policy.family, 6, [(1, 2, 2), (1, 2, 4)], 1)
    setattr(prompt, lost, getattr(Prompt(prompt.ids), lost))
    with pytest.raises(ValueError, match=f"the prompt's images do not agree: .*{said}"):
        policy.pack([Group(prompt, [])])
    cut = make_prompt(policy.family, 6, [(1, 2, 2), (1, 2, 4)], 1)
    cut.pixel_values = cut.pixel_values[:-1]
    with pytest.raises(ValueError, match="grids of 12 patches, 11 patches in pixel_values"):
        policy.pack([Group(cut, [])])


def test_other_arguments_that_do_not_fit_are_refused(policy):
    (group,) = blank_groups([(3, [2])])
    with pytest.raises(ValueError, match="layout 'dense' is unknown; it is one of shared, varlen, padded"):
        policy.pack([group], "dense")
    with pytest.raises(ValueError, match="1 prompts come with the completions of 2"):
        pack_groups([group.prompt], [[], []], positions=lambda ids, grids: ids, image_token_id=None)
