"""Which rows attend to which, as tables of tiles for the kernels of shared attention; made on the host, once a batch.

A tile of queries has rows of adjacent segments with one prefix, so that completions shorter than a tile fill it
together. A tile of keys has rows of adjacent segments that are in the same prefix or in none. What a row's own segment
is stands in ``own_start`` and ``own_end``. Kernels may cut a tile into smaller ones of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GRAIN", "AttentionTiles"]

GRAIN = 128
"""Rows of a tile, at most."""
PROGRAMS = 1024
"""A kernel with fewer programs, or with one that has more than this part of the work, may leave a GPU idle."""


class _Segment(NamedTuple):
    """Rows ``[start, end)`` see the rows ``[prefix_start, prefix_end)``, and of their own those up to themselves."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True, eq=False)
class AttentionTiles:
    """Tables of a batch of ``T`` rows, for all layers; on one device. See :meth:`of`."""

    query_tiles: Tensor  # [Q, 4] int32: rows from, to; prefix from, its length. The one with the most keys first
    key_tiles: Tensor  # [K, 4] int32: rows from, to; rows that have these in their prefix from, to. Likewise
    own_start: Tensor  # [T] int32: first row of each row's segment
    own_end: Tensor  # [T] int32: row after the last one of each row's segment
    segments: tuple[_Segment, ...]
    grain: int  # rows of a tile, at most; a power of two
    heaviest: int  # queries that the tile of keys with the most has
    total: int  # of all tiles of keys

    @classmethod
    def of(
        cls,
        start: Sequence[int],
        length: Sequence[int],
        prefix_start: Sequence[int],
        prefix_length: Sequence[int],
        device: torch.device | str,
        *,
        grain: int = GRAIN,
    ) -> AttentionTiles:
        """Tables of segments in the order of their rows, which cover ``[0, T)``.

        Rows ``[start, start + length)`` see the rows ``[prefix_start, prefix_start + prefix_length)`` and of their own
        those up to themselves. Segments with the same prefix must be adjacent, and prefixes must not overlap, nor
        overlap the segments that have them. Copies to ``device`` once. Raises ValueError.
        """
        segments = _checked(start, length, prefix_start, prefix_length)
        runs = _merged(segments)
        readers = _readers(runs)
        n_rows = segments[-1].end if segments else 0
        own = torch.tensor([(s.start, s.end) for s in segments], dtype=torch.int32).view(-1, 2)
        own_rows = own.repeat_interleave(own[:, 1] - own[:, 0], 0) if segments else own
        query = [
            (keys, (first, last, run.prefix_start, run.prefix_end - run.prefix_start))
            for run in runs
            for first, last in _cut(run.start, run.end, grain)
            for keys in (run.prefix_end - run.prefix_start + last - int(own_rows[first, 0]),)
        ]
        key = []
        for zone_first, zone_last, reader in _zones(n_rows, readers):
            for first, last in _cut(zone_first, zone_last, grain):
                queries = int(own_rows[last - 1, 1]) - first + reader.end - reader.start
                key.append((queries, (first, last, reader.start, reader.end)))
        tables = [_heaviest_first(query), _heaviest_first(key), own_rows.T.reshape(2 * n_rows)]
        joined = torch.cat([table.flatten() for table in tables])
        moved = (joined.pin_memory() if torch.device(device).type == "cuda" else joined).to(device, non_blocking=True)
        query_tiles, key_tiles, own_start, own_end = moved.split([4 * len(query), 4 * len(key), n_rows, n_rows])
        weights = [weight for weight, _ in key]
        return cls(
            *(query_tiles.view(-1, 4), key_tiles.view(-1, 4), own_start, own_end, tuple(segments), grain),
            *(max(weights, default=0), sum(weights)),
        )

    @property
    def n_rows(self) -> int:
        return len(self.own_start)

    def splits(self, share: int, kv_heads: int) -> int:
        """Programs that share the work of a tile of keys and a key head, which ``share`` query heads read.

        The fewest, for each writes its part of dK and dV in fp32, such that no program has more than one part in
        ``PROGRAMS`` of the work; else one a query head.
        """
        work = self.total * kv_heads * share
        enough = (n for n in range(1, share + 1) if share % n == 0 and self.heaviest * share // n * PROGRAMS <= work)
        return next(enough, share)


def _checked(*fields: Sequence[int]) -> list[_Segment]:
    if len({len(field) for field in fields}) > 1:
        raise ValueError(f"start, length, prefix_start and prefix_length differ in length: {[len(f) for f in fields]}")
    segments, at = [], 0
    n_rows = sum(fields[1])
    for i, (start, length, prefix, n_prefix) in enumerate(zip(*fields, strict=True)):
        if start != at or length < 1:
            raise ValueError(f"segment {i} is {length} rows from {start}; it must begin at row {at} and not be empty")
        at += length
        if n_prefix < 0 or (n_prefix > 0 and not 0 <= prefix <= n_rows - n_prefix):
            raise ValueError(f"the prefix of segment {i}, {n_prefix} rows from {prefix}, is not in [0, {n_rows})")
        if n_prefix > 0 and prefix < at and start < prefix + n_prefix:
            raise ValueError(f"segment {i}, rows {start} to {at - 1}, overlaps its prefix, {n_prefix} from {prefix}")
        segments.append(_Segment(start, at, prefix, prefix + n_prefix) if n_prefix else _Segment(start, at, 0, 0))
    return segments


def _merged(segments: Sequence[_Segment]) -> list[_Segment]:
    """Adjacent segments with the same prefix as one."""
    runs: list[_Segment] = []
    for segment in segments:
        if runs and runs[-1][2:] == segment[2:]:
            runs[-1] = runs[-1]._replace(end=segment.end)
        else:
            runs.append(segment)
    return runs


def _readers(runs: Sequence[_Segment]) -> list[_Segment]:
    """The runs that have a prefix, in the order of their prefixes."""
    readers = sorted((run for run in runs if run.prefix_end > 0), key=lambda run: run.prefix_start)
    for one, other in pairwise(readers):
        if other.prefix_start < one.prefix_end:
            raise ValueError(
                f"rows {other.prefix_start} to {min(one.prefix_end, other.prefix_end) - 1} are in the prefixes of rows "
                f"{one.start} to {one.end - 1} and of rows {other.start} to {other.end - 1}: segments with the same "
                "prefix must be adjacent and have all of it; repeat the prompt instead"
            )
    return readers


def _zones(n_rows: int, readers: Sequence[_Segment]) -> list[tuple[int, int, _Segment]]:
    """All rows, cut where a prefix begins or ends: from, to, and the run that has them as its prefix."""
    nobody, zones, at = _Segment(0, 0, 0, 0), [], 0
    for reader in readers:
        zones += [(at, reader.prefix_start, nobody), (reader.prefix_start, reader.prefix_end, reader)]
        at = reader.prefix_end
    return [*zones, (at, n_rows, nobody)]


def _cut(first: int, last: int, grain: int) -> list[tuple[int, int]]:
    return [(at, min(at + grain, last)) for at in range(first, last, grain)]


def _heaviest_first(tiles: list[tuple[int, tuple[int, int, int, int]]]) -> Tensor:
    """``[n, 4]`` int32: those with the most work start first, so that no late one keeps the device waiting."""
    ordered = sorted(tiles, key=lambda tile: -tile[0])
    return torch.tensor([tile for _, tile in ordered], dtype=torch.int32).view(-1, 4)
