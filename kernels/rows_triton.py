"""The row kernel in Triton: statistics of logits ``[n, V]``, their gradient in place, or both in one kernel.

One program a row. Statistics are an online log-sum-exp over tiles with one ``exp`` a logit: running maximum ``m``, sum
``s`` of ``exp(z - m)`` and sum ``w`` of ``exp(z - m) (z - m)``; then ``log_total = log s``, ``H = log_total - w / s``.
The gradient goes over the row's tiles once more, from the end, where the cache is warm. Reads and writes for bf16
logits: 2 bytes a logit for statistics, 4 for the gradient, 6 for the one-kernel path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from revisual_fast.kernels.launch import ROW_LAUNCHES, Launch, row_launch
from revisual_fast.kernels.objective import token_objective
from revisual_fast.kernels.plan import CORRECTIONS, KL_FORMS, SURROGATES, Inline
from revisual_fast.kernels.rows import RawRows

LOWEST = tl.constexpr(-1e30)  # stands for minus infinity, so that p log p is 0 and not nan


ROW_VECTORS = ["target_ptr", "temperature_ptr", "mask_ptr", "logp_ptr", "entropy_ptr", "top_ptr", "total_ptr"]
ROW_VECTORS += ["c_ptr", "e_ptr"]
TOKEN_VECTORS = ["loss_ptr", "advantage_ptr", "old_ptr", "ref_ptr", "rollout_ptr", "weight_ptr"]
"""``[n]`` vectors begin wherever a chunk does: their alignment is no reason to compile again."""


@triton.jit
def tanh(x):
    """(tanh, its derivative), neither with cancellation: near 0 a Taylor polynomial stands for the quotient."""
    y = x * x
    near = 62.0 / 2835.0 + y * (-1382.0 / 155925.0 + y * (21844.0 / 6081075.0))
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * near))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.0625, near, tl.where(x < 0, -far, far)), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_logits(z_ptr, bias_ptr, cols, V, temperature, softcap):
    """(z, slope of the softcap) of some columns of a row; columns beyond V are minus infinity."""
    z = tl.load(z_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    slope = z
    if softcap is not None:
        t, slope = tanh(z / softcap)
        z = tl.where(cols < V, softcap * t, z)
    if temperature is not None:
        z = z / temperature
    return z, slope


@triton.jit
def at_least_lowest(z):
    """``z``, or a finite stand-in for minus infinity; nan stays nan, which ``maximum`` would drop."""
    return tl.where(z < LOWEST, LOWEST, z)


@triton.jit
def row_statistics(
    z_ptr,
    bias_ptr,
    target,
    V,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
):
    """(logp of the target, entropy, maximum, log of the sum) of one row."""
    m = LOWEST + 0.0
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_logits(z_ptr, bias_ptr, cols, V, temperature, softcap)
        top = tl.maximum(m, tl.max(z, 0))
        d = at_least_lowest(z - top)
        p = tl.exp(d)
        shrink = tl.exp(m - top)
        w = (w + s * (m - top)) * shrink + tl.sum(p * d, 0)
        s = s * shrink + tl.sum(p, 0)
        m = top
    log_total = tl.log(s)
    inside = (target >= 0) & (target < V)
    y, _ = load_logits(z_ptr, bias_ptr, tl.where(inside, target, 0), V, temperature, softcap)
    logp = tl.where(inside, (y - m) - log_total, float("nan"))  # the host may not look at the targets: be loud
    return logp, log_total - w / s, m, log_total


@triton.jit
def write_zeros(out_ptr, V, BLOCK: tl.constexpr):
    """The gradient of a row that does not count, or that changes nothing."""
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + cols, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=cols < V)


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def statistics_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    mask_ptr,
    logp_ptr,
    entropy_ptr,
    top_ptr,
    total_ptr,
    V,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None and not tl.load(mask_ptr + row):
        tl.store(logp_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(top_ptr + row, 0.0)
        tl.store(total_ptr + row, 0.0)
        return
    temperature = tl.load(temperature_ptr + row) if temperature_ptr is not None else None
    target = tl.load(target_ptr + row)
    logp, entropy, top, log_total = row_statistics(
        z_ptr + row * z_stride, bias_ptr, target, V, temperature, softcap, BLOCK
    )
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, log_total)


@triton.jit
def row_gradient(
    z_ptr,
    out_ptr,
    bias_ptr,
    target,
    top,
    log_total,
    entropy,
    c,
    e,
    V,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
):
    """Write ``c (1[j=y] - p_j) - e p_j (log p_j + H)``, taken back through temperature and softcap; zeros, without
    reading the row again, where both are 0."""
    silent = c == 0.0
    if e is not None:
        silent = silent & (e == 0.0)
    if temperature is not None:
        c = c / temperature
        if e is not None:
            e = e / temperature
    if silent:
        write_zeros(out_ptr, V, BLOCK)
    else:
        tiles = tl.cdiv(V, BLOCK)
        for i in range(0, tiles):
            cols = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            z, slope = load_logits(z_ptr, bias_ptr, cols, V, temperature, softcap)
            log_p = at_least_lowest(z - top) - log_total
            p = tl.exp(log_p)
            if e is not None:
                g = -p * (c + e * (log_p + entropy))
            else:
                g = -p * c
            g = tl.where(cols == target, g + c, g)
            if softcap is not None:
                g *= slope
            tl.store(out_ptr + cols, g.to(out_ptr.dtype.element_ty), mask=cols < V)


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def gradient_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
    index_ptr,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    mask_ptr,
    entropy_ptr,
    top_ptr,
    total_ptr,
    c_ptr,
    e_ptr,
    V,
    softcap,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + place) if index_ptr is not None else place
    if mask_ptr is not None and not tl.load(mask_ptr + row):
        write_zeros(out_ptr + place * out_stride, V, BLOCK)
        return
    temperature = tl.load(temperature_ptr + row) if temperature_ptr is not None else None
    e = tl.load(e_ptr + row) if e_ptr is not None else None
    row_gradient(
        z_ptr + row * z_stride,
        out_ptr + place * out_stride,
        bias_ptr,
        tl.load(target_ptr + row),
        tl.load(top_ptr + row),
        tl.load(total_ptr + row),
        tl.load(entropy_ptr + row),
        tl.load(c_ptr + row),
        e,
        V,
        temperature,
        softcap,
        BLOCK,
    )


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS + TOKEN_VECTORS)
def loss_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    mask_ptr,
    logp_ptr,
    entropy_ptr,
    loss_ptr,
    c_ptr,
    e_ptr,
    advantage_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    weight_ptr,
    V,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    kl_coef,
    entropy_coef,
    rollout_cap,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_BIAS: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None and not tl.load(mask_ptr + row):
        tl.store(logp_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(loss_ptr + row, 0.0)
        tl.store(c_ptr + row, 0.0)
        if e_ptr is not None:
            tl.store(e_ptr + row, 0.0)
        write_zeros(out_ptr + row * out_stride, V, BLOCK)
        return
    temperature = tl.load(temperature_ptr + row) if temperature_ptr is not None else None
    target = tl.load(target_ptr + row)
    z_ptr += row * z_stride
    logp, entropy, top, log_total = row_statistics(z_ptr, bias_ptr, target, V, temperature, softcap, BLOCK)
    loss, c, e = token_objective(
        logp,
        entropy,
        tl.load(advantage_ptr + row) if advantage_ptr is not None else 1.0,
        tl.load(old_ptr + row) if old_ptr is not None else logp,
        tl.load(ref_ptr + row) if KL != 0 else 0.0,
        tl.load(rollout_ptr + row) if CORRECTION != 0 else 1.0,
        tl.load(weight_ptr + row),
        clip_low,
        clip_high,
        dual_clip,
        delta,
        tau_pos,
        tau_neg,
        kl_coef,
        entropy_coef,
        rollout_cap,
        SURROGATE,
        KL,
        KL_BIAS,
        CORRECTION,
    )
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(loss_ptr + row, loss)
    tl.store(c_ptr + row, c)
    if e_ptr is not None:
        tl.store(e_ptr + row, e)
    row_gradient(
        z_ptr,
        out_ptr + row * out_stride,
        bias_ptr,
        target,
        top,
        log_total,
        entropy,
        c,
        e if e_ptr is not None else None,
        V,
        temperature,
        softcap,
        BLOCK,
    )


def statistics(rows: RawRows, logp: Tensor, entropy: Tensor, top: Tensor, total: Tensor) -> None:
    """Writes ``[n]`` vectors; ``top`` and ``total`` are what :func:`gradient` needs besides."""
    z, transform = rows.z, rows.transform
    statistics_kernel[(len(z),)](
        *(z, z.stride(0), rows.bias, rows.targets, transform.temperature, transform.mask),
        *(logp, entropy, top, total, z.shape[1], transform.softcap),
        **_launch(z),
    )


def gradient(
    rows: RawRows,
    out: Tensor,  # [k, V]
    index: Tensor | None,  # [k] which rows; None: all
    entropy: Tensor,  # [n], as all that follow
    top: Tensor,
    total: Tensor,
    c: Tensor,
    e: Tensor | None,
) -> None:
    """Writes the gradient of the rows' raw logits to ``out``."""
    z, transform = rows.z, rows.transform
    gradient_kernel[(len(out),)](
        *(z, z.stride(0), out, out.stride(0), index),
        *(rows.bias, rows.targets, transform.temperature, transform.mask),
        *(entropy, top, total, c, e, z.shape[1], transform.softcap),
        **_launch(z),
    )


