"""The section on rollouts: which engine generates, where, and what happens when it fails."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from revisual_fast.config.base import Count, Positive, PositiveFloat, Section

__all__ = ["RolloutConfig"]


class RolloutConfig(Section):
    engine: Literal["auto", "embedded", "vllm"] = "auto"
    """embedded: transformers, in this process; auto: vllm where it is installed and the device is CUDA."""
    async_: Literal["off", "one_step"] = Field("off", alias="async")
    """one_step: the next step's rollouts are generated while this one trains, with weights one step old (vllm only)."""
    max_batch: Positive = 1024
    """Sequences decoded at once."""
    max_cached_tokens: Positive = 262144
    """Prompt and response tokens in the embedded engine's cache at once."""
    url: str | None = None
    """Of a running ``vllm serve``; null: an engine process of our own, on this node."""
    tensor_parallel: Positive = 1
    """Devices that vllm's engine process spreads the model over."""
    memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the device's memory, for vllm's weights and cache together."""
    sleep: Literal["auto", "off", 1, 2] = "auto"
    """What vllm gives back while the trainer works: 1 keeps its weights on the host, 2 drops them; auto: 1, where it
    shares the trainer's CUDA device and nothing overlaps."""
    transfer: Literal["auto", "ipc", "nccl", "host"] = "auto"
    """How weights reach vllm: CUDA IPC, NCCL, or shared host memory; auto: nccl to a server on CUDA, ipc to one process
    on the trainer's device, host otherwise."""
    bucket_mib: Positive = 512
    """Weights sent at a time."""
    check_weights: bool = False
    """After every update, compare fingerprints of all weights in trainer and engine."""
    start_seconds: PositiveFloat = 900.0
    """How long vllm may take to start."""
    stall_seconds: PositiveFloat = 300.0
    """An engine that shows no sign of life for so long is taken for hung."""
    max_restarts: Count = 3
    """Times that the engine is started anew within one batch, before the run stops."""
    request_retries: Count = 2
    """Times that a request which failed is sent again, before the run stops and names its record."""

    def for_vllm(self) -> list[str]:
        """The settings that were given and have an effect on vllm only."""
        others = {"engine", "async_", "max_batch", "max_cached_tokens"}
        given = ["async"] if self.async_ != "off" else []
        return given + [key for key in type(self).model_fields if key in self.model_fields_set - others]

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        if self.engine == "embedded" and self.async_ != "off":
            raise ValueError(
                "async one_step needs engine vllm: the embedded engine samples from the weights being trained"
            )
        if self.engine == "embedded" and (given := self.for_vllm()):
            raise ValueError(f"{', '.join(given)}: of vllm, without effect on engine embedded; leave it out")
        if self.url is not None and "memory_share" in self.model_fields_set:
            raise ValueError(
                "memory_share is the server's business (vllm serve --gpu-memory-utilization); leave it out"
            )
        if self.url is not None and self.transfer == "ipc":
            raise ValueError("transfer ipc reaches an engine process of our own; for a server say nccl or host")
        if self.async_ != "off" and self.sleep in (1, 2):
            raise ValueError("sleep cannot be combined with async one_step, where the engine never rests")
        return self
