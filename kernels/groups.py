"""Group advantages and PAD (arXiv 2506.04207) of a large batch, on its device, without waiting for it.

``N`` completions, consecutive within their group, ``B`` groups. ``revisual_fast.advantages`` is the general form:
groups in any order, results as indices and Python numbers, values checked; on CUDA that waits for the device several
times. Use it where rewards come from Python functions, as in the trainer. Use this where rewards are on the device
already. Here nothing can be checked on CUDA, so a reward that is not a number shows: its group's advantages are nan,
and a completion with such an advantage is kept, so that the loss is nan as well.

All arithmetic is fp64, as there: these vectors are small. Settings are rounded to fp32 first, so that both backends
work with the same numbers; thresholds towards each other, which is exact for fp32 advantages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from revisual_fast.advantages import check_pad_settings, pad_count
from revisual_fast.kernels.dispatch import pick_backend
from revisual_fast.ranges import ranged

__all__ = ["PadMask", "group_advantages", "pad_mask"]

LOWEST = -1e30
"""The smallest key of a completion that may be drawn: above minus infinity, whatever the noise."""


class PadMask(NamedTuple):
    """Which completions are trained on. Everything is on the device: reading a number waits for it."""

    keep: Tensor  # [N] bool
    n_effective: Tensor  # 0-d int64, |E|: completions within the thresholds (N for the modes without)
    dropped_low: Tensor  # 0-d int64: |A| below t_low
    dropped_high: Tensor  # 0-d int64: |A| above t_high


@ranged("revisual_fast.group_advantages")
def group_advantages(
    rewards: Tensor,  # [N] floating point
    cu_groups: Tensor,  # [B + 1] int32 or int64: group b owns the rows cu_groups[b] .. cu_groups[b + 1]
    *,
    eps: float = 1e-6,
    scale: str = "std",
    backend: str = "auto",
) -> Tensor:
    """Advantages ``[N]`` fp32: ``(r - mean) / (std + eps)`` within the group; ``scale="none"`` leaves the division out.

    std is the sample's (n - 1). Exactly 0 in a group whose rewards are all equal, a group of one included; a group may
    be empty. GRPO, arXiv 2402.03300; without the division Dr. GRPO, arXiv 2503.20783. ``cu_groups`` runs from 0 to N:
    its values are checked on the CPU only. Raises ValueError for shapes, dtypes or settings that do not fit.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r} is unknown; it is one of std, none")
    rewards = rewards.detach()
    _check_groups(rewards, cu_groups)
    if pick_backend(backend, rewards.device) == "triton":
        from revisual_fast.kernels.groups_triton import normalise_groups

        return normalise_groups(rewards, cu_groups, eps, scale == "std")
    return _normalise_groups(rewards.double(), cu_groups, eps, scale == "std").float()


def _check_groups(rewards: Tensor, cu_groups: Tensor) -> None:
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be [N] of floating-point numbers; got {list(rewards.shape)} {rewards.dtype}")
    fits = cu_groups.ndim == 1 and len(cu_groups) > 0 and cu_groups.device == rewards.device
    if not fits or cu_groups.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_groups must be [B + 1] int32 or int64 on {rewards.device}, as rewards; "
            f"got {list(cu_groups.shape)} {cu_groups.dtype} on {cu_groups.device}"
        )
    if cu_groups.device.type != "cpu":
        return
    if cu_groups[0] != 0 or cu_groups[-1] != len(rewards) or bool((cu_groups.diff() < 0).any()):
        raise ValueError(f"cu_groups must rise from 0 to N = {len(rewards)}; got {cu_groups.tolist()}")


