"""Plain torch for the row kernel: the backend for every device, and the yardstick of the others.

A row with logits ``z`` (after softcap, then temperature) and target ``y`` has ``logp = z_y - lse(z)`` and ``H = lse -
sum p z``. With ``c = dL/dlogp`` and ``e = dL/dH``, ``dL/dz_j = c (1[j=y] - p_j) - e p_j (log p_j + H)``. Statistics are
fp32 (fp64 for fp64 inputs). All passes over the logits go block by block, in sizes that stay in a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """From raw logits to the ``z`` of the statistics: softcap first (``cap tanh(z / cap)``), then ``/ temperature``.

    Where ``mask`` is False, nobody looks at a row's logits, target or temperature: logp, entropy and gradient are 0.
    """

    temperature: Tensor | None = None  # [N]
    softcap: float | None = None
    mask: Tensor | None = None  # [N] bool; None: every row counts

    def rows(self, rows: slice | Tensor) -> Transform:
        temperature, mask = (None if t is None else t[rows] for t in (self.temperature, self.mask))
        return Transform(temperature, self.softcap, mask)


class TorchChunk:
    """Logits ``[n, V]`` of the statistics' dtype, which become the probabilities and then the gradient in their place.

    What the gradient needs of the logits is taken back from the probabilities: where one underflows, so does its row's
    entry of the gradient, but for the target's, of which the log-prob is kept. With a softcap the buffer holds its tanh
    instead, so that the slope is as exact as autograd's.
    """

    def __init__(
        self,
        z: Tensor,  # [n, V] raw logits
        targets: Tensor,  # [n] int64
        transform: Transform,
        bias: Tensor | None = None,  # [V]
    ) -> None:
        self.dropped = None if transform.mask is None else ~transform.mask  # [n]
        if self.dropped is not None:  # harmless values stand in for whatever these rows hold
            targets = targets.masked_fill(self.dropped, 0)
            if transform.temperature is not None:
                transform = replace(transform, temperature=transform.temperature.masked_fill(self.dropped, 1))
        self.buffer, self.targets, self.transform = z, targets[:, None], transform
        self.logp, self.entropy, self.lse = (z.new_empty(len(z)) for _ in range(3))
        scratch: list[Tensor] = []
        for at in _blocks(z):
            if self.dropped is not None:
                z[at].masked_fill_(self.dropped[at, None], 0)
            if bias is not None:
                z[at].add_(bias)
            scratch = scratch or [torch.empty_like(z[at]) for _ in range(1 if transform.softcap is None else 2)]
            self._normalise(at, scratch)
        if self.dropped is not None:
            self.logp.masked_fill_(self.dropped, 0)
            self.entropy.masked_fill_(self.dropped, 0)

    def _normalise(self, at: slice, scratch: list[Tensor]) -> None:
        """Statistics of a block; its logits become probabilities, or their tanh. ``scratch`` is as large as a block."""
        z, transform = self.buffer[at], self.transform.rows(at)
        if transform.softcap is not None:
            z.div_(transform.softcap).tanh_()
            z = torch.mul(z, transform.softcap, out=scratch[1][: len(z)])
        if transform.temperature is not None:
            z.div_(transform.temperature[:, None])
        top = z.amax(dim=1)
        target = z.sub_(top[:, None]).gather(1, self.targets[at])[:, 0]
        p = torch.softmax(z.clamp_(min=LOWEST), dim=1, out=scratch[0][: len(z)])
        log_total = p.amax(dim=1).log_().neg_()  # the largest is exp(0) / total
        self.logp[at] = target - log_total
        self.entropy[at] = log_total - z.mul_(p).sum(dim=1)
        self.lse[at] = top + log_total
        if transform.softcap is None:
            z.copy_(p)

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`."""
        rows = slice(None) if index is None else index
        out, transform, targets, logp = (
            self.buffer[rows],
            self.transform.rows(rows),
            self.targets[rows],
            self.logp[rows],
        )
        logp, entropy, lse = logp[:, None].clamp(min=LOWEST), self.entropy[rows, None], self.lse[rows, None]
        c, e = c[rows, None], None if e is None else e[rows, None]
        if self.dropped is not None:
            c = c.masked_fill(self.dropped[rows, None], 0)
            e = None if e is None else e.masked_fill(self.dropped[rows, None], 0)
        if transform.temperature is not None:
            c, e = c / transform.temperature[:, None], None if e is None else e / transform.temperature[:, None]
        p_target = logp.exp()
        d_target = c - p_target * (c if e is None else c + e * (logp + entropy))
        for at in _blocks(out):
            block, slope = out[at], None
            if transform.softcap is not None:
                slope = 1 - block.square()
                p = block.mul_(transform.softcap)
                if transform.temperature is not None:
                    p.div_(transform.temperature[at, None])
                p.sub_(lse[at]).exp_()
            if e is None:
                block.mul_(-c[at])
            else:
                log_p = block.clamp(min=TINY[block.dtype]).log_()
                block.mul_(log_p.add_(entropy[at]).mul_(-e[at]).sub_(c[at]))
            block.scatter_(1, targets[at], d_target[at])
            if slope is not None:
                block.mul_(slope)
        return out


def _blocks(z: Tensor) -> list[slice]:
    budget = BLOCK_BYTES.get(z.device.type)
    step = len(z) if budget is None else max(1, budget // (z.shape[1] * z.dtype.itemsize))
    return [slice(start, start + step) for start in range(0, len(z), max(1, step))]


def solve(chunk: TorchChunk, plan: Plan, part: Part) -> tuple[TorchChunk, Tensor, Tensor, Tensor | None]:
    """The chunk, its loss, ``c`` and ``e``: statistics first, then the objective on ``[n]`` vectors."""
    return chunk, *plan.gradients(chunk.logp, chunk.entropy, part)
