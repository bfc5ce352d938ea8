"""RMSNorm, SwiGLU and RoPE from liger-kernel, for one model: no other model and no module of transformers is changed.

liger-kernel's own ``apply_liger_kernel_to_qwen2_5_vl`` changes transformers' module for every model of the process, and
for RoPE sets a name that transformers 5.17 no longer looks up. So its functions are bound here, module by module.

They change the rounding, not the mathematics. A limit of liger's SwiGLU: its backward pass overwrites what its forward
pass saved, so that one forward pass has one backward pass (``retain_graph=True`` would give wrong gradients).
"""

from __future__ import annotations

import importlib.util
import os
from types import MethodType
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from revisual_fast.policy.families import Family

__all__ = ["apply_liger", "use_liger"]


def use_liger(setting: Literal["auto"] | bool, device: torch.device) -> tuple[bool, str]:
    """Whether ``model.liger_kernels: setting`` puts liger's kernels in on ``device``, and why.

    Raises ValueError where ``True`` cannot be had. The CPU counts as able with ``TRITON_INTERPRET=1``, for tests.
    """
    if setting is False:
        return False, "model.liger_kernels is false"
    interpreted = setting is True and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        missing, fix = f"they need a CUDA device and this is {device.type}", "set it to auto"
    elif importlib.util.find_spec("liger_kernel") is None:
        missing, fix = "liger-kernel is not installed", "pip install liger-kernel, or set it to auto"
    elif Version(transformers.__version__).release < (5, 17):
        missing = f"they need transformers 5.17, and {transformers.__version__} is installed"
        fix = "pip install -U transformers, or set it to auto"
    else:
        return True, f"liger-kernel is installed, and the device is {device.type}"
    if setting is True:
        raise ValueError(f"model.liger_kernels is true, but {missing}: {fix}")
    return False, missing


def apply_liger(family: Family) -> dict[str, int]:
    """Put the kernels into the family's model; returns how many modules of each kind were changed.

    A family's RMSNorms and gated MLPs are liger's by definition; those of other kinds (a Qwen3-VL's tower has
    LayerNorms and plain MLPs) stay as they are.
    """
    from liger_kernel.transformers.functional import liger_rope

    norms, mlps = family.norms(), family.swiglu_mlps()
    for norm in norms:
        norm.forward = MethodType(_rms_norm, norm)
    for mlp in mlps:
        mlp.forward = MethodType(_swiglu, mlp)
    return {"rms_norm": len(norms), "swiglu": len(mlps), "rope": family.use_rotary(liger_rope)}


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:  # [..., D] -> [..., D]
    from liger_kernel.transformers.functional import liger_rms_norm

    # not in place: the upstream gradient stays as it is, for whoever else holds it
    return liger_rms_norm(hidden, norm.weight, norm.variance_epsilon, in_place=False)


def _swiglu(mlp: Any, hidden: Tensor) -> Tensor:  # [..., D] -> [..., D]
    from liger_kernel.transformers.functional import liger_swiglu

    return mlp.down_proj(liger_swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
