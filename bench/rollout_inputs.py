"""Rollouts' models and prompts: the same for every engine, and nothing that ends a completion early."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case
from bench.step_inputs import LARGE, MODELS, SMALL, as_transformers, build
from revisual_fast.packing import Group, Prompt
from revisual_fast.policy.init.tiny_vl import build_tiny_vl, tiny_tokenizer
from revisual_fast.policy.model import Policy

TINY = "tiny-vl"
SHORT_NAMES = {TINY: TINY, SMALL: "3B at a quarter", LARGE: "3B"}


def tiny_config() -> Any:
    """Of the model that the quickstart and the tests use, without an end of sequence."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_vl(Path(folder) / "model")
        config = AutoConfig.from_pretrained(Path(folder) / "model")
    config.eos_token_id = config.text_config.eos_token_id = None
    return config


CONFIGS: dict[str, Callable[[], Any]] = {**MODELS, TINY: tiny_config}


@dataclass(frozen=True)
class Load:
    """Tokens of each prompt (those of its image included), tokens and number of its completions, and prompts."""

    prompt: int
    response: int
    group: int
    prompts: int
    grid: tuple[int, int, int]  # (t, h, w) of each prompt's image, in patches
    model: str = SMALL

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4

    @property
    def tokens(self) -> int:
        """Generated."""
        return self.prompts * self.group * self.response

    @property
    def label(self) -> str:
        """``tiny-vl, 4 x 250/64/8, image of 196 tokens``."""
        sizes = f"{self.prompts} x {self.prompt}/{self.response}/{self.group}"
        return f"{SHORT_NAMES.get(self.model, self.model)}, {sizes}, image of {self.image_tokens:,} tokens"

    def case(self, dtype: str, device: str) -> Case:
        text = CONFIGS[self.model]().text_config
        return Case("rollout", self.tokens, text.hidden_size, text.vocab_size, dtype, device, self.label)


class RolloutInputs:
    """A policy of random weights, and prompts of random words, each with an image of noise of its own."""

    def __init__(self, load: Load, dtype: torch.dtype, device: str):
        self.load = load
        self.config = CONFIGS[load.model]()
        for part in (self.config, self.config.text_config):
            part.eos_token_id = None
        self.model = build(self.config, dtype, device).eval()
        self.model.generation_config.eos_token_id = None
        self.policy = Policy(self.model)
        self.prompts = [make_prompt(load, self.config, seed) for seed in range(load.prompts)]

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """What an engine process reads: configuration and tokenizer, no weights."""
        folder = tempfile.TemporaryDirectory()
        self.config.architectures = [type(self.model).__name__]  # which vLLM goes by
        self.config.save_pretrained(folder.name)
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None  # vLLM would end at it
        tokenizer.save_pretrained(folder.name)
        settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
        (Path(folder.name) / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    def transformers(self, prompts: list[Prompt], **options: Any) -> Tensor:
        """New tokens [prompts * copies, C] of transformers' generate for prompts of equal length; nothing is padded."""
        from transformers import GenerationConfig

        device, dtype = self.policy.device, self.model.dtype
        ids = torch.stack([p.ids for p in prompts]).to(device)
        pixels = [p.pixel_values.to(device, dtype) for p in prompts if p.pixel_values is not None]
        settings = GenerationConfig(max_new_tokens=self.load.response, pad_token_id=0, **options)
        with as_transformers(self.model), torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.config.image_token_id).int(),
                pixel_values=torch.cat(pixels),
                image_grid_thw=torch.cat([p.grids for p in prompts]).to(device),
                generation_config=settings,
            )
        return out[:, ids.shape[1] :].cpu()

    def regret(self, answers: list[list[Tensor]]) -> float:
        """By how many nats, on average, the greedy ``answers``' tokens are below the trainer's own best ones."""
        groups = [Group(p, list(completions)) for p, completions in zip(self.prompts, answers, strict=True)]
        total, count = 0.0, 0
        for group in groups:
            batch = self.policy.pack([group])
            with torch.no_grad():
                logits = self.policy.logits(self.policy.hidden(batch))
            chosen = logits.gather(1, batch.targets[:, None])[:, 0]
            total += float((logits.amax(1) - chosen).double().sum())
            count += len(chosen)
        return total / count


def make_prompt(load: Load, config: Any, seed: int) -> Prompt:
    """Words, and between the marks of an image its tokens."""
    g = torch.Generator().manual_seed(seed)
    image = config.image_token_id
    marks = [config.vision_start_token_id, config.vision_end_token_id]
    special = torch.tensor([image, config.video_token_id, *marks])
    words = torch.arange(config.text_config.vocab_size)
    words = words[~torch.isin(words, special)]
    ids = words[torch.randint(len(words), (load.prompt,), generator=g)]
    ids[0], ids[1 : 1 + load.image_tokens], ids[1 + load.image_tokens] = marks[0], image, marks[1]
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grids = torch.tensor([load.grid])
    return Prompt(ids, torch.randn(int(grids.prod()), width, generator=g), grids, (f"image {seed}",))
