"""Weights through shared memory, and the engine process's rules, without vLLM."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import Alive, Command, EngineSettings, Problem, Reply, Request
from revisual_fast.rollout.vllm.commands import Refused, engine_arguments, environment, problem_of
from revisual_fast.rollout.vllm.inputs import image_spans
from revisual_fast.rollout.vllm.transfer import ALIGN, HostSender, make_sender, plan_buckets
from revisual_fast.rollout.vllm.worker import serve
from revisual_fast.rollout.weights import WeightMeta, WeightSource
from tests.models import tiny

SETTINGS = EngineSettings("model", "bfloat16", "cpu", max_model_len=64, max_batch=8)
READER = """
import hashlib, json, sys
info = json.load(sys.stdin)
bucket = open(info["path"], "rb").read()
assert len(bucket) == info["size"]
for name, dtype, shape, offset in zip(info["names"], info["dtype_names"], info["shapes"], info["offsets"]):
    size = {"float32": 4, "bfloat16": 2}[dtype]
    for length in shape:
        size *= length
    print(name, hashlib.sha256(bucket[offset : offset + size]).hexdigest())
"""


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([torch.float32, torch.bfloat16]))), st.integers(1, 2000))
def test_buckets_hold_every_weight_once_and_in_order(sizes: list[tuple[int, torch.dtype]], limit: int) -> None:
    entries = [WeightMeta(str(i), dtype, (n,)) for i, (n, dtype) in enumerate(sizes)]
    buckets = plan_buckets(entries, limit)
    assert [entry for bucket in buckets for entry, _ in bucket] == entries
    for bucket in buckets:
        assert len(bucket) == 1 or max(offset + entry.bytes for entry, offset in bucket) <= limit
        ends = [0]
        for entry, offset in bucket:
            assert offset % ALIGN == 0
            assert offset >= ends[-1]
            ends.append(offset + entry.bytes)


class Reader:
    """An engine in another process, which hashes the bytes of each weight that it is sent."""

    def __init__(self, fails_after: int | None = None):
        self.commands: list[str] = []
        self.hashes: dict[str, str] = {}
        self.fails_after = fails_after

    def call(self, name: str, *, timeout: float | None = None, **given: Any) -> Any:
        self.commands.append(name)
        if self.commands.count("update_weights") == self.fails_after:
            raise RuntimeError("the engine fell over")
        if name == "update_weights":
            text = json.dumps(given["update_info"])  # a server takes it as JSON
            done = subprocess.run(
                [sys.executable, "-c", READER], input=text, capture_output=True, text=True, check=True
            )
            self.hashes |= dict(line.split() for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def source() -> WeightSource:
    return WeightSource(Policy(tiny("qwen2_5_vl")))


def test_weights_arrive_in_another_process(source: WeightSource) -> None:
    reader = Reader()
    sender = HostSender(reader, 300_000)  # type: ignore[arg-type]
    sync = sender.send(source, None, 3)
    names = ["init_weight_transfer_engine", "start_weight_update", "finish_weight_update", "drop_caches"]
    assert [name for name in reader.commands if name != "update_weights"] == names
    assert reader.commands.count("update_weights") > 1
    assert reader.hashes == {n: hashlib.sha256(t.contiguous().numpy()).hexdigest() for n, t in source.tensors()}
    assert sync.tensors == len(reader.hashes)
    assert sync.bytes == sum(entry.bytes for entry in source.entries())


def test_only_the_chosen_weights_are_sent(source: WeightSource) -> None:
    reader = Reader()
    sender = HostSender(reader, 2**20)  # type: ignore[arg-type]
    chosen = frozenset(entry.name for entry in source.entries() if "layers.0." in entry.name)
    assert sender.send(source, chosen, 1).tensors == len(chosen)
    assert reader.hashes.keys() == chosen
    sender.send(source, frozenset(), 2)
    assert reader.commands.count("init_weight_transfer_engine") == 1
    assert reader.commands[-3:] == ["start_weight_update", "finish_weight_update", "drop_caches"]


def test_shared_memory_is_given_back_also_after_an_error(source: WeightSource) -> None:
    def ours() -> list[str]:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.islink(link) and "revisual" in os.readlink(link)]

    sender = HostSender(Reader(fails_after=2), 300_000)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="fell over"):
        sender.send(source, None, 1)
    assert ours() == []


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_cuda_backends_are_refused_on_a_cpu(kind: str) -> None:
    with pytest.raises(ValueError, match="say host"):
        make_sender(kind, Reader(), bucket_bytes=1, device=torch.device("cpu"))  # type: ignore[arg-type]


# -- requests


def request(ids: list[int], grids: list[list[int]], keys: tuple[str, ...]) -> Request:
    patches = torch.zeros(sum(t * h * w for t, h, w in grids), 12)
    return Request(0, ids, 1, patches, torch.tensor(grids), keys, image_token_id=5, merge_size=2)


def test_images_are_found_by_their_sizes() -> None:
    assert image_spans(Request(0, [1, 2, 3], 1)) == []
    assert image_spans(request([1, 5, 5, 5, 5, 2, 5], [[1, 4, 4], [1, 2, 2]], ("a", "b"))) == [(1, 4), (6, 1)]
    assert image_spans(request([5, 5, 5], [[1, 2, 4], [1, 2, 2]], ("a", "b"))) == [(0, 2), (2, 1)]  # side by side


@pytest.mark.parametrize(
    ("ids", "keys", "message"),
    [
        ([1, 5, 5, 5, 2], ("a",), "3 image tokens in the prompt, but its images have 4 features"),
        ([1, 5, 5, 2, 5, 5], ("a",), "do not stand together"),
        ([5, 5, 5, 5], ("a", "b"), "1 images, but 2 image keys"),
    ],
)
def test_requests_that_do_not_fit_together_are_refused(ids: list[int], keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_spans(request(ids, [[1, 4, 4]], keys))


# -- the process


def test_the_environment_keeps_what_the_user_has_set() -> None:
    found = environment(SETTINGS, {"VLLM_CPU_KVCACHE_SPACE": "7", "VLLM_LOGGING_LEVEL": "INFO"})
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not {"VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "CUDA_VISIBLE_DEVICES"} & found.keys()


@pytest.mark.parametrize(
    ("device", "count", "visible", "expected"),
    [
        ("cuda:0", 1, "", "0"),
        ("cuda", 2, "", "0,1"),
        ("cuda:1", 1, "4,6,7", "6"),
        ("cuda:1", 2, "4,6,7", "6,7"),
    ],
)
def test_the_engine_sees_the_trainers_device_and_those_after_it(
    device: str, count: int, visible: str, expected: str
) -> None:
    settings = replace(SETTINGS, device=device, tensor_parallel=count)
    assert environment(settings, {"CUDA_VISIBLE_DEVICES": visible})["CUDA_VISIBLE_DEVICES"] == expected


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(Refused, match="more devices than the 2"):
        environment(replace(SETTINGS, device="cuda:1", tensor_parallel=2), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_what_vllm_is_started_with() -> None:
    on_cpu = engine_arguments(SETTINGS)
    assert on_cpu["enforce_eager"]
    assert "gpu_memory_utilization" not in on_cpu
    on_cuda = engine_arguments(replace(SETTINGS, device="cuda:0", memory_share=0.3, transfer="ipc", sleep=True))
    assert not on_cuda["enforce_eager"]
    assert on_cuda["gpu_memory_utilization"] == 0.3
    assert on_cuda["weight_transfer_config"] == {"backend": "ipc"}
    assert on_cuda["enable_sleep_mode"]


def wrapped(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise RuntimeError("the engine failed") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (wrapped(torch.OutOfMemoryError("")), "out_of_memory"),
        (RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate'"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (wrapped(ValueError("no")), "engine"),
        (Refused("no"), "request"),
    ],
)
def test_errors_are_told_apart(error: Exception, kind: str) -> None:
    assert problem_of(error).kind == kind


class FakeCommands:
    """In the place of vLLM."""

    def generate(self, requests: Any, n: int, sampling: Sampling, emit: Any) -> None:
        emit(Alive())

    def memory(self) -> int:
        raise Refused("not now")

    def sleep(self, level: int) -> None:
        raise RuntimeError("broken")

    def close(self) -> None:
        pass


def test_commands_are_answered_one_by_one_until_close() -> None:
    ours, theirs = Pipe()
    thread = threading.Thread(target=serve, args=(theirs, FakeCommands()))
    thread.start()

    def answers(count: int, name: str, **given: Any) -> list[Any]:
        ours.send_bytes(pickle.dumps(Command(name, given)))
        return [ours.recv() for _ in range(count)]

    assert answers(2, "generate", requests=[], n=1, sampling=Sampling(1)) == [Alive(), Reply()]
    assert answers(1, "memory") == [Problem("request", "not now")]
    (problem,) = answers(1, "sleep", level=1)
    assert problem.kind == "engine"
    assert "RuntimeError: broken" in problem.text
    assert answers(1, "close") == [Reply()]
    thread.join(5)
    assert not thread.is_alive()


def test_the_end_of_the_trainer_ends_the_loop() -> None:
    ours, theirs = Pipe()
    thread = threading.Thread(target=serve, args=(theirs, FakeCommands()))
    thread.start()
    ours.close()
    thread.join(5)
    assert not thread.is_alive()
