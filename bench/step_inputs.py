"""A training step's model and rollouts: the same for every variant.

One step is the forward and backward pass of the GRPO loss (``inputs.OBJECTIVE``: PPO's clip, mean over tokens, no KL
term) of one group of completions, on-policy: old log-probs are the pass's own, detached. What is trained on are the
completions' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.checks import Outputs, relative_error
from bench.harness import Case
from revisual_fast.packing import Group, Prompt

PAD, IMAGE, FIRST_WORD = 0, 5, 10  # ids: padding, image token, the first of the ids that words are drawn from
SMALL, LARGE, HUGE = "Qwen2.5-VL-3B, a quarter as wide, 8 layers", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"
WIDER = {"float32": torch.float64, "bfloat16": torch.float32}  # dtype of a case -> of its reference


@dataclass(frozen=True)
class Step:
    """Prompt tokens (those of the image included), tokens of the longest completion, completions."""

    prompt: int
    response: int
    group: int
    grid: tuple[int, int, int] | None = None  # (t, h, w) of the prompt's image, in patches
    shortest: int | None = None  # tokens of the shortest completion; None: all are equally long
    model: str = SMALL
    checkpointing: bool = False
    padded_rows: int | None = None  # of a padded forward, where all completions' logits at once would not fit
    tf32: bool = False  # the reference's products, where fp32 ones would take most of a minute
    detail: bool = False  # our variants beside the default as well: a call may take seconds

    @property
    def image_tokens(self) -> int:
        return 0 if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2] // 4

    @property
    def lengths(self) -> list[int]:
        """Of the completions, evenly spread from the shortest to the longest."""
        low = self.response if self.shortest is None else self.shortest
        return [low + i * (self.response - low) // max(1, self.group - 1) for i in range(self.group)]

    @property
    def label(self) -> str:
        """``250/96/8, image of 196 tokens``; a published model's name first."""
        response = self.response if self.shortest is None else f"{self.shortest} to {self.response}"
        content = "text" if self.grid is None else f"image of {self.image_tokens:,} tokens"
        model = f"{self.model}, " if self.model in (LARGE, HUGE) else ""
        return f"{model}{self.prompt}/{response}/{self.group}, {content}"

    def case(self, dtype: str, device: str) -> Case:
        """``n`` is the number of tokens trained."""
        text = MODELS[self.model]().text_config
        return Case("grpo_step", sum(self.lengths), text.hidden_size, text.vocab_size, dtype, device, self.label)


def small_config() -> Any:
    """54.6M parameters: widths, heads and vocabulary such that layers, vision tower and head stand to each other about
    as in Qwen2.5-VL-3B; 8 of its 36 layers, 7 of its 32 vision blocks, the last with full attention."""
    return _config(
        {"hidden_size": 512, "intermediate_size": 2752, "num_hidden_layers": 8, "vocab_size": 8192},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "mrope_section": [8, 12, 12]},
        {"hidden_size": 320, "intermediate_size": 856, "depth": 7, "num_heads": 4, "fullatt_block_indexes": [6]},
    )


def large_config() -> Any:
    """Qwen2.5-VL-3B, as published."""
    return _config(
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 151936},
        {"num_attention_heads": 16, "num_key_value_heads": 2, "mrope_section": [16, 24, 24]},
        PUBLISHED_VISION,
    )


def huge_config() -> Any:
    """Qwen2.5-VL-7B, as published."""
    return _config(
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064},
        {"num_attention_heads": 28, "num_key_value_heads": 4, "mrope_section": [16, 24, 24]},
        PUBLISHED_VISION,
        tied=False,
    )


PUBLISHED_VISION = {
    **{"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16},
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _config(text: dict[str, Any], attention: dict[str, Any], vision: dict[str, Any], tied: bool = True) -> Any:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": attention.pop("mrope_section")}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": PAD}
    marks: dict[str, Any] = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": IMAGE}
    return Qwen2_5_VLConfig(
        text_config={**text, **attention, **ends, "rope_parameters": rope, "max_position_embeddings": 32768},
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "window_size": 112},
        video_token_id=6,
        tie_word_embeddings=tied,
        **marks,
        **ends,
    )


MODELS: dict[str, Callable[[], Any]] = {SMALL: small_config, LARGE: large_config, HUGE: huge_config}


