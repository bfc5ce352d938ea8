"""Triton kernels around packed rows: input embeddings, the gather of keys and values, sums of rows, and M-RoPE.

All are bound by the bytes they move. One program has one row of the result, so that every element is computed once, in
one order, without atomics. A row that does not exist is not read and gives nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COPY_TILE, COPY_WARPS = 1024, 4
SUM_TILE, SUM_ENTRIES, SUM_WARPS = 512, 4, 4
ROPE_PAIRS, ROPE_WARPS = 1024, 4
"""Pairs of elements that a program turns at a time: some heads of half a head each."""


@triton.jit
def _copy_row(out, row, known, width, TILE: tl.constexpr):
    readable = tl.where(known, width, 0)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        values = tl.load(row + columns, mask=columns < readable, other=float("nan"))
        tl.store(out + columns, values, mask=columns < width)


@triton.jit(do_not_specialize=["vocab", "n_features"])
def pack_embeddings_kernel(
    ids_ptr,  # [T] int64
    feature_index_ptr,  # [T] int64
    table_ptr,  # [vocab, width]
    features_ptr,  # [n_features, width]
    out_ptr,  # [T, width]
    vocab,
    n_features,
    width,
    table_stride,
    features_stride,
    TILE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    feature = tl.load(feature_index_ptr + t)
    out = out_ptr + t * width
    if feature == -1:
        token = tl.load(ids_ptr + t)
        _copy_row(out, table_ptr + token * table_stride, (token >= 0) & (token < vocab), width, TILE)
    else:
        _copy_row(out, features_ptr + feature * features_stride, (feature >= 0) & (feature < n_features), width, TILE)


@triton.jit(do_not_specialize=["n_rows"])
def gather_pair_kernel(
    key_ptr,  # [n_rows, key_width]
    value_ptr,  # [n_rows, value_width]
    index_ptr,  # [L] int64
    key_out_ptr,  # [L, key_width]
    value_out_ptr,  # [L, value_width]
    n_rows,
    key_width,
    value_width,
    key_stride,
    value_stride,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + i)
    known = (row >= 0) & (row < n_rows)
    _copy_row(key_out_ptr + i * key_width, key_ptr + row * key_stride, known, key_width, TILE)
    _copy_row(value_out_ptr + i * value_width, value_ptr + row * value_stride, known, value_width, TILE)


@triton.jit
def _sum_rows(
    out, rows, order, first, last, width, stride, DOUBLE: tl.constexpr, ENTRIES: tl.constexpr, TILE: tl.constexpr
):
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    total = tl.zeros([ENTRIES, TILE], dtype=tl.float64 if DOUBLE else tl.float32)
    for start in range(first, last, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        live = entries < last
        at = tl.load(order + entries, mask=live, other=0)
        values = tl.load(
            rows + (at * stride)[:, None] + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        total += values.to(total.dtype)
    tl.store(out + columns, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def segment_sums_kernel(
    order_ptr,  # [N] int64
    indptr_ptr,  # [segments + 1] int64
    one_ptr,  # [N, one_width]
    two_ptr,  # [N, two_width], read only if BOTH
    one_out_ptr,  # [segments, one_width]
    two_out_ptr,  # [segments, two_width]
    one_width,
    two_width,
    one_stride,
    two_stride,
    BOTH: tl.constexpr,
    DOUBLE: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(indptr_ptr + segment)
    last = tl.load(indptr_ptr + segment + 1)
    out = one_out_ptr + segment * one_width
    _sum_rows(out, one_ptr, order_ptr, first, last, one_width, one_stride, DOUBLE, ENTRIES, TILE)
    if BOTH:
        out = two_out_ptr + segment * two_width
        _sum_rows(out, two_ptr, order_ptr, first, last, two_width, two_stride, DOUBLE, ENTRIES, TILE)


@triton.jit
def _cos_sin(position, inv_freq):
    """Of an angle that may be as large as a position: see cos_sin in csrc/packing.cuh, which has the same steps."""
    quarters = position.to(tl.float64) * inv_freq.to(tl.float64) * 0.63661977236758134308
    nearest = tl.floor(quarters + 0.5)
    x = ((quarters - nearest) * 1.57079632679489661923).to(tl.float32)
    y = x * x
    s = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    c = 1 - y * (1 / 2 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320 - y * (1 / 3628800)))))
    quadrant = nearest.to(tl.int64) & 3
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine), tl.where(quadrant >= 2, -sine, sine)


@triton.jit
def _rotate(x, out, n_heads, half, head_stride, out_head_stride, cosine, sine, HEADS: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    for start in range(0, n_heads, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)
        live = (heads < n_heads)[:, None] & (i < half)[None, :]
        at = (heads * head_stride)[:, None] + i[None, :]
        a = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        b = tl.load(x + at + half, mask=live, other=0.0).to(tl.float32)
        to = (heads * out_head_stride)[:, None] + i[None, :]
        element = out.dtype.element_ty
        tl.store(out + to, (a * cosine[None, :] - b * sine[None, :]).to(element), mask=live)
        tl.store(out + to + half, (b * cosine[None, :] + a * sine[None, :]).to(element), mask=live)


@triton.jit
def mrope_kernel(
    positions_ptr,  # [3, T] int64
    inv_freq_ptr,  # [half] fp32
    axis_ptr,  # [half] int8
    q_ptr,  # [T, q_heads, 2 half]
    q_out_ptr,
    k_ptr,  # [T, k_heads, 2 half]
    k_out_ptr,
    q_heads,
    k_heads,
    half,
    positions_stride,
    q_token,
    q_head,
    q_out_token,
    q_out_head,
    k_token,
    k_head,
    k_out_token,
    k_out_head,
    cos_scaling,
    sin_scaling,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF)
    inside = i < half
    axis = tl.load(axis_ptr + i, mask=inside, other=0).to(tl.int64)
    known = inside & (axis >= 0) & (axis < 3)
    position = tl.load(positions_ptr + axis * positions_stride + t, mask=known, other=0)
    inv_freq = tl.load(inv_freq_ptr + i, mask=inside, other=0.0)
    cosine, sine = _cos_sin(position, inv_freq)
    cosine = tl.where(known, cosine * cos_scaling, float("nan"))
    sine = tl.where(known, sine * sin_scaling, float("nan"))
    _rotate(
        q_ptr + t * q_token, q_out_ptr + t * q_out_token, q_heads, half, q_head, q_out_head, cosine, sine, HEADS, HALF
    )
    _rotate(
        k_ptr + t * k_token, k_out_ptr + t * k_out_token, k_heads, half, k_head, k_out_head, cosine, sine, HEADS, HALF
    )


# launchers: they fill the outputs that they are given


def pack_embeddings(ids: Tensor, table: Tensor, features: Tensor | None, feature_index: Tensor, out: Tensor) -> None:
    width = table.shape[1]
    source = table if features is None else features
    if out.numel():
        with torch.cuda.device_of(table):
            pack_embeddings_kernel[(len(ids),)](
                *(ids, feature_index, table, source, out, len(table), 0 if features is None else len(features)),
                *(width, table.stride(0), source.stride(0)),
                TILE=min(COPY_TILE, triton.next_power_of_2(width)),
                num_warps=COPY_WARPS,
            )


def gather_pair(key: Tensor, value: Tensor, index: Tensor, key_out: Tensor, value_out: Tensor) -> None:
    widths = key.shape[1], value.shape[1]
    if key_out.numel() + value_out.numel():
        with torch.cuda.device_of(key):
            gather_pair_kernel[(len(index),)](
                *(key, value, index, key_out, value_out, len(key), *widths, key.stride(0), value.stride(0)),
                TILE=min(COPY_TILE, triton.next_power_of_2(max(widths))),
                num_warps=COPY_WARPS,
            )


def segment_sums(order: Tensor, indptr: Tensor, sources: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    one, two, one_out, two_out = sources[0], sources[-1], sums[0], sums[-1]
    widest = max(one.shape[1], two.shape[1])
    tile = min(SUM_TILE, triton.next_power_of_2(widest))
    with torch.cuda.device_of(order):
        segment_sums_kernel[(len(indptr) - 1, triton.cdiv(widest, tile))](
            *(order, indptr, one, two, one_out, two_out, one.shape[1], two.shape[1], one.stride(0), two.stride(0)),
            BOTH=len(sources) == 2,
            DOUBLE=one.dtype == torch.float64,
            ENTRIES=SUM_ENTRIES,
            TILE=tile,
            num_warps=SUM_WARPS,
        )


def mrope(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    positions: Tensor,
    inv_freq: Tensor,
    axis: Tensor,
    scaling: float,
    inverse: bool,
) -> None:
    q, k, q_out, k_out = inputs[0], inputs[-1], outputs[0], outputs[-1]
    if q.numel() + k.numel() == 0:
        return
    half = triton.next_power_of_2(len(inv_freq))
    strides = [x.stride(i) for x in (q, q_out, k, k_out) for i in (0, 1)]
    with torch.cuda.device_of(q):
        mrope_kernel[(len(q),)](
            *(positions, inv_freq, axis, q, q_out, k, k_out, q.shape[1], k.shape[1] if len(inputs) == 2 else 0),
            *(len(inv_freq), positions.stride(0), *strides, scaling, -scaling if inverse else scaling),
            HEADS=max(1, ROPE_PAIRS // half),
            HALF=half,
            num_warps=ROPE_WARPS,
        )


# what is compiled without a GPU

Gate = tuple[Any, dict[str, str], dict[str, Any], int]


def gates() -> list[Gate]:
    """(kernel, signature, constexprs, num_warps) of every launch that must compile without a spill."""
    found = []
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        found.append(_gate(pack_embeddings_kernel, ["i64"] * 2 + [dtype] * 3, {"TILE": COPY_TILE}, COPY_WARPS))
        pair = [dtype, dtype, "i64", dtype, dtype]
        found.append(_gate(gather_pair_kernel, pair, {"TILE": COPY_TILE}, COPY_WARPS))
        for out in dict.fromkeys([dtype, "fp64" if dtype == "fp64" else "fp32"]):
            for both in (True, False):
                constants = {"BOTH": both, "DOUBLE": dtype == "fp64", "ENTRIES": SUM_ENTRIES, "TILE": SUM_TILE}
                pointers = ["i64", "i64", dtype, dtype, out, out]
                found.append(_gate(segment_sums_kernel, pointers, constants, SUM_WARPS))
        if dtype != "fp64":
            pointers = ["i64", "fp32", "i8", *[dtype] * 4]
            found.append(_gate(mrope_kernel, pointers, {"HEADS": ROPE_PAIRS // 64, "HALF": 64}, ROPE_WARPS))
    return found


def _gate(kernel: Any, pointers: list[str], constants: dict[str, Any], warps: int) -> Gate:
    types = {name: "fp32" if name.endswith("_scaling") else "i32" for name in kernel.arg_names}
    types |= {name: f"*{dtype}" for name, dtype in zip(kernel.arg_names, pointers, strict=False)}
    return kernel, types | dict.fromkeys(constants, "constexpr"), constants, warps
