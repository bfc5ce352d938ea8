"""The engine's side of the "host" transfer: buckets of weights in memory that the trainer shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

__all__ = ["HostTransferEngine"]


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One bucket, as :mod:`~revisual_fast.rollout.vllm.transfer` lays it out."""

    path: str
    size: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class HostTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads each bucket into this worker's share of the model, layer by layer, in the memory that it has already."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        info = update_info
        bucket = torch.from_file(info.path, shared=True, size=info.size, dtype=torch.uint8)
        # copied at once: a layer keeps its parts until it has them all, the trainer fills the bucket anew before that
        bucket = bucket.to(self.device, copy=True)
        weights = []
        for name, dtype_name, shape, offset in zip(
            info.names, info.dtype_names, info.shapes, info.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            weights.append((name, bucket[offset : offset + size].view(dtype).view(shape)))
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass
