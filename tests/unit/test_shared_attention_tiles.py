"""The tables of attention with shared prefixes: the loops of the kernels meet every pair of rows once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revisual_fast.kernels.shared_attention import AttentionTiles
from tests.unit.test_shared_attention import GROUPS, LAYOUTS, seen, shared, tiles_of, varlen


def covered(tiles: AttentionTiles, block: int, by_key: bool) -> Tensor:
    """[T, T]: how often the loops of the kernels come to a query and a key, masks applied, as they number them."""
    count = torch.zeros(tiles.n_rows, tiles.n_rows, dtype=torch.int64)
    own_start, own_end = tiles.own_start.tolist(), tiles.own_end.tolist()
    for first, last, other, rest in (tiles.key_tiles if by_key else tiles.query_tiles).tolist():
        for begin in range(first, last, block):
            end = min(begin + block, last)
            if by_key:
                queries = own_end[end - 1] - begin
                for i in range(queries + rest - other):
                    row = begin + i if i < queries else other + i - queries
                    for key in range(begin, end):
                        if i >= queries or key <= row < own_end[key]:
                            count[row, key] += 1
                continue
            for j in range(rest + end - own_start[begin]):
                key = other + j if j < rest else own_start[begin] + j - rest
                for row in range(begin, end):
                    if j < rest or own_start[row] <= key <= row:
                        count[row, key] += 1
    return count


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("grain", "block"), [(16, 16), (32, 16), (8, 2), (128, 128)])
def test_every_pair_is_met_once(name, by_key, grain, block):
    tiles = tiles_of(LAYOUTS[name], grain)
    assert torch.equal(covered(tiles, block, by_key), seen(LAYOUTS[name]).long())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(groups=GROUPS, grain=st.sampled_from([8, 16, 32]))
def test_every_pair_is_met_once_in_any_groups(groups, grain):
    segments = shared(*groups)
    tiles = tiles_of(segments, grain)
    for by_key in (False, True):
        assert torch.equal(covered(tiles, grain // 2, by_key), seen(segments).long())


def test_completions_share_tiles_and_the_heaviest_come_first():
    tiles = tiles_of(shared((100, [4, 4, 4, 4]), (10, [3, 3])))
    assert [100, 116, 0, 100] in tiles.query_tiles.tolist()
    assert tiles.query_tiles[0].tolist() == [100, 116, 0, 100]
    keys = [rest + last - int(tiles.own_start[first]) for first, last, _, rest in tiles.query_tiles.tolist()]
    queries = [
        rest - other + int(tiles.own_end[last - 1]) - first for first, last, other, rest in tiles.key_tiles.tolist()
    ]
    for weights in (keys, queries):
        assert all(one >= other for one, other in pairwise(weights))
    assert (tiles.heaviest, tiles.total) == (max(queries), sum(queries))


def test_small_batches_split_the_heads_of_a_key_head_and_long_ones_do_not():
    few, many = (AttentionTiles.of(*zip(*varlen(*[128] * n), strict=True), "cpu") for n in (8, 2048))
    assert few.splits(8, 2) == 8
    assert many.splits(8, 2) == 1
    assert few.splits(1, 16) == 1
    prompts = AttentionTiles.of(*zip(*shared(*[(1450, [500] * 8)] * 2), strict=True), "cpu")
    assert prompts.splits(8, 2) == 8
    assert prompts.splits(7, 4) == 7


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(0, 4, 0, 0), (5, 2, 0, 0)], "segment 1 is 2 rows from 5; it must begin at row 4"),
        ([(0, 4, 0, 0), (4, 0, 0, 0)], "not be empty"),
        ([(0, 4, 0, 0), (4, 2, 3, 4)], r"4 rows from 3, is not in \[0, 6\)"),
        ([(0, 4, 0, 0), (4, 2, -1, 2)], r"not in \[0, 6\)"),
        ([(0, 4, 0, 0), (4, 2, 0, 5)], "overlaps its prefix"),
        (
            [(0, 4, 0, 0), (4, 2, 0, 4), (6, 2, 0, 0), (8, 2, 0, 4)],
            "rows 0 to 3 are in the prefixes of rows 4 to 5 and",
        ),
        ([(0, 4, 0, 0), (4, 2, 0, 4), (6, 2, 0, 3)], "repeat the prompt instead"),
    ],
)
def test_segments_that_do_not_fit(segments, message):
    with pytest.raises(ValueError, match=message):
        tiles_of(segments)


def test_fields_of_different_lengths():
    with pytest.raises(ValueError, match="differ in length"):
        AttentionTiles.of([0], [1], [0], [], "cpu")
