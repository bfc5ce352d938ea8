"""Ranks: how work is shared, what they tell each other, and the optimizer's divided state; two processes on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from revisual_fast import distributed
from revisual_fast.config import Config
from revisual_fast.distributed import ALONE, World, joined, owners
from revisual_fast.policy.load import pick_device
from revisual_fast.rollout.build import check_rollout
from revisual_fast.rollout.engine import EngineError, NonFiniteLogits, Sync
from revisual_fast.rollout.session import EngineSession
from revisual_fast.rollout.vllm.process import without_torchrun
from tests.ranks import torchrun


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_shares_make_the_whole(size, count):
    items = list(range(count))
    parts = [World(rank, size).share(items) for rank in range(size)]
    assert World.whole(parts) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_owners_are_even_and_the_same_everywhere():
    sizes = [("embedding", 1000), *((f"layer {i}", 300 + i) for i in range(20)), *((f"norm {i}", 2) for i in range(20))]
    found = owners(sizes, 4)
    assert found == owners(reversed(sizes), 4)
    loads = [sum(size for name, size in sizes if found[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) < 310
    assert set(owners(sizes, 1).values()) == {0}


def test_alone_nothing_is_sent():
    assert ALONE.gather(3) == [3]
    assert ALONE.agree(3) == 3
    assert ALONE.any(True)
    values = torch.ones(2)
    assert ALONE.sum(values) is values
    assert ALONE.collect({"a": values})["a"] is values
    with pytest.raises(KeyError, match="as it is"):
        ALONE.gather_from(lambda: {}["as it is"])
    with joined() as ranks:
        assert ranks is ALONE


def test_what_ranks_tell_each_other():
    done = torchrun("tests.ranks", "communication")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all is well") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_is_divided(dtype):
    done = torchrun("tests.ranks", "optimizer", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all is well") == 2


def test_settings_that_several_ranks_cannot_have(monkeypatch):
    monkeypatch.setattr(distributed, "_world", World(1, 4))
    cpu = torch.device("cpu")
    for rollout, message in (
        ({"engine": "vllm", "async": "one_step"}, "rollout.async: one_step"),
        ({"engine": "vllm", "url": "http://localhost:8000"}, "leave out url"),
        ({"engine": "vllm", "tensor_parallel": 2}, "leave out url and tensor_parallel"),
        ({"engine": "vllm", "transfer": "ipc"}, "rollout.transfer: ipc needs a single rank"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rollout(Config.model_construct(rollout=Config.model_fields["rollout"].annotation(**rollout)), cpu)
    with pytest.raises(ValueError, match=r"model\.device: cuda:1 .*say auto"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 ranks, and 2 CUDA devices"):
        pick_device("auto")


def test_engines_are_brought_up_to_date_together(monkeypatch):
    """One that cannot be started again is an error on every rank, before any of them generates."""
    told = []

    class Told(World):
        def gather_from(self, work, *kinds):
            told.append(kinds)
            return [None, work()]

    monkeypatch.setattr(distributed, "_world", Told(1, 2))
    session = EngineSession(SimpleNamespace(update_weights=lambda policy, version: Sync(version)))
    session.update(None, 7)
    assert told == [(NonFiniteLogits, EngineError)]
    assert session.taken().tensors == 7


def test_a_process_beside_the_ranks_is_none_of_them():
    given = {"PATH": "/bin", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert without_torchrun(given) == {"PATH": "/bin"}


def test_a_process_group_of_somebody_else_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="in use already"), joined():
        pass
    monkeypatch.setattr(distributed, "_world", World(1, 2))
    with joined() as ranks:
        assert ranks == World(1, 2), "ours, from further out"


def test_several_nodes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="one node only"), joined():
        pass
