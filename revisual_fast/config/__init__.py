"""The configuration's schema: strict pydantic models. Imports neither torch nor transformers.

Every key of a YAML file stands here with its type, range and default; ``config_file.load_config`` reads one.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from revisual_fast.config.base import Positive, PositiveFloat, Section, nearest
from revisual_fast.config.data import DatasetConfig, EvaluationConfig
from revisual_fast.config.model import ChatConfig, LoraConfig, ModelConfig
from revisual_fast.config.rollout import RolloutConfig
from revisual_fast.config.stages import (
    AdvantageConfig,
    EntropyConfig,
    GRPOConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PadConfig,
    ResampleConfig,
    RewardConfig,
    SFTConfig,
    StageBase,
    StageConfig,
)

__all__ = [
    "AdvantageConfig", "ChatConfig", "Config", "DatasetConfig", "EntropyConfig", "GRPOConfig", "LoraConfig",
    "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "PadConfig", "ResampleConfig", "RewardConfig",
    "RolloutConfig", "SFTConfig", "StageBase", "StageConfig", "TelemetryConfig", "nearest",
]  # fmt: skip


class RunConfig(Section):
    dir: str
    """Where everything of this run goes: checkpoints, models, metrics, report."""
    seed: int = 0
    deterministic: bool = False
    """Ask torch for deterministic algorithms only (the CPU is deterministic without it)."""
    threads: Positive | None = None
    """CPU threads for torch; null leaves torch's own choice."""
    max_minutes: PositiveFloat | None = None
    """Save and stop, as on Ctrl-C, after the step by which training and evaluation have taken this long in all."""


class TrainConfig(Section):
    max_steps: Positive | None = None
    """Cut every stage after this many steps."""
    micro_batch_tokens: Positive = 16384
    """Packed tokens per forward and backward pass; more only where one prompt and response do not fit."""
    layout: Literal["shared", "varlen"] = "shared"
    """shared: a group's prompt stands in the packed row once; varlen: once per completion, for comparison."""
    max_nonfinite: Positive = 3
    """Stop after this many steps in a row with a non-finite loss or gradient."""


class CheckpointConfig(Section):
    every: Positive = 50
    """Steps between checkpoints; one more is written at the end of every stage and on Ctrl-C."""
    keep: Positive = 2


class TelemetryConfig(Section):
    trackio: str | None = None
    """Project name; null: off."""
    wandb: str | None = None
    samples_every: Positive = 10
    """Steps between stored sample rollouts."""
    progress: bool = True
    plots: bool = True
    """Whether reports have pictures while the run goes on; ``revisual-fast report`` draws them in any case."""


class Config(Section):
    run: RunConfig
    model: ModelConfig
    chat: ChatConfig = ChatConfig()
    data: dict[str, DatasetConfig]
    stages: dict[str, StageConfig]
    curriculum: list[str]
    """Which stages run, in this order."""
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig.model_validate({})
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def start_model(self) -> str:
        """Where the model is that the curriculum starts from: a directory or a hub id."""
        return self.model.path or f"{self.run.dir}/start"

    @model_validator(mode="after")
    def _staleness(self) -> Config:
        for name in self.curriculum if self.rollout.async_ == "one_step" else []:
            stage = self.stages.get(name)
            if not isinstance(stage, GRPOConfig):
                continue
            if stage.old_logp == "trainer" and stage.objective.rollout_correction is None:
                raise ValueError(
                    f"stages.{name}: with rollout.async: one_step completions are sampled with older weights; say "
                    "old_logp: engine, or objective.rollout_correction: truncate or mask"
                )
        return self

    @model_validator(mode="after")
    def _names(self) -> Config:
        _known("curriculum", self.curriculum, self.stages)
        if not self.curriculum or len(set(self.curriculum)) != len(self.curriculum):
            raise ValueError("curriculum must name at least one stage, and each at most once")
        for name, stage in self.stages.items():
            if name == "start" or not re.fullmatch("[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"stages.{name}: a stage's name is letters, digits, _ and -, and not 'start'; rename it"
                )
            if not stage.data:
                raise ValueError(f"stages.{name}.data: name at least one dataset")
            self._datasets(f"stages.{name}.data", stage.data, "response" if isinstance(stage, SFTConfig) else "answer")
        self._datasets("evaluation.heldout", list(self.evaluation.heldout.values()), "answer")
        self._datasets("evaluation.validation", list(self.evaluation.validation.values()), "answer")
        return self

    def _datasets(self, where: str, names: list[str], needed: Literal["answer", "response"]) -> None:
        _known(where, names, self.data)
        for name in names:
            if getattr(self.data[name], needed) is None:
                what = "the target" if needed == "response" else "the right answer"
                raise ValueError(f"data.{name}.{needed} must say what {what} is: {where} uses it")


def _known(where: str, names: list[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not defined{nearest(name, list(known))}")
