"""Which groups go into which micro-batch: within the token budget, and of near-equal cost."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nsmallest

from revisual_fast.packing.batch import Group, Layout, check_layout
from revisual_fast.packing.cost import CostModel

__all__ = ["MicroBatch", "plan_micro_batches"]

CLOSE = 1.01
"""The cost of a micro-batch over the mean from which on it tries to give some away."""

PARTNERS, TRIALS = 4, 200_000
"""To how many of the cheapest micro-batches, and how many comparisons that may take in all."""


@dataclass(frozen=True)
class MicroBatch:
    """Groups, or parts of them, that make one packed row. An empty one, to be skipped, is what a rank
    without work gets."""

    parts: tuple[tuple[int, tuple[int, ...]], ...]  # (group index, indices of its completions), both ascending
    tokens: int
    cost: float

    def of(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to pack, with just these completions; ``groups`` are those of the plan."""
        return [_part(groups[g], part) for g, part in self.parts]


@dataclass(frozen=True)
class _Item:
    """A group, or a part of one that exceeds the budget: what is not split any further."""

    group: int
    part: tuple[int, ...]
    tokens: int
    room: int  # what it takes of the budget: a single completion that exceeds it takes all of it
    cost: float


def plan_micro_batches(
    groups: Sequence[Group],
    budget: int,
    *,
    cost: CostModel | Callable[[Group], float],
    layout: Layout = "shared",
    ranks: int = 1,
) -> list[list[MicroBatch]]:
    """Micro-batches for every rank: ``[rank][step]``, each rank the same number of them, so that collectives match.

    In this order: a micro-batch holds at most ``budget`` packed tokens (a single completion that exceeds it is one by
    itself); a group is split only where it exceeds the budget, by completions, into parts of near-equal length, each
    with the prompt; there are as few micro-batches as best-fit decreasing finds, rounded up to a multiple of ``ranks``;
    their costs are close: the dearest first to the cheapest micro-batch with room (Graham 1969: with room everywhere
    at most 4/3 of the optimum), then trades between the dearest and the cheap ones. ``cost`` is a cost model or any
    function of a group, positive and in any unit.

    The ranks' micro-batches of one step are neighbours in cost, the dearest step comes first, and the ranks' sums are
    close. A rank gets an empty micro-batch only if there are fewer groups (or parts) than micro-batches. The result
    depends on the arguments only. Raises ValueError for a budget or a number of ranks below 1, and for ``padded``,
    whose rows depend on what else is in the micro-batch.
    """
    check_layout(layout)
    if budget < 1:
        raise ValueError(f"micro_batch_tokens is {budget}: a micro-batch must hold at least one token")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}: there must be at least one")
    if layout == "padded":
        raise ValueError("the padded layout is not planned: use shared or varlen")
    price = (lambda group: cost.flops(group, layout)) if isinstance(cost, CostModel) else cost
    items = [item for g, group in enumerate(groups) for item in _items(g, group, budget, price, layout)]
    bins = _fill(items, budget, ranks)
    batches = [_micro_batch([items[i] for i in members], groups, price, layout) for members in bins]
    return _deal(batches, ranks)


def _part(group: Group, part: Sequence[int]) -> Group:
    return Group(group.prompt, [group.completions[i] for i in part])


def _items(index: int, group: Group, budget: int, price: Callable[[Group], float], layout: Layout) -> list[_Item]:
    """The group whole if it fits, otherwise its parts: as few as best-fit decreasing finds, of near-equal length."""
    everything = tuple(range(len(group.completions)))
    tokens = group.tokens(layout)
    if tokens <= budget or len(everything) <= 1:
        return [_Item(index, everything, tokens, min(tokens, budget), price(group))]
    once = len(group.prompt.ids) if layout == "shared" else 0  # of the prompt; varlen has it in every completion
    own = [_part(group, [i]).tokens(layout) - once for i in everything]
    pieces = [_Item(index, (i,), n, n, n) for i, n in enumerate(own) if once + n <= budget]
    parts = [tuple(i for (i,) in sorted(pieces[m].part for m in b)) for b in _fill(pieces, max(1, budget - once), 1)]
    parts += [(i,) for i, n in enumerate(own) if once + n > budget]
    made = [(part, _part(group, part)) for part in sorted(parts)]
    return [_Item(index, p, g.tokens(layout), min(g.tokens(layout), budget), price(g)) for p, g in made]


def _micro_batch(
    items: Sequence[_Item], groups: Sequence[Group], price: Callable[[Group], float], layout: Layout
) -> MicroBatch:
    """Two parts of one group that share a micro-batch also share the prompt."""
    parts: dict[int, tuple[int, ...]] = {}
    for item in sorted(items, key=lambda item: (item.group, item.part)):
        parts[item.group] = tuple(sorted((*parts.get(item.group, ()), *item.part)))
    if len(parts) == len(items):
        tokens, cost = sum(item.tokens for item in items), sum(item.cost for item in items)
    else:
        made = [_part(groups[g], part) for g, part in parts.items()]
        tokens, cost = sum(group.tokens(layout) for group in made), sum(price(group) for group in made)
    return MicroBatch(tuple(parts.items()), tokens, cost)


