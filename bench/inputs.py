"""What every variant of a case gets, and the float64 answer it is held against.

Logits have a standard deviation of 2, the target's is raised by 0 to 16: tokens between certain and hopeless, as in a
rollout. Log-ratios lie within 0.1 of 0, except for 2% at 0.5 to either side, so that about 1% of the rows are clipped,
none of them close enough to a bound for rounding to decide, and no variant gains from skipping rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.checks import Outputs
from bench.harness import Case
from revisual_fast import PolicyObjective, TokenBatch

SEQUENCES = 8  # completions of equal length, which the peers that want [B, T] need
CHUNK_ELEMENTS = 1 << 25  # float64 logits of the reference at a time
CLIP = 0.2
KEPT = 8  # ids a row that top-p sampling left, on average, at the usual settings

LossOf = Callable[[Tensor], Tensor]
"""logp ``[N]`` -> scalar loss, differentiable."""


@dataclass(frozen=True)
class Inputs:
    """``hidden`` and ``weight`` are there for the linear ops, ``logits`` for the others."""

    targets: Tensor  # [N] int64
    advantages: Tensor  # [N] fp32
    old_logp: Tensor  # [N] fp32
    hidden: Tensor | None = None  # [N, D]
    weight: Tensor | None = None  # [V, D]
    logits: Tensor | None = None  # [N, V]
    kept: Tensor | None = None  # [N, KEPT] int64, the target first

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """``(hidden, weight)``, leaves that require a gradient."""
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden, self.weight

    @property
    def vocab(self) -> int:
        if self.logits is not None:
            return self.logits.shape[1]
        return len(self.head[1])

    @property
    def tokens(self) -> TokenBatch:
        return TokenBatch(self.advantages, old_logp=self.old_logp)

    @property
    def sequences(self) -> TokenBatch:
        """``tokens`` with the bounds of the completions, which lie on the CPU, where packing leaves them."""
        n = len(self.targets)
        return replace(self.tokens, cu_seqlens=torch.arange(0, n + 1, n // SEQUENCES, dtype=torch.int32))

    @property
    def sampling_mask(self) -> tuple[Tensor, Tensor]:
        """The kept ids in CSR: ``(indptr [N + 1], indices [N KEPT])``."""
        assert self.kept is not None
        n, k = self.kept.shape
        return torch.arange(0, n * k + 1, k, device=self.kept.device), self.kept.reshape(-1)


OBJECTIVE = PolicyObjective(clip_low=CLIP, clip_high=CLIP, aggregation="token_mean")
SEQUENCE_OBJECTIVE = replace(OBJECTIVE, level="sequence")
"""GSPO's, but for its clip range of some 1e-4: in that most sequences would be clipped, and could be skipped."""


def clip_loss(inputs: Inputs) -> LossOf:
    """``OBJECTIVE``, written out in torch (arXiv 1707.06347)."""
    return lambda logp: _clipped((logp - inputs.old_logp).exp(), inputs.advantages)


def sequence_clip_loss(inputs: Inputs) -> LossOf:
    """``SEQUENCE_OBJECTIVE``: the ratio is the geometric mean over a completion (arXiv 2507.18071, eq. 7)."""

    def loss(logp: Tensor) -> Tensor:
        log_ratio = (logp - inputs.old_logp).view(SEQUENCES, -1)
        ratio = log_ratio.mean(1, keepdim=True).exp().expand_as(log_ratio)
        return _clipped(ratio.reshape(-1), inputs.advantages)

    return loss


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def cross_entropy(inputs: Inputs) -> LossOf:
    """``-mean(logp)``, for the peers that know nothing else."""
    return lambda logp: -logp.mean()


