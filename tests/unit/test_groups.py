"""Group advantages and PAD on the device: the same as ``revisual_fast.advantages``, on both backends."""

import math
from collections import Counter

import pytest
import torch

from revisual_fast import advantages as general
from revisual_fast.kernels import groups
from revisual_fast.kernels.groups import group_advantages, pad_mask
from tests.devices import BACKENDS, DEVICE, ON_DEVICE, needs_triton
from tests.unit.test_advantages import naive_inclusion

pytestmark = [*ON_DEVICE, pytest.mark.usefixtures("poisoned_and_deterministic")]
SIZES = [8, 8, 1, 3, 200, 65, 64, 2]


def cumulated(sizes: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, dtype)


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_rewards(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rewards = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0))
    rewards[:8] = 0.1  # all equal, and no sum of them is exact
    rewards[8:16] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    return rewards.to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_advantages_are_the_general_ones(backend, scale, dtype):
    rewards = make_rewards(dtype)
    got = group_advantages(rewards, cumulated(SIZES), scale=scale, backend=backend)
    expected = general.group_advantages(rewards, group_sizes=SIZES, scale=scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2**-23, atol=0)  # fp64 inside: one rounding apart at most
    assert got[:8].tolist() == [0.0] * 8
    assert got[16] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_any_layout(backend):
    rewards = make_rewards()
    expected = group_advantages(rewards, cumulated(SIZES), backend=backend)
    spread = torch.stack([rewards, rewards + 1], 1)[:, 0]  # strided
    assert torch.equal(group_advantages(spread, cumulated(SIZES, torch.int64), backend=backend), expected)
    with_empty = [0, *SIZES[:3], 0, 0, *SIZES[3:], 0]
    assert torch.equal(group_advantages(rewards, cumulated(with_empty), backend=backend), expected)
    assert group_advantages(rewards[:0], cumulated([0, 0]), backend=backend).shape == (0,)
    assert group_advantages(rewards[:0], cumulated([]), backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 2])
def test_a_reward_that_is_no_number_shows_in_its_group_only(backend, place):
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 2.0], device=DEVICE)
    rewards[place] = math.nan
    got = group_advantages(rewards, cumulated([3, 3]), backend=backend)
    assert got.isnan().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("rewards", "cu", "options", "message"),
    [
        (torch.zeros(2, 2), [0, 2], {}, r"rewards must be \[N\]"),
        (torch.zeros(2, dtype=torch.int64), [0, 2], {}, "floating-point"),
        (torch.zeros(4), [0, 3], {}, r"from 0 to N = 4; got \[0, 3\]"),
        (torch.zeros(4), [0, 3, 2, 4], {}, "must rise"),
        (torch.zeros(4), [], {}, r"\[B \+ 1\]"),
        (torch.zeros(4), [0.0, 4.0], {}, "int32 or int64"),
        (torch.zeros(4), [0, 4], {"scale": "var"}, "one of std, none"),
        (torch.zeros(4), [0, 4], {"backend": "cuda"}, "one of auto"),
    ],
)
def test_groups_that_do_not_fit(rewards, cu, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, torch.tensor(cu), **options)


# -- PAD


@needs_triton
@pytest.mark.parametrize("mode", ["paper", "filter", "sample", "off"])
@pytest.mark.parametrize("n", [1, 100, 2500])
def test_the_backends_agree_given_the_same_noise(mode, n):
    advantages = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    noise = uniform(n) if mode in ("paper", "sample") else None
    results = [
        pad_mask(advantages, mode=mode, rho=0.3, t_low=0.2, t_high=1.5, tau=0.7, noise=noise, backend=backend)
        for backend in ("torch", "triton")
    ]
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    keep, n_effective, low, high = results[0]
    expected = general.pad_select(
        advantages, mode=mode, rho=0.3, t_low=0.2, t_high=1.5, generator=torch.Generator(DEVICE).manual_seed(0)
    )
    counts = (expected.n_effective, expected.dropped_low, expected.dropped_high)
    assert (int(n_effective), int(low), int(high)) == counts
    assert int(keep.sum()) == len(expected.indices)
    size = advantages.abs()
    if mode in ("paper", "filter"):
        assert not bool((keep & ((size < 0.2) | (size > 1.5))).any())
    if mode in ("filter", "off"):
        assert keep.nonzero()[:, 0].tolist() == expected.indices.tolist()


