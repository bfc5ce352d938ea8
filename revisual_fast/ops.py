"""The fused ops: from hidden states or logits to log-probs, loss and gradient, without ``[tokens, vocab]`` in memory.

``N`` rows that have a target (rows without one are not passed in), hidden size ``D``, vocabulary ``V``. Logits are
``hidden @ weight.T + bias``, then softcapped, ``cap * tanh(z / cap)``, then divided by the temperature, in this order.
A backend is chosen once, visibly, per call: ``available_backends`` says which there are and why the others are not.
Under ``torch.compile`` each op stays whole, without a graph break.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast import library
from revisual_fast.kernels.dispatch import backend_problem
from revisual_fast.kernels.embed import pack_embeddings
from revisual_fast.kernels.gather import gather_rows
from revisual_fast.kernels.groups import PadMask, pad_mask
from revisual_fast.kernels.groups import group_advantages as packed_group_advantages
from revisual_fast.kernels.mrope import mrope, mrope_, mrope_axis
from revisual_fast.kernels.plan import statistics_dtype
from revisual_fast.kernels.prefix import KVRows, gather_kv
from revisual_fast.kernels.scaling import scale_
from revisual_fast.losses import Objective, PolicyObjective, TokenBatch, check_mask, counted
from revisual_fast.objective_metrics import metric_names, policy_metrics

__all__ = [
    "OPS",
    "KVRows",
    "PadMask",
    "PolicyLoss",
    "available_backends",
    "gather_kv",
    "gather_rows",
    "linear_logprob",
    "linear_policy_loss",
    "mrope",
    "mrope_",
    "mrope_axis",
    "pack_embeddings",
    "packed_group_advantages",
    "pad_mask",
    "policy_loss_from_logits",
    "resolve_backend",
]

OPS = ("linear_logprob", "linear_policy_loss", "policy_loss_from_logits")
BACKENDS = ("cuda", "triton", "torch")
SamplingMask = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy-loss op returns. Only ``loss`` can be differentiated."""

    loss: Tensor  # scalar, fp32 (fp64 for fp64 inputs)
    logp: Tensor  # [N] log-prob of each target, detached; differentiate linear_logprob instead
    entropy: Tensor  # [N] nats, detached; with a sampling mask, that of the renormalised kept set
    metrics: dict[str, Tensor]  # 0-d, detached, on the device: reading one is the caller's sync


def available_backends(op_name: str) -> dict[str, str]:
    """Backend -> ``"yes"`` or the reason why not, in the order ``backend="auto"`` prefers them.

    Raises ValueError for an unknown op.
    """
    if op_name not in OPS:
        raise ValueError(f"op_name={op_name!r} is unknown; it is one of {', '.join(OPS)}")
    return {name: _problem(name, _default_device()) or "yes" for name in BACKENDS}


def resolve_backend(
    op_name: str, backend: str = "auto", rows: Tensor | None = None, sampling_mask: SamplingMask | None = None
) -> str:
    """The backend that a call with ``backend`` runs on, for the tensor ``rows`` where it is given.

    "auto" takes, for CUDA tensors of 16 or 32 bits, cuda where it is built, else triton; torch for all others. Raises
    ValueError if the backend is unknown or cannot run here.
    """
    if op_name not in OPS:
        raise ValueError(f"op_name={op_name!r} is unknown; it is one of {', '.join(OPS)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is unknown; it is one of auto, {', '.join(BACKENDS)}")
    device = _default_device() if rows is None else rows.device
    if backend == "auto":
        for name in BACKENDS if device.type == "cuda" else ():
            if _problem(name, device, rows, sampling_mask) is None:
                return name
        return "torch"
    problem = _problem(backend, device, rows, sampling_mask)
    if problem is not None:
        raise ValueError(f"backend={backend!r} of {op_name} is {problem}; use backend='auto' or 'torch'")
    return backend


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _problem(
    backend: str, device: torch.device, rows: Tensor | None = None, sampling_mask: SamplingMask | None = None
) -> str | None:
    """Why a backend cannot do it, or None."""
    problem = backend_problem(backend, device)
    if problem is None and backend != "torch" and rows is not None and rows.dtype == torch.float64:
        return "made for fp32 statistics; these rows are float64"
    if problem is None and backend == "cuda" and sampling_mask is not None:
        return "without kernels for a sampling mask"
    return problem


