"""Plain torch for the fused policy-loss ops, in chunks of rows: ``[N, V]`` never exists unless the caller brings it.

``N`` rows that have a target, hidden size ``D``, vocabulary ``V``. A row with logits ``z`` (after softcap, then
temperature) and target ``y`` has ``logp = z_y - lse(z)`` and ``H = lse - sum p z``. Every objective reduces to two
numbers a row, ``c = dL/dlogp`` and ``e = dL/dH``; then ``dL/dz_j = c (1[j=y] - p_j) - e p_j (log p_j + H)``. So the
gradient is computed in the forward pass, while the chunk's logits are at hand: GEMM, statistics, ``c`` and ``e``,
gradient in place, dX GEMM, dW GEMM: 6 N D V FLOPs, 4 with a frozen head, 2 without gradient. An objective that couples
rows of different chunks needs all of logp first and computes the logits twice: 8 N D V.

Statistics are fp32 (fp64 for fp64 inputs). bf16 operands with fp32 logits are multiplied with an fp32 result: on CUDA
by the GEMM itself, elsewhere by casting the operands, the weight once a call (4 V D bytes for its duration). dW is
accumulated in fp32 across chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Size of one chunk's logits by device type; up to three such buffers are alive at a time."""

LOWEST = -1e30
"""Stands for minus infinity, so that ``p log p`` is 0 and not nan."""

Rows = slice | Tensor
Gradients = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor, Tensor | None]]
"""``(logp [n], entropy [n], rows) -> (loss of these rows, c [n], e [n] or None)``."""


class Plan(NamedTuple):
    """What is minimised, as far as this file needs to know."""

    gradients: Gradients
    local: bool  # gradients may be asked for one chunk after the other; otherwise for all rows at once
    skip: bool = True  # rows with c = e = 0 leave before the gradient GEMMs


class Chunk(NamedTuple):
    """Some rows after the softmax."""

    log_p: Tensor  # [n, V] log-probabilities
    targets: Tensor  # [n]
    logp: Tensor  # [n] log-probability of the target
    entropy: Tensor  # [n]
    lse: Tensor  # [n, 1]


@dataclass(frozen=True)
class Transform:
    """From raw logits to the ``z`` of the statistics: softcap first (``cap tanh(z / cap)``), then ``/ temperature``."""

    temperature: float = 1.0
    softcap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """In place on ``[n, V]``."""
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def gradient_(self, chunk: Chunk, c: Tensor, e: Tensor | None) -> Tensor:
        """dL/d(raw logits) ``[n, V]``; overwrites ``chunk.log_p``."""
        c, e = c / self.temperature, None if e is None else e / self.temperature
        if self.softcap is None:
            return logit_gradient_(chunk, c, e)
        slope = (chunk.log_p + chunk.lse).mul_(self.temperature / self.softcap).square_().neg_().add_(1)
        return logit_gradient_(chunk, c, e).mul_(slope)


def normalise_(z: Tensor, targets: Tensor) -> Chunk:
    """Softmax statistics of logits ``[n, V]``, which become the log-probabilities in place."""
    top = z.amax(dim=-1, keepdim=True)
    z.sub_(top).clamp_(min=LOWEST)
    p = z.exp()
    total = p.sum(dim=-1, keepdim=True)
    log_total = total.log()
    entropy = log_total - p.mul_(z).sum(dim=-1, keepdim=True) / total
    z.sub_(log_total)
    return Chunk(z, targets, z.gather(1, targets[:, None])[:, 0], entropy[:, 0], top + log_total)


def logit_gradient_(chunk: Chunk, c: Tensor, e: Tensor | None) -> Tensor:
    """``c (1[j=y] - p_j) - e p_j (log p_j + H)``, ``[n, V]``, in the place of ``chunk.log_p``."""
    log_p, target = chunk.log_p, chunk.targets[:, None]
    if e is None:
        dz = log_p.exp_().mul_(-c[:, None])
    else:
        p = log_p.exp()
        dz = log_p.add_(chunk.entropy[:, None]).mul_(-e[:, None]).sub_(c[:, None]).mul_(p)
    return dz.scatter_(1, target, dz.gather(1, target) + c[:, None])


