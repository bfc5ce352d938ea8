"""Our ops as variants, one for each backend and setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.harness import Call, Case, Outputs, Variant
from bench.inputs import OBJECTIVE, Inputs
from bench.plain import detached, gradients
from revisual_fast import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss_from_logits
from revisual_fast.ops import available_backends

NAME = "revisual-fast"
INTERPRETED = "runs in Triton's interpreter on a CPU, where a time means nothing"

Make = Callable[..., Callable[[], Call]]
"""``make(backend=..., **settings) -> setup``."""
MakeExtra = Callable[..., Callable[[Outputs], dict[str, float]]]
"""``make(backend=..., **settings) -> extra``, see ``Variant.extra``."""


def replays() -> bool:
    """Whether this version has sampling-mask replay."""
    return "sampling_mask" in inspect.signature(linear_policy_loss).parameters


def ours(
    case: Case, op: str, make: Make, settings: dict[str, dict[str, Any]], extra: MakeExtra | None = None
) -> list[Variant]:
    """One variant for each backend of ``op`` and each of ``settings``: what its name ends in -> keyword arguments."""
    out = []
    for backend, reason in _backends(case, op):
        for label, options in settings.items():
            setup = None if reason else make(backend=backend, **options)
            more = extra(backend=backend, **options) if extra else None
            out.append(Variant(f"{NAME} {backend}{label}", "ours", setup, reason, extra=more))
    return out


def _backends(case: Case, op: str) -> Iterator[tuple[str, str]]:
    """Backend and, if it cannot be timed here, the reason."""
    for backend, state in available_backends(op).items():
        if state != "yes":
            yield backend, state
        else:
            yield backend, INTERPRETED if backend == "triton" and case.device == "cpu" else ""


def logits_dtypes(case: Case) -> dict[str, dict[str, Any]]:
    """fp32 logits, the default; and bf16 ones where the op takes them."""
    low = {", bf16 logits": {"logits_dtype": "bfloat16"}} if case.dtype == "bfloat16" else {}
    return {"": {}} | low


def linear_loss(x: Inputs, objective: PolicyObjective, entropy: bool = True) -> Make:
    def make(**options: Any) -> Callable[[], Call]:
        def run() -> Outputs:
            out = linear_policy_loss(*x.head, x.targets, x.tokens, objective, **options)
            entropies = out.entropy if entropy else None
            return gradients(x, out.loss) | detached(loss=out.loss, logp=out.logp, entropy=entropies)

        return lambda: Call(run)

    return make


def replay_loss(x: Inputs) -> Make:
    return lambda **options: linear_loss(x, OBJECTIVE, entropy=False)(sampling_mask=x.sampling_mask, **options)


def linear_values(x: Inputs, loss_of: Callable[..., Any]) -> Make:
    def make(**options: Any) -> Callable[[], Call]:
        def run() -> Outputs:
            logp, entropy = linear_logprob(*x.head, x.targets, **options)
            return gradients(x, loss_of(logp)) | detached(logp=logp, entropy=entropy)

        return lambda: Call(run)

    return make


def loss_from_logits(x: Inputs) -> Make:
    """In place, the logits are brought back before every call."""
    assert x.logits is not None
    logits = x.logits

    def make(inplace: bool, **options: Any) -> Callable[[], Call]:
        def setup() -> Call:
            own = logits.detach().clone().requires_grad_() if inplace else logits

            def run() -> Outputs:
                out = policy_loss_from_logits(own, x.targets, x.tokens, OBJECTIVE, inplace=inplace, **options)
                (d_logits,) = torch.autograd.grad(out.loss, [own])
                return detached(loss=out.loss, logp=out.logp, entropy=out.entropy, d_logits=d_logits)

            return Call(run, (lambda: own.detach().copy_(logits.detach())) if inplace else None)

        return setup

    return make


def ratio_error(x: Inputs) -> MakeExtra:
    """``max |ratio - 1|`` of identical policies: the loss's log-probs against those of ``linear_logprob``."""

    def make(**options: Any) -> Callable[[Outputs], dict[str, float]]:
        @torch.no_grad()
        def extra(outputs: Outputs) -> dict[str, float]:
            old, _ = linear_logprob(*x.head, x.targets, **options)
            return {"ratio_error": float((outputs["logp"] - old).expm1().abs().max())}

        return extra

    return make
