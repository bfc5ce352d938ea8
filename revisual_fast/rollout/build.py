"""The engine of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from revisual_fast.config import Config, GRPOConfig
from revisual_fast.data.processor import Processor
from revisual_fast.data.records import Record
from revisual_fast.distributed import world
from revisual_fast.policy.load import pick_device
from revisual_fast.policy.model import Policy
from revisual_fast.rollout import INSTALL, pick_engine, vllm_problem
from revisual_fast.rollout.engine import Engine
from revisual_fast.rollout.hf import HFEngine
from revisual_fast.rollout.messages import EngineSettings
from revisual_fast.rollout.session import EngineSession

__all__ = ["EngineRoom", "check_rollout", "engine_settings", "transfer_kind"]


class EngineRoom:
    """The engine that a run's stages and evaluations take turns to use.

    vllm is started when it is first needed and lives until :meth:`close`; the embedded engine is part of a policy and
    goes with it. ``records`` are all that will be asked about, ``log`` is where vllm's output goes.
    """

    def __init__(
        self, config: Config, processor: Processor, records: Iterable[Record], log: Path, *, model: str | None = None
    ):
        self.config, self.processor, self.log, self.model = config, processor, log, model or config.start_model
        self.device = pick_device(config.model.device)
        self.kind, self.why = check_rollout(config, self.device)
        self.images = max((len(record.images) for record in records), default=0)
        needs = self.images or transfer_kind(config, self.device) == "nccl"
        if config.rollout.url is not None and needs and (problem := vllm_problem()):
            raise ValueError(
                f"rollout.url: a server needs vllm here as well, for images and nccl: {problem}; {INSTALL}"
            )
        self._session: EngineSession | None = None

    def __enter__(self) -> EngineRoom:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def describe(self) -> str:
        """A line for the run's header."""
        rollout = self.config.rollout
        if self.kind == "embedded":
            return f"rollouts: embedded ({self.why})"
        place = f"server {rollout.url}" if rollout.url else f"own process, {rollout.tensor_parallel} device(s)"
        sleep = f"sleep {level}" if (level := sleep_level(self.config, self.device)) else "always awake"
        kind = transfer_kind(self.config, self.device)
        ahead = ", one step ahead" if rollout.async_ == "one_step" else ""
        return f"rollouts: vllm ({self.why}; {place}; weights by {kind}; {sleep}{ahead})"

    def session(self, policy: Policy) -> EngineSession:
        """The engine for ``policy``; it gets the weights when it is used."""
        if self.kind == "embedded":
            engine = HFEngine(
                policy,
                self.processor.eos_token_ids,
                max_batch=self.config.rollout.max_batch,
                max_cached_tokens=self.config.rollout.max_cached_tokens,
                prefill_tokens=self.config.train.micro_batch_tokens,
            )
            return EngineSession(engine)
        if self._session is None:
            self._session = EngineSession(self._vllm(policy), sleep_level(self.config, self.device))
        return self._session

    def close(self) -> None:
        if self._session is not None:
            self._session.engine.close()
            self._session = None

    def _vllm(self, policy: Policy) -> Engine:
        from revisual_fast.rollout.remote import Connection, RemoteEngine
        from revisual_fast.rollout.vllm.process import ProcessConnection
        from revisual_fast.rollout.vllm.server import ServerConnection
        from revisual_fast.rollout.vllm.transfer import make_sender

        rollout = self.config.rollout
        longest = policy.base.config.get_text_config().max_position_embeddings
        settings = engine_settings(
            *(self.config, self.device, self.images, longest),
            model=self.model,
            eos_token_ids=self.processor.eos_token_ids,
        )
        connection: Connection
        start, stall = rollout.start_seconds, rollout.stall_seconds
        if rollout.url is None:
            connection = ProcessConnection(settings, log=self.log, start_seconds=start, stall_seconds=stall)
        else:
            connection = ServerConnection(
                rollout.url,
                settings,
                tokenizer=self.processor.tokenizer,
                vocab=policy.head_weight.shape[0],
                start_seconds=start,
                stall_seconds=stall,
            )
        bucket = rollout.bucket_mib * 2**20
        sender = make_sender(settings.transfer, connection, bucket_bytes=bucket, device=self.device)
        return RemoteEngine(
            connection,
            sender,
            max_restarts=rollout.max_restarts,
            request_retries=rollout.request_retries,
            check_weights=rollout.check_weights,
        )