def _normalise_groups(values: Tensor, cu_groups: Tensor, eps: float, divide: bool) -> Tensor:
    """The torch form, on fp64 ``values [N]``."""
    n_groups = len(cu_groups) - 1
    if len(values) == 0:
        return values.clone()
    ids = torch.searchsorted(cu_groups[1:], torch.arange(len(values), device=values.device), right=True)

    def per_group(x: Tensor) -> Tensor:
        return x.new_zeros(n_groups).index_add(0, ids, x)

    count = cu_groups.diff().double()
    first = values[cu_groups[:-1].clamp(max=len(values) - 1)]  # that of an empty group is not used
    differs = per_group((values != first[ids]).double()) > 0
    centred = torch.where(differs[ids], values - (per_group(values) / count)[ids], 0.0)
    if divide:
        std = (per_group(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)[ids]
    return centred


@ranged("revisual_fast.pad_mask")
def pad_mask(
    advantages: Tensor,  # [N]
    *,
    mode: str = "paper",
    rho: float = 1.0,
    t_low: float = 1e-4,
    t_high: float = math.inf,
    tau: float = 0.3,
    noise: Tensor | None = None,  # [N] fp64 in (0, 1), uniform
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> PadMask:
    """Choose completions by ``a = |A|``, as :func:`revisual_fast.advantages.pad_select`, from the same distribution.

    Of ``E = {t_low <= a <= t_high}`` the ``min(ceil(rho N), |E|)`` with the largest ``a / tau + Gumbel noise`` are
    kept, which is a draw without replacement with probability ``softmax(a / tau)`` (arXiv 1903.06059). Modes paper,
    filter, sample and off; released draws with replacement, which no mask can express. paper and sample need ``noise``
    or a ``generator`` on the device of ``advantages`` that draws it. Advantages are taken as fp32. Raises ValueError
    for a value outside its range, and on the CPU for advantages that are not finite.
    """
    check_pad_settings(mode, rho, t_low, tau)
    if mode == "released":
        raise ValueError("mode='released' draws with replacement; use revisual_fast.advantages.pad_select")
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [N]; got {list(advantages.shape)}")
    if advantages.device.type == "cpu" and not bool(advantages.isfinite().all()):
        raise ValueError("advantages must be finite")
    backend = pick_backend(backend, advantages.device)
    n_rows, size = len(advantages), advantages.detach().float().abs()
    if mode == "off" or n_rows == 0:
        zero = size.new_zeros((), dtype=torch.int64)
        return PadMask(torch.ones_like(size, dtype=torch.bool), zero + n_rows, zero, zero)
    draws = mode in ("paper", "sample")
    noise = _noise(size, noise, generator, mode) if draws else None
    low, high = (0.0, math.inf) if mode == "sample" else (_fp32(t_low, math.inf), _fp32(t_high, -math.inf))
    keys, counts = _keys(size, noise, low, high, _fp32(tau), backend)
    keep = keys > -math.inf
    if draws:
        order = keys.sort(descending=True, stable=True).indices
        count = counts[0].clamp(max=pad_count(rho, n_rows))
        keep.scatter_(0, order, torch.arange(n_rows, device=keys.device) < count)
    return PadMask(keep, *counts.long().unbind())


def _noise(size: Tensor, noise: Tensor | None, generator: torch.Generator | None, mode: str) -> Tensor:
    if (noise is None) == (generator is None):
        raise ValueError(f"mode={mode!r} draws: pass noise or generator=torch.Generator(device).manual_seed(...)")
    if noise is None:
        return torch.rand(len(size), dtype=torch.float64, device=size.device, generator=generator)
    if noise.shape != size.shape or noise.dtype != torch.float64 or noise.device != size.device:
        raise ValueError(
            f"noise must be [{len(size)}] float64 on {size.device}, as advantages; "
            f"got {list(noise.shape)} {noise.dtype} on {noise.device}"
        )
    return noise


def _fp32(value: float, towards: float | None = None) -> float:
    """The nearest fp32 number, or the nearest one that does not lie on the other side of ``value``."""
    rounded = torch.tensor(value, dtype=torch.float32)  # on the CPU
    if towards is not None and (rounded.item() < value if towards > value else rounded.item() > value):
        rounded = torch.nextafter(rounded, torch.tensor(towards))
    return rounded.item()


def _keys(
    size: Tensor, noise: Tensor | None, low: float, high: float, tau: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Keys ``[N]`` fp64, minus infinity outside E, and the counts (in E, below it, above it) ``[3]``."""
    if backend == "triton":
        from revisual_fast.kernels.groups_triton import pad_keys

        return pad_keys(size, noise, low, high, tau)
    too_low, too_high = size < low, size > high
    outside = too_low | too_high
    keys = torch.zeros_like(size, dtype=torch.float64)
    if noise is not None:
        keys = (size.double() / tau - (-noise.log()).log()).clamp(min=LOWEST)
    keys = keys.masked_fill(size.isnan(), math.inf).masked_fill(outside, -math.inf)
    return keys, torch.stack([(~outside).sum(), too_low.sum(), too_high.sum()])
