"""What the models made by this package share: chat template, configuration, image settings, the way to disk."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

__all__ = ["CHAT_TEMPLATE", "VIDEO_TOKEN", "VISION_TOKENS", "InitError", "new_directory", "save_model", "vl_config"]

VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
VIDEO_TOKEN = "<|video_pad|>"
"""Not used; the model's configuration names one."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""
"""ChatML; a message's content is a string or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``."""


class InitError(ValueError):
    """A model that cannot be made; the message says what is missing or in the way, and the fix."""


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``directory`` if the block succeeds and vanishes if it does not.

    Raises :class:`InitError` if ``directory`` exists and is not an empty folder.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InitError(f"{directory}: exists and is not an empty folder; remove it or name another one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        yield made
        made.rename(directory)


def vl_config(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], vision: dict[str, Any], *, rope_theta: float, tied: bool
) -> Qwen2_5_VLConfig:
    """The configuration for ``tokenizer`` and the sizes in ``text`` and ``vision`` (fields of transformers' classes).

    M-RoPE splits a head's rotary frequencies as Qwen2.5-VL does: a quarter for time, the rest for height and width.
    """
    start, image, end, video = (tokenizer.get_vocab()[token] for token in (*VISION_TOKENS, VIDEO_TOKEN))
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        text_config={**text, **ends, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            **vision,
            "num_heads": 4,
            "intermediate_size": 2 * vision["hidden_size"],
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [vision["depth"] - 1],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
        dtype="float32",
        **ends,
    )


def save_model(
    directory: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    min_pixels: int,
    max_pixels: int,
) -> None:
    """Write everything that is needed to use the model; images are scaled to between the limits (in pixels)."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
