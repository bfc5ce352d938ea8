"""Whether a running ``vllm serve`` is one that can be trained against, and the command that starts such a one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from revisual_fast.rollout.messages import EngineSettings

__all__ = ["ROUTES", "Tokenizer", "differences", "first_difference", "sample_ids", "serve_command"]

EXTENSION = "revisual_fast.rollout.vllm.extension.WorkerExtension"
ROUTES = (
    "/inference/v1/generate",
    "/detokenize",
    "/server_info",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/weight_info",
    "/get_world_size",
    "/sleep",
    "/wake_up",
)
"""What is asked of a server; most of them are there with VLLM_SERVER_DEV_MODE=1 only."""
SAMPLE = 4096
"""Ids of a vocabulary that are compared, besides the special ones."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    all_special_ids: list[int]

    def __len__(self) -> int: ...

    def decode(self, ids: list[int]) -> str: ...

    def get_added_vocab(self) -> dict[str, int]: ...


def serve_command(settings: EngineSettings, url: str) -> str:
    """The command line that starts a server as ``settings`` want it, at ``url``."""
    at = urlsplit(url)
    options: list[str] = [
        *("--host", at.hostname or "localhost", "--port", str(at.port or 8000)),
        *("--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_batch), "--tensor-parallel-size", str(settings.tensor_parallel)),
        *("--load-format", "dummy", "--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
        *("--weight-transfer-config", json.dumps({"backend": settings.transfer})),
        *("--worker-extension-cls", EXTENSION),
    ]
    if settings.images:
        options += ["--limit-mm-per-prompt", json.dumps({"image": settings.images, "video": 0})]
        options += ["--skip-mm-profiling", "--mm-processor-cache-gb", "0", "--no-mm-device-do-normalize"]
    options += ["--enable-sleep-mode"] * settings.sleep + ["--return-sampling-mask"] * settings.masks
    options += [] if settings.prefix_cache else ["--no-enable-prefix-caching"]
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve {shlex.quote(settings.model)} {shlex.join(options)}"


def differences(config: dict[str, Any], settings: EngineSettings) -> list[str]:
    """Where the ``vllm_config`` of ``/server_info`` is not as ``settings`` want it, a line each."""

    def of(*path: str) -> Any:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def wrong(option: str, found: Any, right: Callable[[Any], bool], wanted: Any) -> list[str]:
        return [] if found is not None and right(found) else [f"{option} is {found}, not {wanted}"]

    def same(option: str, found: Any, wanted: Any) -> list[str]:
        return wrong(option, found, lambda value: value == wanted, wanted)

    lines = [
        *same("--dtype", of("model_config", "dtype"), f"torch.{settings.dtype}"),
        *same("--logprobs-mode", of("model_config", "logprobs_mode"), "processed_logprobs"),
        *same("--weight-transfer-config", of("weight_transfer_config", "backend"), settings.transfer),
        *same("--worker-extension-cls", of("parallel_config", "worker_extension_cls"), EXTENSION),
    ]
    length = settings.max_model_len
    lines += wrong("--max-model-len", of("model_config", "max_model_len"), lambda n: n >= length, f"{length} or more")
    # a server that returns masks wants every request to be one for masks
    masks = of("model_config", "return_sampling_mask")
    lines += same("--return-sampling-mask", masks or False, settings.masks)
    if settings.sleep:
        lines += same("--enable-sleep-mode", of("model_config", "enable_sleep_mode"), True)
    if settings.images:
        images = of("model_config", "multimodal_config", "limit_per_prompt", "image", "count")
        wanted = f"image: {settings.images} or more"
        lines += wrong("--limit-mm-per-prompt", images, lambda n: n >= settings.images, wanted)
        cache = of("model_config", "multimodal_config", "mm_processor_cache_gb")
        lines += same("--mm-processor-cache-gb", cache, 0)
        if of("model_config", "multimodal_config", "mm_device_do_normalize"):
            lines.append("--no-mm-device-do-normalize is missing: the patches come normalised")
    return lines


def sample_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids all over the vocabulary, with all special and added ones, the last, and one beyond it; in order."""
    size = len(tokenizer)
    spread = range(0, size, max(1, size // SAMPLE))
    return sorted({*spread, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), size - 1, size})


def first_difference(
    ids: Sequence[int], ours: Callable[[list[int]], str], theirs: Callable[[list[int]], str]
) -> int | None:
    """The first id whose text is not the same, or None. Many ids are decoded together where they agree."""
    if not ids or ours(list(ids)) == theirs(list(ids)):
        return None
    if len(ids) == 1:
        return ids[0]
    middle = len(ids) // 2
    before = first_difference(ids[:middle], ours, theirs)
    return before if before is not None else first_difference(ids[middle:], ours, theirs)
