"""Plain torch for the row kernel: the backend for every device, and the yardstick of the others.

A row with logits ``z`` (after softcap, then temperature) and target ``y`` has ``logp = z_y - lse(z)`` and ``H = lse -
sum p z``. With ``c = dL/dlogp`` and ``e = dL/dH``, ``dL/dz_j = c (1[j=y] - p_j) - e p_j (log p_j + H)``. Statistics are
fp32 (fp64 for fp64 inputs). All passes over the logits go block by block, in sizes that stay in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revisual_fast.kernels.plan import Part, Plan

LOWEST = -1e30
"""Stands for minus infinity, so that ``p log p`` is 0 and not nan."""

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
"""The least probability that has a logarithm here."""

BLOCK_BYTES = {"cpu": 4 << 20}
"""Logits that one pass after the other goes over before the next block's turn; no blocks on other devices."""


@dataclass(frozen=True)
class Transform:
    """From raw logits to the ``z`` of the statistics: softcap first (``cap tanh(z / cap)``), then ``/ temperature``."""

    temperature: Tensor | None = None  # [N]
    softcap: float | None = None

    def rows(self, rows: slice | Tensor) -> Transform:
        return Transform(None if self.temperature is None else self.temperature[rows], self.softcap)

    def slope(self, z: Tensor) -> Tensor:
        """d(softcapped logit) / d(raw logit) of transformed logits ``[n, ...]``, which are overwritten."""
        assert self.softcap is not None
        if self.temperature is not None:
            z.mul_(self.temperature[:, None])
        return z.div_(self.softcap).square_().neg_().add_(1)


class TorchChunk:
    """Logits ``[n, V]`` of the statistics' dtype, which become the probabilities and then the gradient in their place.

    What the gradient needs of the logits is taken back from the probabilities: where one underflows, so does its row's
    entry of the gradient, but for the target's, of which the log-prob is kept.
    """

    def __init__(
        self,
        z: Tensor,  # [n, V] raw logits
        targets: Tensor,  # [n] int64
        transform: Transform,
        bias: Tensor | None = None,  # [V]
    ) -> None:
        self.p, self.targets, self.transform = z, targets[:, None], transform
        self.logp, self.entropy, self.lse = (z.new_empty(len(z)) for _ in range(3))
        scratch: Tensor | None = None
        for at in _blocks(z):
            if bias is not None:
                z[at].add_(bias)
            scratch = torch.empty_like(z[at]) if scratch is None else scratch
            self._normalise(at, scratch)

    def _normalise(self, at: slice, scratch: Tensor) -> None:
        """Statistics and probabilities of a block; ``scratch`` is as large as any."""
        z, transform = self.p[at], self.transform.rows(at)
        if transform.softcap is not None:
            z.div_(transform.softcap).tanh_().mul_(transform.softcap)
        if transform.temperature is not None:
            z.div_(transform.temperature[:, None])
        top = z.amax(dim=1)
        z.sub_(top[:, None]).clamp_(min=LOWEST)
        p = torch.softmax(z, dim=1, out=scratch[: len(z)])
        log_total = p.amax(dim=1).log_().neg_()  # the largest is exp(0) / total
        self.logp[at] = z.gather(1, self.targets[at])[:, 0] - log_total
        self.entropy[at] = log_total - z.mul_(p).sum(dim=1)
        self.lse[at] = top + log_total
        z.copy_(p)

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`."""
        rows = slice(None) if index is None else index
        p, transform, targets, logp = self.p[rows], self.transform.rows(rows), self.targets[rows], self.logp[rows, None]
        entropy, lse, c = self.entropy[rows, None], self.lse[rows, None], c[rows, None]
        e = None if e is None else e[rows, None]
        if transform.temperature is not None:
            c, e = c / transform.temperature[:, None], None if e is None else e / transform.temperature[:, None]
        p_target = logp.exp()
        d_target = c - p_target * (c if e is None else c + e * (logp + entropy))
        if transform.softcap is not None:
            d_target.mul_(transform.slope(logp + lse))
        for at in _blocks(p):
            block = p[at]
            log_p = None if e is None and transform.softcap is None else block.clamp(min=TINY[p.dtype]).log_()
            block.mul_(-c[at] if e is None or log_p is None else (log_p + entropy[at]).mul_(-e[at]).sub_(c[at]))
            if transform.softcap is not None and log_p is not None:
                block.mul_(transform.rows(at).slope(log_p.add_(lse[at])))
            block.scatter_(1, targets[at], d_target[at])
        return p


def _blocks(z: Tensor) -> list[slice]:
    budget = BLOCK_BYTES.get(z.device.type)
    step = len(z) if budget is None else max(1, budget // (z.shape[1] * z.dtype.itemsize))
    return [slice(start, start + step) for start in range(0, len(z), max(1, step))]


def solve(chunk: TorchChunk, plan: Plan, part: Part) -> tuple[TorchChunk, Tensor, Tensor, Tensor | None]:
    """The chunk, its loss, ``c`` and ``e``: statistics first, then the objective on ``[n]`` vectors."""
    return chunk, *plan.gradients(chunk.logp, chunk.entropy, part)
