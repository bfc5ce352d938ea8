"""The sections on stages: what is trained on, how it is sampled, rewarded and optimised."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from revisual_fast.config.base import Beta, Count, NonNegative, Positive, PositiveFloat, Section, Share

__all__ = [
    "AdvantageConfig", "EntropyConfig", "GRPOConfig", "ObjectiveConfig", "OptimizerConfig", "PadConfig",
    "ResampleConfig", "RewardConfig", "SFTConfig", "SamplingConfig", "StageBase", "StageConfig",
]  # fmt: skip


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    vision_lr: PositiveFloat | None = None
    """Learning rate of the vision tower (with its merger); null: the same as ``lr``."""
    weight_decay: NonNegative = 1e-2
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Share = 0.0
    """Share of the stage's updates over which the learning rate rises linearly."""
    min_lr_ratio: Share = 0.0
    """Where cosine and linear end, as a share of ``lr``."""
    max_grad_norm: PositiveFloat = 1.0


class SamplingConfig(Section):
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    replay: Literal["mask", "ignore"] = "mask"
    """Where top_p or top_k leave ids out. mask: the trainer's log-probs are those over the ids that sampling kept;
    ignore: over the whole vocabulary, although the completions were not sampled from it."""

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0

    @property
    def replayed(self) -> bool:
        """Whether the trainer needs to know which ids were kept."""
        return self.truncated and self.replay == "mask"


class ObjectiveConfig(Section):
    preset: Literal[
        "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "gmpo", "vespo", "luspo", "reinforce"
    ] = "grpo"  # fmt: skip
    clip_low: NonNegative | None = None
    """How far below 1 the ratio may fall; gmpo: below 0 its log, in nats."""
    clip_high: NonNegative | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    delta: PositiveFloat | None = None
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: NonNegative = 0.0
    """0: no reference model is loaded."""
    kl_bias_correction: bool = False
    rollout_correction: Literal["truncate", "mask"] | None = None
    """Importance sampling of old policy over engine: truncate its weight at the cap, or drop what is above."""
    rollout_cap: PositiveFloat | None = None
    rollout_level: Literal["token", "sequence"] | None = None
    off_policy_mask: PositiveFloat | None = None
    """Nats a token: a sequence with a negative advantage that became less likely by more has no policy gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] | None = None
    """null: the preset's own."""

    @model_validator(mode="after")
    def _corrections(self) -> ObjectiveConfig:
        given = [key for key in ("rollout_cap", "rollout_level") if getattr(self, key) is not None]
        if given and self.rollout_correction is None:
            raise ValueError(
                f"{' and '.join(given)} have no effect without rollout_correction; set it to truncate or mask"
            )
        return self


class EntropyConfig(Section):
    """Coefficient of the true-entropy bonus at update k: 0 if k < warmup, else max(floor, start * decay^(k-warmup))."""

    start: NonNegative = 0.0
    warmup: Count = 0
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    floor: NonNegative = 0.0


class AdvantageConfig(Section):
    scale: Literal["std", "none"] = "std"
    eps: PositiveFloat = 1e-6


class ResampleConfig(Section):
    """Dynamic sampling: prompts whose group is stagnant are replaced by further ones."""

    tries: Count = 0
    """Extra rounds of generation a step; what is missing after the last is filled with stagnant groups."""
    on: Literal["accuracy", "reward"] = "accuracy"
    """A group is stagnant if all its completions have the same accuracy, or the same total reward."""


