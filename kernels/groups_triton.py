"""Triton kernels of group advantages (one program a group) and of PAD's keys (thresholds, noise and counts at once)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP_BLOCK, GROUP_WARPS = 64, 1
"""Rewards that a program holds at a time: most groups in one go."""
KEY_BLOCK, KEY_WARPS = 1024, 4


@triton.jit
def normalise_groups_kernel(
    rewards_ptr,  # [N]
    cu_groups_ptr,  # [B + 1]
    advantages_ptr,  # [N] fp32
    eps,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    start = tl.load(cu_groups_ptr + group).to(tl.int64)
    end = tl.load(cu_groups_ptr + group + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    first = tl.load(rewards_ptr + start, mask=start < end, other=0.0).to(tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    differs = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(start, end, BLOCK):
        inside = i + lanes < end
        reward = tl.load(rewards_ptr + i + lanes, mask=inside, other=0.0).to(tl.float64)
        total += reward
        differs += (inside & (reward != first)).to(tl.int32)
    mean = tl.sum(total) / tl.maximum(end - start, 1).to(tl.float64)
    equal = tl.sum(differs) == 0
    denominator = 1.0
    if DIVIDE:
        squares = tl.zeros([BLOCK], dtype=tl.float64)
        for i in range(start, end, BLOCK):
            inside = i + lanes < end
            reward = tl.load(rewards_ptr + i + lanes, mask=inside, other=0.0).to(tl.float64)
            squares += tl.where(inside, (reward - mean) * (reward - mean), 0.0)
        denominator = tl.sqrt(tl.sum(squares) / tl.maximum(end - start - 1, 1).to(tl.float64)) + eps
    for i in range(start, end, BLOCK):
        inside = i + lanes < end
        reward = tl.load(rewards_ptr + i + lanes, mask=inside, other=0.0).to(tl.float64)
        advantage = tl.where(equal, 0.0, (reward - mean) / denominator)
        tl.store(advantages_ptr + i + lanes, advantage.to(tl.float32), mask=inside)


def normalise_groups(rewards: Tensor, cu_groups: Tensor, eps: float, divide: bool) -> Tensor:
    """Advantages ``[N]`` fp32 of ``rewards [N]`` in the groups of ``cu_groups [B + 1]``."""
    advantages = torch.empty_like(rewards, dtype=torch.float32)
    n_groups = len(cu_groups) - 1
    if n_groups > 0:
        normalise_groups_kernel[(n_groups,)](
            rewards.contiguous(),
            cu_groups.contiguous(),
            advantages,
            eps,
            DIVIDE=divide,
            BLOCK=GROUP_BLOCK,
            num_warps=GROUP_WARPS,
        )
    return advantages


@triton.jit(do_not_specialize=["n_rows"])
def pad_keys_kernel(
    size_ptr,  # [N] fp32, |A|
    noise_ptr,  # [N] fp64 in (0, 1), or anything without DRAW
    keys_ptr,  # [N] fp64
    counts_ptr,  # [3] int32 zeros: in E, below it, above it
    n_rows,
    low,
    high,
    tau,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    size = tl.load(size_ptr + rows, mask=inside, other=0.0)
    too_low = inside & (size < low)
    too_high = inside & (size > high)
    outside = too_low | too_high
    key = tl.zeros([BLOCK], dtype=tl.float64)
    if DRAW:
        noise = tl.load(noise_ptr + rows, mask=inside, other=0.5)
        key = tl.maximum(size.to(tl.float64) / tau - tl.log(-tl.log(noise)), -1e30)
    key = tl.where(size != size, float("inf"), key)
    key = tl.where(outside, -float("inf"), key)
    tl.store(keys_ptr + rows, key, mask=inside)
    tl.atomic_add(counts_ptr, tl.sum((inside & ~outside).to(tl.int32)))
    tl.atomic_add(counts_ptr + 1, tl.sum(too_low.to(tl.int32)))
    tl.atomic_add(counts_ptr + 2, tl.sum(too_high.to(tl.int32)))


def pad_keys(size: Tensor, noise: Tensor | None, low: float, high: float, tau: float) -> tuple[Tensor, Tensor]:
    """Keys ``[N]`` fp64, minus infinity outside ``low <= size <= high``, and the counts (in, below, above) ``[3]``."""
    keys = torch.empty_like(size, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.int32, device=size.device)
    pad_keys_kernel[(triton.cdiv(len(size), KEY_BLOCK),)](
        size.contiguous(),
        keys if noise is None else noise.contiguous(),
        keys,
        counts,
        len(size),
        low,
        high,
        tau,
        DRAW=noise is not None,
        BLOCK=KEY_BLOCK,
        num_warps=KEY_WARPS,
    )
    return keys, counts


def gates() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """What is compiled without a GPU: kernel, signature, constants, warps."""
    groups = {"rewards_ptr": "*fp32", "cu_groups_ptr": "*i32", "advantages_ptr": "*fp32", "eps": "fp32"}
    keys = {"size_ptr": "*fp32", "noise_ptr": "*fp64", "keys_ptr": "*fp64", "counts_ptr": "*i32", "n_rows": "i32"}
    keys |= {"low": "fp32", "high": "fp32", "tau": "fp32"}
    both = (True, False)
    return [
        *((normalise_groups_kernel, groups, {"DIVIDE": on, "BLOCK": GROUP_BLOCK}, GROUP_WARPS) for on in both),
        *((pad_keys_kernel, keys, {"DRAW": on, "BLOCK": KEY_BLOCK}, KEY_WARPS) for on in both),
    ]
