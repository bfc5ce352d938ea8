"""How a pass over ``N`` rows is cut, and which rows have a gradient: what every backend shares.

A chunk holds as many rows as its byte budget allows. A part is a set of rows whose loss can be computed by itself: any
rows for a row-local objective, whole sequences for a sequence-level one, all rows for a function that nobody knows. A
part that fits in a chunk takes one pass; one that does not has its statistics computed first and its logits again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
"""Size by device type of a chunk's fp32 logits; without superchunks, of their narrower gradient as well."""

SUPERCHUNK_BYTES = {"cuda": 5 << 29}
"""Size by device type of the gradient, in hidden's dtype, that chunks leave behind and that is multiplied at once.

8,192 rows of 152,064 logits take 2.49 GB in bf16, so that dX and dW are one product each: with four, every sum of dW
but the first would read and write 8 V D bytes again, and dX of 2,048 rows would fill 132 multiprocessors 1.7 times
instead of 6.8. A device that is not named multiplies chunk by chunk: on a CPU the gradient is still in the cache.
"""

SAVED_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
"""Up to this size ``linear_logprob`` keeps the logits for its backward pass; beyond it they are computed again."""

WORTH_SKIPPING = 0.05
"""Share of rows without gradient from which on gathering the others costs less than multiplying all."""

TILE = 128
"""Rows of a GEMM's tile: chunks are a multiple of it long where they may be."""

SURROGATES = {name: number for number, name in enumerate(("clip", "cispo", "sapo", "reinforce", "sft"))}
KL_FORMS = {None: 0, "k1": 1, "k2": 2, "k3": 3}
CORRECTIONS = {None: 0, "given": 1, "truncate": 2, "mask": 3}
"""What the one-kernel path has, and the numbers these go by in the kernels."""


class Part(NamedTuple):
    """Rows whose loss can be computed by itself, and the sequences they are, where that matters."""

    rows: slice
    sequences: slice | None = None

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start


Gradients = Callable[[Tensor, Tensor, Part], tuple[Tensor, Tensor, Tensor | None]]
"""``(logp [n], entropy [n], part) -> (loss of the part, c = dL/dlogp [n], e = dL/dH [n] or None)``."""


@dataclass(frozen=True)
class Inline:
    """A built-in token-level objective as the one-kernel path takes it: settings by name, ``[N]`` vectors, numbers."""

    surrogate: str
    kl: str | None  # None: no KL term
    kl_bias_correction: bool
    correction: (
        str | None
    )  # None | given (rollout holds the weight) | truncate | mask (it holds the engine's log-probs)
    has_entropy: bool
    advantages: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout: Tensor | None
    weight: Tensor
    numbers: tuple[float, ...]  # clip_low, clip_high, dual_clip, delta, tau_pos, tau_neg, kl_coef, entropy_coef, cap

    def vectors(self, rows: slice) -> tuple[Tensor | None, ...]:
        """advantages, old_logp, ref_logp, rollout and weight of some rows."""
        all_rows = (self.advantages, self.old_logp, self.ref_logp, self.rollout, self.weight)
        return tuple(None if vector is None else vector[rows] for vector in all_rows)


@dataclass(frozen=True)
class Plan:
    """What is minimised, as far as a backend needs to know."""

    gradients: Gradients
    value: Callable[[Tensor, Tensor, Part], Tensor]  # the loss alone, forward only
    scope: str  # what a part may be: any "row"s, whole "sequence"s, only the whole "batch"
    boundaries: Sequence[int] | None = None  # cu_seqlens as host integers; without them the batch is one part
    inline: Inline | None = None  # the objective, for a backend that has it in its kernel
    skip: bool = True  # rows with c = e = 0 leave before the gradient GEMMs

    def parts(self, n_rows: int, size: int, superchunk: int = 0) -> list[Part]:
        """Consecutive parts that cover ``n_rows``, of at most ``size`` rows wherever the scope allows it."""
        if self.scope == "row":
            return [Part(rows) for rows in chunks(n_rows, size, superchunk)]
        if self.scope == "batch" or self.boundaries is None or n_rows <= size:
            return [Part(slice(0, n_rows))]
        return list(_whole_sequences(self.boundaries, size))


def _whole_sequences(cu_seqlens: Sequence[int], size: int) -> list[Part]:
    parts, first = [], 0
    for last in range(1, len(cu_seqlens)):
        if last + 1 == len(cu_seqlens) or cu_seqlens[last + 1] - cu_seqlens[first] > size:
            parts.append(Part(slice(cu_seqlens[first], cu_seqlens[last]), slice(first, last)))
            first = last
    return parts


def slices(n_rows: int, size: int) -> list[slice]:
    """Slices of nearly equal length, at most ``size``, that cover ``n_rows``; whole tiles where ``size`` allows it."""
    even = math.ceil(n_rows / max(1, math.ceil(n_rows / max(1, size))))
    tiles = math.ceil(even / TILE) * TILE
    step = tiles if tiles <= size else even
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, max(1, step))]


def chunks(n_rows: int, size: int, superchunk: int = 0) -> list[slice]:
    """Slices of at most ``size`` rows, none of which crosses the bounds of a superchunk (0: there are none)."""
    if superchunk == 0:
        return slices(n_rows, size)
    whole = [(rows.start, slices(rows.stop - rows.start, size)) for rows in slices(n_rows, superchunk)]
    return [slice(start + rows.start, start + rows.stop) for start, inside in whole for rows in inside]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums over tensors of ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def active_rows(c: Tensor, e: Tensor | None) -> Tensor:
    """``[n]`` bool: the rows whose gradient is not 0."""
    return (c != 0) if e is None else (c != 0) | (e != 0)


