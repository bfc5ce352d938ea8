"""From hidden states to log-probs, loss and gradients in chunks of rows: ``[N, V]`` never exists.

``N`` rows that have a target, hidden size ``D``, vocabulary ``V``. The gradient of a chunk is computed while its logits
are at hand: GEMM, statistics, ``c`` and ``e``, gradient in place, dX GEMM, dW GEMM: 6 N D V FLOPs, 4 with a frozen
head, 2 without gradient. A part that does not fit in a chunk has its logits computed twice: 8 N D V. The GEMMs are the
library's on every backend; what happens to a chunk's rows between them is the backend's.

fp32 logits of bf16 or fp16 operands come from the GEMM itself on CUDA; elsewhere its operands are cast, block by block.
The gradient GEMMs multiply operands of hidden's dtype. dW is accumulated in fp32 across chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revisual_fast.kernels import reference
from revisual_fast.kernels.plan import (
    SAVED_BYTES,
    Chunk,
    Part,
    Plan,
    backward,
    policy_pass,
    rows_per_chunk,
    slices,
    statistics_dtype,
)
from revisual_fast.kernels.reference import Transform
from revisual_fast.kernels.rows import KernelChunk, RawRows, row_kernels, solve
from revisual_fast.ranges import ranged, span

BLOCK_BYTES = 4 << 20
"""Of the weight or its gradient in fp32, what a CPU converts or adds up at a time: it stays in the cache."""

Rows = slice | Tensor


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``a @ b`` with a result of ``dtype``, accumulated in at least that precision."""
    if a.dtype == b.dtype == dtype:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    out = a.new_empty((len(a), b.shape[1]), dtype=dtype) if out is None else out
    wide = a.to(dtype)
    for columns, part in zip(b.split(_block(b), dim=1), out.split(_block(b), dim=1), strict=True):
        torch.mm(wide, columns.to(dtype), out=part)  # a copy of all of b would be as large as an fp32 weight
    return out


