"""Group advantages and PAD against small independent implementations, and the two traps of the method."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from typing import Any

import pytest
import torch

from revisual_fast.advantages import PAD_MODES, group_advantages, linear_schedule, pad_select, stagnation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_advantages(rewards: list[float], ids: list[int], eps: float, scale: str) -> list[float]:
    out = []
    for reward, group in zip(rewards, ids, strict=True):
        members = [r for r, g in zip(rewards, ids, strict=True) if g == group]
        std = statistics.stdev(members) if len(members) > 1 else 0.0
        centred = reward - statistics.fmean(members)
        out.append(centred / (std + eps) if scale == "std" else centred)
    return out


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_against_a_naive_implementation(scale: str, eps: float) -> None:
    rewards = torch.randn(23, generator=generator())
    ids = torch.randint(5, (23,), generator=generator(1)) * 7 - 3  # any integers, in any order
    expected = naive_advantages(rewards.tolist(), ids.tolist(), eps, scale)
    got = group_advantages(rewards, group_ids=ids, eps=eps, scale=scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_three_ways_to_say_the_groups() -> None:
    rewards = torch.randn(4, 6, generator=generator())
    flat = group_advantages(rewards)
    assert flat.shape == (24,)
    ids = torch.arange(4).repeat_interleave(6)
    assert torch.equal(flat, group_advantages(rewards.flatten(), group_ids=ids))
    assert torch.equal(flat, group_advantages(rewards.flatten(), group_sizes=[6] * 4))
    shuffle = torch.randperm(24, generator=generator())
    torch.testing.assert_close(flat[shuffle], group_advantages(rewards.flatten()[shuffle], group_ids=ids[shuffle]))
    uneven = group_advantages(rewards.flatten(), group_sizes=torch.tensor([1, 20, 3]))
    assert uneven[0] == 0
    torch.testing.assert_close(uneven[21:], group_advantages(rewards.flatten()[None, 21:]))


def test_equal_rewards_give_exactly_zero() -> None:
    tenths = torch.full((1, 3), 0.1, dtype=torch.float64)  # their sum over three is not 0.1 in binary
    assert torch.equal(group_advantages(tenths), torch.zeros(3))
    rewards = torch.full((3, 8), 0.1)
    rewards[1] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    advantages = group_advantages(rewards).reshape(3, 8)
    assert torch.equal(advantages[[0, 2]], torch.zeros(2, 8))
    assert (advantages[1] != 0).all()
    assert stagnation(rewards) == pytest.approx(2 / 3)
    assert stagnation(rewards.flatten(), group_sizes=[8, 4, 4, 8]) == pytest.approx(3 / 4)
    assert stagnation(torch.zeros(0, 8)) == 0


def test_integer_rewards_and_no_rewards() -> None:
    torch.testing.assert_close(group_advantages(torch.tensor([[1, 0]])), torch.tensor([1.0, -1.0]) / 2**0.5)
    assert group_advantages(torch.zeros(0, 8)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([1.0, 2.0], {}, "exactly one of group_ids, group_sizes"),
        ([1.0, 2.0], {"group_sizes": [2], "group_ids": torch.tensor([0, 0])}, "exactly one of"),
        ([[1.0, 2.0]], {"group_sizes": [2]}, "exactly one of"),
        ([1.0, 2.0], {"group_sizes": [1, 2]}, r"sum to 2; got \[1, 2\]"),
        ([1.0, 2.0], {"group_sizes": [2, 0]}, "must be positive"),
        ([1.0, 2.0], {"group_ids": torch.tensor([0])}, r"group_ids must be \[2\]"),
        ([1.0, math.nan], {"group_sizes": [2]}, "returned nan or infinity"),
        ([[1.0, 2.0]], {"scale": "range"}, "one of std, none"),
    ],
)
def test_groups_that_do_not_fit(rewards: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), **options)


def test_linear_schedule() -> None:
    assert [linear_schedule(1.0, 0.3, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.65, 0.3])
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]"):
        linear_schedule(1.0, 0.3, 1.5)


# PAD


def binary_groups(*correct: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy ``[B, G]`` with so many correct answers a group, and the advantages."""
    accuracy = torch.tensor([[1.0] * k + [0.0] * (size - k) for k in correct])
    return accuracy, group_advantages(accuracy)


