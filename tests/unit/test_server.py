"""A server by URL: which one is refused, and what its answers and failures become."""

import dataclasses
import itertools
import logging
import shlex
import threading
import time

import pytest
import torch

from revisual_fast.packing import Prompt
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import EngineError, RequestError, Sampling, Sync
from revisual_fast.rollout.messages import Alive, EngineSettings, Failed, Finished, Request
from revisual_fast.rollout.remote import EngineLost, RemoteEngine
from revisual_fast.rollout.vllm.server import ServerConnection
from revisual_fast.rollout.vllm.server_checks import ROUTES, first_difference, sample_ids, serve_command
from tests.http_engine import BAD, BREAKS, SILENT, Server
from tests.models import tiny

SETTINGS = EngineSettings("the/model", "float32", "cpu", max_model_len=64, max_batch=8, eos_token_ids=(1,))
WORDS = [f"w{i} " for i in range(64)]
SAMPLING = Sampling(max_tokens=4, seed=5)


class Tokenizer:
    def __init__(self, words=WORDS):
        self.words = words
        self.all_special_ids = [0, 1]

    def __len__(self):
        return len(self.words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids if i < len(self.words))

    def get_added_vocab(self):
        return {"w63 ": 63}


@pytest.fixture
def serve():
    made: list[Server] = []

    def make(words=WORDS, **kwargs) -> Server:
        made.append(Server(words, **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def connect(url: str, settings=SETTINGS, stall_seconds: float = 20.0, start_seconds: float = 20.0, words=WORDS):
    return ServerConnection(
        url,
        settings,
        tokenizer=Tokenizer(words),
        vocab=len(words),
        start_seconds=start_seconds,
        stall_seconds=stall_seconds,
    )


def requests(*first: int) -> list[Request]:
    return [Request(i, [token, i], seed=i) for i, token in enumerate(first)]


def test_start_says_how_large_the_vocabulary_is(serve):
    server = serve()
    server.asleep = True  # left so by an earlier trainer
    assert connect(server.url).start() == 64
    assert not server.asleep
    with pytest.raises(ValueError, match="localhost"):
        connect("localhost:8000")


def test_another_vocabulary_is_refused(serve):
    other = [*WORDS[:37], "another ", *WORDS[38:]]
    server = serve(other)
    with pytest.raises(
        EngineError, match=r"(?s)id 37 is 'another ' there and 'w37 ' here.*vllm serve the/model"
    ) as caught:
        connect(server.url).start()
    assert server.url in str(caught.value)
    with pytest.raises(EngineError, match="id 64 is 'w64 ' there and '' here"):  # the same ids and more
        connect(serve([*WORDS, "w64 "]).url).start()
    larger = connect(serve().url)
    larger.vocab = 65  # of the head, which the tokenizer does not use in full
    with pytest.raises(EngineError, match="not of 65 ids: id 64 is not in it"):
        larger.start()


def test_ids_are_sampled_all_over_and_compared_one_by_one():
    ids = sample_ids(Tokenizer([f"{i} " for i in range(50_000)]))
    assert {0, 1, 63, 49_999, 50_000} <= set(ids)
    assert max(b - a for a, b in itertools.pairwise(ids)) <= 50_000 // 4096
    asked = []

    def theirs(some):
        asked.append(some)
        return " ".join("x" if i in (700, 900) else str(i) for i in some)

    def ours(some):
        return " ".join(map(str, some))

    assert first_difference(range(1000), ours, theirs) == 700
    assert len(asked) < 30
    assert first_difference(range(700), ours, theirs) is None


def test_a_server_that_was_started_otherwise_is_refused_with_the_command(serve):
    server = serve(routes=tuple(route for route in ROUTES if route not in ("/inference/v1/generate", "/sleep")))
    with pytest.raises(EngineError, match=r"(?s)does not have /inference/v1/generate, /sleep\n.*--enable-scale-out"):
        connect(server.url).start()
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", max_model_len=128, transfer="nccl", images=2, sleep=True)
    server = serve(
        model_config={"logprobs_mode": "raw_logprobs", "multimodal_config": {"mm_device_do_normalize": True}},
        parallel_config={},
    )
    with pytest.raises(EngineError) as caught:
        connect(server.url, settings).start()
    problems, command = str(caught.value).split("start it with")
    for option in (
        "--dtype is torch.float32, not torch.bfloat16",
        "--logprobs-mode is raw_logprobs",
        "--weight-transfer-config is host, not nccl",
        "--worker-extension-cls is None",
        "--max-model-len is 64, not 128 or more",
        "--enable-sleep-mode is None",
        "--limit-mm-per-prompt is None",
        "--mm-processor-cache-gb is None",
        "--no-mm-device-do-normalize is missing",
    ):
        assert option in problems
    words = shlex.split(command)
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "the/model"]
    for option, value in (
        ("--dtype", "bfloat16"),
        ("--max-model-len", "128"),
        ("--limit-mm-per-prompt", '{"image": 2, "video": 0}'),
    ):
        assert words[words.index(option) + 1] == value
    assert words[words.index("--port") + 1] == server.url.rsplit(":", 1)[1]
    assert command.strip() == serve_command(settings, server.url)


def test_requests_and_answers(serve):
    server = serve()
    connection = connect(server.url)
    connection.start()
    sampling = Sampling(max_tokens=4, temperature=0.7, top_p=0.9, top_k=3)
    events = {e.index: e for e in connection.generate(requests(10, BAD, 12), 2, sampling)}
    assert events[0] == Finished(0, [[10, 0], [10, 1]], [[-0.5] * 2] * 2, ["stop", "stop"])
    assert events[1] == Failed(1, "I do not like it (HTTP 400)")
    params = next(p for what, p in server.asked if what == "generate" and p["seed"] == 2)
    wanted = {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 3,
        "max_tokens": 4,
        "logprobs": 0,
        "stop_token_ids": [1],
        "ignore_eos": True,
    }
    assert params.items() >= wanted.items()
    (greedy,) = connection.generate(requests(10), 3, Sampling(max_tokens=4, temperature=0))
    assert greedy.ids == [[10, 0]] * 3
    assert server.asked[-1][1]["n"] == 1
    (long,) = connection.generate(requests(10), 1, Sampling(max_tokens=63))
    assert long == Failed(0, "a prompt of 2 and a response of 63 tokens are more than the engine's 64")


def test_commands(serve):
    server = serve()
    connection = connect(server.url)
    connection.start()
    server.asked.clear()
    connection.call("sleep", level=2)
    connection.call("wake_up", tags=["weights", "kv_cache"])
    connection.call("drop_caches")
    assert connection.call("memory") == 11
    assert connection.call("world_size") == 2
    connection.call("update_weights", update_info={"a": [2**63 + 1, 3]})
    assert connection.call("fingerprints", names=["a"]) == {"workers": [{"a": [2**63 + 1, 3]}], "mapping": {"a": "a"}}
    assert server.asked[:2] == [("/sleep", {"level": ["2"]}), ("/wake_up", {"tags": ["weights", "kv_cache"]})]
    assert [path for path, _ in server.asked[2:5]] == ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    server.routes = ()
    with pytest.raises(EngineError, match=r"refuses /reset_prefix_cache: .*Not Found.*404"):
        connection.call("drop_caches")


def test_a_server_that_computes_is_waited_for_and_one_that_does_not_is_hung(serve):
    server = serve()
    connection = connect(server.url, stall_seconds=1.0)
    connection.start()

    def work():
        for _ in range(15):
            time.sleep(0.1)
            server.tokens += 1
        server.release.set()

    threading.Thread(target=work).start()
    events = list(connection.generate(requests(10, SILENT), 1, SAMPLING))
    assert any(isinstance(e, Alive) for e in events)
    assert sum(isinstance(e, Finished) for e in events) == 2
    server.release.clear()
    with pytest.raises(EngineLost, match=r"hung.*computed nothing for 1 seconds"):
        list(connection.generate(requests(10, SILENT), 1, SAMPLING))


def test_the_end_of_the_engine_is_told_from_that_of_a_request(serve):
    server = serve()
    connection = connect(server.url)
    connection.start()
    with pytest.raises(EngineLost, match="CUDA out of memory") as caught:
        list(connection.generate(requests(10, BREAKS), 1, SAMPLING))
    assert caught.value.kind == "out of memory"
    server.stop()
    with pytest.raises(EngineLost, match="died"):
        connection.call("memory")
    with pytest.raises(EngineLost, match=r"(?s)not there within 0.2 seconds.*vllm serve"):
        connect(server.url, start_seconds=0.2).start()


class FakeSender:
    def __init__(self, connection):
        self.connection = connection

    def send(self, source, names, version):
        held = {name: source.fingerprints()[name] for name in sorted(names or source.fingerprints())}
        self.connection.call("start_weight_update")
        self.connection.call("update_weights", update_info=held)
        self.connection.call("finish_weight_update", weight_version=str(version))
        return Sync(tensors=len(held))

    def forget(self):
        pass


def test_a_server_that_was_started_anew_gets_all_weights(serve, caplog):
    policy = Policy(tiny("qwen2"))
    for name, parameter in policy.base.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    first = serve()
    connection = connect(first.url)
    engine = RemoteEngine(connection, FakeSender(connection), check_weights=True)
    everything = engine.update_weights(policy, 0).tensors
    assert engine.update_weights(policy, 1).tensors == 3
    port = first.server_address[1]
    first.stop()
    second = serve(port=port)  # between two steps, so that no connection breaks
    assert engine.update_weights(policy, 2).tensors == everything
    assert engine.counts["restarts"] == 1
    assert second.label == "2"
    second.stop()
    third = serve(port=port)
    prompts = [Prompt(torch.tensor([token])) for token in (10, 11)]
    groups = engine.generate(prompts, 2, SAMPLING)
    assert [[r.ids.tolist() for r in g] for g in groups] == [[[10, 0], [10, 1]], [[11, 0], [11, 1]]]
    assert len(third.weights) == everything
    third.stop()
    with caplog.at_level(logging.WARNING):
        later: list[Server] = []
        timer = threading.Timer(0.5, lambda: later.append(serve(port=port)))
        timer.start()
        engine.generate(prompts, 2, SAMPLING)
        timer.join()
    assert "Waiting for the server" in caplog.text
    assert later[0].label == "2"
    with pytest.raises(RequestError, match="prompt 1: I do not like it"):
        engine.generate([prompts[0], Prompt(torch.tensor([BAD]))], 2, SAMPLING)


def test_an_interrupted_batch_is_left_at_the_server(serve):
    server = serve()
    connection = connect(server.url)
    engine = RemoteEngine(connection, FakeSender(connection))
    policy = Policy(tiny("qwen2"))
    engine.update_weights(policy, 0)

    def interrupt(index, group):
        raise KeyboardInterrupt

    prompts = [Prompt(torch.tensor([token])) for token in (10, SILENT)]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, 1, SAMPLING, interrupt)
    threads = [t for t in threading.enumerate() if t.name.startswith("rollout")]
    for thread in threads:
        thread.join(5)  # they do not wait for the silent request
    assert not any(t.is_alive() for t in threads)
    assert len(engine.generate(prompts[:1], 1, SAMPLING)[0]) == 1
