"""Modules that OpenRLHF imports and that are not built without a GPU: the functions it calls, in plain torch."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import transformers.modeling_utils  # noqa: F401 - looks for flash-attn when it is imported
from torch import Tensor


def install() -> None:
    """Put the stand-ins where the packages would be, unless they are there."""
    torch._dynamo.config.disable = True  # its entropy is compiled; there need be no compiler here
    if importlib.util.find_spec("flash_attn") is None:
        _module("flash_attn")
        _module("flash_attn.bert_padding", **_padding())
        _module("flash_attn.utils")
        _module("flash_attn.utils.distributed", all_gather=None)
    if importlib.util.find_spec("deepspeed") is None:
        _module("deepspeed")
        _module("deepspeed.utils", set_z3_leaf_modules=lambda model, classes: None)
        _module("deepspeed.ops")
        _module("deepspeed.ops.adam", DeepSpeedCPUAdam=None, FusedAdam=None)
        _module("deepspeed.runtime")
        _module("deepspeed.runtime.zero", ZeroParamStatus=None)
        _module("deepspeed.runtime.zero.partition_parameters", ZeroParamStatus=None)


def _module(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _padding() -> dict[str, Any]:
    from einops import rearrange

    def unpad_input(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
        lengths = mask.sum(-1, dtype=torch.int32)
        indices = mask.flatten().nonzero()[:, 0]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return values.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths

    def pad_input(values: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
        out = values.new_zeros(batch * length, *values.shape[1:])
        return out.index_put((indices,), values).view(batch, length, *values.shape[1:])

    def index_first_axis(values: Tensor, indices: Tensor) -> Tensor:
        return values[indices]

    return {f.__name__: f for f in (unpad_input, pad_input, index_first_axis)} | {"rearrange": rearrange}
