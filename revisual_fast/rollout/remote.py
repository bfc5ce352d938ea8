"""An engine in another process or on another machine: kept up to date, and put right when it fails.

:class:`RemoteEngine` knows what the engine at the other end of a :class:`Connection` holds. It sends what is missing,
asks again what was not answered, and starts an engine that was lost anew, with the current weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Literal, Protocol, TypeVar
from weakref import ref

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import EngineError, OnGroup, Rollout, Sampling, Sync
from revisual_fast.rollout.messages import Event, Failed, Finished, Request
from revisual_fast.rollout.requests import PendingBatch, make_requests
from revisual_fast.rollout.weights import WeightSource, compare

__all__ = ["Connection", "EngineLost", "RemoteEngine", "Sender"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

PARTS = ("weights", "kv_cache")
"""What sleeps."""
ADVICE = {
    "died": "",
    "hung": "\nIf it was merely slow, raise rollout.stall_seconds.",
    "out of memory": "\nLower rollout.max_batch, or change rollout.memory_share to what the trainer leaves free.",
}


class EngineLost(Exception):
    """The engine is of no use any more: it died, gave no sign of life for too long, or has no memory left."""

    def __init__(self, kind: Literal["died", "hung", "out of memory"], text: str):
        super().__init__(f"{kind}: {text}")
        self.kind: Literal["died", "hung", "out of memory"] = kind
        self.text = text


class Connection(Protocol):
    """The way to one engine. All but ``kill`` and ``close`` raise :class:`EngineLost` where the engine is lost.

    After that, and after a stream of events that was not read to its end, only ``start``, ``kill`` and ``close`` may
    be called. Raises EngineError where the engine is well and refuses.
    """

    def start(self) -> int:
        """Start the engine, or wait for it; blocks until it can be used. Returns the rows of its model's head."""

    def call(self, name: str, *, timeout: float | None = None, **kwargs: Any) -> Any:
        """The value of a :class:`~revisual_fast.rollout.messages.Command`; ``timeout`` in seconds."""

    def generate(self, requests: Sequence[Request], n: int, sampling: Sampling) -> Generator[Event]:
        """Events until every request is answered with Finished or Failed."""

    def kill(self) -> None:
        """Give the engine up at once. May be repeated."""

    def close(self) -> None:
        """End the engine, politely where it listens."""


class Sender(Protocol):
    """Moves weights over a connection."""

    def send(self, source: WeightSource, names: frozenset[str] | None, version: int) -> Sync:
        """Send the weights of these ``names``, or all; then the engine drops what it has derived from earlier ones."""

    def forget(self) -> None:
        """The engine is a new one."""


