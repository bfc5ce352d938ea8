"""The policy loss of logits ``[N, V]`` that exist already, and their gradient: in their place, or beside them."""

from __future__ import annotations

from torch import Tensor

from revisual_fast.kernels import reference
from revisual_fast.kernels.plan import Chunk, Part, Plan, Sink, policy_pass, rows_per_chunk, statistics_dtype
from revisual_fast.kernels.reference import Transform
from revisual_fast.kernels.rows import KernelChunk, RawRows, row_kernels, solve


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
        self.n_rows, self.device = len(logits), logits.device
        self.kernels = None if backend == "torch" else row_kernels(backend)
        self.stats = statistics_dtype(logits.dtype)
        chunk = rows_per_chunk(logits.shape[1], logits.dtype, logits.device)
        self.size = chunk if self.kernels is None else max(self.n_rows, 1)
        self.superchunk = 0

    def chunk(self, rows: slice | Tensor, sink: Sink | None = None) -> Chunk:
        if self.kernels is None:
            return self._copied(rows)
        return KernelChunk(self.kernels, self._raw(rows), self.place(rows))

    def solve(self, plan: Plan, part: Part, sink: Sink) -> tuple[Chunk, Tensor, Tensor, Tensor | None]:
        if self.kernels is None:
            return reference.solve(self._copied(part.rows), plan, part)
        return solve(self.kernels, self._raw(part.rows), plan, part, self.place(part.rows))

    def _copied(self, rows: slice | Tensor) -> reference.TorchChunk:
        z = self.logits[rows].to(self.stats, copy=True)
        return reference.TorchChunk(z, self.targets[rows], self.transform.rows(rows))

    def _raw(self, rows: slice | Tensor) -> RawRows:
        return RawRows(self.logits[rows], self.targets[rows], self.transform.rows(rows))

    def place(self, rows: slice | Tensor) -> Tensor | None:
        """See :class:`plan.Sink`."""
        return None if self.gradient is None else self.gradient[rows]

    def finish(self) -> None:
        """See :class:`plan.Sink`: everything is written."""

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
    if gradient is not None and 0 < source.n_rows <= source.size:  # one part, as always on a kernel
        whole = Part(slice(0, source.n_rows))
        chunk, loss, c, e = source.solve(plan, whole, source)
        source.add(whole.rows, chunk, c, e, None)
        return loss, chunk.logp, chunk.entropy
    return policy_pass(source, None if gradient is None else source, plan)