def linear_logprob(
    hidden: Tensor,  # [N, D] bf16, fp16, fp32 or fp64
    weight: Tensor,  # [V, D] of hidden's dtype, or wider (an fp32 master weight)
    targets: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float | None = None,
    sampling_mask: SamplingMask | None = None,  # ([N+1], [nnz])
    logits_dtype: str | torch.dtype = "float32",
    skip_inactive: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each row, ``[N]`` fp32 each (fp64 for fp64 inputs), in nats.

    Differentiable in both outputs with respect to hidden, weight and bias: 6 N D V FLOPs if the logits fit in the byte
    budget ``kernels.plan.SAVED_BYTES`` and are kept, else they are computed again for the rows whose upstream gradient
    is not 0 (``skip_inactive``, as for :func:`linear_policy_loss`). ``logits_dtype``: "float32" multiplies 16-bit
    operands with an fp32 result; "bfloat16" rounds the logits to bf16 first, which is faster and up to 6% off on a
    ratio. A weight wider than hidden is rounded to hidden's dtype for the products and gets its gradient in its own.
    ``sampling_mask = (indptr, indices)`` holds the ids that top-p or top-k sampling kept for each row, in CSR form:
    log-prob and entropy are then those of the renormalised distribution, from its columns only. Targets are checked to
    lie in ``[0, V)`` on the CPU only, where that costs no sync. Raises ValueError for shapes or dtypes that do not fit.
    """
    backend = resolve_backend("linear_logprob", backend, hidden, sampling_mask)
    logits_dtype = _check_head(hidden, weight, bias, logits_dtype)
    _check_targets(targets, hidden, len(weight))
    tensors = (hidden, weight, bias, targets, _temperature(temperature, hidden), *_mask(sampling_mask))
    settings = (_softcap(softcap), logits_dtype, backend, skip_inactive, any(_needs(hidden, weight, bias)))
    return _LinearLogprob.apply(*tensors, *settings)


def linear_policy_loss(
    hidden: Tensor,  # [N, D] bf16, fp16, fp32 or fp64
    weight: Tensor,  # [V, D] of hidden's dtype, or wider (an fp32 master weight)
    targets: Tensor,  # [N] int64
    tokens: TokenBatch,
    objective: Objective,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float | None = None,
    sampling_mask: SamplingMask | None = None,  # ([N+1], [nnz])
    logits_dtype: str | torch.dtype = "float32",
    skip_inactive: bool = True,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss and, computed in the same pass, its gradient with respect to hidden, weight and bias.

    6 N D V FLOPs, 4 with a frozen weight, 2 without gradient. A sequence-level objective takes 6 as well where
    ``tokens.cu_seqlens`` lies on the CPU, so that whole sequences can be put into a chunk; a sequence longer than a
    chunk, and an objective that is the caller's own function over more rows than a chunk has, take 8. ``skip_inactive``
    drops rows whose gradient is exactly 0 before the gradient products; on CUDA the host then waits for a count of each
    chunk, while the device works on the next one (``False``: no wait at all). ``objective`` may be any callable ``(logp
    [N], entropy [N], tokens) -> scalar``. A row where ``tokens.mask`` is False does not count, whatever its hidden
    state, target and temperature: its log-prob, entropy and gradient are 0. With ``sampling_mask``, which excludes a
    mask of rows, the objective may contain neither a KL nor an entropy term: both are defined over the full vocabulary.
    No rows: loss 0, zero gradients, metrics 0. Arguments as for :func:`linear_logprob`. Raises ValueError also where
    ``tokens`` lacks what the objective needs.
    """
    backend = resolve_backend("linear_policy_loss", backend, hidden, sampling_mask)
    logits_dtype = _check_head(hidden, weight, bias, logits_dtype)
    _check_tokens(tokens, hidden)
    _check_targets(targets, hidden, len(weight), tokens.mask)
    _check_objective(objective, tokens, sampling_mask)
    inputs = (hidden, weight, bias)
    if torch.compiler.is_compiling() and not library.objective_key(objective):
        shared: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "backend": backend}
        shared |= {"sampling_mask": sampling_mask, "logits_dtype": logits_dtype, "skip_inactive": skip_inactive}
        if tokens.mask is not None:
            dropped = ~tokens.mask.to(hidden.device)
            hidden, targets = hidden.masked_fill(dropped[:, None], 0), targets.masked_fill(dropped, 0)
            neutral = _temperature(temperature, hidden, tokens.mask)
            shared["temperature"] = 1.0 if neutral is None else neutral
        return _traced(objective, tokens, *linear_logprob(hidden, weight, targets, **shared))
    loss, logp, entropy, metrics, *gradients = library.linear_policy_loss(
        *(_detached(t) for t in inputs),
        targets,
        _temperature(temperature, hidden, tokens.mask),
        _softcap(softcap),
        *_mask(sampling_mask),
        _fields(tokens),
        objective,
        logits_dtype,
        _needs(*inputs),
        skip_inactive,
        backend,
    )
    loss = _attach(loss, inputs, gradients, inplace=False)
    return PolicyLoss(loss, logp, entropy, _named(objective, tokens, metrics))