def naive_inclusion(a: list[float], tau: float, count: int) -> list[float]:
    """Probability that each item is among ``count`` drawn one after the other with p ~ exp(a / tau)."""
    weight = [math.exp(x / tau) for x in a]
    inclusion = [0.0] * len(a)
    for order in itertools.permutations(range(len(a)), count):
        probability, left = 1.0, sum(weight)
        for i in order:
            probability *= weight[i] / left
            left -= weight[i]
        for i in order:
            inclusion[i] += probability
    return inclusion


@pytest.mark.parametrize("mode", ["paper", "sample"])
def test_draws_follow_the_softmax_without_replacement(mode: str) -> None:
    advantages = torch.tensor([0.0, 0.5, -1.5, 1.0, -0.2])
    rounds, g = 4000, generator()
    counts: Counter[int] = Counter()
    for _ in range(rounds):
        result = pad_select(advantages, mode=mode, rho=0.5, tau=0.8, t_low=0.1, generator=g)
        assert len(set(result.indices.tolist())) == 3  # ceil(2.5), none twice
        counts.update(result.indices.tolist())
    kept = [0.5, 1.5, 1.0, 0.2] if mode == "paper" else [0.0, 0.5, 1.5, 1.0, 0.2]
    expected = naive_inclusion(kept, 0.8, 3)
    expected = [0.0, *expected] if mode == "paper" else expected
    assert [counts[i] / rounds for i in range(5)] == pytest.approx(expected, abs=0.03)


def test_released_draws_with_replacement_in_proportion_to_the_power() -> None:
    advantages = torch.tensor([0.03, 0.2, -0.5, 0.9, 0.97, 1.5, 0.0], dtype=torch.float64)
    g = generator()
    drawn = [pad_select(advantages, mode="released", generator=g) for _ in range(2000)]
    assert {len(result.indices) for result in drawn} == {10}  # floor(1.5 * 7)
    counts = Counter(i for result in drawn for i in result.indices.tolist())
    weight = [0.2**1.5, 0.5**1.5, 0.9**1.5]
    assert [counts[i] / 20000 for i in (1, 2, 3)] == pytest.approx([w / sum(weight) for w in weight], abs=0.02)
    assert set(counts) == {1, 2, 3}  # the thresholds themselves are out
    assert (drawn[0].n_effective, drawn[0].dropped_low, drawn[0].dropped_high) == (3, 2, 2)


def test_filter_keeps_both_thresholds_and_off_keeps_everything() -> None:
    advantages = torch.tensor([0.5, -0.1, 1.0, -2.0, 0.0], dtype=torch.float64)
    result = pad_select(advantages, mode="filter", t_low=0.1, t_high=1.0)
    assert result.indices.tolist() == [0, 1, 2]
    assert (result.n_total, result.n_effective, result.dropped_low, result.dropped_high) == (5, 3, 1, 1)
    everything = pad_select(advantages, mode="off", t_low=0.1, t_high=1.0)
    assert everything.indices.tolist() == [0, 1, 2, 3, 4]
    assert (everything.n_effective, everything.dropped_low, everything.dropped_high) == (5, 0, 0)


@pytest.mark.parametrize("mode", PAD_MODES)
def test_a_generator_makes_it_repeatable(mode: str) -> None:
    advantages = torch.randn(40, generator=generator())
    first, again, other = (
        pad_select(advantages, mode=mode, rho=0.4, generator=generator(seed)).indices for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, first.sort().values)
    assert torch.equal(first, other) == (mode in ("filter", "off"))


def test_the_number_drawn() -> None:
    advantages = torch.ones(100)
    for rho, expected in ((0.07, 7), (0.071, 8), (1.0, 100)):  # 0.07 * 100 is a little above 7 in binary
        assert len(pad_select(advantages, rho=rho, generator=generator()).indices) == expected
    advantages[:98] = 0
    assert pad_select(advantages, rho=0.5, generator=generator()).indices.tolist() == [98, 99]


