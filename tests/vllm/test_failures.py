"""The real engine process killed, stopped and left alone in the middle of a batch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from revisual_fast.packing import Prompt
from revisual_fast.rollout.engine import Sampling
from tests.groups import make_prompt
from tests.processes import gone
from tests.vllm.engines import Engines, Vllm

STALL_SECONDS = 15.0
GREEDY = Sampling(max_tokens=24, temperature=0)
ALL = range(90)
"""Prompts: more than are decoded at once, so that some are through when others have not begun."""


@pytest.fixture(scope="module")
def vllm(engines: Engines, tiny_vl: Path) -> Vllm:
    made = engines.get("victim", tiny_vl)
    made.connection.stall_seconds = STALL_SECONDS
    return made


@pytest.fixture(scope="module")
def prompts(vllm: Vllm) -> list[Prompt]:
    return [make_prompt(vllm.policy.family, 4 + i % 9, [(1, 2, 2)] * (i % 3 == 0), seed=i) for i in ALL]


@pytest.fixture(scope="module")
def undisturbed(vllm: Vllm, prompts: list[Prompt]) -> list[list[int]]:
    answers = [group[0].ids.tolist() for group in vllm.generate(GREEDY, prompts=prompts)]
    assert vllm.engine.counts == {"restarts": 0, "retried_requests": 0, "regenerated_groups": 0}
    assert len({tuple(answer) for answer in answers}) > len(answers) // 2
    return answers


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_batch_is_completed_by_a_new_engine(
    vllm: Vllm, prompts: list[Prompt], undisturbed: list[list[int]], blow: signal.Signals
) -> None:
    before = dict(vllm.engine.counts)
    pid = vllm.connection.pid
    assert pid is not None
    seen: list[int] = []

    def strike(index: int, group: object) -> None:
        if not seen:
            os.kill(pid, blow)
        seen.append(index)

    groups = vllm.engine.generate(prompts, 1, GREEDY, strike)
    assert [group[0].ids.tolist() for group in groups] == undisturbed
    assert sorted(seen) == list(ALL)  # each once
    assert all(group[0].version == vllm.version for group in groups)
    counts = {key: vllm.engine.counts[key] - before[key] for key in before}
    assert counts["restarts"] == 1
    assert 0 < counts["regenerated_groups"] < len(ALL)
    assert vllm.connection.pid != pid
    assert gone(pid)
    assert vllm.differences() == []  # all weights were sent again


def test_an_engine_without_its_trainer_ends(vllm: Vllm, prompts: list[Prompt]) -> None:
    pid = vllm.connection.pid
    assert pid is not None
    ended = []

    def leave(index: int, group: object) -> None:
        assert vllm.connection._child is not None
        vllm.connection._child.pipe.close()  # what the kernel does when the trainer is killed
        ended.append(gone(pid))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vllm.engine.generate(prompts, 1, GREEDY, leave)
    assert ended == [True]
