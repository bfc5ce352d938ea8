"""From prompts to groups that are generated and scored: streaming, resampling, and generating one step ahead.

Rewards of a group are computed as soon as its completions are known, while an engine elsewhere goes on. Groups that are
stagnant can be replaced by further prompts. With overlap the batch of the next step is generated while this one trains;
it is at most one step old, which every rollout says by its ``version``, the number of steps its weights had trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from revisual_fast.advantages import stagnation
from revisual_fast.config import GRPOConfig
from revisual_fast.data.processor import Example, Processor
from revisual_fast.distributed import world
from revisual_fast.policy.model import Policy
from revisual_fast.ranges import ranged
from revisual_fast.rewards import Completion, Rewards, RewardTable
from revisual_fast.rollout.engine import Engine, EngineError, NonFiniteLogits, RequestError, Rollout, Sampling
from revisual_fast.rollout.session import EngineSession

__all__ = ["Batch", "Collector", "ScoredGroup"]


@dataclass(frozen=True)
class ScoredGroup:
    """A prompt with its completions and their rewards."""

    example: Example
    rollouts: list[Rollout]
    table: RewardTable

    def stagnant(self, on: str) -> bool:
        """Whether all completions have the same ``on``: "accuracy" or "reward"."""
        values = self.table.accuracy if on == "accuracy" else self.table.total
        return stagnation(values[None]) == 1


@dataclass(frozen=True)
class Batch:
    """What one step trains on, and what it took to get it."""

    groups: list[ScoredGroup]
    """As many as the step has prompts."""
    drawn: list[ScoredGroup]
    """All that were generated for it."""
    tries: int = 0
    """Further rounds that replaced stagnant groups."""
    filled: int = 0
    """Groups taken although they are stagnant, as the tries were used up."""
    seconds: float = 0.0
    """Of generation, rewards included."""
    reward_seconds: float = 0.0
    """Of rewards."""
    end: int = 0
    """Records drawn when it was complete."""


@dataclass
class _Ahead:
    """The batch of ``step``, under way or done."""

    step: int
    start: int  # records drawn before it
    future: Future[Batch]


class Collector:
    """For the stage called ``name``.

    ``draw(count)`` gives further examples, ``position()`` how many records that took so far, ``seed(step, purpose)``
    the seed of a step.
    """

    def __init__(
        self,
        session: EngineSession,
        policy: Policy,
        stage: GRPOConfig,
        rewards: Rewards,
        processor: Processor,
        *,
        name: str,
        draw: Callable[[int], list[Example]],
        position: Callable[[], int],
        seed: Callable[[int, str], int],
        overlap: bool,
    ):
        self.name = name
        self.session, self.policy, self.stage, self.rewards, self.processor = session, policy, stage, rewards, processor
        self._draw, self.position, self.seed, self.overlap = ranged("data")(draw), position, seed, overlap
        self.ahead: _Ahead | None = None
        self._generator = ThreadPoolExecutor(1, "rollouts")

    def collect(self, step: int, *, last: bool) -> Batch:
        """The batch of ``step``; with overlap, that of the next step is begun, unless this is the ``last``.

        Raises EngineError where the engine or a prompt failed for good, whatever a reward raised, and BadRecordError.
        """
        if not self.overlap:
            examples = self._draw(self.stage.rollout_batch)
            with self.session.use(self.policy, step) as engine:
                return self._gather(engine, step, examples)
        if self.ahead is None:
            self._begin(step, step)
        assert self.ahead is not None
        assert self.ahead.step == step
        batch = self.ahead.future.result()
        if last:
            self.ahead = None
        else:
            self._begin(step + 1, step)
        return batch

    def settle(self) -> int | None:
        """Wait for what is under way, if anything is; returns the position to go on from: before it, if it failed."""
        if self.ahead is None:
            return None
        failed = self.ahead.future.exception() is not None
        return self.ahead.start if failed else self.ahead.future.result().end

    def restore(self, step: int, start: int, batch: Batch) -> None:
        """``batch`` has been generated for ``step`` already."""
        done: Future[Batch] = Future()
        done.set_result(batch)
        self.ahead = _Ahead(step, start, done)

    def rebuild(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> list[ScoredGroup]:
        """Groups that were generated earlier, scored again."""
        size = self.stage.group_size
        parts = [list(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]
        return [ScoredGroup(e, r, self._score(e, r)) for e, r in zip(examples, parts, strict=True)]

    # -- generation

    def _begin(self, step: int, version: int) -> None:
        """Generate the batch of ``step`` in a thread, with the weights as they are after ``version`` steps."""
        start = self.position()
        examples = self._draw(self.stage.rollout_batch)
        self.session.update(self.policy, version)
        engine = self.session.engine

        def work() -> Batch:
            batch = self._gather(engine, step, examples)
            self.session.awake = self.session.asleep = engine.memory()
            return batch

        self.ahead = _Ahead(step, start, self._generator.submit(work))

    def _gather(self, engine: Engine, step: int, examples: list[Example]) -> Batch:
        """Rounds of generation until there are enough groups that are not stagnant, or no tries are left."""
        wanted, rule = self.stage.rollout_batch, self.stage.resample
        drawn, seconds, waited = self._round(engine, examples, self.seed(step, "rollout"))
        if not rule.tries:
            return Batch(drawn, drawn, 0, 0, seconds, waited, self.position())
        good = [group for group in drawn if not group.stagnant(rule.on)]
        tries = 0
        while len(good) < wanted and tries < rule.tries:
            tries += 1
            more = self._draw(wanted - len(good))
            groups, *took = self._round(engine, more, self.seed(step, f"rollout {tries}"))
            seconds, waited = seconds + took[0], waited + took[1]
            drawn += groups
            good += [group for group in groups if not group.stagnant(rule.on)]
        spare = [group for group in drawn if group.stagnant(rule.on)][: wanted - len(good)]
        return Batch(good + spare, drawn, tries, len(spare), seconds, waited, self.position())

    def _round(self, engine: Engine, examples: list[Example], seed: int) -> tuple[list[ScoredGroup], float, float]:
        """Groups, seconds, and those of them that rewards took. Every rank generates and scores its share; where one
        fails, all do."""
        began = time.perf_counter()
        ranks = world()
        own = ranks.share(examples)
        outcomes = ranks.gather_from(lambda: self._own_round(engine, own, seed), NonFiniteLogits, EngineError)
        pairs = ranks.whole([pairs for pairs, _ in outcomes])
        groups = [ScoredGroup(e, rollouts, table) for e, (rollouts, table) in zip(examples, pairs, strict=True)]
        return groups, time.perf_counter() - began, outcomes[ranks.rank][1]

    def _own_round(
        self, engine: Engine, examples: list[Example], seed: int
    ) -> tuple[list[tuple[list[Rollout], RewardTable]], float]:
        """One call of the engine: completions and rewards of this rank's ``examples``, each group scored while the
        others are generated; and the seconds that scoring took."""
        tables: dict[int, RewardTable] = {}
        waited = 0.0

        def on_group(index: int, rollouts: list[Rollout]) -> None:
            nonlocal waited
            start = time.perf_counter()
            tables[index] = self._score(examples[index], rollouts)
            waited += time.perf_counter() - start

        if not examples:
            return [], waited
        try:
            prompts = [example.prompt for example in examples]
            rollouts = engine.generate(prompts, self.stage.group_size, self._sampling(seed), on_group)
        except RequestError as error:
            source = examples[error.index].record.source
            raise EngineError(f"{source}: {error.reason} (tried {error.tries} times)") from error
        self._check_masks(rollouts)
        return [(group, tables[i]) for i, group in enumerate(rollouts)], waited

    def _check_masks(self, rollouts: list[list[Rollout]]) -> None:
        if self.stage.sampling.replayed and any(r.mask is None for group in rollouts for r in group):
            raise EngineError(
                f"stages.{self.name}.sampling: the engine did not say which ids top_p and top_k kept, so the log-probs "
                "it sampled with cannot be computed again: set replay to ignore (log-probs over the whole vocabulary), "
                "or top_p 1 and top_k 0"
            )

    def _sampling(self, seed: int) -> Sampling:
        chosen = self.stage.sampling
        limit = self.stage.max_response_tokens
        ranks = world()
        return Sampling(
            limit,
            chosen.temperature,
            chosen.top_p,
            chosen.top_k,
            seed,
            masks=chosen.replayed,
            first=ranks.rank,
            stride=ranks.size,
        )

    @ranged("reward")
    def _score(self, example: Example, rollouts: list[Rollout]) -> RewardTable:
        return self.rewards(
            [Completion(self.processor.decode(r.ids), len(r.ids), r.finished, example.record) for r in rollouts]
        )
