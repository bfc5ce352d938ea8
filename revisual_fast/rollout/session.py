"""An engine between uses: brought up to date before one, put to sleep after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from revisual_fast.distributed import world
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import span
from revisual_fast.rollout.engine import Engine, EngineError, NonFiniteLogits, Sync

__all__ = ["EngineSession"]


class EngineSession:
    """``sleep_level`` 0 leaves the engine awake; 1 and 2 as in :meth:`Engine.sleep`.

    ``awake`` and ``asleep`` are the bytes that the engine held at the end of its
    latest use and after it.
    """

    def __init__(self, engine: Engine, sleep_level: int = 0):
        self.engine = engine
        self.sleep_level = sleep_level
        self._sent: list[Sync] = []
        self.awake = self.asleep = 0

    def update(self, policy: Policy, version: int) -> None:
        """The engine samples from ``policy``; of a sleeping one, first the weights come back, then the cache.

        What fails on one rank fails on all."""

        def work() -> Sync:
            if self.sleep_level:
                self.engine.wake_up(["weights"])
            sent = self.engine.update_weights(policy, version)
            if self.sleep_level:
                self.engine.wake_up(["kv_cache"])
            return sent

        with span("weight sync"):
            ranks = world()
            self._sent.append(ranks.gather_from(work, NonFiniteLogits, EngineError)[ranks.rank])

    def taken(self) -> Sync:
        """All weight updates since this was last asked, added up."""
        sent, self._sent = self._sent, []
        return Sync(sum(s.tensors for s in sent), sum(s.bytes for s in sent), sum(s.seconds for s in sent))

    @contextmanager
    def use(self, policy: Policy, version: int) -> Iterator[Engine]:
        """The engine with the weights of ``policy``; afterwards it sleeps, if it is to."""
        self.update(policy, version)
        yield self.engine
        self.awake = self.engine.memory()
        if self.sleep_level:
            self.engine.sleep(self.sleep_level)
        self.asleep = self.engine.memory() if self.sleep_level else self.awake
