"""From a request to what vLLM takes: the trainer's own ids and patches, so that both sides see the same.

vLLM's image processor is not asked: every image comes as it left the trainer's, under its key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revisual_fast.rollout.messages import Request

__all__ = ["engine_input", "features_json", "image_spans"]


def image_spans(request: Request) -> list[tuple[int, int]]:
    """(offset, length) of the image tokens of each image. Raises ValueError where ids, grids and keys do not agree."""
    if request.pixel_values is None:
        return []
    assert request.grids is not None
    assert request.image_token_id is not None
    lengths = (request.grids.prod(1) // request.merge_size**2).tolist()
    if len(request.image_keys) != len(lengths):
        raise ValueError(f"{len(lengths)} images, but {len(request.image_keys)} image keys")
    places = torch.tensor(request.ids).eq(request.image_token_id).nonzero()[:, 0]
    if len(places) != sum(lengths):
        raise ValueError(f"{len(places)} image tokens in the prompt, but its images have {sum(lengths)} features")
    runs = places.split(lengths)
    if any(int(run[-1] - run[0]) != len(run) - 1 for run in runs):
        raise ValueError("the image tokens of an image do not stand together")
    return [(int(run[0]), len(run)) for run in runs]


def engine_input(request: Request) -> Any:
    """The prompt as ``LLMEngine.add_request`` takes it; an image is one multimodal item."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import PlaceholderRange

    spans = image_spans(request)
    if not spans:
        return tokens_input(request.ids)
    return mm_input(
        request.ids,
        mm_kwargs=_items(request),
        mm_hashes={"image": list(request.image_keys)},
        mm_placeholders={"image": [PlaceholderRange(offset=o, length=n) for o, n in spans]},
    )


def features_json(request: Request) -> dict[str, Any] | None:
    """The images as ``features`` of a request to ``/inference/v1/generate``; None for a prompt without any."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    spans = image_spans(request)
    if not spans:
        return None
    return {
        "mm_hashes": {"image": list(request.image_keys)},
        "mm_placeholders": {"image": [{"offset": o, "length": n} for o, n in spans]},
        "kwargs_data": {"image": [encode_mm_kwargs_item(item) for item in _items(request)["image"]]},
    }


def _items(request: Request) -> Any:
    """vLLM's items of a prompt with images; all Qwen-VL models name the two fields alike."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    assert request.pixel_values is not None
    assert request.grids is not None
    fields: dict[str, Tensor] = {"pixel_values": request.pixel_values, "image_grid_thw": request.grids}
    return MultiModalKwargsItems.from_hf_inputs(
        fields,
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", request.grids.prod(1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