def test_no_effective_completion() -> None:
    advantages = torch.zeros(6)
    results = {mode: pad_select(advantages, mode=mode, rho=0.5, generator=generator()) for mode in PAD_MODES}
    assert results["paper"].empty
    assert results["filter"].empty
    assert results["released"].indices.tolist() == results["off"].indices.tolist() == list(range(6))
    assert len(results["sample"].indices) == 3  # uniform
    assert results["paper"].n_effective == results["released"].n_effective == 0
    assert pad_select(torch.zeros(0), generator=generator()).empty


def test_extreme_temperatures() -> None:
    advantages = torch.tensor([0.1, 3.0, 0.2, -2.0])
    cold = pad_select(advantages, rho=0.5, tau=1e-6, generator=generator())
    assert cold.indices.tolist() == [1, 3]
    counts = Counter(
        pad_select(advantages, rho=0.25, tau=1e6, generator=generator(seed)).indices.item() for seed in range(800)
    )
    assert min(counts[i] for i in range(4)) > 150


def test_trap_a_finite_upper_threshold_drops_the_rarer_outcome() -> None:
    accuracy, advantages = binary_groups(1, 2, 3, 4, 5, 6, 7, 0, 8)
    groups: dict[str, Any] = {"outcomes": accuracy.flatten(), "group_sizes": [8] * 9}
    cut = pad_select(advantages, mode="filter", t_high=0.97, **groups)
    kept = torch.zeros(72, dtype=torch.bool)
    kept[cut.indices] = True
    for group, correct in enumerate((1, 2, 3)):
        rows = slice(8 * group, 8 * group + correct)
        assert not kept[rows].any()  # every positive of a group with at most 3 correct is lost
        assert kept[8 * group + correct : 8 * group + 8].all()
    for group, wrong in ((4, 3), (5, 2), (6, 1)):
        assert not kept[8 * group + 8 - wrong : 8 * group + 8].any()
    assert kept[24:32].all()  # four of eight
    assert cut.dropped_minority == cut.dropped_high == 12
    whole = pad_select(advantages, mode="filter", **groups)
    assert (whole.dropped_minority, whole.dropped_high, whole.dropped_low, whole.n_effective) == (0, 0, 16, 56)
    assert pad_select(advantages, mode="filter", t_high=0.97).dropped_minority is None


def test_trap_a_shaped_reward_hides_stagnation() -> None:
    accuracy, _ = binary_groups(0, 0, 8, 3)
    shaped = accuracy + 0.1 * torch.rand(4, 8, generator=generator())
    assert stagnation(accuracy) == 0.75
    assert stagnation(shaped) == 0
    assert pad_select(group_advantages(shaped), mode="filter").n_effective == 32


def test_minority_is_counted_within_the_group_and_needs_groups() -> None:
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    ids = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9])
    advantages = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    result = pad_select(advantages, mode="filter", t_high=2.0, outcomes=outcomes, group_ids=ids)
    assert (result.dropped_high, result.dropped_minority) == (4, 2)  # one of two is not the rarer one
    with pytest.raises(ValueError, match="exactly one of group_ids"):
        pad_select(advantages, mode="filter", outcomes=outcomes)
    with pytest.raises(ValueError, match=r"outcomes must be \[8\]"):
        pad_select(advantages, mode="filter", outcomes=outcomes[:3], group_sizes=[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "pad"}, "one of paper, released, filter, sample, off"),
        ({"rho": 0.0}, r"in \(0, 1\]"),
        ({"rho": 1.5}, r"in \(0, 1\]"),
        ({"t_low": 0.0}, "t_low must be > 0"),
        ({"tau": 0.0}, "tau must be > 0"),
        ({"generator": None}, "pass generator="),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_select(torch.ones(4), **{"generator": generator(), **options})


def test_advantages_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        pad_select(torch.tensor([1.0, math.nan]), mode="filter")