def weighted_sum(inputs: Inputs) -> LossOf:
    """A fixed upstream gradient for every log-prob."""
    return lambda logp: (inputs.advantages * logp).sum() / len(logp)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Seeded; with a hidden size a head, without one logits. Raises ValueError if N is no multiple of 8."""
    if case.n % SEQUENCES:
        raise ValueError(f"N must be a multiple of {SEQUENCES}, the number of completions; got {case.n}")
    g = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=case.device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=case.device)

    targets = torch.randint(case.v, (case.n,), generator=g, device=case.device)
    advantages = normal(SEQUENCES).repeat_interleave(case.n // SEQUENCES)
    raised = 4 * uniform(case.n, 1)
    x = Inputs(targets, advantages, torch.zeros_like(advantages))
    if case.d:
        weight = normal(case.v, case.d) * (2 / case.d**0.5)
        hidden = (normal(case.n, case.d) + raised * weight[targets]).to(case.torch_dtype)
        x = replace(x, hidden=hidden.requires_grad_(), weight=weight.to(case.torch_dtype).requires_grad_())
    else:
        logits = 2 * normal(case.n, case.v)
        logits.scatter_add_(1, targets[:, None], 4 * raised)
        x = replace(x, logits=logits.to(case.torch_dtype).requires_grad_())
    if case.op == "sampling_mask_replay":
        others = torch.randint(1, case.v // KEPT, (case.n, KEPT), generator=g, device=case.device)
        others[:, 0] = 0
        x = replace(x, kept=(targets[:, None] + others.cumsum(1)) % case.v)  # distinct: steps add up to less than V
    log_ratio = 0.2 * uniform(case.n) - 0.1
    far = uniform(case.n)
    log_ratio = torch.where(far < 0.01, 0.5, torch.where(far > 0.99, -0.5, log_ratio))
    return replace(x, old_logp=(logp_reference(x) - log_ratio).float())


def distinct_kept(x: Inputs) -> int:
    """Rows of the weight that the mask names at all."""
    assert x.kept is not None
    return len(x.kept.unique())


def _chunks(x: Inputs) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // x.vocab)
    return (slice(start, start + step) for start in range(0, len(x.targets), step))


def _log_p(x: Inputs, rows: slice, weight: Tensor | None) -> Tensor:
    """``[n, V]`` float64 log-probabilities, minus infinity off the kept set."""
    if x.logits is not None:
        z = x.logits.detach()[rows].double()
    else:
        assert x.hidden is not None
        assert weight is not None
        z = x.hidden.detach()[rows].double() @ weight.t()
    if x.kept is not None:
        off = torch.ones_like(z, dtype=torch.bool).scatter_(1, x.kept[rows], False)
        z = z.masked_fill_(off, -torch.inf)
    return z.log_softmax(-1)


def _wide_weight(x: Inputs) -> Tensor | None:
    return None if x.weight is None else x.weight.detach().double()


@torch.no_grad()
def logp_reference(x: Inputs) -> Tensor:
    """``[N]`` float64."""
    weight = _wide_weight(x)
    picked = [_log_p(x, rows, weight).gather(1, x.targets[rows, None])[:, 0] for rows in _chunks(x)]
    return torch.cat(picked)


@torch.no_grad()
def statistics_reference(x: Inputs) -> Outputs:
    """logp and entropy, ``[N]`` float64."""
    weight = _wide_weight(x)
    entropies = [_entropy(log_p, log_p.exp()) for log_p in (_log_p(x, rows, weight) for rows in _chunks(x))]
    return {"logp": logp_reference(x), "entropy": torch.cat(entropies)}


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    """``[n]``; zeros are written into ``log_p`` where ``p`` is 0."""
    return -(p * log_p.masked_fill_(p == 0, 0)).sum(-1)


def reference(x: Inputs, loss_of: LossOf, entropy: bool = True) -> Outputs:
    """Loss, logp, entropy, ``c = dL/dlogp`` and the gradients in float64, in chunks of rows, from the definition."""
    logp = logp_reference(x).requires_grad_()
    loss = loss_of(logp)
    (c,) = torch.autograd.grad(loss, logp)
    out: Outputs = {"loss": loss.detach(), "logp": logp.detach(), "c": c}
    weight = _wide_weight(x)
    if x.logits is not None:
        out["d_logits"] = torch.empty(x.logits.shape, dtype=torch.float64, device=c.device)
    else:
        out["d_hidden"], out["d_weight"] = (torch.zeros_like(t, dtype=torch.float64) for t in x.head)
    entropies = []
    for rows in _chunks(x):
        log_p = _log_p(x, rows, weight)
        p = log_p.exp()
        entropies.append(_entropy(log_p, p))
        dz = p.mul_(-c[rows, None]).scatter_add_(1, x.targets[rows, None], c[rows, None])
        if weight is None:
            out["d_logits"][rows] = dz
        else:
            out["d_hidden"][rows] = dz @ weight
            out["d_weight"].addmm_(dz.t(), x.head[0].detach()[rows].double())
    return out | ({"entropy": torch.cat(entropies)} if entropy else {})
