"""From a record to token ids and image patches, with the model's own tokenizer, chat template and image settings."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from revisual_fast.config import ChatConfig
from revisual_fast.data.bad import NO_VISION, SPECIAL_TOKEN, UNREADABLE_IMAGE, BadRecordError, BadRecords
from revisual_fast.data.images import ImageRef
from revisual_fast.data.records import Record
from revisual_fast.packing import Prompt

__all__ = ["Example", "Processor"]

IMAGE_TOKEN = "<|image_pad|>"
CACHE_BYTES = 256 * 2**20


@dataclass
class Example:
    prompt: Prompt
    response: Tensor | None
    """[R] int64, ends with the end-of-sequence token."""
    record: Record


class Processor:
    """Encodes records for the model in ``model_path`` (a directory or a hub id).

    ``min_pixels`` and ``max_pixels`` bound an image's size after scaling; None keeps the model's own. Raises ValueError
    if the tokenizer or the image settings are missing or are not those of a Qwen-VL model.

    A model whose config.json names no vision tower reads text only: ``image_processor`` and ``image_token_id`` are
    None, and a record with an image is a bad one.

    ``eos_token_id`` ends a training target. It is the first of ``eos_token_ids``, any of which ends a generated answer.
    """

    def __init__(
        self,
        model_path: str | Path,
        chat: ChatConfig,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.chat = chat
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        given: dict[str, Any] = {key: value for key, value in pixels.items() if value is not None}
        self.image_processor: Qwen2VLImageProcessorPil | None = None
        self.image_token_id: int | None = None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
            if _sees_images(model_path):
                self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(model_path, **given)
        except OSError as error:  # what transformers raises for a file that is not there
            raise ValueError(f"model.path: {model_path}: {error}") from error
        self.eos_token_id: int = self._token_id(self.tokenizer.eos_token, "an end-of-sequence token", model_path)
        ends = [self.eos_token_id, *_model_eos(model_path)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        if self.image_processor is not None:
            self.image_token_id = self._token_id(IMAGE_TOKEN, IMAGE_TOKEN, model_path)
        elif given:
            raise ValueError(f"model.{', model.'.join(given)}: {model_path} has no vision tower; remove the setting")
        self._check(model_path)
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._cache_room = cache_bytes

    def _token_id(self, token: str | None, what: str, model_path: str | Path) -> int:
        if token is None or token not in self.tokenizer.get_vocab():
            raise ValueError(f"model.path: {model_path}: the tokenizer has no {what.removeprefix('an ')}")
        return self.tokenizer.convert_tokens_to_ids(token)

    def _check(self, model_path: str | Path) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model.path: {model_path}: the tokenizer has no chat template (chat_template.jinja)")
        size = self.image_processor.size if self.image_processor else None
        if size and size["shortest_edge"] > size["longest_edge"]:
            sizes = f"{size['shortest_edge']} is larger than {size['longest_edge']}"
            raise ValueError(f"model.min_pixels, model.max_pixels: {sizes}")
        for key, text in (
            ("prefix", self.chat.prefix),
            ("suffix", self.chat.suffix),
            ("system", self.chat.system or ""),
        ):
            if "<image>" in text or IMAGE_TOKEN in text:
                raise ValueError(f"chat.{key}: an image placeholder belongs in a dataset's prompt: {text!r}")

    def chat_text(self, prompt: str) -> str:
        """The chat template's text for a user's ``prompt``, up to where the answer begins; an image is one token."""
        prompt = self.chat.prefix + prompt + self.chat.suffix
        messages: list[dict[str, Any]] = [{"role": "user", "content": self._content(prompt)}]
        if self.chat.system is not None:
            messages.insert(0, {"role": "system", "content": self.chat.system})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _content(self, prompt: str) -> str | list[dict[str, str]]:
        """A message's content: text and images in turn, or just the text, as a text model's template wants it."""
        if self.image_processor is None:
            return prompt
        parts: list[dict[str, str]] = []
        for i, text in enumerate(prompt.split("<image>")):
            if i:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return parts

    def encode(self, record: Record, with_response: bool = False) -> Example:
        """The record as the model reads it.

        Raises :class:`BadRecordError` for an image that is missing, unreadable or more than the model can see, and for
        a special token in the text.
        """
        if record.images and self.image_processor is None:
            raise BadRecordError(NO_VISION, "the model has no vision tower; leave data with images out", record.source)
        images = [self._patches(image, record.source) for image in record.images]
        grids = torch.stack([grid for _, grid in images]) if images else torch.empty(0, 3, dtype=torch.int64)
        prompt = Prompt(
            ids=self._expand(self._ids(self.chat_text(record.prompt)), grids, record.source),
            pixel_values=torch.cat([patches for patches, _ in images]) if images else None,
            grids=grids,
            image_keys=tuple(image.key for image in record.images),
        )
        return Example(prompt, self._response(record) if with_response else None, record)

    def _expand(self, ids: Tensor, grids: Tensor, source: str) -> Tensor:
        """ids [P] with one token per image of ``grids`` [I, 3] -> ids with one token per merged patch."""
        if self.image_processor is None or self.image_token_id is None:
            return ids
        here = ids == self.image_token_id
        if int(here.sum()) != len(grids):
            raise BadRecordError(SPECIAL_TOKEN, f"the prompt's text contains {IMAGE_TOKEN}; write <image>", source)
        repeats = torch.ones_like(ids)
        repeats[here] = grids.prod(dim=1) // self.image_processor.merge_size**2
        return ids.repeat_interleave(repeats)

    def encode_or_report(
        self, record: Record, bad: BadRecords, policy: Literal["error", "skip"], with_response: bool = False
    ) -> Example | None:
        """:meth:`encode`, or None after ``bad`` has counted the record; raises where ``policy`` is "error"."""
        try:
            return self.encode(record, with_response)
        except BadRecordError as error:
            bad.handle(policy, record.source, error.reason, error.detail)
            return None

    def decode(self, ids: Tensor | list[int]) -> str:
        """The text of response ``ids`` [R], without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, its chat template and the image settings beside an exported model."""
        self.tokenizer.save_pretrained(directory)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(directory)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def _response(self, record: Record) -> Tensor:
        if record.response is None:
            raise ValueError(f"{record.source}: no response; set data.{record.dataset}.response")
        ids = self._ids(record.response)
        for token_id in (*self.eos_token_ids, self.image_token_id):
            if token_id is not None and token_id in ids:
                token = self.tokenizer.convert_ids_to_tokens(token_id)
                raise BadRecordError(SPECIAL_TOKEN, f"the response contains {token}", record.source)
        return torch.cat([ids, torch.tensor([self.eos_token_id])])

    def _patches(self, image: ImageRef, source: str) -> tuple[Tensor, Tensor]:
        """Patches [n, d] fp32 and grid [3] int64 of an image; the latest are kept, up to the cache's size in bytes."""
        try:
            if image.key in self._cache:
                self._cache.move_to_end(image.key)
                return self._cache[image.key]
            opened = image.open()
        except BadRecordError as error:
            raise BadRecordError(error.reason, error.detail, source) from error
        assert self.image_processor is not None
        try:
            made = self.image_processor(images=[opened], return_tensors="pt")
        except ValueError as error:  # longer than 200 times its width
            raise BadRecordError(UNREADABLE_IMAGE, f"{opened.size} pixels: {error}", source) from error
        entry = made["pixel_values"], made["image_grid_thw"][0]
        self._cache[image.key] = entry
        self._cache_room -= entry[0].nbytes
        while self._cache_room < 0:
            _, (dropped, _) = self._cache.popitem(last=False)
            self._cache_room += dropped.nbytes
        return entry


def _sees_images(model_path: str | Path) -> bool:
    """Whether config.json names a vision tower; without a config.json, a folder is taken for a vision model's."""
    settings = _settings(model_path, "config.json")
    return settings is None or "vision_config" in settings


def _model_eos(model_path: str | Path) -> list[int]:
    """The end-of-sequence ids that transformers' generate would use: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        settings = _settings(model_path, name) or {}
        found = settings.get("eos_token_id", settings.get("text_config", {}).get("eos_token_id"))
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def _settings(model_path: str | Path, name: str) -> dict[str, Any] | None:
    """The model's JSON file of that name, or None where it has none."""
    file = cached_file(model_path, name, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model.path: {model_path}: {name} is not valid JSON: {error}") from None
