"""An engine in another process: what it is sent, and what becomes of a batch when it fails."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import EngineError, RequestError, Sampling, Sync
from revisual_fast.rollout.messages import Alive, EngineSettings, Finished, Request
from revisual_fast.rollout.remote import EngineLost, RemoteEngine
from revisual_fast.rollout.requests import PendingBatch, make_requests
from revisual_fast.rollout.vllm.process import ProcessConnection
from tests.engine_child import REFUSED, STUMBLES, VOCAB
from tests.models import tiny
from tests.processes import gone

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EngineSettings("unused", "float32", "cpu", max_model_len=64, max_batch=8)
SAMPLING = Sampling(max_tokens=6, seed=5)
STALL = 1.5


class FakeSender:
    """Sends the weights' fingerprints in their place."""

    def __init__(self, connection):
        self.connection = connection
        self.forgotten = 0

    def send(self, source, names, version):
        held = {name: source.fingerprints()[name] for name in sorted(names or source.fingerprints())}
        self.connection.call("update_weights", update_info=held)
        return Sync(tensors=len(held))

    def forget(self):
        self.forgotten += 1


class Setup:
    """An engine on a stand-in child with the planned ``faults``."""

    def __init__(self, folder: Path, *faults: tuple[str, str], **kwargs):
        self.folder = folder
        (folder / "faults.json").write_text(json.dumps(faults))
        env = {"ENGINE_CHILD": str(folder), "PYTHONPATH": str(ROOT)}
        self.connection = ProcessConnection(
            SETTINGS,
            start_seconds=60,
            stall_seconds=STALL,
            log=folder / "engine.log",
            env=env,
            module="tests.engine_child",
        )
        self.engine = RemoteEngine(self.connection, FakeSender(self.connection), **kwargs)

    def commands(self, name: str) -> list:
        notes = [json.loads(line) for line in (self.folder / "commands.jsonl").read_text().splitlines()]
        return [about for what, about in notes if what == name]


@pytest.fixture
def setup(tmp_path):
    made: list[Setup] = []

    def make(*faults: tuple[str, str], **kwargs) -> Setup:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Setup(folder, *faults, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.connection.kill()


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny("qwen2"))


def prompts(*first: int) -> list[Prompt]:
    return [Prompt(torch.tensor([token, i])) for i, token in enumerate(first)]


def plain(groups) -> list:
    return [[(r.ids.tolist(), r.logp.tolist(), r.finish_reason, r.version) for r in group] for group in groups]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, policy):
    """The completions of five prompts by an engine that nothing happened to."""
    one = Setup(tmp_path_factory.mktemp("undisturbed"))
    one.engine.update_weights(policy, 3)
    groups = one.engine.generate(prompts(1, 2, 3, 4, 5), 2, SAMPLING)
    assert one.engine.counts == {"restarts": 0, "retried_requests": 0, "regenerated_groups": 0}
    pid = one.connection.pid
    one.engine.close()
    assert one.commands("close") == [None]
    assert gone(pid)
    return plain(groups)


def test_groups_come_as_they_finish_and_return_in_the_prompts_order(setup, policy):
    one = setup()
    one.engine.update_weights(policy, 7)
    seen = []
    groups = one.engine.generate(prompts(1, 2, 3), 2, SAMPLING, lambda i, group: seen.append((i, group)))
    assert [i for i, _ in seen] == [2, 1, 0]
    assert all(groups[i] is group for i, group in seen)
    assert [len(g) for g in groups] == [2, 2, 2]
    assert all(r.version == 7 and r.ids.dtype == torch.int64 and r.logp.dtype == torch.float32 for r in groups[0])
    assert one.engine.generate([], 2, SAMPLING) == []
    other_seed = one.engine.generate(prompts(1, 2, 3), 2, Sampling(6, seed=6))
    assert plain(other_seed) != plain(groups)
    masked = one.engine.generate(prompts(1), 1, Sampling(6, seed=5, masks=True))[0][0]
    indptr, kept = masked.mask
    assert indptr.tolist() == list(range(0, 2 * len(masked.ids) + 1, 2))
    assert kept[0::2].tolist() == masked.ids.tolist()


