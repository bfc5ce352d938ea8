"""The trainer's side of a weight update, through vLLM's weight-transfer commands.

"ipc" and "nccl" are vLLM's own backends. "host" is ours: the weights are packed into buckets of memory that trainer
and engine share, on a CPU and on CUDA, for an engine process or a server on the same machine. It needs no vllm here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from revisual_fast.rollout.engine import Sync
from revisual_fast.rollout.remote import Connection, Sender
from revisual_fast.rollout.weights import WeightMeta, WeightSource

__all__ = ["HostSender", "VllmSender", "make_sender", "plan_buckets", "register"]

ALIGN = 64
"""Bytes at whose multiples a weight begins in its bucket."""

Names = frozenset[str] | None


def make_sender(kind: str, connection: Connection, *, bucket_bytes: int, device: torch.device) -> Sender:
    """``bucket_bytes`` are sent at a time; a larger weight goes by itself. ``device`` is the trainer's."""
    if kind == "host":
        return HostSender(connection, bucket_bytes)
    return VllmSender(kind, connection, bucket_bytes, device)


# -- host


def plan_buckets(entries: list[WeightMeta], bucket_bytes: int) -> list[list[tuple[WeightMeta, int]]]:
    """The weights, in order, each with its offset in its bucket."""
    buckets: list[list[tuple[WeightMeta, int]]] = []
    end = 0
    for entry in entries:
        if not buckets or end + entry.bytes > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1].append((entry, end))
        end += -(-entry.bytes // ALIGN) * ALIGN
    return buckets


@contextmanager
def shared_memory(size: int) -> Iterator[tuple[str, Tensor]]:
    """A path under which processes of this user can map the memory, and the memory: [size] uint8.

    It has no name in the file system: nothing is left of it when both sides have let go, however they end.
    """
    fd = os.memfd_create("revisual-fast-weights", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)  # where memory is short, an OSError now instead of SIGBUS later
        path = f"/proc/{os.getpid()}/fd/{fd}"
        yield path, torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(fd)


class HostSender:
    """Packs the weights into shared memory of one bucket's size, which is there during an update only."""

    def __init__(self, connection: Connection, bucket_bytes: int):
        self.connection, self.bucket_bytes = connection, bucket_bytes
        self._ready = False

    def send(self, source: WeightSource, names: Names, version: int) -> Sync:
        begin = time.perf_counter()
        entries = source.entries(names)
        buckets = plan_buckets(entries, self.bucket_bytes)
        call = self.connection.call
        if not self._ready:
            call("init_weight_transfer_engine", init_info={})
            self._ready = True
        call("start_weight_update")
        size = max((offset + entry.bytes for bucket in buckets for entry, offset in bucket), default=1)
        with shared_memory(size) as (path, memory):
            tensors = source.tensors(names)
            for bucket in buckets:
                call("update_weights", update_info={"path": path, "size": size, **_fill(memory, bucket, tensors)})
        call("finish_weight_update", weight_version=str(version))
        call("drop_caches")
        return Sync(len(entries), sum(entry.bytes for entry in entries), time.perf_counter() - begin)

    def forget(self) -> None:
        self._ready = False


def _fill(
    memory: Tensor, bucket: list[tuple[WeightMeta, int]], tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Copy the next weights into their places; what the engine needs to find them."""
    for entry, offset in bucket:
        name, tensor = next(tensors)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (entry.name, entry.dtype, entry.shape), name
        memory[offset : offset + entry.bytes].view(entry.dtype).view(entry.shape).copy_(tensor)
    return {
        "names": [entry.name for entry, _ in bucket],
        "dtype_names": [str(entry.dtype).removeprefix("torch.") for entry, _ in bucket],
        "shapes": [list(entry.shape) for entry, _ in bucket],
        "offsets": [offset for _, offset in bucket],
    }


# -- ipc and nccl


class Chosen:
    """Some of a source's weights, as vLLM's backends read them: its ``WeightSource``, without importing it."""

    def __init__(self, source: WeightSource, names: Names):
        self.source, self.names = source, names

    def metadata(self) -> list[WeightMeta]:
        return self.source.entries(self.names)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source.tensors(self.names):
            yield name, tensor.contiguous()


class Client:
    """The four commands that vLLM's backends give; they do not know the version, so it is added."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.connection.call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self.connection.call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.connection.call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.connection.call("finish_weight_update", weight_version=weight_version or str(self.version))


class VllmSender:
    """vLLM's own backends: "ipc" within one device, "nccl" from this device to the engine's."""

    def __init__(self, kind: str, connection: Connection, bucket_bytes: int, device: torch.device):
        assert kind in ("ipc", "nccl"), kind
        if device.type != "cuda":
            raise ValueError(f"rollout.transfer {kind} needs the trainer on CUDA, not on {device}; say host")
        self.kind, self.connection, self.bucket_bytes, self.device = kind, connection, bucket_bytes, device
        self.client = Client(connection)
        self._engine: Any = None

    def send(self, source: WeightSource, names: Names, version: int) -> Sync:
        begin = time.perf_counter()
        self.client.version = version
        entries = source.entries(names)
        with torch.cuda.device(self.device):
            if self._engine is None:
                self._engine = self._connect(source)
            self._engine.source = Chosen(source, names)
            self._engine.send_weights()
        self.connection.call("drop_caches")
        return Sync(len(entries), sum(entry.bytes for entry in entries), time.perf_counter() - begin)

    def forget(self) -> None:
        self._engine = None

    def _connect(self, source: WeightSource) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        largest = max(entry.bytes for entry in source.entries())  # ipc does not take a weight larger than its buffer
        info = _INIT[self.kind](self.connection, max(self.bucket_bytes, largest))
        return WeightTransferTrainerFactory.trainer_init(info, client=self.client, source=Chosen(source, None))


def _ipc(connection: Connection, buffer_bytes: int) -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=buffer_bytes)


def _nccl(connection: Connection, buffer_bytes: int) -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    return NCCLTrainerInitInfo(
        rank=0,
        master_address=get_ip(),
        master_port=get_open_port(),
        world_size=1 + connection.call("world_size"),
        packed=True,
        packed_buffer_size_bytes=buffer_bytes,
    )


_INIT: dict[str, Callable[[Connection, int], Any]] = {"ipc": _ipc, "nccl": _nccl}


# -- in the engine

_registered = False


def register() -> None:
    """Make "host" known to vLLM, in whichever of its processes this runs; named as one of its plug-ins."""
    global _registered
    if _registered:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("host", "revisual_fast.rollout.vllm.receiver", "HostTransferEngine")
    _registered = True
