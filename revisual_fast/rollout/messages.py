"""What the trainer and an engine in another process say to each other. Torch only; everything here can be pickled.

The trainer sends a :class:`Command`; the engine answers each with one :class:`Reply` or :class:`Problem`. Before the
answer to ``generate`` come its events, and an :class:`Alive` whenever the engine has worked for a second without one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

__all__ = [
    "Alive", "Command", "EngineSettings", "Event", "Failed", "Finished", "Problem", "Reply", "Request",
]  # fmt: skip


@dataclass(frozen=True)
class EngineSettings:
    """How an engine process is to be started. Sizes in tokens and bytes."""

    model: str  # directory or hub id: configuration and tokenizer; its weights are not read
    dtype: Literal["float32", "bfloat16"]
    device: str  # "cpu" or "cuda:0", the trainer's device
    max_model_len: int  # prompt and completion
    max_batch: int  # sequences decoded at once
    tensor_parallel: int = 1
    memory_share: float = 0.5  # of the device, CUDA only
    sleep: bool = False  # whether it will be put to sleep
    masks: bool = False  # whether rollouts carry the sampling mask
    prefix_cache: bool = True
    transfer: Literal["ipc", "nccl", "host"] = "host"
    images: int = 0  # most images of one prompt
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a completion, and nothing else does


@dataclass(frozen=True)
class Request:
    """One prompt. ``index`` is the caller's name for it."""

    index: int
    ids: list[int]
    seed: int
    pixel_values: Tensor | None = None  # [patches, C] of all its images
    grids: Tensor | None = None  # [I, 3] int64
    image_keys: tuple[str, ...] = ()
    image_token_id: int | None = None
    merge_size: int = 1


@dataclass(frozen=True)
class Finished:
    """All completions of a request: ids, log-probs, "stop" or "length", and masks where asked for."""

    index: int
    ids: list[list[int]]
    logp: list[list[float]]
    finish_reason: list[str]
    masks: list[list[list[int]]] | None = None  # [n][C][kept ids]


@dataclass(frozen=True)
class Failed:
    """A request that the engine could not serve; it goes on with the others."""

    index: int
    reason: str


@dataclass(frozen=True)
class Alive:
    """The engine is at work."""


Event = Finished | Failed | Alive


@dataclass(frozen=True)
class Command:
    """start(settings), generate(requests, n, sampling), init_weight_transfer_engine(init_info), start_weight_update(),
    update_weights(update_info), finish_weight_update(weight_version), drop_caches(), fingerprints(), sleep(level),
    wake_up(tags), memory(), world_size(), close()."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    value: Any = None


@dataclass(frozen=True)
class Problem:
    """A command failed. After "out_of_memory" and "engine" the engine is of no use any more."""

    kind: Literal["out_of_memory", "engine", "request"]
    text: str
