"""Triton kernel of the gather's backward pass: every row of the result is summed by one program, in one order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 512, 2
"""A tile's columns: 16 bytes of bf16 a thread."""


@triton.jit
def sum_rows_kernel(
    d_out_ptr,  # [N, width]
    order_ptr,  # [N] int64: rows of d_out, sorted by their destination
    bounds_ptr,  # [T + 1] int64: destination t takes order[bounds[t]:bounds[t + 1]]
    d_hidden_ptr,  # [T, width]
    width,
    DTYPE: tl.constexpr,  # in which is added
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=DTYPE)
    for i in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        source = tl.load(order_ptr + i)
        total += tl.load(d_out_ptr + source * width + columns, mask=inside, other=0.0).to(DTYPE)
    tl.store(d_hidden_ptr + row * width + columns, total.to(d_hidden_ptr.dtype.element_ty), mask=inside)


def sum_rows(d_out: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """``[T, D]``: the rows of ``d_out [N, D]`` added up by destination ``rows [N]``; ``n_rows`` is T."""
    d_out = d_out.contiguous()
    width = d_out.shape[1]
    d_hidden = d_out.new_empty((n_rows, width))
    if d_hidden.numel() == 0:
        return d_hidden
    sorted_rows, order = rows.sort(stable=True)
    bounds = torch.searchsorted(sorted_rows, torch.arange(n_rows + 1, device=rows.device))
    dtype = tl.float64 if d_out.dtype == torch.float64 else tl.float32
    grid = (n_rows, triton.cdiv(width, BLOCK))
    sum_rows_kernel[grid](d_out, order, bounds, d_hidden, width, DTYPE=dtype, BLOCK=BLOCK, num_warps=WARPS)
    return d_hidden


def gates() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """What is compiled without a GPU: kernel, signature, constants, warps."""
    constants = {"DTYPE": tl.float32, "BLOCK": BLOCK}
    fixed = {"order_ptr": "*i64", "bounds_ptr": "*i64", "width": "i32"}
    signatures = [{"d_out_ptr": f"*{t}", **fixed, "d_hidden_ptr": f"*{t}"} for t in ("bf16", "fp32")]
    return [(sum_rows_kernel, signature, constants, WARPS) for signature in signatures]