def test_only_weights_that_can_have_changed_are_sent(setup):
    policy = Policy(tiny("qwen2"))
    for name, parameter in policy.base.named_parameters():
        parameter.requires_grad_("layers.1.mlp.up_proj" in name)
    one = setup(check_weights=True)
    engine = one.engine
    everything = engine.update_weights(policy, 0).tensors
    assert everything == len(list(policy.base.parameters()))
    assert engine.update_weights(policy, 0) == Sync()
    assert engine.update_weights(policy, 1).tensors == 3  # the whole mlp
    policy.base.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    policy.base.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    both = engine.update_weights(policy, 2).tensors
    assert both == 3 + len(list(policy.base.model.layers[0].self_attn.parameters()))  # what was trained until now, too
    assert engine.update_weights(policy, 3).tensors == both - 3
    engine.sleep(1)
    engine.wake_up()
    assert engine.update_weights(policy, 3) == Sync()
    engine.sleep(2)
    with pytest.raises(AssertionError, match="wake_up"):
        engine.generate(prompts(1), 1, SAMPLING)
    engine.wake_up(["weights"])
    assert engine.update_weights(policy, 3).tensors == everything
    engine.wake_up(["kv_cache"])
    assert engine.memory() == everything
    assert engine.update_weights(Policy(tiny("qwen2")), 3).tensors == everything
    assert one.commands("wake_up") == [None, ["weights"], ["kv_cache"]]


def test_weights_that_did_not_arrive_are_named(setup, policy):
    one = setup(check_weights=True)
    send = one.engine.sender.send
    one.engine.sender.send = lambda source, names, version: send(source, source.changed() - {"model.norm.weight"}, 0)
    with pytest.raises(EngineError, match=r"(?s)version 4.*model\.norm\.weight"):
        one.engine.update_weights(policy, 4)


def test_failed_requests_are_sent_again_then_reported(setup, policy):
    one = setup(request_retries=2)
    one.engine.update_weights(policy, 0)
    groups = one.engine.generate(prompts(1, STUMBLES, 3), 2, SAMPLING)
    assert [len(g) for g in groups] == [2, 2, 2]
    assert one.commands("generate") == [[0, 1, 2], [1]]
    assert one.engine.counts["retried_requests"] == 1
    with pytest.raises(RequestError, match="prompt 1: a prompt like this") as caught:
        one.engine.generate(prompts(1, REFUSED, 3), 2, SAMPLING)
    assert (caught.value.index, caught.value.tries) == (1, 3)
    assert one.commands("generate")[2:] == [[0, 1, 2], [1], [1]]
    pid = one.connection.pid
    one.engine.generate(prompts(1), 1, SAMPLING)
    assert one.connection.pid == pid  # the engine goes on
    assert one.engine.counts == {"restarts": 0, "retried_requests": 3, "regenerated_groups": 0}


@pytest.mark.parametrize("fault", ["kill", "stop", "out_of_memory", "engine", "exit"])
def test_only_what_is_missing_is_generated_again(setup, policy, undisturbed, fault):
    one = setup(("generate:2", fault))
    seen: list[int] = []
    one.engine.update_weights(policy, 3)
    pid = one.connection.pid
    groups = one.engine.generate(prompts(1, 2, 3, 4, 5), 2, SAMPLING, lambda i, _: seen.append(i))
    assert plain(groups) == undisturbed
    assert seen == [4, 3, 2, 1, 0]
    assert one.commands("generate") == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert one.commands("update_weights")[0] == one.commands("update_weights")[1]  # all weights, again
    assert one.engine.counts == {"restarts": 1, "retried_requests": 0, "regenerated_groups": 3}
    assert gone(pid)


def test_an_engine_that_is_slow_but_alive_is_left_alone(setup, policy):
    one = setup(("generate:0", "slow"), ("memory", "slow"))
    one.engine.update_weights(policy, 0)
    started = time.monotonic()
    one.engine.generate(prompts(1), 1, SAMPLING)
    assert time.monotonic() - started > STALL
    one.engine.memory()
    assert one.engine.counts["restarts"] == 0