def _deal(batches: Sequence[MicroBatch], ranks: int) -> list[list[MicroBatch]]:
    """Step by step in falling cost; within a step the dearest goes to the rank that has the least so far."""
    order = sorted(batches, key=lambda batch: (-batch.cost, batch.parts))
    dealt: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for first in range(0, len(order), ranks):
        poorest = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for rank, batch in zip(poorest, order[first : first + ranks], strict=True):
            dealt[rank].append(batch)
            total[rank] += batch.cost
    return dealt


def _fill(items: Sequence[_Item], budget: int, ranks: int) -> list[list[int]]:
    """Indices of ``items`` in as few bins as found, a multiple of ``ranks``, of near-equal cost."""
    packed = _best_fit(items, budget)
    bins = _spread(items, budget, -(-len(packed) // ranks) * ranks)
    if bins is None:
        bins = packed
        while len(bins) % ranks:
            donor = max(bins, key=lambda members: (len(members) > 1, sum(items[i].cost for i in members)))
            bins.append([donor.pop()] if len(donor) > 1 else [])
    return _Bins(items, bins, budget).even_out()


def _best_fit(items: Sequence[_Item], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the largest first, into the fullest bin that has room (at most 11/9 of the fewest bins, + 1;
    Johnson 1973)."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in sorted(range(len(items)), key=lambda i: (-items[i].room, i)):
        at = bisect_left(rooms, (items[i].room, 0))
        if at == len(rooms):
            rooms.append((budget, len(bins)))
            bins.append([])
        room, chosen = rooms.pop(at)
        bins[chosen].append(i)
        insort(rooms, (room - items[i].room, chosen))
    return bins


def _spread(items: Sequence[_Item], budget: int, count: int) -> list[list[int]] | None:
    """The dearest first, into the cheapest of ``count`` bins that has room; None where one finds no room."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].cost, -items[i].room, i))
    smallest = math.inf
    least = [smallest := min(smallest, items[i].room) for i in reversed(order)][::-1]  # of an item and all after it
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, bin, budget) for bin in range(count)]
    for i, still in zip(order, least, strict=True):
        passed = []
        while heap and heap[0][2] < items[i].room:
            passed.append(heappop(heap))
        if not heap:
            return None
        cost, chosen, room = heappop(heap)
        bins[chosen].append(i)
        for entry in (*passed, (cost + items[i].cost, chosen, room - items[i].room)):
            if entry[2] >= still:  # a bin that nothing fits into any more is done
                heappush(heap, entry)
    return bins


class _Bins:
    """Bins with their cost and room, between which items are traded."""

    def __init__(self, items: Sequence[_Item], members: list[list[int]], budget: int):
        self.items, self.members = items, members
        self.cost = [sum(items[i].cost for i in bin) for bin in members]
        self.room = [budget - sum(items[i].room for i in bin) for bin in members]

    def even_out(self) -> list[list[int]]:
        """Trade between the dearest bins and the cheapest ones as long as it brings them closer; returns the bins."""
        every = range(len(self.members))
        high = CLOSE * sum(self.cost) / max(1, len(every))
        stuck: set[int] = set()
        left = TRIALS
        while left > 0 and (above := [b for b in every if self.cost[b] > high and b not in stuck]):
            dear = max(above, key=lambda b: (self.cost[b], -b))
            cheapest = nsmallest(PARTNERS, every, key=lambda b: (self.cost[b], b))
            left -= len(every) + sum(len(self.members[dear]) * (1 + len(self.members[b])) for b in cheapest)
            if any(self._trade(dear, cheap) for cheap in cheapest):
                stuck.clear()
            else:
                stuck.add(dear)
        return self.members

    def _trade(self, dear: int, cheap: int) -> bool:
        """Give an item of the one bin to the other, perhaps for one of its own, so that their costs come closest."""
        items, best = self.items, None
        closest = gap = self.cost[dear] - self.cost[cheap]
        for given in self.members[dear]:
            for taken in (None, *self.members[cheap]):
                cost, room = (0, 0) if taken is None else (items[taken].cost, items[taken].room)
                after = abs(gap - 2 * (items[given].cost - cost))
                more = items[given].room - room
                if after < closest and -self.room[dear] <= more <= self.room[cheap]:
                    best, closest = (given, taken), after
        if best is None:
            return False
        self._move(best[0], dear, cheap)
        if best[1] is not None:
            self._move(best[1], cheap, dear)
        return True

    def _move(self, item: int, source: int, target: int) -> None:
        for bin, sign in ((source, -1), (target, 1)):
            self.cost[bin] += sign * self.items[item].cost
            self.room[bin] -= sign * self.items[item].room
        self.members[source].remove(item)
        self.members[target].append(item)
