"""The fused ops: from hidden states or logits to log-probs, loss and gradient, without ``[tokens, vocab]`` in memory.

``N`` rows that have a target (rows without one are not passed in), hidden size ``D``, vocabulary ``V``. Logits are
``hidden @ weight.T + bias``, then softcapped, ``cap * tanh(z / cap)``, then divided by the temperature, in this order.
A backend is chosen once, visibly, per call: ``available_backends`` says which there are and why the others are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from revisual_fast.kernels import reference
from revisual_fast.losses import SURROGATES, Objective, PolicyObjective, TokenBatch, loss_gradients

__all__ = ["OPS", "PolicyLoss", "available_backends", "linear_logprob", "linear_policy_loss", "policy_loss_from_logits"]

OPS = ("linear_logprob", "linear_policy_loss", "policy_loss_from_logits")
_BACKENDS = {  # in the order "auto" prefers them: "yes", or why not
    "cuda": "not built: this version has no CUDA kernels",
    "triton": "not built: this version has no Triton kernels",
    "torch": "yes",
}


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy-loss op returns. Only ``loss`` can be differentiated."""

    loss: Tensor  # scalar, fp32 (fp64 for fp64 inputs)
    logp: Tensor  # [N] log-prob of each target, detached; differentiate linear_logprob instead
    entropy: Tensor  # [N] nats, detached
    metrics: dict[str, Tensor]  # 0-d, detached, on the device: reading one is the caller's sync


def available_backends(op_name: str) -> dict[str, str]:
    """Backend -> ``"yes"`` or the reason why not, in the order ``backend="auto"`` prefers them.

    Raises ValueError for an unknown op.
    """
    if op_name not in OPS:
        raise ValueError(f"op_name={op_name!r} is unknown; it is one of {', '.join(OPS)}")
    return dict(_BACKENDS)


def resolve_backend(op_name: str, backend: str = "auto") -> str:
    """The backend that a call with ``backend`` runs on. Raises ValueError if it is unknown or not available here."""
    available = available_backends(op_name)
    if backend == "auto":
        return next(name for name, state in available.items() if state == "yes")
    if backend not in available:
        raise ValueError(f"backend={backend!r} is unknown; it is one of auto, {', '.join(available)}")
    if available[backend] != "yes":
        raise ValueError(f"backend={backend!r} of {op_name} is {available[backend]}; use backend='auto' or 'torch'")
    return backend


