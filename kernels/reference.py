"""Plain torch for the row kernel: the backend for every device, and the yardstick of the others.

A row with logits ``z`` (after softcap, then temperature) and target ``y`` has ``logp = z_y - lse(z)`` and ``H = lse -
sum p z``. With ``c = dL/dlogp`` and ``e = dL/dH``, ``dL/dz_j = c (1[j=y] - p_j) - e p_j (log p_j + H)``. Statistics are
fp32 (fp64 for fp64 inputs). All passes over the logits go block by block, in sizes that stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revisual_fast.kernels.plan import Part, Plan

LOWEST = -1e30
"""Stands for minus infinity, so that ``p log p`` is 0 and not nan."""

BLOCK_BYTES = {"cpu": 8 << 20}
"""Logits that one pass after the other goes over before the next block's turn; no blocks on other devices."""


@dataclass(frozen=True)
class Transform:
    """From raw logits to the ``z`` of the statistics: softcap first (``cap tanh(z / cap)``), then ``/ temperature``."""

    temperature: Tensor | None = None  # [N]
    softcap: float | None = None

    def rows(self, rows: slice | Tensor) -> Transform:
        return Transform(None if self.temperature is None else self.temperature[rows], self.softcap)


class TorchChunk:
    """Logits ``[n, V]`` of the statistics' dtype, which this object overwrites."""

    def __init__(
        self,
        z: Tensor,  # [n, V] raw logits
        targets: Tensor,  # [n] int64
        transform: Transform,
        bias: Tensor | None = None,  # [V]
        p: Tensor | None = None,  # [n, V] to write the probabilities to
    ) -> None:
        self.targets, self.transform = targets[:, None], transform
        self.z, self.p = z, torch.empty_like(z) if p is None else p
        self.top, self.log_total, entropy = (z.new_empty(len(z), 1) for _ in range(3))
        for at in _blocks(z):
            scaled = None if transform.temperature is None else transform.temperature[at, None]
            self._normalise(at, z[at] if bias is None else z[at].add_(bias), scaled, entropy)
        self.logp = (z.gather(1, self.targets) - self.log_total)[:, 0]
        self.entropy = entropy[:, 0]

    def _normalise(self, at: slice, z: Tensor, temperature: Tensor | None, entropy: Tensor) -> None:
        """Softmax of a block; its logits become ``z - max``."""
        if self.transform.softcap is not None:
            z.div_(self.transform.softcap).tanh_().mul_(self.transform.softcap)
        if temperature is not None:
            z.div_(temperature)
        self.top[at] = z.amax(dim=1, keepdim=True)
        z.sub_(self.top[at]).clamp_(min=LOWEST)
        p = torch.softmax(z, dim=1, out=self.p[at])
        self.log_total[at] = p.amax(dim=1, keepdim=True).log_().neg_()  # the largest is exp(0) / total
        entropy[at] = self.log_total[at] - torch.linalg.vecdot(p, z, dim=1)[:, None]

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`."""
        rows = slice(None) if index is None else index
        c, t = c[rows, None], self.transform.rows(rows).temperature
        e = None if e is None else e[rows, None]
        if t is not None:
            c, e = c / t[:, None], None if e is None else e / t[:, None]
        p, target = self.p[rows], self.targets[rows]
        z = p if e is None and self.transform.softcap is None else self.z[rows]
        slopes = self._slopes(z, rows, t)
        if e is not None:
            shift = e * (self.log_total[rows] - self.entropy[rows, None]) - c
        for at in _blocks(p):
            slope = slopes(at)
            block = p[at].mul_(-c[at] if e is None else z[at].mul_(-e[at]).add_(shift[at]))
            block.scatter_(1, target[at], block.gather(1, target[at]) + c[at])
            if slope is not None:
                block.mul_(slope)
        return p

    def _slopes(self, z: Tensor, rows: slice | Tensor, temperature: Tensor | None) -> Callable[[slice], Tensor | None]:
        """For a block: d(softcapped logit) / d(raw logit), or None without softcap."""
        cap, top = self.transform.softcap, self.top[rows]

        def slope(at: slice) -> Tensor | None:
            if cap is None:
                return None
            capped = z[at] + top[at]
            if temperature is not None:
                capped.mul_(temperature[at, None])
            return capped.div_(cap).square_().neg_().add_(1)

        return slope


def _blocks(z: Tensor) -> list[slice]:
    budget = BLOCK_BYTES.get(z.device.type)
    step = len(z) if budget is None else max(1, budget // (z.shape[1] * z.dtype.itemsize))
    return [slice(start, start + step) for start in range(0, len(z), max(1, step))]


def solve(chunk: TorchChunk, plan: Plan, part: Part) -> tuple[TorchChunk, Tensor, Tensor, Tensor | None]:
    """The chunk, its loss, ``c`` and ``e``: statistics first, then the objective on ``[n]`` vectors."""
    return chunk, *plan.gradients(chunk.logp, chunk.entropy, part)
