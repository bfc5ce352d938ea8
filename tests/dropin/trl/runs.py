"""Training runs of TRL's trainer on a tiny Qwen2.5-VL, stock and fast, on the same rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import build, tiny_config

WORDS = ["<pad>", "<eos>", "<im_start>", "<im_end>", "<unk>", "<|image_pad|>", "<|video_pad|>"]
WORDS += ["<|vision_start|>", "<|vision_end|>", *(f"w{i}" for i in range(64 - 9))]
TEMPLATE = (
    "{% for m in messages %}<im_start> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|>"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endif %} <im_end> {% endfor %}"
)


def tokenizer() -> Any:
    """Words of the tiny models' 64 ids, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.add_special_tokens({"additional_special_tokens": [w for w in WORDS if w.startswith("<|")]})
    made.chat_template = TEMPLATE
    return made


def processor() -> Any:
    """Qwen2.5-VL's processor around that tokenizer."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 6, patch_size=14),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def dataset(images: bool, n: int = 6) -> Any:
    from datasets import Dataset
    from PIL import Image

    rng = torch.Generator().manual_seed(7)
    rows = []
    for i in range(n):
        words = " ".join(f"w{int(j)}" for j in torch.randint(55, (3 + i,), generator=rng))
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": words}]}
        if images:
            size = (28 * (1 + i % 3), 28 * (1 + i % 2))
            noise = torch.randint(256, (size[1], size[0], 3), generator=rng, dtype=torch.uint8)
            row["image"] = Image.fromarray(noise.numpy())
        rows.append(row)
    return Dataset.from_list(rows)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """How many different words there are, with a slope, so that advantages differ."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [len(set(text.split())) + 0.1 * len(text) for text in texts]


@dataclass
class Rollouts:
    """Completions of a first run, for a second one."""

    made: list[tuple[list[list[int]], Any]] = field(default_factory=list)
    replay: bool = False


def replaying(trainer_class: type, rollouts: Rollouts, logprobs: bool, end: Any) -> type:
    """The class, its completions recorded or replayed, cut where ``end(turn, i)`` says. ``logprobs``: with those of an
    engine that is a little off."""

    class Replaying(trainer_class):
        turn = 0

        def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            if not rollouts.replay:
                use, self.use_vllm = self.use_vllm, False
                ids, _ = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
                self.use_vllm = use
                ids = [ended(row, end(self.turn, i)) for i, row in enumerate(ids)]
                rng = torch.Generator().manual_seed(len(rollouts.made))
                noisy = [(-4.2 + 0.3 * torch.randn(len(row), generator=rng)).tolist() for row in ids]
                rollouts.made.append((ids, noisy if logprobs else None))
            made = rollouts.made[self.turn % len(rollouts.made)]
            self.turn += 1
            torch.manual_seed(self.turn)  # what TRL shuffles by, whoever has drawn before
            return made

    return Replaying


def ended(row: list[int], length: int) -> list[int]:
    """With an end after ``length`` tokens, or none where the row is shorter; the model's own ends become words."""
    row = [9 if token == 1 else token for token in row]
    return [*row[:length], 1] if length < len(row) else row


@dataclass
class Run:
    """What a run left behind."""

    losses: list[float]
    metrics: dict[str, list[float]]
    gradients: list[dict[str, Tensor]]  # of every optimizer step
    weights: dict[str, Tensor]
    trainer: Any


NOT_COMPARED = ("step_time", "profiling/", "num_tokens", "train_runtime")


def train(
    trainer_class: type,
    folder: Path,
    rollouts: Rollouts,
    *,
    images: bool = True,
    family: str = "",
    config: Any = None,
    checkpoint: Path | None = None,
    model: Any = None,
    ours_order: bool = True,
    end: Any = lambda turn, i: 2 + (5 * i) % 9,
    steps: int = 3,
    engine: bool = False,
    peft: Any = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """``steps`` optimizer steps of the trainer in fp32 on the CPU; ``more`` are keywords of the constructor."""
    from transformers import TrainerCallback
    from trl import GRPOConfig

    model = model or loaded(
        checkpoint or saved(config or tiny_config(family or ("qwen2_5_vl" if images else "qwen2")), folder)
    )
    gradients: list[dict[str, Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    common: dict[str, Any] = {
        **{"output_dir": str(folder), "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        **{"bf16": False, "max_steps": steps, "logging_steps": 1, "seed": 3},
        **{"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "temperature": 0.9},
        **{"max_grad_norm": 1e9, "optim": "sgd", "learning_rate": 0.05},  # AdamW makes steps of rounding errors
        "generation_kwargs": {"suppress_tokens": [5, 6, 7, 8]},  # those of images and videos
    }
    arguments = GRPOConfig(**{**common, **settings})
    made = replaying(trainer_class, rollouts, engine, end)(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=dataset(images),
        processing_class=processor() if images else tokenizer(),
        callbacks=[Keep()],
        peft_config=peft,
        **(more or {}),
    )
    made._keep_groups = made._keep_groups and ours_order if hasattr(made, "_keep_groups") else False
    if engine:
        made.use_vllm = True
    made.train()
    rollouts.replay = True
    history = made.state.log_history
    names = {n for entry in history for n in entry if not n.startswith(NOT_COMPARED)}
    metrics = {n: [entry[n] for entry in history if n in entry] for n in names}
    weights = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    return Run([entry["loss"] for entry in history if "loss" in entry], metrics, gradients, weights, made)


def saved(config: Any, folder: Path) -> Path:
    """Where a model is on disk, so that TRL can load its reference from there."""
    build(config, 0.1).save_pretrained(folder / "model")
    return folder / "model"


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = "vision_config" in (folder / "config.json").read_text()
    loader: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32)


def differences(found: Run, wanted: Run) -> dict[str, float]:
    """Largest relative differences of losses, metrics and gradients: of a gradient's norm, and of all values else."""
    assert found.metrics.keys() == wanted.metrics.keys()
    assert len(found.gradients) == len(wanted.gradients)
    out = {"loss": worst(found.losses, wanted.losses)}
    out |= {name: worst(found.metrics[name], values) for name, values in wanted.metrics.items()}
    out["gradients"] = 0.0
    for ours, theirs in zip(found.gradients, wanted.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        scale = max(float(g.norm()) for g in theirs.values())
        assert scale > 0, "everything is clipped: the settings test nothing"
        for name, g in theirs.items():
            error = float((ours[name] - g).norm()) / max(float(g.norm()), 1e-4 * scale)
            out["gradients"] = max(out["gradients"], error)
    return out


def worst(found: list[Any], wanted: list[Any]) -> float:
    """Relative to the largest of ``wanted``, at least 0.1: on-policy, a loss is a mean of advantages around 1 that
    cancel."""
    a, b = (torch.tensor([float("nan") if v is None else v for v in x]).double() for x in (found, wanted))
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    return float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=0.1))
