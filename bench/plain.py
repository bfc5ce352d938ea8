"""Plain torch: what everybody has without another package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from bench.checks import Outputs
from bench.harness import Call, Case, Variant
from bench.inputs import Inputs, LossOf

WIDE = "eager, fp32 logits"
COMPILED = 'mode="default", dynamic=False'
CHUNK_ROWS = 512


class WideLogits(torch.autograd.Function):
    """``hidden @ weight^T`` of 16-bit operands as fp32 logits; the products of the backward pass in 16 bits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:  # [N, D], [V, D] -> [N, V] fp32
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()  # mm of a CPU has no out_dtype

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        dz = upstream[0].to(hidden.dtype)
        return dz @ weight, dz.t() @ hidden


def detached(**outputs: Tensor | None) -> Outputs:
    return {name: tensor.detach() for name, tensor in outputs.items() if tensor is not None}


def selected(log_p: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """logp ``[N]``, and the entropy ``[N]`` as the trainers log it: without gradient. Both fp32 at least."""
    logp = log_p.gather(1, targets[:, None])[:, 0]
    logp = logp if logp.dtype == torch.float64 else logp.float()
    if not entropy:
        return logp, None
    with torch.no_grad():
        return logp, log_p.exp().mul_(log_p).sum(-1, dtype=logp.dtype).neg_()


def _plain_forward(z: Tensor, x: Inputs, loss_of: LossOf, upcast: bool, entropy: bool) -> tuple[Tensor, ...]:
    z = z.float() if upcast else z
    if x.kept is not None:
        z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).scatter_(1, x.kept, False), -torch.inf)
    logp, entropies = selected(log_softmax(z, dim=-1), x.targets, entropy)
    return loss_of(logp), logp, *([] if entropies is None else [entropies])


def plain_call(
    x: Inputs, loss_of: LossOf, upcast: bool, entropy: bool, compiled: bool, wide: bool
) -> Callable[[], Call]:
    """Full logits and autograd."""

    def forward(x: Inputs) -> tuple[Tensor, ...]:
        if x.logits is not None:
            return _plain_forward(x.logits, x, loss_of, upcast, entropy)
        hidden, weight = x.head
        z = WideLogits.apply(hidden, weight) if wide else hidden @ weight.t()
        return _plain_forward(z, x, loss_of, upcast, entropy)

    def setup() -> Call:
        function: Any = torch.compile(forward, dynamic=False) if compiled else forward

        def run() -> Outputs:
            loss, logp, *entropies = function(x)
            return gradients(x, loss) | detached(loss=loss, logp=logp, entropy=entropies[0] if entropies else None)

        return Call(run)

    return setup


def gradients(x: Inputs, loss: Tensor) -> Outputs:
    """One backward pass."""
    if x.logits is not None:
        return dict(zip(["d_logits"], torch.autograd.grad(loss, [x.logits]), strict=True))
    return dict(zip(["d_hidden", "d_weight"], torch.autograd.grad(loss, x.head), strict=True))


def plain(case: Case, x: Inputs, loss_of: LossOf, entropy: bool = True) -> list[Variant]:
    """Eager with and without entropy, and compiled. From bf16 also without the customary cast of the logits to fp32,
    and, where there is a head, with logits that are fp32 from the start."""

    def variant(
        name: str, upcast: bool, entropy: bool, compiled: bool = False, yardstick: str = "eager", wide: bool = False
    ) -> Variant:
        setup, note = plain_call(x, loss_of, upcast, entropy, compiled, wide), COMPILED if compiled else ""
        values = name if wide else ""
        return Variant(
            name, "plain", setup, note=note, yardstick=yardstick, values_yardstick=values, slow_start=compiled
        )

    low = case.dtype == "bfloat16"
    out = [variant("eager", low, entropy)]
    if entropy:
        out.append(variant("eager, no entropy", low, False))
    if low:
        name = "eager, bf16 softmax"
        out.append(variant(name, False, entropy, yardstick=name))
        if entropy:
            out.append(variant(f"{name}, no entropy", False, False, yardstick=f"{name}, no entropy"))
    if low and case.d:
        out.append(variant(WIDE, False, entropy, wide=True))
    return [*out, variant("torch.compile", low, entropy, compiled=True)]


def plain_statistics(case: Case, x: Inputs) -> list[Variant]:
    """Log-probs and entropies of logits, without gradient: all rows at once, in chunks of rows, and compiled."""
    assert x.logits is not None
    logits = x.logits.detach()

    @torch.no_grad()
    def statistics(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_softmax(z.float() if case.dtype == "bfloat16" else z, dim=-1)
        logp, entropy = selected(log_p, targets, entropy=True)
        assert entropy is not None
        return logp, entropy

    def chunked(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [statistics(*of) for of in zip(z.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)]
        logp, entropy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return logp, entropy

    def variant(name: str, function: Any, note: str = "", slow_start: bool = False) -> Variant:
        def run() -> Outputs:
            logp, entropy = function(logits, x.targets)
            return detached(logp=logp, entropy=entropy)

        return Variant(name, "plain", lambda: Call(run), note=note, slow_start=slow_start)

    return [
        variant("eager", statistics),
        variant("eager, in chunks", chunked, f"{CHUNK_ROWS} rows"),
        variant("torch.compile", torch.compile(statistics, dynamic=False), COMPILED, slow_start=True),
    ]