def chunks(n_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Slices of nearly equal length that cover ``n_rows``, such that logits ``[n, V]`` fit in ``CHUNK_BYTES``."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    count = math.ceil(n_rows / max(1, budget // (vocab * dtype.itemsize)))
    step = math.ceil(n_rows / max(1, count))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, max(1, step))]


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` with a result of ``dtype``, accumulated in at least that precision; autocast has no say here."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == b.dtype == dtype:
            return torch.mm(a, b)
        if a.is_cuda and a.dtype == b.dtype and dtype == torch.float32:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.to(dtype), b.to(dtype))


class Source(Protocol):
    """Where the rows' logits come from."""

    stats: torch.dtype  # of logp and entropy

    def chunks(self, n_rows: int) -> list[slice]: ...
    def chunk(self, rows: Rows, targets: Tensor) -> Chunk: ...  # targets [N] of all rows


class Sink(Protocol):
    """Where the gradient of the rows' logits goes."""

    def add(self, rows: Rows, chunk: Chunk, c: Tensor, e: Tensor | None) -> None: ...  # overwrites chunk.log_p


class Head:
    """Logits as ``hidden @ weight.T + bias``. Shapes and dtypes have been checked by ``revisual_fast.ops``."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, logits: torch.dtype):
        self.logits_dtype = torch.promote_types(logits, hidden.dtype)
        self.stats = torch.promote_types(hidden.dtype, torch.float32)
        native = hidden.is_cuda or self.logits_dtype == hidden.dtype
        self.operand = hidden.dtype if native else self.logits_dtype  # what the GEMMs multiply
        self.hidden = hidden.detach()  # [N, D]
        self.weight = weight.detach().to(hidden.dtype).to(self.operand)  # [V, D]
        self.bias = None if bias is None else bias.detach().to(self.stats)  # [V]
        self.transform = transform

    def chunks(self, n_rows: int) -> list[slice]:
        return chunks(n_rows, len(self.weight), self.stats, self.hidden.device)

    def chunk(self, rows: Rows, targets: Tensor) -> Chunk:
        z = matmul(self.hidden[rows].to(self.operand), self.weight.t(), self.logits_dtype).to(self.stats)
        if self.bias is not None:
            z.add_(self.bias)
        return normalise_(self.transform.apply_(z), targets[rows])


class HeadGradient:
    """Accumulates dX ``[N, D]``, dW ``[V, D]`` and db ``[V]`` over chunks, those that ``needs`` asks for."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head = head
        zeros = head.hidden.new_zeros
        self.hidden = zeros(head.hidden.shape) if needs[0] else None
        self.weight = zeros(head.weight.shape, dtype=head.stats) if needs[1] else None
        self.bias = zeros(len(head.weight), dtype=head.stats) if needs[2] else None

    def add(self, rows: Rows, chunk: Chunk, c: Tensor, e: Tensor | None) -> None:
        dz = self.head.transform.gradient_(chunk, c, e)
        if self.bias is not None:
            self.bias.add_(dz.sum(dim=0))
        dz = dz.to(self.head.operand)
        if self.hidden is not None:
            self.hidden[rows] = matmul(dz, self.head.weight, self.head.operand).to(self.hidden.dtype)
        if self.weight is not None:
            self._add_weight(self.weight, dz.t(), self.head.hidden[rows].to(self.head.operand))

    def _add_weight(self, total: Tensor, dz: Tensor, hidden: Tensor) -> None:
        if dz.dtype == total.dtype:
            torch.addmm(total, dz, hidden, out=total)  # autocast leaves out= alone
        else:
            total.add_(matmul(dz, hidden, total.dtype if dz.is_cuda else dz.dtype))

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db), each in the dtype of what it is the gradient of."""
        d_weight = None if self.weight is None else self.weight.to(weight.dtype)
        d_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, d_weight, d_bias


class Logits:
    """Logits ``[N, V]`` that the caller brings; with ``gradient``, also where their gradient is written (may alias)."""

    def __init__(self, logits: Tensor, transform: Transform, gradient: Tensor | None = None) -> None:
        self.logits, self.transform, self.gradient = logits.detach(), transform, gradient
        self.stats = torch.promote_types(logits.dtype, torch.float32)

    def chunks(self, n_rows: int) -> list[slice]:
        return chunks(n_rows, self.logits.shape[1], self.stats, self.logits.device)

    def chunk(self, rows: Rows, targets: Tensor) -> Chunk:
        return normalise_(self.transform.apply_(self.logits[rows].to(self.stats, copy=True)), targets[rows])

    def add(self, rows: Rows, chunk: Chunk, c: Tensor, e: Tensor | None) -> None:
        assert self.gradient is not None
        self.gradient[rows] = self.transform.gradient_(chunk, c, e).to(self.gradient.dtype)


def _row_buffers(source: Source, targets: Tensor) -> tuple[Tensor, Tensor]:
    return targets.new_empty(targets.shape, dtype=source.stats), targets.new_empty(targets.shape, dtype=source.stats)


def statistics(source: Source, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logp ``[N]`` and entropy ``[N]`` of all rows: 2 N D V for a head."""
    logp, entropy = _row_buffers(source, targets)
    for rows in source.chunks(len(targets)):
        chunk = source.chunk(rows, targets)
        logp[rows], entropy[rows] = chunk.logp, chunk.entropy
    return logp, entropy


def active_rows(c: Tensor, e: Tensor | None) -> Tensor | None:
    """Indices ``[k]`` of the rows whose gradient is not 0, or None if that is all. On CUDA this reads a count back."""
    rows = ((c != 0) if e is None else (c != 0) | (e != 0)).nonzero()[:, 0]
    return None if len(rows) == len(c) else rows


def backward_from(source: Source, sink: Sink, targets: Tensor, c: Tensor, e: Tensor | None, skip: bool) -> None:
    """Gradients for known ``c [N]`` and ``e [N]``; the logits of the k rows that count are computed again: 6 k D V."""
    index = active_rows(c, e) if skip else None
    for part in source.chunks(len(targets) if index is None else len(index)):
        rows = part if index is None else index[part]
        sink.add(rows, source.chunk(rows, targets), c[rows], None if e is None else e[rows])


def policy_pass(source: Source, sink: Sink | None, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), logp ``[N]``, entropy ``[N]``; gradients go to ``sink``.

    With several chunks and an objective that is not local, the statistics of all rows come first and the logits are
    computed a second time.
    """
    parts = source.chunks(len(targets))
    if sink is None or (len(parts) > 1 and not plan.local):
        logp, entropy = statistics(source, targets)
        total, c, e = plan.gradients(logp, entropy, slice(0, len(targets)))
        if sink is not None:
            backward_from(source, sink, targets, c, e, plan.skip)
        return total, logp, entropy
    logp, entropy = _row_buffers(source, targets)
    total = logp.new_zeros(())
    for rows in parts:
        chunk = source.chunk(rows, targets)
        logp[rows], entropy[rows] = chunk.logp, chunk.entropy
        loss, c, e = plan.gradients(chunk.logp, chunk.entropy, rows)
        total = total + loss
        index = active_rows(c, e) if plan.skip else None
        if index is None:
            sink.add(rows, chunk, c, e)
        elif len(index) > 0:
            kept = Chunk(*(tensor[index] for tensor in chunk))
            sink.add(index + rows.start, kept, c[index], None if e is None else e[index])
    return total, logp, entropy


def _scaled(gradient: Tensor | None, by: Tensor, out: Tensor | None = None) -> Tensor | None:
    """``gradient * by``, the scalar not rounded to the gradient's dtype: on CUDA it has to promote, as ``[1]``."""
    if gradient is None:
        return None
    by = by.reshape(1) if gradient.is_cuda else by
    return torch.mul(gradient, by, out=torch.empty_like(gradient) if out is None else out)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        _hidden, weight, bias, targets, head, plan = args
        sink = HeadGradient(head, ctx.needs_input_grad[:3])
        out = policy_pass(head, sink, targets, plan)
        ctx.save_for_backward(*sink.results(weight, bias))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(_scaled(gradient, d_loss) for gradient in ctx.saved_tensors), None, None, None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, targets, head = args
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head_options = (head.transform, head.logits_dtype)
        ctx.set_materialize_grads(False)
        return statistics(head, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head = Head(hidden, weight, bias, *ctx.head_options)
        sink = HeadGradient(head, ctx.needs_input_grad[:3])
        if d_logp is None:
            d_logp = targets.new_zeros(len(targets), dtype=head.stats)
        backward_from(head, sink, targets, d_logp, d_entropy, skip=True)
        return *sink.results(weight, bias), None, None


class _LogitsPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, plan, transform, inplace = args
        source = Logits(logits, transform, logits.detach() if inplace else torch.empty_like(logits))
        out = policy_pass(source, source, targets, plan)
        ctx.save_for_backward(source.gradient)
        ctx.inplace = inplace
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, d_loss, out=gradient if ctx.inplace else None), None, None, None, None


def linear_policy_loss(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    plan: Plan,
    transform: Transform,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (differentiable in hidden, weight, bias), logp ``[N]`` and entropy ``[N]`` (both detached)."""
    head = Head(hidden, weight, bias, transform, logits_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return _LinearPolicyLoss.apply(hidden, weight, bias, targets, head, plan)
    return policy_pass(head, None, targets, plan)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """logp ``[N]`` and entropy ``[N]``, differentiable: 2 N D V forward and, the logits again, 6 k D V backward."""
    return _LinearLogprob.apply(hidden, weight, bias, targets, Head(hidden, weight, bias, transform, logits_dtype))


def policy_loss_from_logits(
    logits: Tensor, targets: Tensor, plan: Plan, transform: Transform, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (differentiable in ``logits [N, V]``), logp ``[N]`` and entropy ``[N]`` (both detached)."""
    plan = plan._replace(skip=False)  # every row of the gradient has to be written
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogitsPolicyLoss.apply(logits, targets, plan, transform, inplace)
    return policy_pass(Logits(logits, transform), None, targets, plan)