def check_rollout(config: Config, device: torch.device) -> tuple[Literal["embedded", "vllm"], str]:
    """The engine, and why it is this one. Raises ValueError for settings of ``rollout`` that cannot work on ``device``,
    with a stage, or on several ranks."""
    rollout, ranks = config.rollout, world().size
    if ranks > 1:
        if rollout.async_ != "off":
            raise ValueError(f"rollout.async: {rollout.async_} needs a single rank, not {ranks}; set it to off")
        if rollout.url is not None or rollout.tensor_parallel > 1:
            raise ValueError(
                f"rollout: each of {ranks} ranks has an engine on its own device; leave out url and tensor_parallel"
            )
        if rollout.transfer in ("ipc", "nccl"):  # vLLM's would make collectives of its own among the ranks
            raise ValueError(f"rollout.transfer: {rollout.transfer} needs a single rank, not {ranks}; set it to host")
    kind, why = pick_engine(rollout, device)
    if kind == "embedded":
        return kind, why
    if device.type != "cuda" and rollout.sleep in (1, 2):
        raise ValueError(f"rollout.sleep: vllm sleeps on CUDA only, the trainer is on {device.type}; set it to off")
    if device.type != "cuda" and rollout.transfer in ("ipc", "nccl"):
        raise ValueError(
            f"rollout.transfer: {rollout.transfer} needs CUDA, the trainer is on {device.type}; set it to host"
        )
    _check_sampling(config)
    return kind, why


def _check_sampling(config: Config) -> None:
    stages = {name: stage for name in config.curriculum if isinstance(stage := config.stages[name], GRPOConfig)}
    masked = [name for name, stage in stages.items() if stage.sampling.replayed]
    for name, stage in stages.items():
        where = f"stages.{name}.sampling"
        if stage.sampling.temperature < 0.01:
            raise ValueError(
                f"{where}.temperature: vllm samples at 0.01 at least (given: {stage.sampling.temperature})"
            )
        if masked and not stage.sampling.truncated:
            raise ValueError(
                f"{where}: stage {masked[0]} wants sampling masks, which vllm then returns for every token of the run; "
                "without top_p or top_k they hold the whole vocabulary: run this stage by itself, or set "
                f"stages.{masked[0]}.sampling.replay: ignore"
            )


def transfer_kind(config: Config, device: torch.device) -> Literal["ipc", "nccl", "host"]:
    """How weights reach vllm."""
    rollout = config.rollout
    if rollout.transfer != "auto":
        return rollout.transfer
    if device.type != "cuda" or world().size > 1 or (rollout.url is None and rollout.tensor_parallel > 1):
        return "host"
    return "ipc" if rollout.url is None else "nccl"


def sleep_level(config: Config, device: torch.device) -> int:
    """0: the engine is always awake."""
    rollout = config.rollout
    if rollout.sleep == "auto":
        shared = device.type == "cuda" and rollout.url is None
        return int(shared and rollout.async_ == "off")
    return 0 if rollout.sleep == "off" else rollout.sleep


def engine_settings(
    config: Config, device: torch.device, images: int, longest: int, *, model: str, eos_token_ids: tuple[int, ...]
) -> EngineSettings:
    """What vllm is started with: as long as every stage's prompts and responses, and evaluation's if its prompts are as
    the stages', but not longer than the model's ``longest`` sequence."""
    rollout = config.rollout
    stages = [config.stages[name] for name in config.curriculum]
    training = [stage for stage in stages if isinstance(stage, GRPOConfig)]
    longest_prompt = max(stage.max_prompt_tokens for stage in stages)
    evaluated = bool(config.evaluation.heldout or config.evaluation.validation)
    lengths = [stage.max_prompt_tokens + stage.max_response_tokens for stage in training]
    lengths += [longest_prompt + config.evaluation.max_response_tokens] if evaluated else []
    return EngineSettings(
        model=model,
        dtype=config.model.dtype,
        device=str(device),
        max_model_len=min(longest, max(lengths, default=longest_prompt)),
        max_batch=rollout.max_batch,
        tensor_parallel=rollout.tensor_parallel,
        memory_share=rollout.memory_share,
        sleep=sleep_level(config, device) > 0,
        masks=any(stage.sampling.replayed for stage in training),
        transfer=transfer_kind(config, device),
        images=images,
        eos_token_ids=eos_token_ids,
    )
