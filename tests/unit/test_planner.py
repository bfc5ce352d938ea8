"""Plans of micro-batches: nothing lost, the budget kept, no needless split, equal counts over ranks, balanced costs."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revisual_fast.packing.cost import CostModel, ModelShape
from revisual_fast.packing.planner import MicroBatch, plan_micro_batches
from tests.groups import blank_groups

SHAPE = ModelShape(2048, 36, 11008, 16, 2, 128, 151936)  # Qwen2.5-VL-3B, without its images
COST = CostModel(SHAPE)

group_shapes = st.tuples(st.integers(1, 30), st.lists(st.integers(1, 40), max_size=6))
batches = st.lists(group_shapes, max_size=10)
layouts = st.sampled_from(["shared", "varlen"])


def realistic(n: int, group_size: int = 8, seed: int = 0):
    """Prompts of 100 to 1500 tokens, responses of a heavy-tailed length."""
    rng = random.Random(seed)
    return blank_groups(
        [
            (rng.randint(100, 1500), [min(4096, 1 + int(rng.lognormvariate(5.5, 0.8))) for _ in range(group_size)])
            for _ in range(n)
        ]
    )


def flat(plan: list[list[MicroBatch]]) -> list[MicroBatch]:
    return [batch for rank in plan for batch in rank]


def tokens(group, layout) -> int:
    return group.tokens(layout)


def imbalance(values) -> float:
    values = list(values)
    return max(values) * len(values) / sum(values)


@settings(max_examples=200, deadline=None)
@given(batches, st.integers(1, 150), layouts, st.integers(1, 4))
def test_every_completion_once_within_the_budget_and_no_needless_split(shapes, budget, layout, ranks):
    groups = blank_groups(shapes)
    plan = plan_micro_batches(groups, budget, cost=COST, layout=layout, ranks=ranks)
    parts = [part for batch in flat(plan) for part in batch.parts]
    for g, group in enumerate(groups):
        mine = [completions for index, completions in parts if index == g]
        assert sorted(i for part in mine for i in part) == list(range(len(group.completions)))
        assert len(mine) == 1 or tokens(group, layout) > budget, "split though it fits"
        if group.completions:
            assert all(mine)
    for batch in flat(plan):
        made = batch.of(groups)
        assert batch.tokens == sum(tokens(group, layout) for group in made)
        assert batch.cost == sum(COST.flops(group, layout) for group in made)
        alone = len(made) == 1 and len(made[0].completions) <= 1
        assert batch.tokens <= budget or alone
        indices = [g for g, _ in batch.parts]
        assert indices == sorted(set(indices))
        assert all(list(part) == sorted(part) for _, part in batch.parts)


@settings(max_examples=200, deadline=None)
@given(batches, st.integers(1, 150), layouts, st.integers(1, 4))
def test_ranks_have_equally_many_and_empty_ones_only_where_nothing_is_left(shapes, budget, layout, ranks):
    groups = blank_groups(shapes)
    plan = plan_micro_batches(groups, budget, cost=COST, layout=layout, ranks=ranks)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    empty = [batch for batch in flat(plan) if not batch.parts]
    if empty:
        assert all(len(batch.parts) <= 1 for batch in flat(plan))
        assert empty == [MicroBatch((), 0, 0)] * len(empty)
        assert len(empty) < ranks
    again = plan_micro_batches(blank_groups(shapes), budget, cost=COST, layout=layout, ranks=ranks)
    assert again == plan


@settings(max_examples=100, deadline=None)
@given(batches, st.integers(70, 200))
def test_there_are_nearly_as_few_as_there_can_be(shapes, budget):
    """Best-fit decreasing needs at most 11/9 of the fewest bins, + 1; fewer than sum / budget nobody can."""
    groups = [group for group in blank_groups(shapes) if group.tokens("shared") <= budget]
    count = len(flat(plan_micro_batches(groups, budget, cost=COST)))
    sizes = [group.tokens("shared") for group in groups]
    fewest = next(n for n in itertools.count() if fits(sorted(sizes, reverse=True), [budget] * n))
    assert fewest <= count <= 11 / 9 * fewest + 1


def fits(sizes: list[int], rooms: list[int]) -> bool:
    """Whether bins with so much room can take all sizes, by trying everything."""
    if not sizes:
        return True
    first, *rest = sizes
    tried = {room: i for i, room in enumerate(rooms) if room >= first}
    return any(fits(rest, [*rooms[:i], room - first, *rooms[i + 1 :]]) for room, i in tried.items())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 4))
def test_with_room_everywhere_the_dearest_is_within_a_third_of_the_optimum(costs, ranks):
    """Graham 1969: at most 4/3 - 1/(3 ranks) of it; the trades that follow never raise the dearest."""
    groups = blank_groups([(1, [cost]) for cost in costs])
    plan = plan_micro_batches(groups, 10_000, cost=lambda g: len(g.completions[0]), ranks=ranks)
    assert [len(rank) for rank in plan] == [1] * ranks
    choices = itertools.product(range(ranks), repeat=len(costs))
    best = min(
        max(sum(c for c, r in zip(costs, choice, strict=True) if r == k) for k in range(ranks)) for choice in choices
    )
    assert max(batch.cost for batch in flat(plan)) <= (4 / 3 - 1 / (3 * ranks)) * best


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=2, max_size=16), st.integers(50, 120), layouts)
def test_a_group_too_large_is_split_into_few_balanced_parts(prompt, own, budget, layout):
    (group,) = blank_groups([(prompt, own)])
    plan = flat(plan_micro_batches([group], budget, cost=COST, layout=layout))
    parts = [part.of([group])[0] for part in plan]
    if group.tokens(layout) <= budget:
        assert len(parts) == 1
        return
    once = prompt if layout == "shared" else 0
    sizes = [n - 1 + (0 if once else prompt) for n in own]
    small = [n for n in sizes if once + n <= budget]
    fewest = (
        len(sizes) - len(small) + next(n for n in itertools.count() if fits(sorted(small)[::-1], [budget - once] * n))
    )
    assert fewest <= len(parts) <= 11 / 9 * fewest + 1


def test_parts_of_a_group_are_even():
    (group,) = blank_groups([(100, [41] * 12)])
    parts = flat(plan_micro_batches([group], 400, cost=COST))
    assert [len(part) for batch in parts for _, part in batch.parts] == [6, 6], "not 7 and 5"
    assert {batch.tokens for batch in parts} == {100 + 6 * 40}


@pytest.mark.parametrize(("ranks", "budget", "close"), [(8, 16384, 1.05), (8, 32768, 1.02), (1, 16384, 1.05)])
def test_realistic_batches_are_balanced(ranks, budget, close):
    groups = realistic(256)
    plan = plan_micro_batches(groups, budget, cost=COST, ranks=ranks)
    fewest = sum(group.tokens("shared") for group in groups) / budget
    assert len(flat(plan)) <= -(-(fewest * 1.03) // ranks) * ranks
    assert imbalance(batch.cost for batch in flat(plan)) < close
    assert imbalance(sum(batch.cost for batch in rank) for rank in plan) < 1.005
    for step in zip(*plan, strict=True):
        assert imbalance(batch.cost for batch in step) < 1.01, "the ranks wait for each other at every step"
    costs = [batch.cost for batch in plan[0]]
    assert costs == sorted(costs, reverse=True), "what does not fit in memory fails in the first step"


def test_cost_decides_and_not_tokens():
    """As many tokens in every group, but in some of them one long sequence: twice the attention."""
    groups = blank_groups([(64, [8001])] * 4 + [(64, [1001] * 8)] * 12)
    plan = plan_micro_batches(groups, 4 * 8064, cost=CostModel(ModelShape(64, 4, 128, 8, 2, 64, 100)), ranks=4)
    assert [[sum(g < 4 for g, _ in batch.parts) for batch in rank] for rank in plan] == [[1]] * 4


def test_a_full_budget_still_gives_balance_by_swaps():
    """Twice two groups that fill the budget exactly: only pairs (long prompt, short prompt) fit."""
    groups = blank_groups([(10, [31]), (10, [31]), (10, [11]), (10, [11])])
    plan = plan_micro_batches(groups, 60, cost=lambda g: float(g.tokens("shared")))
    assert sorted(tuple(g for g, _ in batch.parts) for batch in plan[0]) in ([(0, 2), (1, 3)], [(0, 3), (1, 2)])


def test_groups_without_completions_are_planned():
    groups = blank_groups([(50, []), (60, []), (30, [])])
    plan = plan_micro_batches(groups, 100, cost=CostModel(SHAPE, gradient=False))
    assert sorted(part for batch in plan[0] for part in batch.parts) == [(0, ()), (1, ()), (2, ())]
    assert len(plan[0]) == 2


def test_nothing_gives_nothing():
    assert plan_micro_batches([], 10, cost=COST, ranks=3) == [[], [], []]


def test_thousands_of_groups_take_less_than_a_second():
    groups = realistic(4096)
    for budget in (8192, 16384, 1 << 30):
        start = time.process_time()
        plan_micro_batches(groups, budget, cost=COST, ranks=8)
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "micro_batch_tokens is 0"),
        ({"ranks": 0}, "ranks is 0"),
        ({"layout": "padded"}, "padded layout is not planned"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches([], options.pop("budget", 10), cost=COST, **options)