def worth_skipping(n_active: int, n_rows: int) -> bool:
    """Whether so many rows have no gradient that leaving them out pays."""
    return n_active <= (1 - WORTH_SKIPPING) * n_rows


def rows_per_chunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows that fit in ``CHUNK_BYTES``, at least one: fp32 or fp64 logits, and a gradient of a narrower ``dtype`` that
    has no budget of its own."""
    stats = statistics_dtype(dtype)
    gradient = 0 if dtype == stats or device.type in SUPERCHUNK_BYTES else dtype.itemsize
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (vocab * (stats.itemsize + gradient)))


def rows_per_superchunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose gradient of ``dtype`` fits in ``SUPERCHUNK_BYTES``, at least one; 0 if the device has none."""
    budget = SUPERCHUNK_BYTES.get(device.type)
    return 0 if budget is None else max(1, budget // (vocab * dtype.itemsize))


class Chunk(Protocol):
    """Some rows whose statistics are known and whose gradient can still be made."""

    logp: Tensor  # [n] of the statistics' dtype
    entropy: Tensor  # [n]

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """dL/d(raw logits) ``[k, V]`` of the rows ``index`` (None: all). May be asked for once."""


class Sink(Protocol):
    """Where the gradient of the rows' logits goes."""

    def place(self, rows: slice | Tensor) -> Tensor | None:
        """``[n, V]`` for the gradient of these rows, the next in order; None: wherever the chunk likes."""

    def add(self, rows: slice | Tensor, chunk: Chunk, c: Tensor, e: Tensor | None, index: Tensor | None) -> None:
        """``rows`` are the chunk's; ``index`` says which of them have a gradient (None: all, or a superchunk knows)."""

    def finish(self) -> None:
        """Every row has been added."""


class Source(Protocol):
    """Where the rows' logits come from. A chunk whose gradient will be asked for is told the ``sink``."""

    n_rows: int
    size: int  # rows of a chunk
    superchunk: int  # rows that are multiplied at once; 0: chunk by chunk
    stats: torch.dtype  # of logp and entropy
    device: torch.device

    def chunk(self, rows: slice | Tensor, sink: Sink | None = None) -> Chunk: ...
    def solve(
        self, plan: Plan, part: Part, sink: Sink
    ) -> tuple[Chunk, Tensor, Tensor, Tensor | None]: ...  # chunk, loss, c, e


def add_active(sink: Sink, rows: slice, chunk: Chunk, c: Tensor, e: Tensor | None) -> None:
    """Pass a chunk on to the sink, without the rows whose gradient is 0 where that pays. The host looks at the rows."""
    active = active_rows(c, e)
    count = int(active.sum())
    if count:
        sink.add(rows, chunk, c, e, active.nonzero()[:, 0] if worth_skipping(count, len(active)) else None)


def statistics(source: Source, rows: slice) -> tuple[Tensor, Tensor]:
    """logp and entropy of the rows, in chunks: 2 n D V for a head."""
    if 0 < rows.stop - rows.start <= source.size:
        chunk = source.chunk(rows)
        return chunk.logp, chunk.entropy
    logp = torch.empty(rows.stop - rows.start, dtype=source.stats, device=source.device)
    entropy = torch.empty_like(logp)
    for at in slices(len(logp), source.size):
        chunk = source.chunk(slice(rows.start + at.start, rows.start + at.stop))
        logp[at], entropy[at] = chunk.logp, chunk.entropy
    return logp, entropy


def backward(source: Source, sink: Sink, rows: slice, c: Tensor, e: Tensor | None, skip: bool) -> None:
    """Gradients of ``rows`` for known ``c [n]`` and ``e [n]``; their logits are asked for again.

    k rows that count cost 6 k D V; with superchunks, on CUDA, where k is known too late for the first GEMM,
    2 n D V + 4 k D V.
    """
    index = None
    if skip and not source.superchunk:
        index = active_rows(c, e).nonzero()[:, 0]
        index = index if worth_skipping(len(index), len(c)) else None
    for at in chunks(len(c) if index is None else len(index), source.size, source.superchunk):
        chosen = at if index is None else index[at]
        where = slice(rows.start + at.start, rows.start + at.stop) if index is None else chosen + rows.start
        sink.add(where, source.chunk(where, sink), c[chosen], None if e is None else e[chosen], None)


def policy_pass(source: Source, sink: Sink | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), logp ``[N]``, entropy ``[N]``; gradients go to ``sink``, if there is one."""
    everything = slice(0, source.n_rows)
    if sink is None:
        logp, entropy = statistics(source, everything)
        return plan.value(logp, entropy, Part(everything)), logp, entropy
    logp = torch.empty(source.n_rows, dtype=source.stats, device=source.device)
    entropy, total = torch.empty_like(logp), logp.new_zeros(())
    for part in plan.parts(source.n_rows, source.size, source.superchunk):
        total = total + _part(source, sink, plan, part, logp[part.rows], entropy[part.rows])
    sink.finish()
    return total, logp, entropy


def _part(source: Source, sink: Sink, plan: Plan, part: Part, logp: Tensor, entropy: Tensor) -> Tensor:
    """The loss of a part; its gradients go to ``sink``. Writes ``logp`` and ``entropy``."""
    if part.length <= source.size:
        chunk, loss, c, e = source.solve(plan, part, sink)
        logp.copy_(chunk.logp)
        entropy.copy_(chunk.entropy)
        if plan.skip and not source.superchunk:
            add_active(sink, part.rows, chunk, c, e)
        else:
            sink.add(part.rows, chunk, c, e, None)
        return loss
    for whole, found in zip((logp, entropy), statistics(source, part.rows), strict=True):
        whole.copy_(found)
    loss, c, e = plan.gradients(logp, entropy, part)
    backward(source, sink, part.rows, c, e, plan.skip)
    return loss