def policy_loss_from_logits(
    logits: Tensor,  # [N, V] bf16, fp16, fp32 or fp64; rows may be strided
    targets: Tensor,  # [N] int64
    tokens: TokenBatch,
    objective: Objective,
    *,
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float | None = None,
    sampling_mask: SamplingMask | None = None,  # ([N+1], [nnz])
    inplace: bool = False,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy loss of logits that exist already, with its gradient; statistics are fp32 whatever the logits' dtype.

    ``inplace=True`` overwrites the buffer of ``logits`` with its gradient (if there is one to compute), so that no
    second ``[N, V]`` is needed: the logits are gone after the call, and one backward pass is allowed. Whatever made the
    logits must not need its output for its own backward pass: a linear layer does not. Nobody may read them afterwards:
    what does gets gradients for logits, and nothing can detect it. Otherwise as :func:`linear_policy_loss`.
    """
    backend = resolve_backend("policy_loss_from_logits", backend, logits, sampling_mask)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, V]; got {list(logits.shape)}: flatten the batch, keep rows with a target")
    _check_dtype("logits", logits)
    _check_tokens(tokens, logits)
    _check_targets(targets, logits, logits.shape[1], tokens.mask)
    _check_objective(objective, tokens, sampling_mask)
    (needed, *_), rows = _needs(logits), _with_contiguous_rows(logits.detach(), inplace)
    transform = (_temperature(temperature, logits, tokens.mask), _softcap(softcap), *_mask(sampling_mask))
    if torch.compiler.is_compiling() and not library.objective_key(objective):
        raise ValueError("under torch.compile the objective of policy_loss_from_logits must be a built-in one")
    of = (rows, targets, *transform, _fields(tokens), objective)
    if inplace and needed:
        loss, logp, entropy, metrics = library.policy_loss_from_logits_(*of, backend)
        gradient = rows
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(rows)  # a kernel's writes are not seen by autograd otherwise
    else:
        loss, logp, entropy, metrics, gradient = library.policy_loss_from_logits(*of, needed, backend)
    loss = _attach(loss, (logits,), (gradient,), inplace)
    return PolicyLoss(loss, logp, entropy, _named(objective, tokens, metrics))


# Autograd: the gradients exist already


class _Attach(torch.autograd.Function):
    """Gives a loss the gradients that were computed with it: ``(loss, inplace, *inputs [k], *gradients [k])``.

    They are handed on as they are, times the upstream gradient, in their own memory; as copies only where the graph is
    kept for another backward pass.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, inplace: bool, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        ctx.inplace = inplace
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if torch.compiler.is_compiling():
            scaled = [_product(gradient, d_loss) for gradient in gradients]
        elif torch._C._autograd._get_current_graph_task_keep_graph() and not ctx.inplace:
            scaled = [scale_(gradient.clone(), d_loss) for gradient in gradients]
        else:
            scaled = [scale_(gradient, d_loss) for gradient in gradients]
            torch.autograd.graph.increment_version(gradients)  # a second backward pass in place is an error
        return None, None, *scaled, *(None for _ in gradients)


def _attach(loss: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor], inplace: bool) -> Tensor:
    pairs = [(i, g) for i, g, need in zip(inputs, gradients, _needs(*inputs), strict=True) if need]
    return _Attach.apply(loss, inplace, *(i for i, _ in pairs), *(g for _, g in pairs)) if pairs else loss