def test_loss_during_an_update_a_sleep_and_a_start(setup, policy, undisturbed):
    one = setup(("update_weights", "kill"), ("start", "exit"), ("sleep", "kill"), ("wake_up", "kill"))
    assert one.engine.update_weights(policy, 3).tensors > 0
    assert one.engine.counts["restarts"] == 1
    one.engine.sleep(1)
    assert one.engine.memory() == 0  # nothing runs, nothing is held
    one.engine.wake_up()
    assert one.engine.update_weights(policy, 3).tensors > 0
    one.engine.sleep(1)
    one.engine.wake_up(["weights"])
    assert plain(one.engine.generate(prompts(1, 2, 3, 4, 5), 2, SAMPLING)) == undisturbed
    assert one.engine.counts == {"restarts": 3, "retried_requests": 0, "regenerated_groups": 0}


def test_too_many_losses_end_the_run_and_say_what_to_change(setup, policy):
    one = setup(("generate:0", "out_of_memory"), ("generate:0", "out_of_memory"), max_restarts=1)
    one.engine.update_weights(policy, 0)
    with pytest.raises(EngineError, match=r"(?s)2 times.*max_restarts: 1.*planned out_of_memory.*memory_share"):
        one.engine.generate(prompts(1), 1, SAMPLING)


def test_an_engine_that_cannot_start_shows_its_last_lines(setup, policy):
    one = setup(("start", "exit"))
    (one.folder / "engine.log").write_text("of an earlier engine\n")
    with pytest.raises(EngineError, match=r"(?s)cannot be started.*status 3.*I cannot go on like this") as caught:
        one.engine.update_weights(policy, 0)
    assert "earlier engine" not in str(caught.value)
    assert one.commands("start") == [None]  # there was no second try
    refuses = setup(("start", "request"))
    with pytest.raises(EngineError, match=r"^a planned request$"):
        refuses.engine.update_weights(policy, 0)


def test_an_interrupted_batch_leaves_an_engine_that_can_be_used(setup, policy, undisturbed):
    one = setup()
    one.engine.update_weights(policy, 3)

    def interrupt(index, group):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.engine.generate(prompts(9, 8, 7), 2, SAMPLING, interrupt)
    assert one.connection.pid is None
    assert plain(one.engine.generate(prompts(1, 2, 3, 4, 5), 2, SAMPLING)) == undisturbed


def test_weights_sent_again_are_not_read_while_they_are_written(setup, policy, monkeypatch):
    """The engine dies while an optimizer step is under way: its weights are sent again after that step."""
    one = setup(("generate:1", "kill"))
    one.engine.update_weights(policy, 3)
    send, held = one.engine.sender.send, []

    def watched(*arguments):
        held.append(policy.writing.locked())
        return send(*arguments)

    monkeypatch.setattr(one.engine.sender, "send", watched)
    policy.writing.acquire()
    threading.Timer(1.0, lambda: (held.append("written"), policy.writing.release())).start()
    groups = one.engine.generate(prompts(1, 2), 1, SAMPLING)
    assert held == ["written", True]
    assert [g[0].version for g in groups] == [3, 3]


def test_another_policy_gets_all_its_weights_across(setup, policy):
    one, other = setup(), Policy(tiny("qwen2"))
    for parameter in [*policy.model.parameters()][1:]:
        parameter.requires_grad_(False)
    try:
        one.engine.update_weights(policy, 0)
        assert one.engine.update_weights(policy, 1).tensors < one.engine.update_weights(other, 1).tensors
        assert one.commands("update_weights")[0] == one.commands("update_weights")[2], "all of it, as the first time"
    finally:
        policy.model.requires_grad_(True)


def test_a_new_engine_is_a_new_one_to_the_sender(setup, policy):
    one = setup(("generate:1", "kill"))
    one.engine.update_weights(policy, 0)
    one.engine.generate(prompts(1, 2), 1, SAMPLING)
    assert one.engine.sender.forgotten == 1


