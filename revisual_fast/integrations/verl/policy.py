"""A policy over the model of a verl engine: packed rows through its own modules, in the order that verl calls them.

Every process of an FSDP group has to call the same modules in the same order, whether it packs a micro-batch or leaves
it to verl: embedding, vision tower once (verl's blank image where there is none), layers, head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.ops import linear_logprob
from revisual_fast.packing import PackedBatch
from revisual_fast.policy.attention import AttentionPlan, autocast_dtype, make_plan, pick_attention
from revisual_fast.policy.borrowed import BorrowedPolicy
from revisual_fast.policy.families import family_for

__all__ = ["OWN_ATTENTION", "EnginePolicy", "HeadCall", "remember_attention"]

OWN_ATTENTION: dict[type, Callable[..., Any]] = {}
"""transformers' attention modules whose forward verl replaces in the class -> what it was."""
BLANK = (1, 4, 4)
"""The grid of the image that verl runs through the tower where a micro-batch has none."""


def remember_attention() -> None:
    """Keep what verl's ``apply_monkey_patch`` will replace; nothing where it has been replaced already."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

    for kind in (Qwen2_5_VLAttention, Qwen2VLAttention):
        if _is_own(kind):
            OWN_ATTENTION[kind] = kind.forward


def _is_own(kind: Any) -> bool:
    return kind.forward.__module__ == kind.__module__


class HeadCall:
    """What the head is asked for beside its input; no dataclass, or FSDP would cast the temperatures."""

    def __init__(self, targets: Tensor, temperature: float | Tensor):
        self.targets = targets  # [N] int64
        self.temperature = temperature  # a number, or [N] fp32


class EnginePolicy(BorrowedPolicy):
    """Made of the bare model, before any wrapper. Raises ValueError, with the reason, for one that cannot be packed."""

    def __init__(self, model: Any):
        family = family_for(model.config.model_type)
        family.check(model.config)
        self.head: Any = model.lm_head
        if type(self.head) is not nn.Linear:
            raise ValueError(f"the head is a {type(self.head).__name__}, not a linear layer")
        self._place: torch.device | None = None
        self._rows: Tensor | None = None
        self._routed = _route_attention(model)
        super().__init__(model, cache_bytes=0)
        self._backend: str | None = None
        vars(self.head)["forward"] = partial(_head_forward, self.head)

    def release(self) -> None:
        super().release()
        for module in (self.head, *self._routed):
            vars(module).pop("forward", None)

    @property
    def device(self) -> torch.device:
        return self._place or super().device

    def on(self, device: Any) -> EnginePolicy:
        """The same policy, whose batches go to ``device``: the weights may be elsewhere, or sharded."""
        self._place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return self

    def why_not(self) -> str | None:
        """Why the wrapped model cannot run packed rows, or None."""
        head = self.family.head
        if getattr(head, "_fsdp_wrapped_module", head) is not self.head:
            return f"the head is wrapped by {type(head).__name__}"
        return None

    def logprob(self, batch: PackedBatch, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and entropy, [N] fp32 each; to be called inside the model's forward."""
        head: Any = self.family.head
        return head(self.hidden(batch), revisual_fast_call=HeadCall(batch.targets, temperature))

    def states(self, batch: PackedBatch, plan: AttentionPlan | None = None) -> Tensor:
        self._rows = self.family.embedding(batch.ids)  # [T, D]
        device = self.device
        dtype = autocast_dtype(device.type) or self._rows.dtype
        if self._backend is None:
            self._backend, _ = pick_attention("auto", device, dtype)
        return super().states(batch, plan or make_plan(self._backend, batch.segments, device, dtype))

    def image_features(self, batch: PackedBatch) -> Tensor | None:
        """One pass of the tower, frozen or not, with images or without: processes must not differ in their number."""
        if self.family.visual is None:
            return None
        if batch.pixel_values:
            return self.family.encode_images(torch.cat(batch.pixel_values).to(self.device), batch.grids)
        vision = self.base.config.vision_config
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        blank = torch.zeros(BLANK[1] * BLANK[2], size, device=self.device)
        features = self.family.encode_images(blank, torch.tensor([BLANK]))
        assert self._rows is not None
        self._rows = self._rows + 0.0 * features.mean()  # a gradient of zero for every parameter of the tower
        return None

    def embed(self, batch: PackedBatch, features: Tensor | None) -> Tensor:
        assert self._rows is not None
        rows, self._rows = self._rows, None
        taken = torch.full_like(batch.ids, -1).index_copy(0, batch.image_rows, batch.image_index)
        return pack_embeddings(torch.arange(len(rows), device=rows.device), rows, features, taken)[None]


def _route_attention(model: nn.Module) -> list[nn.Module]:
    """Give every attention module whose class verl has changed transformers' own forward, for packed rows only."""
    routed = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and type(module).__module__.startswith("transformers."):
            if _is_own(type(module)):
                continue
            if type(module) not in OWN_ATTENTION:
                raise ValueError(
                    f"{type(module).__name__}.forward was replaced before revisual_fast.integrations.verl was imported"
                )
            own = MethodType(OWN_ATTENTION[type(module)], module)
            module.forward = partial(_attention_forward, own, module.forward)
            routed.append(module)
    return routed


def _attention_forward(own: Callable[..., Any], verls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (verls if kwargs.get("packed") is None else own)(*args, **kwargs)


def _head_forward(head: nn.Linear, hidden: Tensor, *, revisual_fast_call: HeadCall | None = None) -> Any:
    """The head's forward; with a call [N, D] -> log-prob and entropy, each [N].

    Inside of it, because FSDP gathers the weight for the time of the forward only.
    """
    if revisual_fast_call is None:
        return type(head).forward(head, hidden)
    weight, bias = head.weight, head.bias
    if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        hidden = hidden.to(weight.dtype)
    call = revisual_fast_call
    return linear_logprob(hidden, weight, call.targets, bias=bias, temperature=call.temperature)
