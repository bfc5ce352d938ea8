"""verl engines on the CPU and batches in verl's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.models.transformers.qwen2_vl import get_rope_index
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.model import compute_position_id_with_mask
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from revisual_fast.integrations.verl.engine import SharedPromptEngine
from tests.groups import TEXT_IDS
from tests.models import IDS, tiny

FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def save(kind: str, directory: Path) -> Path:
    model = tiny(kind)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    return directory


def engine_of(path: Path, *, ours: bool, strategy: str = "fsdp2", engine: dict | None = None, **model: Any) -> Any:
    settings: dict[str, Any] = {"enable_gradient_checkpointing": False, "use_remove_padding": False, **model}
    settings["override_config"] = {"attn_implementation": "sdpa", **settings.get("override_config", {})}
    kind = SharedPromptEngine if ours else FSDPEngineWithLMHead
    made = kind(
        model_config=HFModelConfig(path=str(path), load_tokenizer=False, **settings),
        engine_config=FSDPEngineConfig(
            **{
                **{"strategy": strategy, "model_dtype": "fp32", "mixed_precision": FP32, "use_torch_compile": False},
                **(engine or {}),
            }
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


@dataclass
class Row:
    prompt: Tensor
    response: Tensor
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    pixels: Tensor | None = None


def rows_of(
    groups: Sequence[tuple[int, list[tuple[int, int, int]], list[int]]], seed: int = 0, side: int = 14
) -> list[Row]:
    """Of groups: (text tokens, image grids, response lengths); ``side`` is that of the images' patches, in pixels."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for text, grids, lengths in groups:
        prompt = torch.randint(*TEXT_IDS, (text,), generator=rng)
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), 6 * side**2, generator=rng) if grids else None
        for t, h, w in reversed(grids):
            slots = torch.full((t * h * w // 4,), IDS["image_token_id"])
            marks = [torch.tensor([IDS[name]]) for name in ("vision_start_token_id", "vision_end_token_id")]
            prompt = torch.cat([prompt[:1], marks[0], slots, marks[1], prompt[1:]])
        for length in lengths:
            own = None if pixels is None else pixels.clone()
            rows.append(Row(prompt, torch.randint(*TEXT_IDS, (length,), generator=rng), grids, own))
    return rows


def batch_of(rows: Sequence[Row], *, vision: bool, seed: int = 1, **settings: Any) -> TensorDict:
    """As verl's trainer makes it of a padded batch."""
    before, after = max(len(r.prompt) for r in rows), max(len(r.response) for r in rows)
    ids, mask = torch.zeros(2, len(rows), before + after, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(before - len(row.prompt), before + len(row.response))
        ids[i, at], mask[i, at] = torch.cat([row.prompt, row.response]), 1
    response_mask = mask[:, before:].clone()
    rng = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(rows), after, generator=rng) * response_mask for _ in range(4)]
    tensors = {
        **{"input_ids": ids, "attention_mask": mask, "prompts": ids[:, :before], "responses": ids[:, before:]},
        **{"position_ids": _positions(rows, ids, mask, vision), "response_mask": response_mask},
        **{"old_log_probs": -3.5 + 0.4 * noise[0], "ref_log_prob": -3.5 + 0.4 * noise[1]},
        "advantages": torch.randn(len(rows), 1, generator=rng).expand(-1, after) * response_mask,
        "rollout_is_weights": noise[3].abs().clamp(max=2) + 0.1,
    }
    others = {}
    if vision:
        inputs = np.empty(len(rows), dtype=object)
        for i, row in enumerate(rows):
            grids = torch.tensor(row.grids)
            inputs[i] = {} if row.pixels is None else {"pixel_values": row.pixels, "image_grid_thw": grids}
        others["multi_modal_inputs"] = inputs
    data = left_right_2_no_padding(DataProto.from_dict(tensors, non_tensors=others).to_tensordict())
    tu.assign_non_tensor(
        data,
        **{
            **{"temperature": 0.8, "calculate_entropy": True, "use_remove_padding": False, "use_fused_kernels": False},
            **{"use_dynamic_bsz": False, "micro_batch_size_per_gpu": len(rows), "global_batch_size": len(rows)},
            "return_model_output": True,
            **settings,
        },
    )
    return data


def _positions(rows: Sequence[Row], ids: Tensor, mask: Tensor, vision: bool) -> Tensor:
    text = compute_position_id_with_mask(mask)
    if not vision:
        return text
    names = {"<|image_pad|>": IDS["image_token_id"], "<|video_pad|>": IDS["video_token_id"]}
    names["<|vision_start|>"] = IDS["vision_start_token_id"]
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2),
        tokenizer=SimpleNamespace(convert_tokens_to_ids=names.__getitem__),
    )
    made = []
    for i, row in enumerate(rows):
        grids = torch.tensor(row.grids) if row.grids else None
        if grids is None:
            made.append(text[i].expand(3, -1))
        else:
            made.append(get_rope_index(processor, ids[i], image_grid_thw=grids, attention_mask=mask[i]))
    return torch.cat([text[:, None], torch.stack(made)], 1)  # [bs, 4, length]


def actor(**settings: Any) -> FSDPActorConfig:
    return FSDPActorConfig(
        **{
            **{"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 8, "use_torch_compile": False},
            **settings,
        }
    )


@dataclass
class Step:
    loss: float
    metrics: dict[str, Any]
    outputs: dict[str, Tensor]  # [bs, resp]
    gradients: dict[str, Tensor]


def step(engine: Any, data: TensorDict, loss: Callable[..., Any] | None = None, **settings: Any) -> Step:
    """One forward and backward pass over the batch, gradients of all parameters."""
    loss = loss or partial(ppo_loss, config=actor(**settings))
    engine.module.zero_grad()
    with engine.train_mode(zero_grad_on_exit=False):
        found = engine.forward_backward_batch(data.clone(), loss)
    gradients = {name: _whole(p.grad, p) for name, p in engine.module.named_parameters()}
    engine.module.zero_grad()
    return Step(sum(found["loss"]), found["metrics"], _responses(found, data), gradients)


def score(engine: Any, data: TensorDict) -> dict[str, Tensor]:
    """Log-probs and entropy without gradient, as verl's passes for the old and the reference policy."""
    with engine.eval_mode():
        return _responses(engine.infer_batch(data.clone()), data)


def _responses(found: dict[str, Any], data: TensorDict) -> dict[str, Tensor]:
    return {name: no_padding_2_padding(x, data).detach() for name, x in found["model_output"].items()}


def _whole(gradient: Any, parameter: Any) -> Tensor:
    found = torch.zeros_like(parameter) if gradient is None else gradient
    return getattr(found, "full_tensor", lambda: found)().detach().clone()
