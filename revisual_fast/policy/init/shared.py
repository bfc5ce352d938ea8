"""What the models made by this package have in common: the chat template, the image settings, the way to disk."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CHAT_TEMPLATE", "VIDEO_TOKEN", "VISION_TOKENS", "InitError", "new_directory", "save_image_processor"]

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


def save_image_processor(directory: Path, *, min_pixels: int, max_pixels: int) -> None:
    """Write ``preprocessor_config.json``: patches of 14 pixels, 2 x 2 of them to a token, limits in pixels."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
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
