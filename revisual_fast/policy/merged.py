"""The weights of a policy as a checkpoint without adapters has them: plain names, adapters merged in. Torch only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PlainWeight", "plain_weights"]

_BASE = ".base_layer."
_ADAPTER = ".lora_"


@dataclass(frozen=True, eq=False)
class PlainWeight:
    """A parameter under its name without adapters, and the peft layer that adapts it, if there is one."""

    name: str
    parameter: Tensor
    adapter: Any | None = None

    @property
    def trained(self) -> bool:
        """Whether training can change its value, by itself or through its adapter."""
        own = () if self.adapter is None else self.adapter.named_parameters()
        adapting = any(p.requires_grad for n, p in own if _ADAPTER in f".{n}")
        return self.parameter.requires_grad or adapting

    @torch.no_grad()
    def value(self) -> Tensor:
        """As a checkpoint would hold it, in the parameter's dtype and on its device: the parameter itself, detached,
        unless it is adapted (then merged in fp32 and rounded once) or sharded.

        Of a sharded parameter (DTensor) the whole, which is a collective: all ranks must ask for it.
        """
        weight = _whole(self.parameter.detach())
        if self.adapter is None:
            return weight
        delta = _whole(self.adapter.get_delta_weight("default"))
        return (weight.float() + delta.float()).to(weight.dtype)


def plain_weights(base: nn.Module) -> list[PlainWeight]:
    """Every parameter of ``base``, a transformers model that peft may have put adapters into, in the model's order.

    Tied ones come once, under the first of their names, and adapters not at all. Raises ValueError where an adapter
    is on a tied parameter: merging it would change the other one as well.
    """
    adapted = {f"{n}.weight": m for n, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    uses = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    found: list[PlainWeight] = []
    for full_name, parameter in base.named_parameters():
        if _ADAPTER in full_name:
            continue
        name = full_name.replace(_BASE, ".")
        adapter = adapted.get(name)
        if adapter is not None and uses[id(parameter)] > 1:
            raise ValueError(
                f"model.lora.target_modules matches {name.removesuffix('.weight')}, whose weight is tied to another: "
                "the adapter cannot be merged; leave this module out"
            )
        found.append(PlainWeight(name, parameter, adapter))
    return found


def _whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor (DTensor); any other one as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
