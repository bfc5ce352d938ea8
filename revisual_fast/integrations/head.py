"""The head of a transformers model: its weight, what it is given, and what the model does to its logits afterwards."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from revisual_fast.policy.attention import autocast_dtype

INSTEAD = "call it without score=True and take the log-probs from its logits"


class Transform(NamedTuple):
    """Logits are ``scale * z``, or ``scale * softcap * tanh(z / softcap)``, of the head's output ``z``."""

    scale: float = 1.0
    softcap: float | None = None


TRANSFORMS: weakref.WeakKeyDictionary[Any, Transform] = weakref.WeakKeyDictionary()


class Seen:
    """Stands in a head's place: keeps its input and returns one row of known values instead of ``[B, T, V]``."""

    def __init__(self, head: nn.Linear) -> None:
        self.hidden: list[Tensor] = []
        self.probe = torch.empty(0)
        self.autocast: torch.dtype | None = None  # the dtype in which the head would have multiplied
        self.head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden.append(hidden)
        self.autocast = autocast_dtype(hidden.device.type)
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        self.probe = torch.linspace(-50, 50, self.head.out_features, dtype=dtype, device=hidden.device)
        self.probe[0], self.probe[-1] = TINY, HUGE
        return self.probe.view(*(1 for _ in hidden.shape[:-1]), -1).clone()


TINY, HUGE = 2.0**-20, 2.0**20


def transform_of(base: Any, seen: Seen, out: Any) -> Transform:
    """What the model did to the row, looked at once for each model: reading it waits for the device."""
    name = type(base).__name__
    if len(seen.hidden) != 1:
        raise ValueError(f"{name} calls its head {len(seen.hidden)} times in a forward pass, not once: {INSTEAD}")
    row = getattr(out, "logits", None)
    if row is None or row.shape != (1, 1, len(seen.probe)):
        raise ValueError(f"{name} does not return its head's output as logits: {INSTEAD}")
    if row.requires_grad:
        raise ValueError(f"{name} has parameters after its head, which would get no gradient: {INSTEAD}")
    out.logits = None
    if base not in TRANSFORMS:
        TRANSFORMS[base] = _fit(seen.probe.cpu().double(), row.flatten().cpu().double(), name)
    return TRANSFORMS[base]


def _fit(z: Tensor, f: Tensor, name: str) -> Transform:
    """Scale and softcap with which ``f = transform(z)`` in every column; ValueError where there are none."""
    scale = _digits(f[0] / z[0])
    cap = _digits(f[-1] / scale) if scale > 0 else 0.0  # tanh(HUGE / cap) is 1
    if scale > 0 and torch.allclose(f, scale * z, rtol=1e-6, atol=0):
        return Transform(scale)
    if cap > 0 and torch.allclose(f, scale * cap * torch.tanh(z / cap), rtol=1e-5, atol=1e-6):
        return Transform(scale, cap)
    raise ValueError(f"{name} does more to its logits than a scale and a softcap: {INSTEAD}")


def _digits(value: Tensor) -> float:
    return float(f"{value.item():.12g}")


def base_of(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model: pass the model before it is wrapped")
    return base


def head_of(base: Any) -> Any:
    """The head, an ``nn.Linear`` that nothing has changed. Raises ValueError where there is none."""
    head, name = base.get_output_embeddings(), type(base).__name__
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder and a decoder: its labels are not its inputs")
    if head is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM or -ForImageTextToText")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head of {name} is a {type(head).__module__}.{type(head).__name__}, not a plain torch.nn.Linear: "
            f"leave adapters and quantisation off it (LoRA: not in target_modules, not in modules_to_save)"
        )
    return head


def head_problem(model: Any, partitioned: str) -> str | None:
    """Why the head of ``model`` cannot be asked for log-probs; ``partitioned`` where ZeRO stage 3 holds it. Or None."""
    try:
        return partitioned if hasattr(head_of(base_of(model)).weight, "ds_id") else None
    except ValueError as error:
        return str(error)


def gathered(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as plain tensors, whole.

    Under FSDP2 they are already, inside the forward pass of the module that gathers them. Another DTensor is taken for
    one of tensor parallelism: every rank has the same rows, and its share of their gradient.
    """
    parts = []
    for name in ("weight", "bias"):
        part = getattr(head, name)
        if part is not None and part.is_meta:
            raise ValueError("the head is offloaded (meta device): keep it on a device, device_map={'lm_head': 0, ...}")
        if hasattr(part, "ds_id"):
            raise ValueError(f"DeepSpeed ZeRO stage 3 has partitioned the head's {name}: use stage 2, or FSDP2")
        if hasattr(part, "full_tensor") and isinstance(head, FSDPModule):
            raise ValueError(
                "the head is sharded again after its own forward pass: leave it to the model's fully_shard, or "
                "fully_shard(head, reshard_after_forward=False)"
            )
        parts.append(part.full_tensor() if hasattr(part, "full_tensor") else part)
    if parts[0].shape != (head.out_features, head.in_features):
        raise ValueError(
            f"the head's weight is {list(parts[0].shape)}, not [{head.out_features}, {head.in_features}]: it is "
            f"sharded in a way that is not known here; FSDP2 (fully_shard) and DDP are"
        )
    return parts[0], parts[1]