def test_equal_prompts_of_a_batch_are_answered_differently(setup, policy):
    requests = make_requests([Prompt(torch.tensor([5, 6]))] * 3, policy.family, Sampling(8, seed=1))
    assert len({request.seed for request in requests}) == 3
    assert [r.seed for r in make_requests([Prompt(torch.tensor([7]))] * 3, policy.family, Sampling(8, seed=1))] == [
        r.seed for r in requests
    ], "they depend on the place alone"


def test_a_model_of_another_vocabulary_is_refused(setup, policy):
    one = setup()
    larger = Policy(tiny("qwen2"))
    larger.base.resize_token_embeddings(VOCAB + 1)
    with pytest.raises(EngineError, match=f"a vocabulary of {VOCAB}, the policy's {VOCAB + 1}"):
        one.engine.update_weights(larger, 0)


def test_how_a_completion_ended_is_handed_on():
    event = Finished(0, [[1], [2, 3]], [[-1.0], [-1.0, -2.0]], ["stop", "length"])
    batch = PendingBatch([], 2, SAMPLING, None)
    batch.finish(event, 0)
    assert [(r.finish_reason, r.finished) for r in batch.groups[0]] == [("stop", True), ("length", False)]


def test_a_policy_is_not_kept_alive(setup):
    one, policy = setup(), Policy(tiny("qwen2"))
    one.engine.update_weights(policy, 0)
    left = weakref.ref(policy)
    del policy
    gc.collect()
    assert left() is None


def test_an_engine_that_is_closed_while_it_generates_is_not_started_again(setup, policy):
    one = setup(("generate:1", "stop"))
    one.engine.update_weights(policy, 0)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(one.engine.generate, prompts(1, 2), 1, SAMPLING)
        time.sleep(0.5)
        one.engine.close()
        with pytest.raises(EngineError, match="was closed"):
            answer.result(20)
    assert one.connection.pid is None
    assert one.engine.counts["restarts"] == 0


def test_large_messages_and_a_reader_that_has_stopped(setup):
    one = setup()
    connection = one.connection
    connection.start()
    value = random.Random(0).randbytes(20_000_000)
    assert connection.call("echo", value=value) == value
    os.kill(connection.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match="hung"):
        connection.call("echo", value=value)  # does not fit into the pipe
    connection.start()
    events = list(connection.generate([Request(7, [1, 2], seed=0)], 1, SAMPLING))
    assert [type(e) for e in events if not isinstance(e, Alive)] == [Finished]


def test_an_engine_ends_with_its_connection(tmp_path):
    connection = Setup(tmp_path).connection
    connection.start()
    pid = connection.pid
    del connection
    gc.collect()
    assert gone(pid)


TRAINER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from pathlib import Path
from tests.blanks import without_torch
without_torch("revisual_fast.rollout.requests", "revisual_fast.rollout.weights")
from revisual_fast.rollout.messages import EngineSettings, Request
from revisual_fast.rollout.vllm.process import ProcessConnection
settings, log = EngineSettings("unused", "float32", "cpu", 64, 8), Path(sys.argv[1]) / "engine.log"
connection = ProcessConnection(settings, start_seconds=60, stall_seconds=60, log=log, module="tests.engine_child")
connection.start()
try:
    print(connection.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("memory", connection.call("memory"), flush=True)
if sys.argv[2] == "exit":
    sys.exit()
list(connection.generate([Request(0, [1], 0)], 1, None))
"""


def test_the_engine_outlives_ctrl_c_but_not_its_trainer(tmp_path):
    trainers = {}
    for end in ("exit", "kill"):
        folder = tmp_path / end
        folder.mkdir()
        (folder / "faults.json").write_text('[["generate:0", "slow"]]')
        command = [sys.executable, "-c", TRAINER, str(folder), end]
        env = {**os.environ, "ENGINE_CHILD": str(folder), "PYTHONPATH": str(ROOT)}
        trainers[end] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env
        )
    for end, trainer in trainers.items():
        with trainer:
            assert trainer.stdout is not None
            pid = int(trainer.stdout.readline())
            os.killpg(trainer.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
            assert trainer.stdout.readline() == "memory 0\n"
            if end == "kill":
                time.sleep(0.5)  # in the middle of a generate
                trainer.kill()
            trainer.wait(20)
            assert gone(pid)
