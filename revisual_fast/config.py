"""The configuration's schema: strict pydantic models. Imports neither torch nor transformers.

Every key of a YAML file stands here with its type, range and default; ``config_file.load_config`` reads one.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "AdvantageConfig", "ChatConfig", "Config", "DatasetConfig", "EntropyConfig", "GRPOConfig", "LoraConfig",
    "ModelConfig", "OptimizerConfig", "PadConfig", "RewardConfig", "SFTConfig", "StageBase", "StageConfig",
    "TelemetryConfig", "nearest",
]  # fmt: skip

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _strings(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError(f"Input should be a string or a list of strings (given: {value!r})")


Strings = Annotated[str | list[str], BeforeValidator(_strings)]  # one error for the field, not one a member


class Section(BaseModel):
    """Strict: no value is converted, but an integer is a number and a YAML list a tuple."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class RunConfig(Section):
    dir: str
    """Where everything of this run goes: checkpoints, models, metrics, report."""
    seed: int = 0
    deterministic: bool = False
    """Ask torch for deterministic algorithms only (the CPU is deterministic without it)."""
    threads: Positive | None = None
    """CPU threads for torch; null leaves torch's own choice."""


class LoraConfig(Section):
    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Share = 0.0
    target_modules: Strings = r".*\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"  # of the text tower


class ModelConfig(Section):
    path: str | None = None
    """A directory or hub id that transformers can load; with ``init``, null is ``run.dir``/start."""
    init: Literal["tiny-vl", "smollm2-vl"] | None = None
    """Build this model there if nothing is there yet; new weights are drawn with ``run.seed``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "auto"
    gradient_checkpointing: bool = False
    liger_kernels: Literal["auto"] | bool = "auto"
    """RMSNorm, SwiGLU and RoPE by liger-kernel; auto: where it is installed and the device is CUDA."""
    attention: Literal["auto", "flash", "varlen", "triton", "sdpa"] = "auto"
    """Attention over packed rows (docs/packing.md); auto: flash-attn's or torch's varlen kernel if it runs, or SDPA."""
    vision_cache_mib: Count = 2048
    """Image features of a frozen vision tower are kept up to this size, on the model's device; 0: none."""
    lora: LoraConfig | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    trust_remote_code: Literal[False] = False

    @model_validator(mode="after")
    def _start(self) -> ModelConfig:
        if not self.path and self.init is None:
            raise ValueError("give path (a directory or hub id), init (tiny-vl, smollm2-vl) or both")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} must be at most max_pixels {self.max_pixels}")
        return self


class ChatConfig(Section):
    system: str | None = None
    """System prompt put before every prompt."""
    prefix: str = ""
    """Text before every prompt."""
    suffix: str = ""
    """Text after every prompt."""


class DatasetConfig(Section):
    path: Strings | None = None
    """JSONL, JSON or parquet file(s), relative to the configuration file; globs allowed."""
    hub: str | None = None
    """A `datasets` id (or a local directory that `datasets.load_dataset` takes)."""
    hub_config: str | None = None
    split: str = "train"
    function: str | None = None
    """``package.module:function`` or ``file.py:function`` that returns an iterable of records (mappings)."""
    args: dict[str, Any] = {}
    prompt: str = "{problem}"
    """A template over the record's fields. ``<image>`` in the result says where an image goes (default: in front)."""
    answer: str | None = "{answer}"
    response: str | None = None
    """A template for the target of supervised fine-tuning."""
    images: Strings | None = None
    """The field(s) that hold images: a path, bytes, a list of these, or what `datasets` makes of an image."""
    image_root: str | None = None
    """Folder that image paths are relative to; default: the folder of the data file."""
    options: str | None = None
    """The field that holds a question's answer options; ``{options}`` in ``prompt`` lists them by letter."""
    replace: list[Annotated[tuple[str, str], Field(strict=False)]] = []
    """Regular expressions and what to put for them, applied to the response."""
    verifier: Literal["math", "choice", "exact", "number"] = "math"
    limit: Positive | None = None
    on_bad_record: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if sum(source is not None for source in (self.path, self.hub, self.function)) != 1:
            raise ValueError("give exactly one of path, hub, function")
        for key, owner in (("args", "function"), ("hub_config", "hub"), ("split", "hub"), ("image_root", "images")):
            if key in self.model_fields_set and getattr(self, owner) is None:
                raise ValueError(f"{key} has no effect without {owner}; remove it")
        return self


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
    off_policy_mask: PositiveFloat | None = None
    """Nats a token: a sequence with a negative advantage that became less likely by more has no policy gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] | None = None
    """null: the preset's own."""


class EntropyConfig(Section):
    """Coefficient of the true-entropy bonus at update k: 0 if k < warmup, else max(floor, start * decay^(k-warmup))."""

    start: NonNegative = 0.0
    warmup: Count = 0
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    floor: NonNegative = 0.0


class AdvantageConfig(Section):
    scale: Literal["std", "none"] = "std"
    eps: PositiveFloat = 1e-6


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
    args: dict[str, Any] = {}


class StageBase(Section):
    data: list[str]
    steps: Positive | None = None
    """Optimizer steps (sft) or rollout steps (grpo). Exactly one of steps, epochs."""
    epochs: PositiveFloat | None = None
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
    entropy: EntropyConfig = EntropyConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    pad: PadConfig = PadConfig()
    rewards: dict[str, RewardConfig] = {"accuracy": RewardConfig()}

    @model_validator(mode="after")
    def _batches(self) -> GRPOConfig:
        if self.update_batch is not None and self.rollout_batch % self.update_batch:
            raise ValueError(f"update_batch {self.update_batch} must divide rollout_batch {self.rollout_batch}")
        if "accuracy" not in self.rewards:
            raise ValueError("rewards needs a component named accuracy (weight 0 is allowed)")
        return self


StageConfig = Annotated[SFTConfig | GRPOConfig, Field(discriminator="kind")]


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


class RolloutConfig(Section):
    max_batch: Positive = 1024
    """Sequences decoded at once by the embedded engine."""
    max_cached_tokens: Positive = 262144
    """Prompt and response tokens in the embedded engine's cache at once."""


class EvaluationConfig(Section):
    heldout: dict[str, str] = {}
    """Name in the report -> dataset. Evaluated greedily before training and after every stage."""
    validation: dict[str, str] = {}
    """Name -> dataset, evaluated every ``every`` steps."""
    every: Positive | None = None
    max_samples: Positive | None = None
    max_response_tokens: Positive = 1024


class TelemetryConfig(Section):
    trackio: str | None = None
    """Project name; null: off."""
    wandb: str | None = None
    samples_every: Positive = 10
    """Steps between stored sample rollouts."""
    progress: bool = True


class Config(Section):
    run: RunConfig
    model: ModelConfig
    chat: ChatConfig = ChatConfig()
    data: dict[str, DatasetConfig]
    stages: dict[str, StageConfig]
    curriculum: list[str]
    """Which stages run, in this order."""
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def start_model(self) -> str:
        """Where the model is that the curriculum starts from: a directory or a hub id."""
        return self.model.path or f"{self.run.dir}/start"

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


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the name that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