def build(config: Any, dtype: torch.dtype, device: str, checkpointing: bool = False) -> Any:
    """A model of random weights, made on the device, in training mode."""
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = loader.from_config(config, dtype=dtype)
    set_checkpointing(model, checkpointing)
    return model.train()


def set_checkpointing(model: Any, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class StepInputs:
    """A model, and one group of rollouts with their advantages."""

    step: Step
    model: Any
    group: Group  # on the CPU
    advantages: Tensor  # [G] fp32

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def parts(self, size: int) -> list[slice]:
        """The completions, ``size`` at a time."""
        return [slice(start, start + size) for start in range(0, self.step.group, size)]

    def rows(self, members: slice = slice(None)) -> Tensor:
        """Prompt and completion of each member, padded on the right, [B, P + C] int64."""
        rows = [torch.cat([self.group.prompt.ids, c]) for c in self.group.completions[members]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).to(self.device)

    def mask(self, members: slice = slice(None)) -> Tensor:
        """Which of the completions' tokens are none of padding, [B, C] bool."""
        lengths = torch.tensor([len(c) for c in self.group.completions[members]])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)

    def images(self, rows: Tensor) -> dict[str, Tensor]:
        """What transformers takes for the images of ``rows`` [B, L]: one for each of them."""
        prompt, count = self.group.prompt, len(rows)
        if prompt.pixel_values is None:
            return {}
        pixels = prompt.pixel_values.to(self.device, self.model.dtype).repeat(count, 1)
        types = (rows == IMAGE).int()
        grids = prompt.grids.repeat(count, 1).to(self.device)
        return {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}


def make_step(step: Step, model: Any, seed: int = 0) -> StepInputs:
    """Random words, an image of noise, advantages of mean 0 and standard deviation 1."""
    g = torch.Generator().manual_seed(seed)
    vocab = model.config.text_config.vocab_size

    def words(count: int) -> Tensor:
        return torch.randint(FIRST_WORD, vocab, (count,), generator=g)

    ids, pixels, grids = words(step.prompt), None, torch.empty(0, 3, dtype=torch.long)
    if step.grid is not None:
        vision = model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        ids[1 : 1 + step.image_tokens] = IMAGE
        ids[0], ids[1 + step.image_tokens] = (
            model.config.vision_start_token_id,
            model.config.vision_end_token_id,
        )
        grids = torch.tensor([step.grid])
        pixels = torch.randn(int(grids.prod()), width, generator=g)
    advantages = torch.randn(step.group, generator=g)
    advantages = (advantages - advantages.mean()) / advantages.std()
    group = Group(Prompt(ids, pixels, grids, () if pixels is None else ("image",)), [words(n) for n in step.lengths])
    return StepInputs(step, model, group, advantages.to(model.lm_head.weight.device))


@contextmanager
def as_transformers(model: Any, attention: str = "sdpa") -> Iterator[Any]:
    """Inside, both towers attend as transformers does, though a policy of ours holds the model, too."""
    configs = [model.config.text_config, model.config.vision_config]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = attention
    try:
        yield model
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def gradients(model: Any, loss: Tensor) -> Outputs:
    """Of every parameter that the loss depends on. The loss itself says nothing on-policy: minus the mean advantage."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def accumulated(model: Any, losses: Sequence[Callable[[], Tensor]]) -> Outputs:
    """The same of the sum of ``losses``, one pass after the other, added up where a trainer adds them: in ``.grad``."""
    try:
        for loss in losses:
            loss().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)


def step_errors(outputs: Outputs, answer: Outputs) -> dict[str, float]:
    """The largest relative error of a parameter's gradient, in each part of the model. Raises ValueError where a
    parameter has a gradient in one of the two only."""
    apart = sorted(set(outputs) ^ set(answer))
    if apart:
        raise ValueError(f"gradients of {apart[:5]} in the variant or in the reference only")
    errors: dict[str, float] = {}
    for name, value in outputs.items():
        part = part_of(name)
        errors[part] = max(errors.get(part, 0.0), _error(value, answer[name]))
    return errors


def _error(value: Tensor, reference: Tensor) -> float:
    error = relative_error(value, reference)
    return error if error == error else float("inf")  # max() would lose a nan


def part_of(name: str) -> str:
    """Of a parameter."""
    if ".visual." in f".{name}":
        return "d_vision"
    return "d_embedding" if "embed_tokens" in name or "lm_head" in name else "d_text"
