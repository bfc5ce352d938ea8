"""The gradient of several chunks' logits, kept until it is multiplied at once: fewer and larger products.

Rows come in order and are written where they belong, active or not. How many of them are active the host learns when
it has queued the next logits, so that the device does not wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revisual_fast.kernels.plan import active_rows, worth_skipping
from revisual_fast.ranges import span

MOVED_BYTES = 64 << 20
"""Of the gradient's rows, what is copied at a time to close the gaps between active rows."""


class Superchunk:
    """Consecutive rows and the gradient of their logits."""

    def __init__(self, capacity: int, vocab: int, like: Tensor, skip: bool) -> None:
        self.dz = like.new_empty((capacity, vocab))
        self.skip, self.start, self.stop = skip, 0, 0
        self.active = like.new_empty(capacity, dtype=torch.bool)
        self.count = torch.empty(
            (), dtype=torch.int64, pin_memory=like.is_cuda
        )  # of active rows, valid after ``ready``
        self.ready = torch.cuda.Event() if like.is_cuda else None

    def fits(self, rows: slice) -> bool:
        """Whether the next ``rows`` can be held as well; any that are not more than the capacity fit into nothing."""
        return self.stop == self.start or rows.stop - self.start <= len(self.dz)

    def place(self, rows: slice) -> Tensor:
        """``[n, V]`` where the gradient of ``rows`` goes, the next ones."""
        if self.stop == self.start:
            self.start = self.stop = rows.start
        assert rows.start == self.stop, "rows come in order"
        return self.dz[rows.start - self.start : rows.stop - self.start]

    def add(self, rows: slice, c: Tensor, e: Tensor | None) -> None:
        """The gradient of ``rows`` stands, or has been queued to stand, in its place."""
        self.stop = rows.stop
        if not self.skip:
            return
        self.active[rows.start - self.start : rows.stop - self.start] = active_rows(c, e)
        self.count.copy_(self.active[: self.stop - self.start].sum(), non_blocking=True)
        if self.ready is not None:
            self.ready.record()

    def take(self) -> tuple[Tensor, slice | Tensor] | None:
        """What is held, ``[k, V]``, and the rows it belongs to; without inactive rows if that pays. None: nothing.

        To be used before the next row is placed.
        """
        n, start = self.stop - self.start, self.start
        self.start = self.stop
        if n == 0 or (k := self._active(n)) == 0:
            return None
        if not worth_skipping(k, n):
            return self.dz[:n], slice(start, start + n)
        return self.dz[:k], start + close_gaps(self.dz[:n], self.active[:n], k)

    def _active(self, n: int) -> int:
        if not self.skip:
            return n
        if self.ready is not None:
            with span("wait for the count of rows"):
                self.ready.synchronize()
        return int(self.count)


def close_gaps(rows: Tensor, active: Tensor, k: int) -> Tensor:
    """Makes the ``k`` active of ``n > k`` rows the first, in place; returns which they were, ``[k]``.

    Active rows from behind k take the places of inactive ones before it: at most min(k, n - k) are copied. The host
    does not know how many, so the rest of that number is the last row, onto itself.
    """
    n = len(rows)
    most = min(k, n - k)
    gaps = torch.nonzero_static(~active[:k], size=most, fill_value=n - 1)[:, 0]
    movers = k + torch.nonzero_static(active[k:], size=most, fill_value=n - 1 - k)[:, 0]
    step = max(1, MOVED_BYTES // (rows.shape[1] * rows.itemsize))
    for to, by in zip(gaps.split(step), movers.split(step), strict=True):
        rows.index_copy_(0, to, rows.index_select(0, by))
    return torch.arange(n, device=rows.device).index_copy_(0, gaps, movers)[:k]
