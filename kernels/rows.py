"""The row kernel in Triton: statistics of logits ``[n, V]``, their gradient in place, or both in one kernel.

One program a row. Statistics are an online log-sum-exp over tiles with one ``exp`` a logit: running maximum ``m``, sum
``s`` of ``exp(z - m)`` and sum ``w`` of ``exp(z - m) (z - m)``; then ``log_total = log s``, ``H = log_total - w / s``.
The gradient goes over the row's tiles once more, from the end, where the cache is warm. Reads and writes for bf16
logits: 2 bytes a logit for statistics, 4 for the gradient, 6 for the one-kernel path.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revisual_fast.kernels.launch import ROW_LAUNCHES, Launch, row_launch
from revisual_fast.kernels.objective import CORRECTIONS, KL_FORMS, SURROGATES, token_objective
from revisual_fast.kernels.plan import Part, Plan
from revisual_fast.kernels.reference import Transform

LOWEST = tl.constexpr(-1e30)  # stands for minus infinity, so that p log p is 0 and not nan


ROW_VECTORS = ["target_ptr", "temperature_ptr", "logp_ptr", "entropy_ptr", "top_ptr", "total_ptr", "c_ptr", "e_ptr"]
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
    """Write ``c (1[j=y] - p_j) - e p_j (log p_j + H)``, taken back through temperature and softcap."""
    if temperature is not None:
        c = c / temperature
        if e is not None:
            e = e / temperature
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


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=ROW_VECTORS)
def statistics_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    logp_ptr,
    entropy_ptr,
    top_ptr,
    total_ptr,
    n_rows,
    V,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row) if temperature_ptr is not None else None
    target = tl.load(target_ptr + row)
    logp, entropy, top, log_total = row_statistics(
        z_ptr + row * z_stride, bias_ptr, target, V, temperature, softcap, BLOCK
    )
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, log_total)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=ROW_VECTORS)
def gradient_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
    index_ptr,
    bias_ptr,
    target_ptr,
    temperature_ptr,
    entropy_ptr,
    top_ptr,
    total_ptr,
    c_ptr,
    e_ptr,
    n_rows,
    V,
    softcap,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + place) if index_ptr is not None else place
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


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=ROW_VECTORS + TOKEN_VECTORS)
def loss_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    target_ptr,
    temperature_ptr,
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
    n_rows,
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


class TritonChunk:
    """Raw logits ``[n, V]`` (rows may be strided) and the statistics of their rows."""

    def __init__(
        self,
        z: Tensor,
        targets: Tensor,  # [n]
        transform: Transform,
        bias: Tensor | None = None,  # [V]
        out: Tensor | None = None,  # [n, V] where the gradient of all rows goes; may be z
        dtype: torch.dtype | None = None,  # of the gradient where out is None
    ) -> None:
        self.z, self.targets, self.transform, self.bias, self.out = z, targets, transform, bias, out
        self.dtype = dtype
        _check_layout(z, targets, transform.temperature, bias, out)
        self.logp, self.entropy, self.top, self.log_total = _vectors(z, 4)
        if len(z):
            statistics_kernel[(len(z),)](
                *(z, z.stride(0), bias, targets, transform.temperature),
                *(self.logp, self.entropy, self.top, self.log_total, len(z), z.shape[1], transform.softcap),
                **_launch(z),
            )

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`."""
        z, n = self.z, len(self.z) if index is None else len(index)
        whole = self.out is not None and index is None
        dz = self.out if whole else z.new_empty((n, z.shape[1]), dtype=self.dtype)
        assert dz is not None
        if n:
            gradient_kernel[(n,)](
                *(z, z.stride(0), dz, dz.stride(0), index, self.bias, self.targets, self.transform.temperature),
                *(self.entropy, self.top, self.log_total, c.contiguous(), None if e is None else e.contiguous()),
                *(n, z.shape[1], self.transform.softcap),
                **_launch(z),
            )
        return dz


class SolvedChunk:
    """Rows whose gradient stands in ``dz`` already."""

    def __init__(self, logp: Tensor, entropy: Tensor, dz: Tensor) -> None:
        self.logp, self.entropy, self.dz = logp, entropy, dz

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`; ``c`` and ``e`` are those of :func:`solve`."""
        return self.dz if index is None else self.dz[index]


def solve(
    z: Tensor,
    targets: Tensor,
    transform: Transform,
    bias: Tensor | None,
    plan: Plan,
    part: Part,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[TritonChunk | SolvedChunk, Tensor, Tensor, Tensor | None]:
    """The chunk, its loss, ``c`` and ``e``: in one kernel if the objective is inlined, else statistics first."""
    if plan.inline is None:
        chunk = TritonChunk(z, targets, transform, bias, out, dtype)
        return chunk, *plan.gradients(chunk.logp, chunk.entropy, part)
    o, dz = plan.inline, z.new_empty(z.shape, dtype=dtype) if out is None else out
    _check_layout(z, targets, transform.temperature, bias, out, *o.vectors(part.rows))
    logp, entropy, loss, c, e = _vectors(z, 5)
    if len(z):
        loss_kernel[(len(z),)](
            *(z, z.stride(0), dz, dz.stride(0), bias, targets, transform.temperature),
            *(logp, entropy, loss, c, e if o.has_entropy else None, *o.vectors(part.rows)),
            *(len(z), z.shape[1], transform.softcap, *o.numbers),
            SURROGATE=SURROGATES[o.surrogate],
            KL=KL_FORMS[o.kl],
            KL_BIAS=o.kl_bias_correction,
            CORRECTION=CORRECTIONS[o.correction],
            **_launch(z),
        )
    return SolvedChunk(logp, entropy, dz), loss.sum(), c, e if o.has_entropy else None


def _check_layout(*tensors: Tensor | None) -> None:
    assert all(t is None or t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors), "rows and vectors are contiguous"


def _vectors(z: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(len(z), dtype=torch.float32) for _ in range(count))


def _launch(z: Tensor) -> dict[str, int]:
    launch = row_launch(z.shape[1])
    return {"BLOCK": launch.block, "num_warps": launch.warps, "num_stages": launch.stages}


def gates() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """What is compiled without a GPU to see that it compiles: (kernel, signature, constexprs, warps)."""
    lean = ("bias_ptr", "temperature_ptr", "softcap", "e_ptr", "index_ptr")
    found = []
    for launch in dict.fromkeys(launch for _, launch in ROW_LAUNCHES):
        longest = launch == ROW_LAUNCHES[-1][1]
        for z, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"))[: 4 if longest else 1]:
            for absent in (lean, ()):
                settings = {"SURROGATE": 0, "KL": 3, "KL_BIAS": not absent, "CORRECTION": 0 if absent else 2}
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
    kinds |= {"z_stride": "i64", "out_stride": "i64", "n_rows": "i32", "V": "i32"}
    constants = {"SURROGATE", "KL", "KL_BIAS", "CORRECTION", "BLOCK"}
    return {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in kernel.arg_names
    }
