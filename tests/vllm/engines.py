"""Engines on tiny models: a policy, the engine process that is to follow it, and what the tests ask of both."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revisual_fast.config import ChatConfig, ModelConfig
from revisual_fast.data.processor import Processor
from revisual_fast.packing import Group, Prompt
from revisual_fast.policy.load import load_policy
from revisual_fast.policy.model import Policy
from revisual_fast.rollout.engine import Rollout, Sampling
from revisual_fast.rollout.messages import EngineSettings
from revisual_fast.rollout.remote import RemoteEngine
from revisual_fast.rollout.vllm.process import ProcessConnection
from revisual_fast.rollout.vllm.transfer import HostSender
from revisual_fast.rollout.weights import WeightSource, compare
from tests.groups import make_prompt
from tests.models import VISION, as_transformers, build, tiny_config

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 512
SHAPES: list[tuple[int, list[tuple[int, int, int]]]] = [
    (5, []),
    (11, [(1, 2, 2)]),
    (7, [(1, 4, 6), (1, 2, 4)]),
    (150, [(1, 8, 4)]),
    (30, []),
]
"""Of prompts: words and image grids."""


class Vllm:
    """``policy`` and an engine on vLLM that samples from it."""

    def __init__(self, path: Path, model: ModelConfig, folder: Path, **settings: Any):
        self.policy: Policy = load_policy(path, model)
        self.processor = Processor(path, ChatConfig())
        self.settings = EngineSettings(
            model=str(path),
            dtype=model.dtype,
            device="cpu",
            max_model_len=MAX_LENGTH,
            max_batch=64,
            images=2,
            eos_token_ids=self.processor.eos_token_ids,
            **settings,
        )
        self.connection = ProcessConnection(
            self.settings,
            start_seconds=300,
            stall_seconds=120,
            log=folder / "vllm.log",
            env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            module="tests.vllm.probing_worker",
        )
        self.engine = RemoteEngine(self.connection, HostSender(self.connection, 256 * 1024), check_weights=True)
        shapes = [(text, grids if self.policy.family.visual is not None else []) for text, grids in SHAPES]
        self.prompts = [make_prompt(self.policy.family, *shape, seed) for seed, shape in enumerate(shapes)]
        self.version = 0

    def update(self) -> Any:
        """Bring the engine's weights up to the policy's; what was sent."""
        self.version += 1
        return self.engine.update_weights(self.policy, self.version)

    def generate(self, sampling: Sampling, n: int = 1, prompts: Sequence[Prompt] | None = None) -> list[list[Rollout]]:
        return self.engine.generate(self.prompts if prompts is None else prompts, n, sampling)

    def greedy(self, tokens: int = 16) -> list[list[int]]:
        return [group[0].ids.tolist() for group in self.generate(Sampling(tokens, temperature=0))]

    def differences(self) -> list[str]:
        """Between the policy's weights and those of the engine."""
        ours = WeightSource(self.policy).fingerprints()
        theirs = self.connection.call("fingerprints", names=list(ours))
        return compare(ours, theirs["workers"], theirs["mapping"])

    def probe(self) -> dict[str, Any]:
        return self.connection.call("probe")


class Engines:
    """Starts an engine for each model once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict[str, Vllm] = {}

    def get(self, name: str, path: Path, *, dtype: str = "float32", lora: Any = None, **settings: Any) -> Vllm:
        if name not in self.made:
            config = ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": "cpu", "lora": lora})
            self.made[name] = Vllm(path, config, self.folder / name, **settings)
            self.made[name].update()
        return self.made[name]

    def close(self) -> None:
        for made in self.made.values():
            made.engine.close()


def build_family(model_type: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny model of that family with random weights, its heads as wide as vLLM's CPU attention wants them."""
    config = tiny_config(model_type)
    text = config.get_text_config()
    text.hidden_size, text.head_dim = 128, 32
    if model_type in VISION:
        text.rope_parameters["mrope_section"] = [4, 6, 6]
        if model_type == "qwen3_vl":  # transformers takes it as given, vLLM reads it
            text.rope_parameters["mrope_interleaved"] = True
        vision = config.vision_config
        vision.hidden_size = 128 if model_type == "qwen2_vl" else 64
        vision.out_hidden_size = 128
        if model_type == "qwen2_vl":
            vision.embed_dim = 64
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = build(config, 0.1)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def transformers_greedy(policy: Policy, prompt: Prompt, eos: Sequence[int], tokens: int) -> list[int]:
    """The same from transformers' generate."""
    ids = prompt.ids[None]
    images: dict[str, Any] = {}
    if prompt.pixel_values is not None:
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grids}
    with as_transformers(policy) as model, torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == policy.family.image_token_id).int(),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=list(eos),
            pad_token_id=0,
            **images,
        )
    return out[0, ids.shape[1] :].tolist()


def trainer_logp(policy: Policy, prompts: Sequence[Prompt], groups: list[list[Rollout]], temperature: float) -> Tensor:
    """The trainer's log-probs of all completions, one after the other."""
    from revisual_fast.ops import linear_logprob

    packed = [Group(p, [r.ids for r in group]) for p, group in zip(prompts, groups, strict=True)]
    with torch.no_grad():
        batch = policy.pack(packed)
        logp, _ = linear_logprob(policy.hidden(batch), policy.head_weight, batch.targets, temperature=temperature)
    return logp