def linear_logprob(
    hidden: Tensor,  # [N, D] bf16, fp32 or fp64
    weight: Tensor,  # [V, D] of hidden's dtype, or wider (an fp32 master weight)
    targets: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "float32",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, ``[N]`` fp32 each (fp64 for fp64 inputs), in nats.

    Differentiable in both outputs with respect to hidden, weight and bias; the backward pass computes the logits again,
    for the rows whose upstream gradient is not 0. ``logits_dtype``: "float32" multiplies bf16 operands with an fp32
    result; "bfloat16" rounds the logits to bf16 first, which is faster and up to 6% off on a ratio. A weight wider than
    hidden is rounded to hidden's dtype for the products and gets its gradient in its own. Targets are checked to lie in
    ``[0, V)`` on the CPU only, where that costs no sync. Raises ValueError for shapes or dtypes that do not fit.
    """
    resolve_backend("linear_logprob", backend)
    head = _check_head(hidden, weight, targets, bias, temperature, softcap, logits_dtype)
    return reference.linear_logprob(hidden, weight, bias, targets, *head)


def linear_policy_loss(
    hidden: Tensor,  # [N, D] bf16, fp32 or fp64
    weight: Tensor,  # [V, D] of hidden's dtype, or wider (an fp32 master weight)
    targets: Tensor,  # [N] int64
    tokens: TokenBatch,
    objective: Objective,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "float32",
    skip_inactive: bool = True,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss and, computed in the same pass, its gradient with respect to hidden, weight and bias.

    6 N D V FLOPs, 4 with a frozen weight, 2 without gradient; an objective that couples rows (sequence level, or the
    caller's own function) takes 8 if the logits need more than one chunk. ``skip_inactive`` drops rows whose gradient
    is exactly 0 before the gradient products; on CUDA that reads back one count a chunk. ``objective`` may be any
    callable ``(logp [N], entropy [N], tokens) -> scalar``. No rows: loss 0, zero gradients, metrics 0. Arguments as for
    :func:`linear_logprob`. Raises ValueError also where ``tokens`` lacks what the objective needs.
    """
    resolve_backend("linear_policy_loss", backend)
    head = _check_head(hidden, weight, targets, bias, temperature, softcap, logits_dtype)
    tokens, plan = _plan(objective, tokens, hidden, skip_inactive)
    out = reference.linear_policy_loss(hidden, weight, bias, targets, plan, *head)
    return PolicyLoss(*out, policy_metrics(objective, *out[1:], tokens))


def policy_loss_from_logits(
    logits: Tensor,  # [N, V] bf16, fp32 or fp64
    targets: Tensor,  # [N] int64
    tokens: TokenBatch,
    objective: Objective,
    *,
    temperature: float = 1.0,
    inplace: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss of logits that exist already, with its gradient; statistics are fp32 whatever the logits' dtype.

    ``inplace=True`` overwrites the buffer of ``logits`` with its gradient (if there is one to compute), so that no
    second ``[N, V]`` is needed: the logits are gone after the call, and one backward pass is allowed. Whatever made the
    logits must not need its output for its own backward pass: a linear layer does not. Otherwise as
    :func:`linear_policy_loss`.
    """
    resolve_backend("policy_loss_from_logits", backend)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, V]; got {list(logits.shape)}: flatten the batch, keep rows with a target")
    _check_dtype("logits", logits)
    _check_targets(targets, logits, logits.shape[1])
    tokens, plan = _plan(objective, tokens, logits, skip=False)
    out = reference.policy_loss_from_logits(logits, targets, plan, _transform(temperature, None), inplace)
    return PolicyLoss(*out, policy_metrics(objective, *out[1:], tokens))


@torch.no_grad()
def policy_metrics(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    """0-d tensors, plain means and maxima over the rows (0 if there are none), without host sync.

    ``entropy``; ``ratio/mean``, ``ratio/max`` at the objective's level; ``clip_fraction`` (clip and cispo), the share
    of rows whose bound is active; ``kl``, the k3 estimate to the reference, where ``ref_logp`` is given;
    ``importance/mean``, ``importance/max`` with a rollout correction. Of a caller's own function only entropy, token
    ratio and kl are known.
    """
    policy = objective if isinstance(objective, PolicyObjective) else PolicyObjective(surrogate=SURROGATES["reinforce"])
    ratio = policy.ratio(logp, tokens)
    metrics = {"entropy": _mean(entropy), "ratio/mean": _mean(ratio), "ratio/max": _max(ratio)}
    clipped = _clipped(policy, ratio, tokens)
    if clipped is not None:
        metrics["clip_fraction"] = _mean(clipped.to(logp.dtype))
    if tokens.ref_logp is not None:
        difference = tokens.ref_logp - logp
        metrics["kl"] = _mean(torch.expm1(difference) - difference)
    importance = policy.importance(logp, tokens)
    if importance is not None:
        metrics["importance/mean"], metrics["importance/max"] = _mean(importance), _max(importance)
    return metrics


def _clipped(o: PolicyObjective, ratio: Tensor, tokens: TokenBatch) -> Tensor | None:
    if o.surrogate == "cispo":
        return ratio > 1 + o.clip_high
    if o.surrogate != "clip":
        return None
    assert tokens.advantages is not None, "prepare() checks this"
    positive, negative = tokens.advantages > 0, tokens.advantages < 0
    top, delta = 1 + o.clip_high, math.inf if o.delta is None else o.delta
    clipped = (positive & (ratio > min(top, delta))) | (negative & (ratio < 1 - o.clip_low))
    for bound in (max(top, delta), math.inf if o.dual_clip is None else o.dual_clip):
        clipped |= negative & (ratio > bound)
    return clipped


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


def _max(values: Tensor) -> Tensor:
    return values.max() if len(values) else values.new_zeros(())


def _plan(objective: Objective, tokens: TokenBatch, rows: Tensor, skip: bool) -> tuple[TokenBatch, reference.Plan]:
    n_rows, dtype = len(rows), torch.promote_types(rows.dtype, torch.float32)
    if isinstance(objective, PolicyObjective):
        tokens, local = objective.prepare(tokens, n_rows, dtype, rows.device)
    elif callable(objective):
        tokens, local = tokens.expanded(n_rows, dtype, rows.device), False
    else:
        raise ValueError(f"objective must be a PolicyObjective or a callable; got {objective!r}")

    def gradients(logp: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        return loss_gradients(objective, logp, entropy, tokens.rows(part) if local else tokens)

    return tokens, reference.Plan(gradients, local, skip)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: str,
) -> tuple[reference.Transform, torch.dtype]:
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, D]; got {list(hidden.shape)}: flatten the batch, keep rows with a target")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, D] with D = {hidden.shape[1]} as in hidden; got {list(weight.shape)}")
    _check_dtype("hidden", hidden)
    _check_dtype("weight", weight)
    if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        raise ValueError(
            f"weight is {weight.dtype}, narrower than hidden's {hidden.dtype}: cast hidden to {weight.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{len(weight)}]; got {list(bias.shape)}")
    _check_targets(targets, hidden, len(weight))
    if logits_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"logits_dtype={logits_dtype!r} is unknown; it is one of float32, bfloat16")
    if logits_dtype == "bfloat16" and hidden.dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype='bfloat16' needs bf16 hidden; got {hidden.dtype}: use logits_dtype='float32'")
    return _transform(temperature, softcap), getattr(torch, logits_dtype)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be bfloat16, float32 or float64; got {tensor.dtype}: cast it")


def _check_targets(targets: Tensor, rows: Tensor, vocab: int) -> None:
    if targets.shape != rows.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be [{len(rows)}] int64; got {list(targets.shape)} {targets.dtype}")
    if targets.device != rows.device:
        raise ValueError(f"targets are on {targets.device}, the rows on {rows.device}: move them")
    if targets.device.type == "cpu" and len(targets) and (targets.min() < 0 or targets.max() >= vocab):
        raise ValueError(f"targets must lie in [0, {vocab}); drop the rows without a target: hidden[targets >= 0]")


def _transform(temperature: float, softcap: float | None) -> reference.Transform:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None; got {softcap!r}")
    return reference.Transform(temperature, softcap)
