"""The trainer's side of vLLM's own backends, against vLLM's own classes, with stand-ins for what needs CUDA."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from revisual_fast.config import ModelConfig
from revisual_fast.policy.load import load_policy
from revisual_fast.rollout.vllm.transfer import VllmSender
from revisual_fast.rollout.weights import WeightSource

BUCKET = 100_000  # bytes; smaller than the largest weight
WORLD = 3


class FakeEngine:
    """Checks every command's contents with the class that vLLM's worker reads them with."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.commands: list[str] = []
        self.received: list[str] = []
        self.version = ""

    def call(self, name: str, *, timeout: float | None = None, **given: Any) -> Any:
        self.commands.append(name)
        if name == "world_size":
            return WORLD - 1
        if name == "init_weight_transfer_engine":
            self.init = self.backend.init_info_cls(**given["init_info"])
        if name == "update_weights":
            info = self.backend.update_info_cls(**given["update_info"])
            assert len(info.names) == len(info.dtype_names) == len(info.shapes)
            self.received += info.names
        if name == "finish_weight_update":
            self.version = given["weight_version"]
        return None


@pytest.fixture
def source(tiny_vl: Path) -> WeightSource:
    return WeightSource(load_policy(tiny_vl, ModelConfig(path=str(tiny_vl), dtype="float32", device="cpu")))


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"uuid": "GPU-0"}))


def stand_in(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, replacement: Any) -> None:
    """Replace a function of vLLM's by one that is called exactly as the real one may be."""
    signature = inspect.signature(getattr(module, name))

    def checked(*arguments: Any, **options: Any) -> Any:
        return replacement(**signature.bind(*arguments, **options).arguments)

    monkeypatch.setattr(module, name, checked)


def send_twice(kind: str, engine: FakeEngine, source: WeightSource) -> tuple[list[str], list[str]]:
    """All weights, then some; the names that the engine got each time."""
    sender = VllmSender(kind, engine, BUCKET, torch.device("cuda:0"))  # type: ignore[arg-type]
    some = frozenset(entry.name for entry in source.entries() if "layers.1.mlp" in entry.name)
    found = []
    for version, names in ((1, None), (2, some)):
        engine.received.clear()
        sync = sender.send(source, names, version)
        assert engine.version == str(version)
        assert engine.commands[-2:] == ["finish_weight_update", "drop_caches"]
        assert (sync.tensors, sync.bytes) == (len(engine.received), sum(e.bytes for e in source.entries(names)))
        found.append(engine.received.copy())
    assert engine.commands.count("init_weight_transfer_engine") == 1
    sender.forget()
    sender.send(source, some, 3)
    assert engine.commands.count("init_weight_transfer_engine") == 2  # the engine is a new one
    assert found[0] == [entry.name for entry in source.entries()]
    assert found[1] == [entry.name for entry in source.entries(some)]
    return found[0], found[1]


def test_ipc(source: WeightSource, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import ipc_engine

    handles = []

    def produce(iterator: Any, gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int) -> Any:
        for item in iterator:
            tensor = post_iter_func(item)
            assert tensor.is_contiguous()
            assert tensor.nbytes <= buffer_size_bytes
            handles.append(gpu_uuid)
            names, dtypes = [item[0]], [str(tensor.dtype).split(".")[-1]]
            yield ipc_engine_chunk(names, [list(tensor.shape)], dtypes, [tensor.nbytes], {gpu_uuid: ()})

    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk as ipc_engine_chunk

    stand_in(monkeypatch, ipc_engine, "packed_ipc_producer", produce)
    monkeypatch.setattr(ipc_engine.IPCTrainerWeightTransferEngine, "_post_send_sync", staticmethod(lambda: None))
    engine = FakeEngine(ipc_engine.IPCWeightTransferEngine)
    send_twice("ipc", engine, source)
    assert engine.init.packed
    assert set(handles) == {"GPU-0"}


def test_nccl(source: WeightSource, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    groups: list[Any] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: groups.append(info) or info)

    def broadcast(iterator: Any, group: Any, **_: Any) -> None:
        """Goes through the real check of what iterates against what was announced."""
        assert group is groups[-1]
        assert all(tensor.is_contiguous() for _, tensor in iterator)

    stand_in(monkeypatch, nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    engine = FakeEngine(nccl_engine.NCCLWeightTransferEngine)
    send_twice("nccl", engine, source)
    assert engine.init.world_size == groups[-1].world_size == WORLD
    assert engine.init.master_port == groups[-1].master_port
    assert engine.init.packed
    assert engine.init.packed_buffer_size_bytes == max(e.bytes for e in source.entries())


def test_host_is_one_of_vllms_backends() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from revisual_fast.rollout.vllm.receiver import HostTransferEngine
    from revisual_fast.rollout.vllm.transfer import register

    register()
    register()
    assert WeightTransferEngineFactory._registry["host"]() is HostTransferEngine


def test_the_installed_package_is_a_plug_in_of_vllm() -> None:
    """So that a server knows the backend too."""
    from importlib.metadata import entry_points

    assert "revisual_fast" in entry_points(group="vllm.general_plugins").names


def test_features_for_a_server_are_read_back_as_they_were() -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import MultiModalFeatures

    from revisual_fast.rollout.messages import Request
    from revisual_fast.rollout.vllm.inputs import features_json

    patches = torch.randn(16 + 8, 12, generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])
    ids = [9, 5, 5, 5, 5, 8, 5, 5, 7]
    request = Request(0, ids, 1, patches, grids, ("a", "b"), image_token_id=5, merge_size=2)
    found = features_json(request)
    assert found is not None
    items = mm_kwargs_from_features(MultiModalFeatures(**found))["image"]
    assert found["mm_hashes"] == {"image": ["a", "b"]}
    assert found["mm_placeholders"] == {"image": [{"offset": 1, "length": 4}, {"offset": 6, "length": 2}]}
    for item, pixels, grid in zip(items, patches.split([16, 8]), grids, strict=True):
        assert torch.equal(item["pixel_values"].data, pixels)
        assert torch.equal(item["image_grid_thw"].data, grid)
    assert features_json(Request(0, [1, 2], 1)) is None