class RemoteEngine:
    """The :class:`~revisual_fast.rollout.engine.Engine` at the other end of ``connection``; it is started when needed.

    Within one call the engine is started anew at most ``max_restarts`` times, and one that has never started not at
    all. A request that fails is sent again ``request_retries`` times. With ``check_weights`` the fingerprints of all
    weights are compared after every update. The policy is not kept alive. Weights that have to be sent again while the
    trainer goes on are those of that moment, and of the version that was asked for last.
    """

    def __init__(
        self,
        connection: Connection,
        sender: Sender,
        *,
        max_restarts: int = 3,
        request_retries: int = 2,
        check_weights: bool = False,
    ):
        self.connection, self.sender = connection, sender
        self.max_restarts, self.request_retries = max_restarts, request_retries
        self.check_weights = check_weights
        self.counts = {"restarts": 0, "retried_requests": 0, "regenerated_groups": 0}
        self._vocab: int | None = None  # as the latest start has said
        self._running = False
        self._asleep: set[str] = set()
        self._closed = False
        self._wanted: tuple[ref[Policy], int] | None = None  # policy and version
        self._held: tuple[ref[Policy], int] | None = None  # what the engine has of them
        self._trained: frozenset[str] = frozenset()  # names that could change when they were last sent

    # -- the protocol

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        assert self._wanted is not None, "update_weights first"
        assert not self._asleep, f"wake_up first: {sorted(self._asleep)}"
        family = self._policy().family
        batch = PendingBatch(make_requests(prompts, family, sampling), n, sampling, on_group)
        self._surely("a batch", lambda: self._answer(batch))
        if batch.refused is not None:
            raise batch.refused
        return [batch.groups[i] for i in range(len(prompts))]

    def update_weights(self, policy: Policy, version: int) -> Sync:
        assert "weights" not in self._asleep, "wake_up the weights first"
        self._wanted = ref(policy), version
        return self._surely("a weight update", self._prepare)

    def sleep(self, level: int = 1) -> None:
        """An engine that is lost on the way sleeps deepest: it is started anew when it is needed."""
        if self._running and self._calls("sleep", level=level):
            self._asleep = set(PARTS)
            self._held = None if level == 2 else self._held

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        if self._asleep.intersection(tags or PARTS) and self._calls("wake_up", tags=tags):
            self._asleep -= set(tags or PARTS)

    def memory(self) -> int:
        answer = self._calls("memory") if self._running else []
        return answer[0] if answer else 0

    def close(self) -> None:
        self._closed = True
        self.connection.close()
        self._forget()

    # -- the engine's life

    def _surely(self, what: str, action: Callable[[], _T]) -> _T:
        """The result of ``action``, which starts the engine if it does not run and is repeated when it is lost."""
        losses: list[EngineLost] = []
        while len(losses) <= self.max_restarts:
            try:
                return action()
            except EngineLost as lost:
                if self._closed:
                    raise EngineError("the engine was closed while it was asked for something") from lost
                losses.append(lost)
                self._lose(lost)
            except BaseException:  # also a KeyboardInterrupt: what the engine was about is not known
                self._abandon()
                raise
        last = losses[-1]
        message = f"the engine was lost {len(losses)} times within {what} (rollout.max_restarts: {self.max_restarts})"
        raise EngineError(f"{message}, at last: {last}{ADVICE[last.kind]}") from last

    def _calls(self, name: str, **kwargs: Any) -> list[Any]:
        """The value of a command in a list, which is empty if the engine was lost; it is then not started again yet."""
        try:
            return [self.connection.call(name, **kwargs)]
        except EngineLost as lost:
            self._lose(lost)
            return []
        except BaseException:
            self._abandon()
            raise

    def _start(self) -> None:
        if self._running:
            return
        if self._closed:
            raise EngineError("the engine has been closed")
        try:
            vocab = self.connection.start()
        except EngineLost as lost:
            if self._vocab is None:
                self._abandon()
                raise EngineError(f"the engine cannot be started: {lost}{ADVICE[lost.kind]}") from lost
            raise
        self.counts["restarts"] += self._vocab is not None
        self._vocab, self._running = vocab, True

    def _lose(self, lost: EngineLost) -> None:
        _log.warning("The engine is lost and will be started anew: %s", lost)
        self._abandon()

    def _abandon(self) -> None:
        self.connection.kill()
        self._forget()

    def _forget(self) -> None:
        self._running, self._asleep, self._held = False, set(), None
        self.sender.forget()

    # -- weights

    def _prepare(self) -> Sync:
        """The engine runs, with the weights that are wanted; what was sent."""
        assert self._wanted is not None
        self._start()
        if self._held == self._wanted:
            return Sync()
        policy, version = self._policy(), self._wanted[1]
        rows = policy.head_weight.shape[0]
        if self._vocab != rows:
            raise EngineError(f"the engine's model has a vocabulary of {self._vocab}, the policy's {rows}: another one")
        with policy.writing:
            source = WeightSource(policy)
            same = self._held is not None and self._held[0] == self._wanted[0]
            names = self._trained | source.changed() if same else None
            self._held = None  # until all of it is there
            sync = self.sender.send(source, names, version)
            self._trained = source.changed()
            if self.check_weights:
                self._check(source, version)
        self._held = self._wanted
        return sync

    def _policy(self) -> Policy:
        assert self._wanted is not None
        policy = self._wanted[0]()
        assert policy is not None, "the policy is gone: update_weights with another"
        return policy

    def _check(self, source: WeightSource, version: int) -> None:
        ours = source.fingerprints()
        theirs = self.connection.call("fingerprints", names=list(ours))
        if problems := compare(ours, theirs["workers"], theirs["mapping"]):
            some = "\n".join([*problems[:5], *["..."] * (len(problems) > 5)])
            raise EngineError(f"after the update to version {version} the engine holds other weights:\n{some}")

    # -- completions

    def _answer(self, batch: PendingBatch) -> None:
        """Ask for what is missing until nothing is, or a request has failed too often."""
        while (missing := batch.missing()) and batch.refused is None:
            self._prepare()
            assert self._held is not None
            self.counts["retried_requests"] += sum(1 for r in missing if r.index in batch.failed)
            batch.failed.clear()
            try:
                with closing(self.connection.generate(missing, batch.n, batch.sampling)) as events:
                    for event in events:
                        if isinstance(event, Finished):
                            batch.finish(event, self._held[1])
                        elif isinstance(event, Failed):
                            batch.fail(event, self.request_retries)
            except EngineLost:
                self.counts["regenerated_groups"] += len(batch.missing())
                raise