def loss(
    rows: RawRows,
    out: Tensor,  # [n, V]
    objective: Inline,
    vectors: Sequence[Tensor | None],  # advantages, old, ref, rollout, weight: [n]
    logp: Tensor,  # [n], as all that follow
    entropy: Tensor,
    losses: Tensor,
    c: Tensor,
    e: Tensor | None,
) -> None:
    """Writes statistics, loss, ``c``, ``e`` and the gradient of the rows' raw logits."""
    z, transform, o = rows.z, rows.transform, objective
    loss_kernel[(len(z),)](
        *(z, z.stride(0), out, out.stride(0)),
        *(rows.bias, rows.targets, transform.temperature, transform.mask),
        *(logp, entropy, losses, c, e, *vectors),
        *(z.shape[1], transform.softcap, *o.numbers),
        SURROGATE=SURROGATES[o.surrogate],
        KL=KL_FORMS[o.kl],
        KL_BIAS=o.kl_bias_correction,
        CORRECTION=CORRECTIONS[o.correction],
        **_launch(z),
    )


def _launch(z: Tensor) -> dict[str, int]:
    launch = row_launch(z.shape[1])
    return {"BLOCK": launch.block, "num_warps": launch.warps, "num_stages": launch.stages}


def gates() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """What is compiled without a GPU to see that it compiles: (kernel, signature, constexprs, warps)."""
    lean = ("bias_ptr", "temperature_ptr", "mask_ptr", "softcap", "e_ptr", "index_ptr")
    found = []
    for launch in dict.fromkeys(launch for _, launch in ROW_LAUNCHES):
        longest = launch == ROW_LAUNCHES[-1][1]
        for z, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"))[: 4 if longest else 1]:
            for absent in (lean, ("mask_ptr",), ())[: 3 if z == "bf16" else 2]:
                full = absent is not lean
                settings = {"SURROGATE": 0, "KL": 3, "KL_BIAS": full, "CORRECTION": 2 if full else 0}
                constants = {**dict.fromkeys(absent), **settings}
                found += [
                    _gate(k, z, out, launch, constants) for k in (statistics_kernel, gradient_kernel, loss_kernel)
                ]
    for surrogate in SURROGATES.values():
        settings = {"SURROGATE": surrogate, "KL": 1, "KL_BIAS": True, "CORRECTION": 3}
        found.append(_gate(loss_kernel, "bf16", "bf16", ROW_LAUNCHES[-1][1], settings))
    return found


def _gate(
    kernel: Any, z: str, out: str, launch: Launch, constants: dict[str, Any]
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    signature = _signature(kernel, z, out)
    constants = {name: value for name, value in constants.items() if name in signature}
    return kernel, signature, {**constants, "BLOCK": launch.block}, launch.warps


def _signature(kernel: Any, z: str, out: str) -> dict[str, str]:
    kinds = {"z_ptr": f"*{z}", "out_ptr": f"*{out}", "target_ptr": "*i64", "index_ptr": "*i64"}
    kinds |= {"mask_ptr": "*i1", "z_stride": "i64", "out_stride": "i64", "V": "i32"}
    constants = {"SURROGATE", "KL", "KL_BIAS", "CORRECTION", "BLOCK"}
    return {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in kernel.arg_names
    }
