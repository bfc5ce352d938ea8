"""Several devices of one node, one process (rank) each: the same run everywhere, the work divided.

Every rank draws the same prompts, selects the same sequences and plans the same micro-batches, so that nothing has to
be decided twice; what differs is what a rank generates, scores, runs and keeps of the optimizer's state. Models are
whole on every rank: passes need no communication. ``torchrun`` starts the processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "World", "joined", "world"]

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: one may generate far longer than the rest."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of a run, from the point of view of one of them. Calls that communicate are made by all of them, in the
    same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of ``items``: every ``size``-th."""
        return list(items[self.rank :: self.size])

    @staticmethod
    def whole(parts: Sequence[Sequence[T]]) -> list[T]:
        """Of all ranks' parts of a sequence (as :meth:`share` gave them, whatever became of them)."""
        missing: Any = object()
        return [item for turn in zip_longest(*parts, fillvalue=missing) for item in turn if item is not missing]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (what pickle takes, tensors on the CPU), in the ranks' order, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_from(self, work: Callable[[], T], *kinds: type[Exception]) -> list[T]:
        """Every rank's result of ``work``. Where it fails on some rank, all raise: that rank its error, the others the
        first of ``kinds`` that it is (RuntimeError if it is none), made of a message that says which rank it was."""
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        if self.size == 1:
            if error is not None:
                raise error
            return [result]  # type: ignore[list-item]
        kind = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), None)
        failures = self.gather(None if error is None else (kind, f"{type(error).__name__}: {error}"))
        first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return self.gather(result)  # type: ignore[arg-type]
        if error is not None:
            raise error
        number, text = failures[first]  # type: ignore[misc]
        raise (RuntimeError if number is None else kinds[number])(f"rank {first}: {text}")

    def same(self, work: Callable[[], T], what: str) -> T:
        """The result of ``work``, which has to be the same on all ranks. Raises RuntimeError, naming ``what``, if it is
        not, and where ``work`` has failed elsewhere."""
        results = self.gather_from(work)
        other = next((rank for rank, result in enumerate(results) if result != results[0]), None)
        if other is not None:
            raise RuntimeError(f"rank {other} has other {what} than rank 0: {results[other]} instead of {results[0]}")
        return results[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in the place of ``values``."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return any(self.gather(flag))

    def agree(self, value: T) -> T:
        """The main rank's ``value``, on all of them."""
        return self.gather(value)[0] if self.size > 1 else value

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.gather(None)

    def reduce(self, values: Tensor, to: int) -> None:
        """The sum over the ranks, in the place of ``values`` on the rank ``to``; elsewhere they are undefined then."""
        if self.size > 1:
            dist.reduce(values, to)

    def broadcast(self, values: Tensor, of: int) -> None:
        """``values`` of one rank, in their place on all of them."""
        if self.size > 1:
            dist.broadcast(values, of)

    def collect(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' tensors by name, on the main rank and its CPU; nothing elsewhere. Sent one after the other."""
        if self.size == 1:
            return mine
        found: dict[str, Tensor] = {}
        shapes = self.gather({name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()})
        for rank, theirs in enumerate(shapes):
            for name, (shape, dtype) in theirs.items():
                if rank == self.rank == 0:
                    found[name] = mine[name]
                elif self.main:
                    found[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(found[name], rank)
                elif rank == self.rank:
                    dist.send(mine[name].detach().cpu().contiguous(), 0)
        return found


ALONE = World()
_world = ALONE


def world() -> World:
    """The ranks of this process's run; :data:`ALONE` outside :func:`joined`."""
    return _world


@contextmanager
def joined() -> Iterator[World]:
    """Inside, this process is one of those that ``torchrun`` started, if it did. Raises ValueError for more nodes, and
    where somebody else has begun to use torch.distributed."""
    global _world
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size == 1 or _world is not ALONE:
        yield _world
        return
    if dist.is_initialized():
        raise ValueError("torch.distributed is in use already: let the run make its own process group")
    if size != local:
        raise ValueError(f"{size} ranks, {local} of them here: one node only (torchrun --standalone --nproc-per-node)")
    cuda = torch.cuda.device_count() >= size  # with fewer the ranks can only be on the CPU
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    _world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield _world
    finally:
        _world = ALONE
        time.sleep(0.1)  # gloo's thread may want the GIL to end a last call; the group's end keeps it (pytorch#56297)
        dist.destroy_process_group()


def owners(sizes: Iterable[tuple[str, int]], ranks: int) -> dict[str, int]:
    """Which rank keeps what: name -> rank, the largest first to the rank that has the least so far."""
    loads, found = [0] * ranks, {}
    for name, size in sorted(sizes, key=lambda item: (-item[1], item[0])):
        rank = loads.index(min(loads))
        found[name] = rank
        loads[rank] += size
    return found