def _product(gradient: Tensor, by: Tensor) -> Tensor:
    """``gradient * by``, the scalar not rounded to the gradient's dtype: on CUDA it has to promote, as ``[1]``."""
    by = by.reshape(1) if gradient.is_cuda else by
    return torch.mul(gradient, by, out=gradient.new_empty(gradient.shape))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, softcap, logits_dtype, backend, skip, keep = args
        hidden, weight, bias, targets, temperature, indptr, indices = tensors
        of = (hidden, weight, bias, targets, temperature, softcap, indptr, indices, logits_dtype)
        logp, entropy, saved = library.linear_logprob(*of, keep, backend)
        ctx.save_for_backward(*tensors, saved)
        ctx.options = (softcap, logits_dtype, backend, skip)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature, indptr, indices, saved = ctx.saved_tensors
        softcap, logits_dtype, backend, skip = ctx.options
        needs = list(ctx.needs_input_grad[:3])
        if d_logp is None:
            d_logp = torch.zeros(len(hidden), dtype=statistics_dtype(hidden.dtype), device=hidden.device)
        of = (hidden, weight, bias, targets, temperature, softcap, indptr, indices, saved, logits_dtype)
        out = library.linear_logprob_backward(d_logp, d_entropy, *of, needs, skip, backend)
        return *(g if need else None for g, need in zip(out, needs, strict=True)), *(None for _ in range(9))


def _traced(objective: Objective, tokens: TokenBatch, logp: Tensor, entropy: Tensor) -> PolicyLoss:
    """The loss of an own function as plain torch, for a tracer to go through."""
    if isinstance(objective, PolicyObjective):
        tokens, _ = objective.prepare(tokens, len(logp), logp.dtype, logp.device)
    else:
        tokens = tokens.expanded(len(logp), logp.dtype, logp.device)
    logp, entropy = counted(logp, tokens.mask), counted(entropy, tokens.mask)
    loss = objective(logp, entropy, tokens)
    logp, entropy = logp.detach(), entropy.detach()
    return PolicyLoss(loss, logp, entropy, policy_metrics(objective, logp, entropy, tokens))


def _mask(sampling_mask: SamplingMask | None) -> tuple[Tensor | None, Tensor | None]:
    if sampling_mask is None:
        return None, None
    if not isinstance(sampling_mask, tuple | list) or len(sampling_mask) != 2:
        raise ValueError(
            "sampling_mask must be a pair of tensors, (indptr [N + 1], indices [nnz]): CSR, not a mask [N, V]"
        )
    return sampling_mask[0], sampling_mask[1]


def _with_contiguous_rows(logits: Tensor, inplace: bool) -> Tensor:
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits
    if inplace:
        raise ValueError(f"inplace=True needs logits whose rows are contiguous; strides are {logits.stride()}")
    return logits.contiguous()