class PadConfig(Section):
    """Prioritized Advantage Distillation; see docs/method.md."""

    mode: Literal["paper", "released", "filter", "sample", "off"] = "paper"
    rho: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the batch that may be kept. With 1 the draw keeps all of E: `paper` is `filter`, `sample` is `off`."""
    t_low: PositiveFloat = 1e-4
    t_high: Annotated[float, Field(gt=0, allow_inf_nan=True)] = float("inf")
    tau_start: PositiveFloat = 1.0
    tau_end: PositiveFloat = 0.3

    @model_validator(mode="after")
    def _thresholds(self) -> PadConfig:
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low {self.t_low} must be below t_high {self.t_high}")
        return self


class RewardConfig(Section):
    weight: float = 1.0
    function: str | None = None
    """``package.module:function`` or ``file.py:function``; null: the built-in reward of this name."""
    args: dict[str, Any] = Field(default_factory=dict)


class StageBase(Section):
    data: list[str]
    steps: Positive | None = None
    """Optimizer steps (sft) or rollout steps (grpo). Exactly one of steps, epochs."""
    epochs: PositiveFloat | None = None
    max_minutes: PositiveFloat | None = None
    """End the stage after the step by which it has taken this long; schedules still go by ``steps`` or ``epochs``."""
    max_prompt_tokens: Positive = 8192
    freeze_vision: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _one_length(self) -> StageBase:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps, epochs")
        return self


class SFTConfig(StageBase):
    kind: Literal["sft"]
    batch_size: Positive = 128
    """Sequences per optimizer step."""
    max_length: Positive = 32768
    """Tokens of prompt and response together; a longer record is a bad record."""


class GRPOConfig(StageBase):
    kind: Literal["grpo"]
    rollout_batch: Positive = 512
    """Prompts per rollout step."""
    update_batch: Positive | None = None
    """Prompts per optimizer update; null: all of the rollout step's, which is strictly on-policy."""
    group_size: Annotated[int, Field(ge=2)] = 8
    max_response_tokens: Positive = 8192
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    old_logp: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs are those of the old policy; engine: as sampled, without a pass of the trainer for them."""
    entropy: EntropyConfig = EntropyConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    resample: ResampleConfig = ResampleConfig()
    pad: PadConfig = PadConfig()
    rewards: dict[str, RewardConfig] = Field(default_factory=lambda: {"accuracy": RewardConfig()})

    @model_validator(mode="after")
    def _batches(self) -> GRPOConfig:
        if self.update_batch is not None and self.rollout_batch % self.update_batch:
            raise ValueError(f"update_batch {self.update_batch} must divide rollout_batch {self.rollout_batch}")
        if self.old_logp == "engine" and self.objective.rollout_correction is not None:
            raise ValueError(
                "objective.rollout_correction weighs the old policy against the engine's; with old_logp: engine they "
                "are the same: choose one of the two"
            )
        if "accuracy" not in self.rewards:
            raise ValueError("rewards needs a component named accuracy (weight 0 is allowed)")
        return self

    @property
    def _engine_log_probs(self) -> dict[str, bool]:
        """What compares the engine's log-probs with the trainer's -> whether it is used."""
        return {
            "old_logp: engine": self.old_logp == "engine",
            "objective.off_policy_mask": self.objective.off_policy_mask is not None,
        }

    @model_validator(mode="after")
    def _replay(self) -> GRPOConfig:
        full = {
            "objective.kl_coef": self.objective.kl_coef,
            "entropy.start": self.entropy.start,
            "entropy.floor": self.entropy.floor,
        }
        given = [key for key, value in full.items() if value]
        if self.sampling.replayed and given:
            raise ValueError(
                f"{', '.join(given)}: KL and entropy are over the whole vocabulary, but top_p or top_k leave part of "
                "it out: say sampling.replay: ignore (log-probs over the whole vocabulary), or top_p: 1 and top_k: 0"
            )
        theirs = [key for key, used in self._engine_log_probs.items() if used]
        if self.sampling.truncated and not self.sampling.replayed and theirs:
            raise ValueError(
                f"{', '.join(theirs)}: the engine's log-probs are over the ids that top_p and top_k kept, the "
                "trainer's with sampling.replay: ignore over all, so that their ratio is not the policy's: use replay: "
                "mask, or top_p: 1 and top_k: 0"
            )
        return self


StageConfig = Annotated[SFTConfig | GRPOConfig, Field(discriminator="kind")]
