"""Triton kernels of attention with shared prefixes: forward, dQ, and dK with dV.

The keys of a tile of queries are numbered ``j``: first its prefix, then its own rows, so that one loop goes over both
wherever they lie. Up to some ``j`` every row of the tile sees every key, and no mask is made; the other keys are
compared with each row. The queries of a tile of keys are numbered ``i`` in the same way, the masked ones first. Every
sum is made by one program in one order, in fp32: nothing is atomic, and results repeat to the bit.

FLOPs per visible pair and query head: 4 d forward; backward 6 d (dQ) and 8 d (dK and dV), for scores are made again in
both. The usual 10 d of one backward kernel would need atomic sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where nothing has been seen yet
TABLES = ["tiles_ptr", "own_ptr"]
"""Tables begin wherever the one before ends: their alignment is no reason to compile again."""


@triton.jit
def _load_rows(
    base, rows, stride, live, LONG: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr
):
    """``[rows, WIDTH]``, zeros beyond HEAD and, if CHECKED, where a row is not live. LONG: offsets pass 2^31."""
    columns = tl.arange(0, WIDTH)
    if LONG:
        rows = rows.to(tl.int64)
    at = base + rows[:, None] * stride + columns[None, :]
    if CHECKED:
        if HEAD == WIDTH:
            return tl.load(at, mask=live[:, None], other=0.0)
        else:
            return tl.load(at, mask=live[:, None] & (columns < HEAD)[None, :], other=0.0)
    else:
        if HEAD == WIDTH:
            return tl.load(at)
        else:
            return tl.load(at, mask=(columns < HEAD)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, stride, values, live, LONG: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    if LONG:
        rows = rows.to(tl.int64)
    at = base + rows[:, None] * stride + columns[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=live[:, None] & (columns < HEAD)[None, :])


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """``a b`` in fp32, and ``acc`` if there is one. The interpreter does not know how to multiply bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _query_tile(tiles_ptr, own_ptr, place, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, GRAIN: tl.constexpr):
    """Of a tile: its rows, which are live, if any; where its prefix begins, the keys in it, what to add to the number
    of a later key to get its row; the keys that need no mask, all keys; each row's first own key."""
    tile = tiles_ptr + place // (GRAIN // BLOCK) * 4
    first = tl.load(tile) + place % (GRAIN // BLOCK) * BLOCK
    end = tl.minimum(first + BLOCK, tl.load(tile + 1))
    prefix_start = tl.load(tile + 2)
    prefix = tl.load(tile + 3)
    rows = first + tl.arange(0, BLOCK)
    live = rows < end
    own = tl.load(own_ptr + rows, mask=live, other=0)
    begin = tl.load(own_ptr + first, mask=first < end, other=0)
    alone = tl.load(own_ptr + end - 1, mask=first < end, other=0) == begin
    shift = begin - prefix
    free = tl.where(alone, first - shift, prefix) // BLOCK_N * BLOCK_N
    return rows, live, first < end, prefix_start, prefix, shift, free, end - shift, own - shift


@triton.jit
def _visible(j, prefix, own, last):
    """Which keys ``j`` are seen by rows whose own keys are ``own`` to ``last``."""
    return (j < prefix)[None, :] | ((j[None, :] >= own[:, None]) & (j[None, :] <= last[:, None]))


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=TABLES)
def forward_kernel(
    q_ptr,  # [n_rows, heads, HEAD]
    k_ptr,  # [n_rows, heads / share, HEAD]
    v_ptr,
    out_ptr,  # [n_rows, heads, HEAD]
    lse_ptr,  # [heads, n_rows] fp32, base 2
    tiles_ptr,  # [tiles, 4] int32: query_tiles
    own_ptr,  # [n_rows] int32: own_start
    n_rows,
    heads,
    share,
    factor,  # scale log2 e
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    LONG: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRAIN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    rows, live, any_live, prefix_start, prefix, shift, free, end, own = _query_tile(
        tiles_ptr, own_ptr, tl.program_id(0) // heads, BLOCK_M, BLOCK_N, GRAIN
    )
    if not any_live:
        return
    q = _load_rows(q_ptr + head * q_head, rows, q_row, live, LONG, HEAD, WIDTH, True)
    k_ptr += head // share * k_head
    v_ptr += head // share * v_head
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(free if MASKED else 0, end if MASKED else free, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = tl.where(j < prefix, prefix_start + j, shift + j)
            k = _load_rows(k_ptr, at, k_row, j < end, LONG, HEAD, WIDTH, MASKED)
            scores = _dot(q, tl.trans(k), None, INTERPRETED)
            if MASKED:
                scores = tl.where(_visible(j, prefix, own, rows - shift), scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * factor)
            p = tl.exp2(scores * factor - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = _load_rows(v_ptr, at, v_row, j < end, LONG, HEAD, WIDTH, MASKED)
            acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRETED)
            top = new_top
    _store_rows(out_ptr + head * HEAD, rows, heads * HEAD, acc / total[:, None], live, LONG, HEAD, WIDTH)
    tl.store(lse_ptr + head * n_rows + rows, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=TABLES)
def query_gradient_kernel(
    q_ptr,  # [n_rows, heads, HEAD]
    k_ptr,  # [n_rows, heads / share, HEAD]
    v_ptr,
    out_ptr,  # [n_rows, heads, HEAD], contiguous
    d_out_ptr,  # [n_rows, heads, HEAD]
    d_q_ptr,  # [n_rows, heads, HEAD], contiguous
    lse_ptr,  # [heads, n_rows] fp32, base 2
    delta_ptr,  # [heads, n_rows] fp32: written, sum of out times its gradient
    tiles_ptr,  # [tiles, 4] int32: query_tiles
    own_ptr,  # [n_rows] int32: own_start
    n_rows,
    heads,
    share,
    scale,
    factor,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    d_out_row,
    d_out_head,
    LONG: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRAIN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    rows, live, any_live, prefix_start, prefix, shift, free, end, own = _query_tile(
        tiles_ptr, own_ptr, tl.program_id(0) // heads, BLOCK_M, BLOCK_N, GRAIN
    )
    if not any_live:
        return
    out = _load_rows(out_ptr + head * HEAD, rows, heads * HEAD, live, LONG, HEAD, WIDTH, True)
    d_out = _load_rows(d_out_ptr + head * d_out_head, rows, d_out_row, live, LONG, HEAD, WIDTH, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * n_rows + rows, delta, mask=live)
    lse = tl.load(lse_ptr + head * n_rows + rows, mask=live, other=float("inf"))
    q = _load_rows(q_ptr + head * q_head, rows, q_row, live, LONG, HEAD, WIDTH, True)
    k_ptr += head // share * k_head
    v_ptr += head // share * v_head
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(free if MASKED else 0, end if MASKED else free, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            at = tl.where(j < prefix, prefix_start + j, shift + j)
            k = _load_rows(k_ptr, at, k_row, j < end, LONG, HEAD, WIDTH, MASKED)
            exponents = _dot(q, tl.trans(k), None, INTERPRETED) * factor - lse[:, None]
            if MASKED:
                exponents = tl.where(_visible(j, prefix, own, rows - shift), exponents, -float("inf"))
            p = tl.exp2(exponents)
            v = _load_rows(v_ptr, at, v_row, j < end, LONG, HEAD, WIDTH, MASKED)
            d_p = _dot(d_out, tl.trans(v), None, INTERPRETED)
            d_scores = (p * (d_p - delta[:, None])).to(k.dtype)
            acc = _dot(d_scores, k, acc, INTERPRETED)
    _store_rows(d_q_ptr + head * HEAD, rows, heads * HEAD, acc * scale, live, LONG, HEAD, WIDTH)


@triton.jit(do_not_specialize=["n_rows", "splits"], do_not_specialize_on_alignment=TABLES)
def key_gradient_kernel(
    q_ptr,  # [n_rows, heads, HEAD]
    k_ptr,  # [n_rows, heads / share, HEAD]
    v_ptr,
    d_out_ptr,  # [n_rows, heads, HEAD]
    d_k_ptr,  # [splits, n_rows, heads / share, HEAD], contiguous
    d_v_ptr,
    lse_ptr,  # [heads, n_rows] fp32, base 2
    delta_ptr,  # [heads, n_rows] fp32
    tiles_ptr,  # [tiles, 4] int32: key_tiles
    own_ptr,  # [n_rows] int32: own_end
    n_rows,
    splits,
    heads,
    share,
    scale,
    factor,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    d_out_row,
    d_out_head,
    LONG: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRAIN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    kv_heads = heads // share
    part = tl.program_id(0) % (kv_heads * splits)  # of the query heads
    each = share // splits
    split = (part % splits).to(tl.int64)
    kv_head = (part // splits).to(tl.int64)
    place = tl.program_id(0) // (kv_heads * splits)
    tile = tiles_ptr + place // (GRAIN // BLOCK_N) * 4
    first = tl.load(tile) + place % (GRAIN // BLOCK_N) * BLOCK_N
    last = tl.minimum(first + BLOCK_N, tl.load(tile + 1))
    if first >= last:
        return
    keys = first + tl.arange(0, BLOCK_N)
    live = keys < last
    own_end = tl.load(own_ptr + keys, mask=live, other=0)
    end = tl.load(own_ptr + last - 1)
    own = end - first  # queries i that may be of the same segments; those that have the keys in their prefix follow
    shift = tl.load(tile + 2) - own
    queries = tl.load(tile + 3) - shift
    some = tl.where(tl.load(own_ptr + first) == end, last - first, own)  # those that need a mask
    some = tl.minimum(tl.cdiv(some, BLOCK_M), tl.cdiv(queries, BLOCK_M))
    k = _load_rows(k_ptr + kv_head * k_head, keys, k_row, live, LONG, HEAD, WIDTH, True)
    v = _load_rows(v_ptr + kv_head * v_head, keys, v_row, live, LONG, HEAD, WIDTH, True)
    d_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    d_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for FREE in tl.static_range(2):
        n_tiles = tl.cdiv(queries, BLOCK_M) - some if FREE else some
        divisor = tl.maximum(n_tiles, 1)  # a pipeline divides before it knows whether there is a first step
        for step in range(0, n_tiles * each):  # the tiles of one head, then those of the next
            head = kv_head * share + split * each + step // divisor
            i = (some * FREE + step % divisor) * BLOCK_M + tl.arange(0, BLOCK_M)
            rows = tl.where(i < own, first + i, shift + i)
            asks = i < queries
            q = _load_rows(q_ptr + head * q_head, rows, q_row, asks, LONG, HEAD, WIDTH, True)
            lse = tl.load(lse_ptr + head * n_rows + rows, mask=asks, other=float("inf"))
            exponents = _dot(k, tl.trans(q), None, INTERPRETED) * factor - lse[None, :]
            if not FREE:
                mine = (rows[None, :] >= keys[:, None]) & (rows[None, :] < own_end[:, None])
                exponents = tl.where((i >= own)[None, :] | mine, exponents, -float("inf"))
            p = tl.exp2(exponents)
            d_out = _load_rows(d_out_ptr + head * d_out_head, rows, d_out_row, asks, LONG, HEAD, WIDTH, True)
            d_v = _dot(p.to(q.dtype), d_out, d_v, INTERPRETED)
            delta = tl.load(delta_ptr + head * n_rows + rows, mask=asks, other=0.0)
            d_p = _dot(v, tl.trans(d_out), None, INTERPRETED)
            d_scores = (p * (d_p - delta[None, :])).to(q.dtype)
            d_k = _dot(d_scores, q, d_k, INTERPRETED)
    to = split * n_rows * kv_heads * HEAD + kv_head * HEAD
    _store_rows(d_k_ptr + to, keys, kv_heads * HEAD, d_k * scale, live, LONG, HEAD, WIDTH)
    _store_rows(d_v_ptr + to, keys, kv_heads * HEAD, d_v, live, LONG, HEAD, WIDTH)
