"""Our ops as variants, one for each backend and setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from bench.checks import Outputs
from bench.harness import Call, Case, Variant
from bench.inputs import OBJECTIVE, Inputs
from bench.plain import WIDE, detached, gradients
from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss, policy_loss_from_logits
from revisual_fast.kernels.dispatch import backend_problem
from revisual_fast.ops import BACKENDS, available_backends

NAME = "revisual-fast"
INTERPRETED = "runs in Triton's interpreter on a CPU, where a time means nothing"

Make = Callable[..., Callable[[], Call]]
"""``make(backend=..., **settings) -> setup``."""
MakeExtra = Callable[..., Callable[[Outputs, Outputs], dict[str, float]]]
"""``make(backend=..., **settings) -> extra``, see ``Variant.extra``."""


def ours(
    case: Case,
    op: str,
    make: Make,
    settings: dict[str, dict[str, Any]],
    extra: MakeExtra | None = None,
    backends: Sequence[str] = BACKENDS,
) -> list[Variant]:
    """One variant for each backend of ``op`` and each of ``settings``: what its name ends in -> keyword arguments.

    From bf16 hidden states to fp32 logits, the default, loss, logp and entropy are held against fp32 logits of torch.
    """
    out = []
    states = {name: state for name, state in available_backends(op).items() if name in backends}
    for backend, reason in _reasons(case, states):
        for label, options in settings.items():
            setup = None if reason else make(backend=backend, **options)
            more = extra(backend=backend, **options) if extra else None
            wide = WIDE if case.d and case.dtype == "bfloat16" and "logits_dtype" not in options else ""
            out.append(Variant(f"{NAME} {backend}{label}", "ours", setup, reason, values_yardstick=wide, extra=more))
    return out


def by_device(
    case: Case, make: Callable[[str], Callable[[], Call]], note: str = "", backends: Sequence[str] = BACKENDS
) -> list[Variant]:
    """One variant for each backend, of an op that takes one everywhere its kernels run; ``make(backend) -> setup``."""
    device = torch.device(case.device)
    states = {backend: backend_problem(backend, device) or "yes" for backend in backends}
    reasons = _reasons(case, states)
    return [Variant(f"{NAME} {name}", "ours", None if why else make(name), why, note) for name, why in reasons]


def _reasons(case: Case, states: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Backend and, if it cannot be timed here, the reason; not the kernels that have not been built."""
    for backend, state in states.items():
        if state.startswith("not built"):
            continue
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


def loss_from_logits(x: Inputs, objective: PolicyObjective, tokens: TokenBatch) -> Make:
    """In place, the logits are brought back before every call. ``blocks`` is a setting of the cuda backend: how many
    blocks of a cluster that keeps a row in its shared memory a multiprocessor has; 0 reads each row twice."""
    assert x.logits is not None
    logits = x.logits

    def make(inplace: bool, blocks: int | None = None, **options: Any) -> Callable[[], Call]:
        def setup() -> Call:
            own = logits.detach().clone().requires_grad_() if inplace else logits

            def run() -> Outputs:
                with nullcontext() if blocks is None else _blocks(blocks):
                    out = policy_loss_from_logits(own, x.targets, tokens, objective, inplace=inplace, **options)
                (d_logits,) = torch.autograd.grad(out.loss, [own])
                return detached(loss=out.loss, logp=out.logp, entropy=out.entropy, d_logits=d_logits)

            return Call(run, (lambda: own.detach().copy_(logits.detach())) if inplace else None)

        return setup

    return make


def _blocks(count: int) -> Any:
    return patch.object(import_module("revisual_fast.kernels.rows_cuda"), "BLOCKS_PER_MULTIPROCESSOR", count)


def statistics_of_logits(x: Inputs) -> Make:
    """Of a loss without gradient only the log-probs and entropies are looked at."""
    assert x.logits is not None
    logits = x.logits.detach()

    def make(**options: Any) -> Callable[[], Call]:
        def run() -> Outputs:
            out = policy_loss_from_logits(logits, x.targets, x.tokens, OBJECTIVE, **options)
            return detached(logp=out.logp, entropy=out.entropy)

        return lambda: Call(run)

    return make


def ratio_error(x: Inputs) -> MakeExtra:
    """``max |ratio - 1|`` of identical policies, whose old log-probs came from another partition of the rows.

    ``linear_logprob`` gets them shuffled and in pieces of other sizes than the loss cuts, as a trainer that stores them
    does. Beside it, the same maximum for the loss's log-probs against those of float64.
    """
    n = len(x.targets)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(x.targets.device)

    def make(**options: Any) -> Callable[[Outputs, Outputs], dict[str, float]]:
        @torch.no_grad()
        def extra(outputs: Outputs, reference: Outputs) -> dict[str, float]:
            hidden, weight = x.head
            old = torch.empty_like(outputs["logp"])
            for rows in shuffled.split(n // 3 + 1):
                old[rows] = linear_logprob(hidden[rows], weight, x.targets[rows], **options)[0]
            return {
                "ratio_error": _largest(outputs["logp"] - old),
                "ratio_error_float64": _largest(outputs["logp"].double() - reference["logp"]),
            }

        return extra

    return make


def _largest(log_ratio: torch.Tensor) -> float:
    return float(log_ratio.expm1().abs().max())
