"""The fused computations as PyTorch's dispatcher sees them: custom ops with fake implementations and FLOP formulas.

Each op is a function of tensors and plain values that computes results and gradients in one go, without autograd: the
gradients travel on as tensors until ``revisual_fast.ops`` hands them to autograd. To a custom op the objective goes by
its ``key``. ``tokens`` are the fields of a TokenBatch in their order. Gradients not asked for are empty tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from revisual_fast.kernels import kept as kept_rows
from revisual_fast.kernels import linear, logits
from revisual_fast.kernels.plan import SURROGATES, Inline, Part, Plan, statistics_dtype
from revisual_fast.kernels.reference import Transform
from revisual_fast.losses import Objective, PolicyObjective, TokenBatch, loss_gradients, loss_value
from revisual_fast.objective_metrics import metric_names, metric_values
from revisual_fast.ranges import ranged

TOKEN_FIELDS = tuple(f.name for f in fields(TokenBatch))
NAMESPACE = __name__.partition(".")[0]
"""Of the ops: the package's name, so that copies of it under other names do not collide."""


class FusedOp:
    """A function that is also a custom op. Called as the one in eager mode, where autograd and counters of FLOPs and
    memory can look inside, and as the other while ``torch.compile`` traces, which leaves it whole.
    """

    def __init__(self, function: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> None:
        name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=mutates_args)
        self.function = ranged(f"revisual_fast.{name}")(function)
        self.op = torch.library.custom_op(
            f"{NAMESPACE}::{name}", self.function, mutates_args=mutates_args, schema=schema
        )
        self.register_fake = self.op.register_fake

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.function(*args)
        args = tuple(objective_key(argument) or argument for argument in args)
        return (self.function if any(callable(argument) for argument in args) else self.op)(*args)


def objective_key(objective: Any) -> str:
    """By which a custom op finds a built-in objective again; empty for anything else, own functions included."""
    return objective.key if isinstance(objective, PolicyObjective) else ""


@contextmanager
def _settled(rows: Tensor) -> Iterator[None]:
    """Autocast has no say in the computation, and kernels and events go to the device of ``rows``."""
    device = torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()
    with torch.autocast(rows.device.type, enabled=False), device:
        yield


def _objective(objective: Any) -> Objective:
    """The objective of an op's argument: itself in eager mode, where it may be any function; else from its key."""
    return PolicyObjective.from_key(objective) if isinstance(objective, str) else objective


def _batch(tokens: Sequence[Tensor | None]) -> TokenBatch:
    return TokenBatch(**dict(zip(TOKEN_FIELDS, tokens, strict=True)))