def _block(b: Tensor) -> int:
    """Columns of ``b [D, V]`` that a CPU has in its cache, in fp32."""
    return max(1, BLOCK_BYTES // (b.shape[0] * 4))


class Head:
    """Logits as ``hidden @ weight.T + bias``. Shapes and dtypes have been checked by ``revisual_fast.ops``."""

    def __init__(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        transform: Transform,
        logits_dtype: torch.dtype,
        backend: str,
        saved: Tensor | None = None,  # [N, V] raw logits of an earlier pass, not to be overwritten
    ) -> None:
        self.hidden, self.targets, self.transform, self.saved = hidden, targets.contiguous(), transform, saved
        self.weight = weight.to(hidden.dtype)
        self.stats = statistics_dtype(hidden.dtype)
        self.logits_dtype = torch.promote_types(logits_dtype, hidden.dtype)
        self.bias = None if bias is None else bias.to(self.stats).contiguous()
        self.n_rows, self.device = len(hidden), hidden.device
        self.kernels = None if backend == "torch" else row_kernels(backend)
        self.size = rows_per_chunk(len(weight), hidden.dtype, hidden.device)
        self.buffers: dict[str, Tensor] = {}

    @ranged("logits GEMM")
    def logits(self, rows: Rows, out: Tensor | None = None) -> Tensor:
        """Raw logits ``[n, V]`` without bias, of ``logits_dtype``: 2 n D V."""
        hidden = self.hidden[rows]
        out = self._buffer("logits", len(hidden), self.logits_dtype) if out is None else out
        return matmul(hidden, self.weight.t(), self.logits_dtype, out)

    def chunk(self, rows: Rows) -> Chunk:
        z = self.logits(rows) if self.saved is None else self.saved[rows]
        return self.chunk_of(z, rows, owned=self.saved is None)

    @ranged("rows")
    def chunk_of(self, z: Tensor, rows: Rows, owned: bool) -> Chunk:
        """``z``: the raw logits of ``rows``; may be overwritten if ``owned``."""
        if self.kernels is None:
            return self._torch_chunk(z, rows, owned)
        return KernelChunk(self.kernels, self._raw(z, rows), *self._gradient_of(z, owned))

    def solve(self, plan: Plan, part: Part) -> tuple[Chunk, Tensor, Tensor, Tensor | None]:
        z = self.logits(part.rows)
        with span("rows"):
            if self.kernels is None:
                return reference.solve(self._torch_chunk(z, part.rows, owned=True), plan, part)
            return solve(self.kernels, self._raw(z, part.rows), plan, part, *self._gradient_of(z, owned=True))

    def _torch_chunk(self, z: Tensor, rows: Rows, owned: bool) -> reference.TorchChunk:
        if not owned or z.dtype != self.stats:
            wide = self._buffer("statistics", len(z), self.stats)
            z = z.to(self.stats, copy=True) if wide is None else wide.copy_(z)
        return reference.TorchChunk(z, self.targets[rows], self.transform.rows(rows), self.bias)

    def narrow(self, dz: Tensor) -> Tensor:
        """The gradient ``[k, V]`` of a chunk's logits in hidden's dtype."""
        if dz.dtype == self.hidden.dtype:
            return dz
        name = "logits" if self.logits_dtype == self.hidden.dtype else "gradient"  # the logits are not needed any more
        out = self._buffer(name, len(dz), self.hidden.dtype)
        return dz.to(self.hidden.dtype) if out is None else out.copy_(dz)

    def _gradient_of(self, z: Tensor, owned: bool) -> tuple[Tensor | None, torch.dtype]:
        """Where a kernel's gradient goes (None: a new tensor; the logits, if ours and as wide), and its dtype."""
        return z if owned and z.dtype == self.hidden.dtype else None, self.hidden.dtype

    def _raw(self, z: Tensor, rows: Rows) -> RawRows:
        return RawRows(z, self.targets[rows], self.transform.rows(rows), self.bias)

    def _buffer(self, name: str, n: int, dtype: torch.dtype) -> Tensor | None:
        """``[n, V]`` used again by every chunk. None on CUDA: the allocator does it there, and two chunks are alive."""
        if self.hidden.is_cuda:
            return None
        if name not in self.buffers:
            self.buffers[name] = self.hidden.new_empty((min(self.size, self.n_rows), len(self.weight)), dtype=dtype)
        return self.buffers[name][:n]


class HeadGradient:
    """Accumulates dX ``[N, D]``, dW ``[V, D]`` and db ``[V]`` over chunks, those that ``needs`` asks for."""

    def __init__(self, head: Head, needs: Sequence[bool]) -> None:
        self.head = head
        zeros = head.hidden.new_zeros
        self.hidden = zeros(head.hidden.shape) if needs[0] else None
        self.weight = zeros(head.weight.shape, dtype=head.stats) if needs[1] else None
        self.bias = zeros(len(head.weight), dtype=head.stats) if needs[2] else None

    def add(self, rows: Rows, chunk: Chunk, c: Tensor, e: Tensor | None, index: Tensor | None) -> None:
        hidden = self.head.hidden
        with span("row gradients"):
            dz = self.head.narrow(chunk.gradient(c, e, index))
        if index is not None:
            rows = index + rows.start if isinstance(rows, slice) else rows[index]
        if self.bias is not None:
            self.bias.add_(dz.sum(dim=0, dtype=self.bias.dtype))
        if self.hidden is not None:
            with span("dX GEMM"):
                self.hidden[rows] = matmul(dz, self.head.weight, hidden.dtype)
        if self.weight is not None:
            with span("dW GEMM"):
                _accumulate(self.weight, dz.t(), hidden[rows])

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db), each in the dtype of what it is the gradient of. The chunks' buffers are given back first."""
        self.head.buffers.clear()
        d_weight = None if self.weight is None else self.weight.to(weight.dtype)
        d_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, d_weight, d_bias


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in total's dtype. A CPU's low-precision GEMM rounds the product first, block by block."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        for part, rows in zip(total.split(_block(total.t())), a.split(_block(total.t())), strict=True):
            part.add_(torch.mm(rows, b))


def policy_loss(
    head: Head, plan: Plan, needs: Sequence[bool]
) -> tuple[tuple[Tensor, Tensor, Tensor], HeadGradient | None]:
    """(loss, logp ``[N]``, entropy ``[N]``) and the gradients that ``needs`` (hidden, weight, bias) asks for."""
    sink = HeadGradient(head, needs) if any(needs) else None
    return policy_pass(head, sink, plan), sink


def fits(n_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the logits of all rows are within ``SAVED_BYTES``."""
    return n_rows * vocab * dtype.itemsize <= SAVED_BYTES.get(device.type, SAVED_BYTES["cpu"])


def logprob(head: Head, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """logp ``[N]``, entropy ``[N]`` and, if ``keep`` and within ``SAVED_BYTES``, the raw logits ``[N, V]``."""
    logp = torch.empty(head.n_rows, dtype=head.stats, device=head.device)
    entropy = torch.empty_like(logp)
    shape, saved = (head.n_rows, len(head.weight)), None
    if keep and fits(*shape, head.logits_dtype, head.device):
        saved = head.hidden.new_empty(shape, dtype=head.logits_dtype)
    for rows in slices(head.n_rows, head.size):
        z = head.logits(rows, None if saved is None else saved[rows])
        chunk = head.chunk_of(z, rows, owned=saved is None)
        logp[rows], entropy[rows] = chunk.logp, chunk.entropy
    return logp, entropy, saved


def logprob_backward(head: Head, c: Tensor, e: Tensor | None, needs: Sequence[bool], skip: bool) -> HeadGradient:
    """Gradients for upstream ``c [N]`` and ``e [N]``; with ``skip``, rows where both are 0 are left out."""
    sink = HeadGradient(head, needs)
    backward(head, sink, slice(0, head.n_rows), c, e, skip)
    return sink
