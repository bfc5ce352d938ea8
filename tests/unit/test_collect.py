"""How a step's batch comes together: streaming, resampling, one step ahead, failures."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from revisual_fast.config import GRPOConfig
from revisual_fast.packing import Prompt
from revisual_fast.rewards import RewardTable
from revisual_fast.rollout.engine import EngineError
from revisual_fast.rollout.session import EngineSession
from revisual_fast.stages.collect import Collector
from tests.engines import CopyEngine, ScriptedEngine


class Source:
    """Examples 0, 1, 2, ... and how many were drawn."""

    def __init__(self) -> None:
        self.position = 0

    def draw(self, count: int) -> list[Any]:
        drawn = [
            SimpleNamespace(prompt=Prompt(torch.tensor([i])), record=SimpleNamespace(source=f"file:{i}"))
            for i in range(self.position, self.position + count)
        ]
        self.position += count
        return drawn


def accuracy_by(good) -> Any:
    """Rewards under which exactly the groups whose prompt is ``good`` differ within themselves."""

    def score(completions) -> RewardTable:
        values = torch.zeros(len(completions))
        values[0] = float(good(int(completions[0].record.source.split(":")[1])))
        return RewardTable({"accuracy": values}, values + 1, values)

    return score


def collector(engine=None, *, rewards=None, overlap=False, sleep=0, **settings) -> tuple[Collector, Source]:
    source = Source()
    config = GRPOConfig.model_validate(
        {"kind": "grpo", "data": ["d"], "steps": 9, "rollout_batch": 4, "group_size": 3, "max_response_tokens": 8}
        | settings
    )
    made = Collector(
        EngineSession(engine or ScriptedEngine(), sleep),
        policy=None,  # type: ignore[arg-type]  # these engines do not look at it
        stage=config,
        rewards=rewards or accuracy_by(lambda i: True),
        name="rl",
        processor=SimpleNamespace(decode=lambda ids: str(ids.tolist())),  # type: ignore[arg-type]
        draw=source.draw,
        position=lambda: source.position,
        seed=lambda step, purpose: hash((step, purpose)) % 2**31,
        overlap=overlap,
    )
    return made, source


def numbers(groups) -> list[int]:
    return [int(group.example.record.source.split(":")[1]) for group in groups]


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_groups_keep_the_order_of_the_prompts_whichever_finishes_first(order):
    made, _ = collector(ScriptedEngine(order))
    batch = made.collect(0, last=False)
    assert numbers(batch.groups) == [0, 1, 2, 3]
    assert batch.drawn == batch.groups
    expected, _ = collector(ScriptedEngine())
    for ours, theirs in zip(batch.groups, expected.collect(0, last=False).groups, strict=True):
        assert [r.ids.tolist() for r in ours.rollouts] == [r.ids.tolist() for r in theirs.rollouts]
        assert torch.equal(ours.table.total, theirs.table.total)


def test_rewards_begin_while_others_are_still_generated():
    """In the thread that asks, so that a reward may use signals."""
    events = []

    def score(completions) -> RewardTable:
        events.append(("scored", threading.current_thread() is threading.main_thread()))
        return accuracy_by(lambda i: True)(completions)

    class Watched(ScriptedEngine):
        def generate(self, prompts, n, sampling, on_group=None):
            def watched(index, group):
                events.append(("generated", index))
                on_group(index, group)

            return super().generate(prompts, n, sampling, watched)

    made, _ = collector(Watched(), rewards=score)
    assert len(made.collect(0, last=True).groups) == 4
    assert events == [x for i in range(4) for x in (("generated", i), ("scored", True))]


def test_an_error_of_a_reward_is_not_swallowed():
    def score(completions):
        raise ZeroDivisionError("mine")

    made, _ = collector(rewards=score)
    with pytest.raises(ZeroDivisionError, match="mine"):
        made.collect(0, last=True)


def test_stagnant_groups_are_replaced_until_the_batch_is_full():
    engine = ScriptedEngine()
    made, source = collector(engine, rewards=accuracy_by(lambda i: i % 2), resample={"tries": 5})
    batch = made.collect(0, last=False)
    assert numbers(batch.groups) == [1, 3, 5, 7], "0, 2, then 4, then 6 were replaced"
    assert numbers(batch.drawn) == list(range(8))
    assert [count for count, _ in engine.asked] == [4, 2, 1, 1]
    assert len({sampling.seed for _, sampling in engine.asked}) == 4, "every round has a seed of its own"
    assert (batch.tries, batch.filled, source.position) == (3, 0, 8)


def test_after_the_last_try_stagnant_groups_fill_the_batch():
    made, _ = collector(rewards=accuracy_by(lambda i: i == 5), resample={"tries": 1})
    batch = made.collect(0, last=False)
    assert numbers(batch.groups) == [5, 0, 1, 2]
    assert (batch.tries, batch.filled, len(batch.drawn)) == (1, 3, 8)


def test_without_tries_nothing_is_replaced():
    made, source = collector(rewards=accuracy_by(lambda i: False))
    assert numbers(made.collect(0, last=False).groups) == [0, 1, 2, 3]
    assert source.position == 4


def test_stagnation_can_be_judged_by_the_reward():
    def score(completions) -> RewardTable:
        shaped = torch.arange(len(completions)).float()
        return RewardTable({"accuracy": torch.zeros(3)}, shaped, torch.zeros(3))

    made, source = collector(rewards=score, resample={"tries": 2, "on": "reward"})
    made.collect(0, last=False)
    assert source.position == 4, "the rewards differ within every group"
    made, source = collector(rewards=score, resample={"tries": 2, "on": "accuracy"})
    made.collect(0, last=False)
    assert source.position == 12


def test_one_step_ahead_the_weights_are_one_step_old_and_never_older():
    engine = ScriptedEngine()
    made, _ = collector(engine, overlap=True)
    ages = []
    for step in range(5):
        batch = made.collect(step, last=step == 4)
        ages.append({step - r.version for group in batch.groups for r in group.rollouts})
        assert numbers(batch.groups) == list(range(4 * step, 4 * step + 4))
    assert ages == [{0}, {1}, {1}, {1}, {1}]
    assert made.ahead is None, "after the last step nothing is generated"
    assert len(engine.asked) == 5


def test_one_step_ahead_generation_and_the_step_overlap():
    """The engine only finishes once the trainer has got the batch before: it waits for no step."""
    trained = threading.Event()

    class Slow(ScriptedEngine):
        def generate(self, prompts, n, sampling, on_group=None):
            if len(self.asked) == 1:
                assert trained.wait(10), "the step waits for the generation that it should overlap with"
            return super().generate(prompts, n, sampling, on_group)

    made, _ = collector(Slow(), overlap=True)
    made.collect(0, last=False)
    trained.set()
    assert made.collect(1, last=True).groups


def test_what_failed_ahead_is_raised_when_it_is_needed_and_its_prompts_are_drawn_again():
    class Failing(ScriptedEngine):
        def generate(self, prompts, n, sampling, on_group=None):
            self.failing = [2] if len(self.asked) == 1 else []
            return super().generate(prompts, n, sampling, on_group)

    made, _ = collector(Failing(), overlap=True)
    made.collect(0, last=False)
    assert made.settle() == 4, "the position before the batch that failed"
    with pytest.raises(EngineError, match=r"file:6: too long \(tried 3 times\)"):
        made.collect(1, last=False)


def test_a_prompt_that_cannot_be_answered_is_named_by_its_record():
    made, _ = collector(ScriptedEngine(failing=[1]))
    with pytest.raises(EngineError, match="file:1: too long"):
        made.collect(0, last=False)


@pytest.mark.parametrize(
    ("sampling", "masks"), [({}, False), ({"top_p": 0.9}, True), ({"top_k": 5, "replay": "ignore"}, False)]
)
def test_masks_are_asked_for_where_they_are_replayed(sampling, masks):
    engine = ScriptedEngine()
    made, _ = collector(engine, sampling=sampling)
    if masks:
        with pytest.raises(EngineError, match=r"stages\.rl\.sampling: the engine did not say .* set replay to ignore"):
            made.collect(0, last=True)  # this engine does not give any
    else:
        made.collect(0, last=True)
    asked = engine.asked[0][1]
    assert (asked.masks, asked.max_tokens) == (masks, 8)
    assert (asked.top_p, asked.top_k) == (sampling.get("top_p", 1.0), sampling.get("top_k", 0))


def test_a_sleeping_engine_gets_its_weights_back_before_its_cache(tiny_policy):
    engine = CopyEngine([])
    session = EngineSession(engine, sleep_level=2)
    with session.use(tiny_policy, 4) as ready:
        assert ready is engine
    assert engine.calls == ["wake ['weights']", "update 4", "wake ['kv_cache']", "sleep 2"]
    assert (session.taken().tensors, session.awake) == (1, 2**30)
    assert session.taken().tensors == 0, "it has been told"
