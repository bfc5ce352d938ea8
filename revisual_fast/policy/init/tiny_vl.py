"""A Qwen2.5-VL of under two million parameters with random weights and a small tokenizer, for the quickstart and tests.

The tokenizer knows the words of the package's own data (:mod:`revisual_fast.data.digits`) and every printable ASCII
character, so any ASCII text survives ``decode(encode(text))`` unchanged; digits are always single tokens.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from revisual_fast.policy.init.shared import (
    CHAT_TEMPLATE,
    VIDEO_TOKEN,
    VISION_TOKENS,
    InitError,
    new_directory,
    save_model,
    vl_config,
)

__all__ = ["WORDS", "build_tiny_vl", "tiny_tokenizer"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS, VIDEO_TOKEN, "<unk>")

WORDS = (
    *("system\n", "user\n", "assistant\n"),
    *("<think>", "</think>", "\\boxed{"),
    *(" + ", " = ", " < ", " > ", " or ", ", ", "; ", ", carry "),
    *("Read ", "Which ", "is ", "larger"),
)
"""Tokens longer than a character. Spaces belong to words and signs, never to digits, so that digits join up."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: the longest of :data:`WORDS` that fits, otherwise one character.

    ``<|im_end|>`` ends a sequence, ``<|endoftext|>`` pads, and a character that is not printable ASCII is ``<unk>``.
    """
    characters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS, *characters))}
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join([re.escape(word) for word in longest_first] + [r"[\s\S]"])

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>", "<unk>")],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_vl(
    directory: str | Path,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate: int = 384,
    vision_hidden: int = 128,
    vision_depth: int = 2,
    initializer_range: float = 0.05,
    max_pixels: int = 28 * 28 * 16,
) -> Path:
    """Write the model, its tokenizer and its image settings (fp32, HF format) to ``directory`` and return its path.

    ``hidden / heads`` (the head's width) must be a multiple of 16, so that M-RoPE's sections come out whole;
    ``max_pixels`` is what a larger image is scaled down to: 784 pixels are one token. ``initializer_range`` is the
    standard deviation of the weights: at this width 0.05 learns arithmetic in about half the steps that 0.02, meant for
    widths of thousands, takes. The same arguments give the same weights.

    Raises :class:`InitError` if ``directory`` is not empty or the sizes do not fit.
    """
    if hidden % heads or (hidden // heads) % 16 or heads % 2:
        raise InitError(f"hidden {hidden} / heads {heads} must be a multiple of 16, and heads even")
    if vision_hidden % 64:
        raise InitError(f"vision_hidden {vision_hidden} must be a multiple of 64 (four heads)")
    with new_directory(directory) as made:
        tokenizer = tiny_tokenizer()
        text = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096,
            "initializer_range": initializer_range,
        }
        vision = {
            "hidden_size": vision_hidden,
            "depth": vision_depth,
            "window_size": 28,
            "initializer_range": initializer_range,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2_5_VLForConditionalGeneration(
                vl_config(tokenizer, text, vision, rope_theta=10000.0, tied=False)
            )
        save_model(made, model, tokenizer, min_pixels=28 * 28, max_pixels=max_pixels)
    return Path(directory)