@pytest.mark.parametrize("mode", ["paper", "sample"])
def test_draws_follow_the_softmax_without_replacement(mode):
    advantages = torch.tensor([0.0, 0.5, -1.5, 1.0, -0.2], device=DEVICE)
    rounds, counts = 4000, torch.zeros(5, dtype=torch.int64, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(rounds):
        counts += pad_mask(advantages, mode=mode, rho=0.5, tau=0.8, t_low=0.1, generator=g).keep
    kept = [0.5, 1.5, 1.0, 0.2] if mode == "paper" else [0.0, 0.5, 1.5, 1.0, 0.2]
    expected = naive_inclusion(kept, 0.8, 3)  # ceil(2.5)
    expected = [0.0, *expected] if mode == "paper" else expected
    assert int(counts.sum()) == 3 * rounds
    for count, p in zip(counts.tolist(), expected, strict=True):
        assert abs(count / rounds - p) <= 4 * math.sqrt(p * (1 - p) / rounds)  # four standard deviations


def test_pairs_are_drawn_together_as_often_as_by_pad_select():
    """Not only how often each is kept, but which are kept together."""
    advantages, rounds = torch.tensor([0.3, -1.0, 1.7, 0.9]), 3000
    g, h = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    ours: Counter[tuple[int, ...]] = Counter()
    theirs: Counter[tuple[int, ...]] = Counter()
    for _ in range(rounds):
        ours[tuple(pad_mask(advantages, rho=0.5, tau=0.9, generator=g).keep.nonzero()[:, 0].tolist())] += 1
        theirs[tuple(general.pad_select(advantages, rho=0.5, tau=0.9, generator=h).indices.tolist())] += 1
    assert set(ours) == set(theirs)
    chi_square = sum((ours[pair] - theirs[pair]) ** 2 / (ours[pair] + theirs[pair]) for pair in ours)
    assert chi_square < 20.5  # 99.9th percentile for 5 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_are_those_of_pad_select_to_the_last_bit(backend):
    edges = torch.tensor([1e-4, 0.1, 0.3, 0.7, 0.97], dtype=torch.float32)
    near = [torch.nextafter(edges, torch.tensor(towards)) for towards in (0.0, 2.0)]
    advantages = torch.cat([edges, *near]).to(DEVICE)
    for low in (1e-4, 0.1, 0.3):
        for high in (0.3, 0.7, 0.97, math.inf):
            got = pad_mask(advantages, mode="filter", t_low=low, t_high=high, backend=backend)
            expected = general.pad_select(advantages, mode="filter", t_low=low, t_high=high)
            assert got.keep.nonzero()[:, 0].tolist() == expected.indices.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_kept(backend):
    advantages = torch.ones(100, device=DEVICE)
    for rho, expected in ((0.07, 7), (0.071, 8), (1.0, 100)):
        assert int(pad_mask(advantages, rho=rho, noise=uniform(100), backend=backend).keep.sum()) == expected
    advantages[:98] = 0
    few = pad_mask(advantages, rho=0.5, noise=uniform(100), backend=backend)
    assert few.keep.nonzero()[:, 0].tolist() == [98, 99]
    nobody = pad_mask(advantages * 0, rho=0.5, noise=uniform(100), backend=backend)
    assert not bool(nobody.keep.any())
    assert [int(x) for x in nobody[1:]] == [0, 100, 0]
    assert int(pad_mask(advantages * 0, mode="sample", rho=0.5, noise=uniform(100), backend=backend).keep.sum()) == 50
    assert pad_mask(advantages[:0], noise=uniform(0), backend=backend).keep.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_temperatures_and_noise(backend):
    advantages = torch.tensor([0.1, 3.0, 0.2, -2.0], device=DEVICE)
    cold = pad_mask(advantages, rho=0.5, tau=1e-6, noise=uniform(4), backend=backend)
    assert cold.keep.tolist() == [False, True, False, True]
    noise = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64, device=DEVICE)  # 0 is the worst draw, not no draw
    assert bool(pad_mask(advantages, rho=1.0, noise=noise, backend=backend).keep.all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_advantage_that_is_no_number_is_kept_so_that_the_loss_shows_it(backend):
    size = torch.tensor([0.5, math.nan, 2.0, 0.01], device=DEVICE)
    keys, counts = groups._keys(size, uniform(4), 0.1, math.inf, 0.3, backend)
    assert int(keys.argmax()) == 1
    assert keys[3] == -math.inf
    assert counts.tolist() == [3, 1, 0]


def test_a_generator_makes_it_repeatable():
    advantages = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, again, other = (
        pad_mask(advantages, rho=0.4, generator=torch.Generator(DEVICE).manual_seed(seed)).keep for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_reads_a_value_back():
    """Tensors without data cannot be read: the same code runs on a CUDA device without waiting for it."""
    rewards = torch.empty(6, device="meta")
    advantages = group_advantages(rewards, torch.empty(3, dtype=torch.int32, device="meta"))
    noise = torch.empty(6, dtype=torch.float64, device="meta")
    for mode in ("paper", "filter", "sample", "off"):
        mask = pad_mask(advantages, mode=mode, rho=0.5, noise=noise if mode in ("paper", "sample") else None)
        assert mask.keep.shape == (6,)
        assert all(count.shape == () for count in mask[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "released"}, "use revisual_fast.advantages.pad_select"),
        ({"mode": "pad"}, "one of paper, released, filter, sample, off"),
        ({"rho": 0.0}, r"in \(0, 1\]"),
        ({"t_low": 0.0}, "t_low must be > 0"),
        ({"tau": 0.0}, "tau must be > 0"),
        ({"noise": None}, "pass noise or generator="),
        ({"generator": torch.Generator()}, "pass noise or generator="),
        ({"noise": torch.rand(4)}, r"noise must be \[4\] float64"),
        ({"noise": torch.rand(3, dtype=torch.float64)}, r"noise must be \[4\] float64"),
        ({"advantages": torch.ones(2, 2)}, r"advantages must be \[N\]"),
        ({"advantages": torch.tensor([1.0, math.nan])}, "finite"),
    ],
)
def test_values_out_of_range(options, message):
    arguments = {"advantages": torch.ones(4), "noise": torch.rand(4, dtype=torch.float64), **options}
    with pytest.raises(ValueError, match=message):
        pad_mask(arguments.pop("advantages"), **arguments)