def make_plan(objective: Objective, tokens: TokenBatch, rows: Tensor, skip: bool) -> tuple[TokenBatch, Plan]:
    """The batch, expanded and checked, and what the kernels need to know of the objective."""
    n_rows, dtype = rows.shape[0], statistics_dtype(rows.dtype)
    cu, boundaries = tokens.cu_seqlens, None
    if isinstance(objective, PolicyObjective):
        tokens, scope = objective.prepare(tokens, n_rows, dtype, rows.device)
    else:
        tokens, scope = tokens.expanded(n_rows, dtype, rows.device), "batch"
    if scope == "sequence" and cu is not None and cu.device.type == "cpu":
        boundaries = cu.tolist()

    def cut(part: Part) -> TokenBatch:
        if part.sequences is not None:
            return tokens.sequences(part.sequences, part.rows)
        return tokens.rows(part.rows) if scope == "row" else tokens

    def value(logp: Tensor, entropy: Tensor, part: Part) -> Tensor:
        return loss_value(objective, logp, entropy, cut(part))

    def gradients(logp: Tensor, entropy: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            return loss_gradients(objective, logp, entropy, cut(part))  # autograd is off inside a custom op

    return tokens, Plan(gradients, value, scope, boundaries, _inline(objective, tokens, scope), skip)


def _inline(objective: Objective, tokens: TokenBatch, scope: str) -> Inline | None:
    """The objective for the one-kernel path, or None if it has to go through :mod:`revisual_fast.losses`."""
    o = objective
    if not isinstance(o, PolicyObjective) or scope != "row" or o.surrogate not in SURROGATES:
        return None
    assert tokens.weight is not None, "prepare() derives it"
    given = tokens.importance if o.rollout_correction is not None else None
    infinite = float("inf")
    bounds = (o.clip_low, o.clip_high, *(infinite if b is None else b for b in (o.dual_clip, o.delta)))
    numbers = (*bounds, o.sapo_tau_pos, o.sapo_tau_neg, o.kl_coef, o.entropy_coef, o.rollout_cap)
    return Inline(
        surrogate=str(o.surrogate),
        kl=o.kl if o.kl_coef != 0 else None,
        kl_bias_correction=o.kl_bias_correction,
        correction=o.rollout_correction if given is None else "given",
        has_entropy=o.entropy_coef != 0,
        advantages=tokens.advantages,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp if o.kl_coef != 0 else None,
        rollout=tokens.rollout_logp if given is None and o.rollout_correction is not None else given,
        weight=tokens.weight,
        numbers=tuple(float(number) for number in numbers),
    )


def _or_empty(
    gradients: Sequence[Tensor | None], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, hidden if bias is None else bias)
    made = [like.new_empty(0) if g is None else g for g, like in zip(gradients, inputs, strict=True)]
    return made[0], made[1], made[2]


def _pair(indptr: Tensor | None, indices: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The sampling mask of two arguments."""
    return None if indptr is None or indices is None else (indptr, indices)


def _temperature(transform: Transform, rows: Tensor) -> Tensor:
    ones = torch.ones(rows.shape[0], dtype=statistics_dtype(rows.dtype), device=rows.device)
    return ones if transform.temperature is None else transform.temperature


def _like_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of the right shapes and dtypes, for the fakes."""
    inputs = (hidden, weight, hidden if bias is None else bias)
    made = [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True)]
    return made[0], made[1], made[2]


def _fake_loss(rows: Tensor, tokens: Sequence[Tensor | None], objective: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, logp, entropy and metrics without values."""
    logp = rows.new_empty(rows.shape[0], dtype=statistics_dtype(rows.dtype))
    metrics = logp.new_empty(len(metric_names(_objective(objective), _batch(tokens))))
    return logp.new_empty(()), logp, torch.empty_like(logp), metrics


# hidden states -> loss and gradients


@FusedOp
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    mask_indptr: Tensor | None,
    mask_indices: Tensor | None,
    tokens: Sequence[Tensor | None],
    objective: str,
    logits_dtype: str,
    needs: Sequence[bool],
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logp ``[N]``, entropy ``[N]``, metrics ``[M]``, dX ``[N, D]``, dW ``[V, D]``, db ``[V]``."""
    with _settled(hidden):
        goal = _objective(objective)
        batch, plan = make_plan(goal, _batch(tokens), hidden, skip)
        transform = Transform(temperature, softcap, batch.mask)
        if batch.mask is not None and needs[1]:
            hidden = hidden.masked_fill(~batch.mask[:, None], 0)  # for dW a gradient of 0 times nan would be nan
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        sampling_mask = _pair(mask_indptr, mask_indices)
        if sampling_mask is not None:
            mask, found = _replayed(hidden, weight, bias, targets, transform, sampling_mask, backend)
            whole = (found.logp, found.entropy, Part(slice(0, hidden.shape[0])))
            if any(needs):
                loss, c, e = plan.gradients(*whole)
                dz = kept_rows.kept_gradient(found, mask, c, e)
                gradients = _kept_backward(dz, hidden, weight, bias, mask, needs, backend)
            else:
                loss = plan.value(*whole)
            out = (loss, found.logp, found.entropy)
        else:
            head = linear.Head(hidden, weight, bias, targets, transform, getattr(torch, logits_dtype), backend)
            out, sink = linear.policy_loss(head, plan, needs)
            gradients = gradients if sink is None else sink.results(weight, bias)
        loss, logp, entropy = out
        metrics = metric_values(goal, logp, entropy, batch)
        return loss, logp, entropy, metrics, *_or_empty(gradients, hidden, weight, bias)


@linear_policy_loss.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, mask_indptr, mask_indices, tokens, objective, logits_dtype,
    needs, skip, backend,
):  # fmt: skip
    return *_fake_loss(hidden, tokens, objective), *_like_hidden(hidden, weight, bias, needs)


def _replayed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    sampling_mask: tuple[Tensor, Tensor],
    backend: str,
) -> tuple[kept_rows.Kept, kept_rows.KeptStatistics]:
    """The kept sets, checked, and the statistics of the rows over them."""
    mask = kept_rows.make_kept(sampling_mask, targets, weight.shape[0])
    z = kept_rows.kept_logits(hidden, weight, bias, mask, statistics_dtype(hidden.dtype), backend)
    return mask, kept_rows.kept_statistics(z, targets, mask, _temperature(transform, hidden), transform.softcap)


