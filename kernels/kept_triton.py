"""Triton kernels of sampling-mask replay: a gathered product, and a weighted sum of gathered rows, for dX and for dW.

Both are bound by the bytes they gather. The product's programs take blocks of entries whatever row these belong to, so
that rows that keep one id and rows that keep thousands are spread evenly; the sum's take one segment and a tile of D,
so that every element is added up by one program in one order. An id outside its table reads nothing and gives nan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Entries and elements of D that a program holds at a time, and its warps."""

    entries: int
    tile: int
    warps: int


PRODUCTS = {2: Launch(16, 128, 4), 4: Launch(16, 128, 4), 8: Launch(16, 64, 4)}
"""By bytes of an element of hidden."""
SUMS = {2: Launch(8, 256, 4), 4: Launch(8, 256, 4), 8: Launch(8, 128, 4)}
"""By bytes of an element of the table."""


@triton.jit(do_not_specialize=["nnz", "n_rows", "vocab"])
def gathered_products_kernel(
    hidden_ptr,  # [n_rows, width]
    weight_ptr,  # [vocab, width]
    rows_ptr,  # [nnz] int64
    ids_ptr,  # [nnz] int64
    z_ptr,  # [nnz] fp32 or fp64, the dtype of the arithmetic
    nnz,
    n_rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    ENTRIES: tl.constexpr,
    TILE: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    live = entries < nnz
    rows = tl.load(rows_ptr + entries, mask=live, other=-1)
    ids = tl.load(ids_ptr + entries, mask=live, other=-1)
    known = (rows >= 0) & (rows < n_rows) & (ids >= 0) & (ids < vocab)
    hidden_rows = hidden_ptr + rows * hidden_stride
    weight_rows = weight_ptr + ids * weight_stride
    total = tl.zeros([ENTRIES, TILE], dtype=z_ptr.dtype.element_ty)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        mask = known[:, None] & (columns < width)[None, :]
        h = tl.load(hidden_rows[:, None] + columns[None, :], mask=mask, other=0.0)
        w = tl.load(weight_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(h.dtype)
        total += h.to(total.dtype) * w.to(total.dtype)
    z = tl.where(known, tl.sum(total, axis=1), float("nan"))
    tl.store(z_ptr + entries, z, mask=live)


@triton.jit(do_not_specialize=["n_table"])
def weighted_sums_kernel(
    coefficients_ptr,  # [nnz] fp32 or fp64, the dtype of the arithmetic
    index_ptr,  # [nnz] int64
    indptr_ptr,  # [segments + 1] int64
    table_ptr,  # [n_table, width]
    out_ptr,  # [segments, width]
    n_table,
    width,
    table_stride,
    ENTRIES: tl.constexpr,
    TILE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(indptr_ptr + segment)
    last = tl.load(indptr_ptr + segment + 1)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    total = tl.zeros([ENTRIES, TILE], dtype=coefficients_ptr.dtype.element_ty)
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        live = entries < last
        index = tl.load(index_ptr + entries, mask=live, other=-1)
        known = (index >= 0) & (index < n_table)
        coefficients = tl.load(coefficients_ptr + entries, mask=live, other=0.0)
        coefficients = tl.where(known | (entries >= last), coefficients, float("nan"))
        rows = table_ptr + index * table_stride
        values = tl.load(rows[:, None] + columns[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        total += coefficients[:, None] * values.to(total.dtype)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + segment * width + columns, out, mask=inside)


def gathered_products(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """``z_j = hidden[rows_j] . weight[ids_j]``, ``[nnz]``; a weight wider than hidden is rounded to hidden's dtype."""
    hidden, weight = _with_contiguous_rows(hidden), _with_contiguous_rows(weight)
    width, nnz = hidden.shape[1], len(ids)
    z = hidden.new_empty(nnz, dtype=dtype)
    launch = PRODUCTS[hidden.element_size()]
    if nnz:
        gathered_products_kernel[(triton.cdiv(nnz, launch.entries),)](
            *(hidden, weight, rows, ids, z),
            *(nnz, len(hidden), len(weight), width, hidden.stride(0), weight.stride(0)),
            ENTRIES=launch.entries,
            TILE=min(launch.tile, triton.next_power_of_2(width)),
            num_warps=launch.warps,
        )
    return z


def weighted_sums(coefficients: Tensor, index: Tensor, indptr: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_j coefficients_j table[index_j]`` over each segment, ``[segments, D]``; added up in coefficients' dtype."""
    table = _with_contiguous_rows(table)
    segments, width = len(indptr) - 1, table.shape[1]
    out = table.new_empty((segments, width), dtype=dtype)
    if out.numel():
        launch = SUMS[table.element_size()]
        tile = min(launch.tile, triton.next_power_of_2(width))
        weighted_sums_kernel[(segments, triton.cdiv(width, tile))](
            *(coefficients, index, indptr, table, out, len(table), width, table.stride(0)),
            ENTRIES=launch.entries,
            TILE=tile,
            num_warps=launch.warps,
        )
    return out


def _with_contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()


def gates() -> list[tuple[Any, dict[str, str], dict[str, int], int]]:
    """(kernel, signature, constexprs, num_warps) of every launch that must compile without a spill."""
    found = []
    for hidden, weight, z in (
        ("bf16", "bf16", "fp32"),
        ("fp16", "fp16", "fp32"),
        ("bf16", "fp32", "fp32"),
        ("fp32", "fp32", "fp32"),
        ("fp64", "fp64", "fp64"),
    ):
        found.append(_gate(gathered_products_kernel, [hidden, weight, "i64", "i64", z], PRODUCTS[_BYTES[hidden]]))
        for table, out in dict.fromkeys([(weight, hidden), (hidden, z)]):  # dX, dW
            found.append(_gate(weighted_sums_kernel, [z, "i64", "i64", table, out], SUMS[_BYTES[table]]))
    return found


_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _gate(kernel: Any, pointers: list[str], launch: Launch) -> tuple[Any, dict[str, str], dict[str, int], int]:
    constants = {"ENTRIES": launch.entries, "TILE": launch.tile}
    sizes = len(kernel.arg_names) - len(pointers) - len(constants)
    types = [*(f"*{dtype}" for dtype in pointers), *["i32"] * sizes, *["constexpr"] * len(constants)]
    return kernel, dict(zip(kernel.arg_names, types, strict=True)), constants, launch.warps
