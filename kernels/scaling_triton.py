"""``x *= by`` in Triton: few programs, each of which looks at the factor first and leaves if it is 1."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # enough for every multiprocessor to have several
BLOCK, WARPS = 4096, 8


@triton.jit(do_not_specialize=["tiles"])
def scale_kernel(
    x_ptr,  # [rows, columns]
    stride,
    by_ptr,  # scalar
    columns,
    tiles,  # of all rows
    BLOCK: tl.constexpr,
):
    by = tl.load(by_ptr)
    if by != 1.0:
        per_row = tl.cdiv(columns, BLOCK)
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):  # 64 bits, as its offsets
            at = (tile % per_row) * BLOCK + tl.arange(0, BLOCK)
            place = x_ptr + (tile // per_row) * stride + at
            x = tl.load(place, mask=at < columns, other=0.0)
            tl.store(place, (x.to(by.dtype) * by).to(x.dtype), mask=at < columns)


def scale(x: Tensor, by: Tensor) -> None:
    """``x [rows, columns]`` with contiguous rows."""
    rows, columns = x.shape
    tiles = rows * triton.cdiv(columns, BLOCK)
    scale_kernel[(min(tiles, PROGRAMS),)](x, x.stride(0), by, columns, tiles, BLOCK=BLOCK, num_warps=WARPS)


def gates() -> list[tuple[Any, dict[str, str], dict[str, int], int]]:
    """(kernel, signature, constexprs, num_warps) of every launch that must compile without a spill."""
    found = []
    for x, by in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        kinds = (f"*{x}", "i64", f"*{by}", "i64", "i64", "constexpr")
        signature = dict(zip(scale_kernel.arg_names, kinds, strict=True))
        found.append((scale_kernel, signature, {"BLOCK": BLOCK}, WARPS))
    return found