def _needs(*inputs: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _fields(tokens: TokenBatch) -> list[Tensor | None]:
    return [_detached(getattr(tokens, name)) for name in library.TOKEN_FIELDS]


def _named(objective: Objective, tokens: TokenBatch, metrics: Tensor) -> dict[str, Tensor]:
    return dict(zip(metric_names(objective, tokens), metrics.unbind(), strict=True))


# Checks


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: str | torch.dtype) -> str:
    """Raises ValueError for what does not fit; returns the name of ``logits_dtype``."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, D]; got {list(hidden.shape)}: flatten the batch, keep rows with a target")
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be the head's tensor; got {type(weight).__name__}: pass head.weight")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, D] with D = {hidden.shape[1]} as in hidden; got {list(weight.shape)}")
    if len(weight) == 0:
        raise ValueError("weight must be [V, D] with V > 0; got an empty vocabulary")
    _check_dtype("hidden", hidden)
    _check_dtype("weight", weight)
    _check_device("weight", weight, hidden)
    if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        raise ValueError(
            f"weight is {weight.dtype}, narrower than hidden's {hidden.dtype}: cast hidden to {weight.dtype}"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{len(weight)}]; got {list(bias.shape)}")
        _check_dtype("bias", bias)
        _check_device("bias", bias, hidden)
    name = str(logits_dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"logits_dtype={logits_dtype!r} is unknown; it is one of float32, bfloat16")
    if name == "bfloat16" and hidden.dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype='bfloat16' needs bf16 hidden; got {hidden.dtype}: use logits_dtype='float32'")
    return name


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}: cast it")


def _check_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device}, the rows on {rows.device}: move it")


def _check_targets(targets: Tensor, rows: Tensor, vocab: int, mask: Tensor | None = None) -> None:
    if targets.shape != rows.shape[:1]:
        raise ValueError(f"targets must be [{len(rows)}], one for each row; got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; got {targets.dtype}: targets.long()")
    _check_device("targets", targets, rows)
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or (mask is not None and mask.is_meta):
        return
    outside = counted((targets < 0) | (targets >= vocab), None if mask is None else mask.to(targets.device))
    if outside.any():
        raise ValueError(
            f"targets must lie in [0, {vocab}); drop the rows without a target, hidden[targets >= 0], or give the "
            f"policy loss tokens.mask"
        )


def _check_tokens(tokens: TokenBatch, rows: Tensor) -> None:
    if not isinstance(tokens, TokenBatch):
        raise ValueError(f"tokens must be a TokenBatch; got {type(tokens).__name__}: TokenBatch(advantages, ...)")
    for name in library.TOKEN_FIELDS:
        value = getattr(tokens, name)
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"tokens.{name} must be a tensor; got {type(value).__name__}: torch.tensor(...)")
    if tokens.mask is not None:
        check_mask(tokens.mask, rows.shape[0])
    if rows.dtype == torch.float16 and tokens.weight is None and torch.is_grad_enabled():
        raise ValueError(
            "the fp16 gradient is made with the loss, before a GradScaler could scale it, and would underflow: pass "
            "the scale in tokens.weight (aggregation_weights(...) * scaler.get_scale()) and do not scale the loss; or "
            "use bf16, or linear_logprob"
        )


def check_objective(objective: Objective) -> Objective:
    """The objective. Raises ValueError if it is none."""
    if not callable(objective):
        raise ValueError(f"objective must be a PolicyObjective or a callable; got {objective!r}")
    return objective


def _check_objective(objective: Objective, tokens: TokenBatch, sampling_mask: SamplingMask | None) -> None:
    check_objective(objective)
    if sampling_mask is not None and tokens.mask is not None:
        raise ValueError(
            "tokens.mask with sampling_mask: rows that were not sampled have no kept set; pass in the rows that count "
            "only, hidden[mask], and mask=None"
        )
    if sampling_mask is None or not isinstance(objective, PolicyObjective):
        return
    for name in ("kl_coef", "entropy_coef"):
        if getattr(objective, name) != 0:
            raise ValueError(
                f"{name}={getattr(objective, name)} with sampling_mask: KL and entropy are defined over the full "
                f"vocabulary, of which the replay computes the kept columns only; set {name}=0 or drop sampling_mask"
            )


def _temperature(temperature: float | Tensor, rows: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """``[N]``, or None for 1; of rows that do not count, it is 1 whatever was given."""
    dtype = statistics_dtype(rows.dtype)
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), rows.shape[:1]):
            raise ValueError(f"temperature must be a number or [N] = [{len(rows)}]; got {list(temperature.shape)}")
        if mask is not None and temperature.ndim == 1:
            temperature = temperature.masked_fill(~mask.to(temperature.device, non_blocking=True), 1)
        on_cpu = temperature.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and not bool((temperature > 0).all()):
            raise ValueError(f"temperature must be > 0; its least value is {float(temperature.min())}")
        return temperature.detach().to(rows.device, dtype, non_blocking=rows.is_cuda).expand(len(rows)).contiguous()
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature!r}")
    return None if temperature == 1.0 else torch.full((len(rows),), temperature, dtype=dtype, device=rows.device)


def _softcap(softcap: float | None) -> float | None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None; got {softcap!r}")
    return None if softcap is None else float(softcap)
