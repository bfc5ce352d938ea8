"""The policy loss of logits ``[N, V]`` that exist already, and their gradient: in their place, or beside them."""

from __future__ import annotations

from torch import Tensor

from revisual_fast.kernels import reference
from revisual_fast.kernels.plan import Chunk, Part, Plan, policy_pass, rows_per_chunk, statistics_dtype
from revisual_fast.kernels.reference import Transform


class Logits:
    """Source of the logits and, with ``gradient`` (which may be the logits themselves), sink of their gradient.

    The torch backend works on fp32 copies of a few rows at a time, a kernel on all rows at once.
    """

    def __init__(
        self,
        logits: Tensor,  # [N, V]
        targets: Tensor,  # [N]
        transform: Transform,
        backend: str,
        gradient: Tensor | None = None,  # [N, V]
    ) -> None:
        self.logits, self.targets, self.transform, self.gradient = logits, targets.contiguous(), transform, gradient
        self.n_rows, self.device, self.backend = len(logits), logits.device, backend
        self.stats = statistics_dtype(logits.dtype)
        chunk = rows_per_chunk(logits.shape[1], logits.dtype, logits.device)
        self.size = max(self.n_rows, 1) if backend == "triton" else chunk

    def chunk(self, rows: slice | Tensor) -> Chunk:
        z, of = self.logits[rows], (self.targets[rows], self.transform.rows(rows))
        if self.backend == "triton":
            from revisual_fast.kernels.rows import TritonChunk

            return TritonChunk(z, *of, out=self._out(rows))
        return reference.TorchChunk(z.to(self.stats, copy=True), *of)

    def solve(self, plan: Plan, part: Part) -> tuple[Chunk, Tensor, Tensor, Tensor | None]:
        z, of = self.logits[part.rows], (self.targets[part.rows], self.transform.rows(part.rows))
        if self.backend == "triton":
            from revisual_fast.kernels.rows import solve

            return solve(z, *of, None, plan, part, out=self._out(part.rows))
        return reference.solve(reference.TorchChunk(z.to(self.stats, copy=True), *of), plan, part)

    def _out(self, rows: slice | Tensor) -> Tensor | None:
        return None if self.gradient is None else self.gradient[rows]

    def add(self, rows: slice | Tensor, chunk: Chunk, c: Tensor, e: Tensor | None, index: Tensor | None) -> None:
        assert self.gradient is not None
        assert index is None, "every row of the gradient has to be written"
        out = self.gradient[rows]
        dz = chunk.gradient(c, e)
        if dz.data_ptr() != out.data_ptr():
            out.copy_(dz)


def policy_loss(
    logits: Tensor, targets: Tensor, plan: Plan, transform: Transform, backend: str, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), logp ``[N]``, entropy ``[N]``; the gradient is written to ``gradient``, if given."""
    source = Logits(logits, targets, transform, backend, gradient)
    return policy_pass(source, None if gradient is None else source, plan)