def _kept_backward(
    dz: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: kept_rows.Kept,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_hidden, d_weight, d_bias = kept_rows.kept_backward(
        dz, hidden, weight, mask, (needs[0], needs[1], needs[2]), backend
    )
    d_weight = None if d_weight is None else d_weight.to(weight.dtype)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias


# hidden states -> log-probs


@FusedOp
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    mask_indptr: Tensor | None,
    mask_indices: Tensor | None,
    logits_dtype: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp ``[N]``, entropy ``[N]`` and what the backward pass may use again: logits ``[N, V]``, or nothing."""
    with _settled(hidden):
        transform = Transform(temperature, softcap)
        sampling_mask = _pair(mask_indptr, mask_indices)
        if sampling_mask is not None:
            _, statistics = _replayed(hidden, weight, bias, targets, transform, sampling_mask, backend)
            return statistics.logp, statistics.entropy, hidden.new_empty(0)
        head = linear.Head(hidden, weight, bias, targets, transform, getattr(torch, logits_dtype), backend)
        logp, entropy, saved = linear.logprob(head, keep)
        return logp, entropy, hidden.new_empty(0) if saved is None else saved


@linear_logprob.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, mask_indptr, mask_indices, logits_dtype, keep, backend
):  # fmt: skip
    rows = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    dtype = torch.promote_types(getattr(torch, logits_dtype), hidden.dtype)
    saved = hidden.new_empty(0)
    if keep and mask_indptr is None and linear.fits(hidden.shape[0], weight.shape[0], dtype, hidden.device):
        saved = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)
    return rows, torch.empty_like(rows), saved


@FusedOp
def linear_logprob_backward(
    d_logp: Tensor,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    mask_indptr: Tensor | None,
    mask_indices: Tensor | None,
    saved: Tensor,
    logits_dtype: str,
    needs: Sequence[bool],
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX ``[N, D]``, dW ``[V, D]``, db ``[V]`` for the upstream gradients of logp and entropy."""
    with _settled(hidden):
        transform = Transform(temperature, softcap)
        sampling_mask = _pair(mask_indptr, mask_indices)
        if sampling_mask is not None:
            mask, statistics = _replayed(hidden, weight, bias, targets, transform, sampling_mask, backend)
            dz = kept_rows.kept_gradient(statistics, mask, d_logp, d_entropy)
            gradients = _kept_backward(dz, hidden, weight, bias, mask, needs, backend)
            return _or_empty(gradients, hidden, weight, bias)
        dtype, logits_of = getattr(torch, logits_dtype), saved if saved.ndim == 2 else None
        head = linear.Head(hidden, weight, bias, targets, transform, dtype, backend, logits_of)
        sink = linear.logprob_backward(head, d_logp, d_entropy, needs, skip)
        return _or_empty(sink.results(weight, bias), hidden, weight, bias)


@linear_logprob_backward.register_fake
def _(
    d_logp, d_entropy, hidden, weight, bias, targets, temperature, softcap, mask_indptr, mask_indices, saved,
    logits_dtype, needs, skip, backend,
):  # fmt: skip
    return _like_hidden(hidden, weight, bias, needs)


# logits -> loss and gradient


def _from_logits(
    rows: Tensor,
    targets: Tensor,
    transform: Transform,
    mask: tuple[Tensor, Tensor] | None,
    tokens: Sequence[Tensor | None],
    objective: str,
    backend: str,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _settled(rows):
        goal = _objective(objective)
        batch, plan = make_plan(goal, _batch(tokens), rows, skip=False)  # every row of the gradient has to be written
        transform = replace(transform, mask=batch.mask)
        if mask is None:
            out = logits.policy_loss(rows, targets, plan, transform, backend, gradient)
        else:
            out = _kept_from_logits(rows, targets, transform, mask, plan, gradient)
        return *out, metric_values(goal, *out[1:], batch)


def _kept_from_logits(
    rows: Tensor,
    targets: Tensor,
    transform: Transform,
    sampling_mask: tuple[Tensor, Tensor],
    plan: Plan,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = kept_rows.make_kept(sampling_mask, targets, rows.shape[1])
    z = kept_rows.kept_from_logits(rows, mask, statistics_dtype(rows.dtype))
    statistics = kept_rows.kept_statistics(z, targets, mask, _temperature(transform, rows), transform.softcap)
    whole = (statistics.logp, statistics.entropy, Part(slice(0, rows.shape[0])))
    if gradient is None:
        return plan.value(*whole), *whole[:2]
    loss, c, e = plan.gradients(*whole)
    gradient.zero_()
    kept_rows.kept_scatter(kept_rows.kept_gradient(statistics, mask, c, e), mask, gradient)
    return loss, *whole[:2]


@FusedOp
def policy_loss_from_logits(
    rows: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    mask_indptr: Tensor | None,
    mask_indices: Tensor | None,
    tokens: Sequence[Tensor | None],
    objective: str,
    needs_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logp ``[N]``, entropy ``[N]``, metrics ``[M]`` and the gradient of the logits ``[N, V]``, if needed."""
    gradient = rows.new_empty(rows.shape) if needs_gradient else None
    mask = _pair(mask_indptr, mask_indices)
    out = _from_logits(rows, targets, Transform(temperature, softcap), mask, tokens, objective, backend, gradient)
    return *out, rows.new_empty(0) if gradient is None else gradient


@policy_loss_from_logits.register_fake
def _(
    rows, targets, temperature, softcap, mask_indptr, mask_indices, tokens, objective, needs_gradient, backend
):  # fmt: skip
    gradient = rows.new_empty(rows.shape if needs_gradient else 0)
    return *_fake_loss(rows, tokens, objective), gradient


@partial(FusedOp, mutates_args=("rows",))
def policy_loss_from_logits_(
    rows: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    mask_indptr: Tensor | None,
    mask_indices: Tensor | None,
    tokens: Sequence[Tensor | None],
    objective: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, logp ``[N]``, entropy ``[N]``, metrics ``[M]``; the logits ``[N, V]`` become their gradient."""
    mask = _pair(mask_indptr, mask_indices)
    return _from_logits(rows, targets, Transform(temperature, softcap), mask, tokens, objective, backend, rows)


@policy_loss_from_logits_.register_fake
def _(rows, targets, temperature, softcap, mask_indptr, mask_indices, tokens, objective, backend):
    return _fake_loss(rows, tokens, objective)


# FLOPs, for torch.utils.flop_counter: every row active, every part in one chunk; of a replay, only the kept columns

_OPS = getattr(torch.ops, NAMESPACE)


@register_flop_formula(_OPS.linear_policy_loss)
def _linear_policy_loss_flops(hidden, weight, *args, out_shape=None, **kwargs) -> int:
    mask, needs = args[5], args[9]
    return _products(hidden, weight, mask) * (1 + sum(needs[:2]))


@register_flop_formula(_OPS.linear_logprob)
def _linear_logprob_flops(hidden, weight, *args, out_shape=None, **kwargs) -> int:
    return _products(hidden, weight, args[5])


@register_flop_formula(_OPS.linear_logprob_backward)
def _linear_logprob_backward_flops(d_logp, d_entropy, hidden, weight, *args, out_shape=None, **kwargs) -> int:
    mask, saved, needs = args[5], args[6], args[8]
    return _products(hidden, weight, mask) * ((len(saved) != 2) + sum(needs[:2]))


def _products(hidden: Sequence[int], weight: Sequence[int], mask: Sequence[int] | None) -> int:
    pairs = hidden[0] * weight[0] if mask is None else mask[0]
    return 2 * pairs * hidden[1]
