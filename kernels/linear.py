"""From hidden states to log-probs, loss and gradients in chunks of rows: ``[N, V]`` never exists.

``N`` rows that have a target, hidden size ``D``, vocabulary ``V``. The gradient of a chunk is computed while its logits
are at hand: GEMM, statistics, ``c`` and ``e``, gradient. dX and dW are two GEMMs for every chunk or, where a device has
superchunks, for the gradient of several: 6 N D V FLOPs, 4 with a frozen head, 2 without gradient. A part that does not
fit in a chunk has its logits computed twice: 8 N D V. The GEMMs are the library's on every backend; what happens to a
chunk's rows between them is the backend's.

fp32 logits of bf16 or fp16 operands come from the GEMM itself on CUDA; elsewhere its operands are cast, block by block.
The gradient GEMMs multiply operands of hidden's dtype. dW is one product, or a sum of several in fp32.
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
    Sink,
    backward,
    policy_pass,
    rows_per_chunk,
    rows_per_superchunk,
    slices,
    statistics_dtype,
)
from revisual_fast.kernels.reference import Transform
from revisual_fast.kernels.rows import KernelChunk, RawRows, row_kernels, solve
from revisual_fast.kernels.superchunk import Superchunk
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
        self.superchunk = rows_per_superchunk(len(weight), hidden.dtype, hidden.device)
        size = rows_per_chunk(len(weight), hidden.dtype, hidden.device)
        self.size = min(size, self.superchunk) if self.superchunk else size
        self.weight_dtype = weight.dtype
        self.buffers: dict[str, Tensor] = {}

    @ranged("logits GEMM")
    def logits(self, rows: Rows, out: Tensor | None = None) -> Tensor:
        """Raw logits ``[n, V]`` without bias, of ``logits_dtype``: 2 n D V."""
        hidden = self.hidden[rows]
        out = self._buffer("logits", len(hidden), self.logits_dtype) if out is None else out
        return matmul(hidden, self.weight.t(), self.logits_dtype, out)

    def chunk(self, rows: Rows, sink: Sink | None = None) -> Chunk:
        z, place = self._logits_and_place(rows, sink)
        return self.chunk_of(z, rows, owned=self.saved is None, place=place)

    @ranged("rows")
    def chunk_of(self, z: Tensor, rows: Rows, owned: bool, place: Tensor | None = None) -> Chunk:
        """``z``: the raw logits of ``rows``; may be overwritten if ``owned``. ``place``: where their gradient goes."""
        if self.kernels is None:
            return self._torch_chunk(z, rows, owned)
        return KernelChunk(self.kernels, self._raw(z, rows), *self._gradient_of(z, owned, place))

    def solve(self, plan: Plan, part: Part, sink: Sink) -> tuple[Chunk, Tensor, Tensor, Tensor | None]:
        z, place = self._logits_and_place(part.rows, sink)
        with span("rows"):
            if self.kernels is None:
                return reference.solve(self._torch_chunk(z, part.rows, owned=True), plan, part)
            return solve(self.kernels, self._raw(z, part.rows), plan, part, *self._gradient_of(z, True, place))

    def _logits_and_place(self, rows: Rows, sink: Sink | None) -> tuple[Tensor, Tensor | None]:
        """The raw logits, and where their gradient goes, if there is a place for it: over the logits if as wide.

        The sink is asked once the logits have been queued, if they do not need the place themselves: it may read
        something from the device before it answers.
        """
        if self.saved is None and self.logits_dtype == self.hidden.dtype:
            place = None if sink is None else sink.place(rows)
            return self.logits(rows, place), place
        z = self.logits(rows) if self.saved is None else self.saved[rows]
        return z, None if sink is None else sink.place(rows)

    def _torch_chunk(self, z: Tensor, rows: Rows, owned: bool) -> reference.TorchChunk:
        if not owned or z.dtype != self.stats:
            z = self._buffer("statistics", len(z), self.stats).copy_(z)
        return reference.TorchChunk(z, self.targets[rows], self.transform.rows(rows), self.bias)

    def narrow(self, dz: Tensor) -> Tensor:
        """The gradient ``[k, V]`` of a chunk's logits in hidden's dtype."""
        if dz.dtype == self.hidden.dtype:
            return dz
        name = "logits" if self.logits_dtype == self.hidden.dtype else "gradient"  # the logits are not needed any more
        return self._buffer(name, len(dz), self.hidden.dtype).copy_(dz)

    def _gradient_of(self, z: Tensor, owned: bool, place: Tensor | None) -> tuple[Tensor | None, torch.dtype]:
        """Where a kernel's gradient goes (None: a new tensor; the logits, if ours and as wide), and its dtype."""
        if place is None and owned and z.dtype == self.hidden.dtype:
            place = z
        return place, self.hidden.dtype

    def _raw(self, z: Tensor, rows: Rows) -> RawRows:
        return RawRows(z, self.targets[rows], self.transform.rows(rows), self.bias)

    def _buffer(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        """``[n, V]`` used again by every chunk: on a GPU too, where one comes after the other."""
        if name not in self.buffers or len(self.buffers[name]) < n:
            self.buffers.pop(name, None)
            rows = n if self.superchunk else min(self.size, self.n_rows)
            self.buffers[name] = self.hidden.new_empty((rows, len(self.weight)), dtype=dtype)
        return self.buffers[name][:n]


class HeadGradient:
    """Accumulates dX ``[N, D]``, dW ``[V, D]`` and db ``[V]``, those that ``needs`` asks for."""

    def __init__(self, head: Head, needs: Sequence[bool], skip: bool, equal: bool = True) -> None:
        """``equal``: the rows are cut into superchunks of one length; whole sequences fill one as far as they fit."""
        self.head, self.needs = head, needs
        self.hidden = head.hidden.new_zeros(head.hidden.shape) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.held: Superchunk | None = None
        at_once = head.size
        if head.superchunk:
            at_once = slices(head.n_rows, head.superchunk)[0].stop if equal and head.n_rows else head.superchunk
            at_once = min(at_once, max(1, head.n_rows))
            self.held = Superchunk(at_once, len(head.weight), head.hidden, skip)
        direct = head.n_rows <= at_once and head.weight_dtype in (head.hidden.dtype, head.stats)
        self.dtype = head.weight_dtype if direct else head.stats  # of dW: the only product is rounded once

    def place(self, rows: Rows) -> Tensor | None:
        """See :class:`plan.Sink`. What is held is multiplied first if the rows do not fit beside it."""
        if self.held is None:
            return None
        assert isinstance(rows, slice)
        if not self.held.fits(rows):
            self._multiply(self.held.take())
        return self.held.place(rows)

    def add(self, rows: Rows, chunk: Chunk, c: Tensor, e: Tensor | None, index: Tensor | None) -> None:
        """See :class:`plan.Sink`."""
        with span("row gradients"):
            dz = chunk.gradient(c, e, index)
            if self.held is None:
                dz = self.head.narrow(dz)
            else:
                assert isinstance(rows, slice)
                place = self.held.place(rows)
                if dz.data_ptr() != place.data_ptr():
                    place.copy_(dz)
                return self.held.add(rows, c, e)
        if index is not None:
            rows = index + rows.start if isinstance(rows, slice) else rows[index]
        return self._multiply((dz, rows))

    def finish(self) -> None:
        """See :class:`plan.Sink`. The logits' memory is given back before the last products take some."""
        if self.held is not None:
            self.head.buffers.clear()
            self._multiply(self.held.take())

    def _multiply(self, taken: tuple[Tensor, Rows] | None) -> None:
        """Adds up the products of a gradient ``[k, V]`` with the head and with its rows of hidden: 4 k D V."""
        if taken is None:
            return
        (dz, rows), hidden = taken, self.head.hidden
        if self.needs[2]:
            total = dz.sum(dim=0, dtype=self.head.stats)
            self.bias = total if self.bias is None else self.bias.add_(total)
        if self.hidden is not None:
            with span("dX GEMM"):
                if isinstance(rows, slice):
                    matmul(dz, self.head.weight, hidden.dtype, self.hidden[rows])
                else:
                    self.hidden[rows] = matmul(dz, self.head.weight, hidden.dtype)
        if self.needs[1]:
            with span("dW GEMM"):
                self.weight = add_product(self.weight, dz.t(), hidden[rows], self.dtype)

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db), each in the dtype of what it is the gradient of. All buffers are given back first."""
        self.head.buffers.clear()
        self.held = None
        d_weight, d_bias = self.weight, self.bias
        if self.needs[1]:
            d_weight = weight.new_zeros(weight.shape) if d_weight is None else d_weight.to(weight.dtype)
        if self.needs[2] and bias is not None:
            d_bias = bias.new_zeros(bias.shape) if d_bias is None else d_bias.to(bias.dtype)
        return self.hidden, d_weight, d_bias


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` of ``dtype``, in total's memory; None is 0.

    A CPU's low-precision GEMM rounds the product before it is added, block by block.
    """
    if a.dtype == dtype or a.is_cuda:
        if total is None:
            return matmul(a, b, dtype)
        if a.dtype == dtype:
            return torch.addmm(total, a, b, out=total)
        return torch.ops.aten.addmm.dtype_out(total, a, b, dtype, out=total)
    found = a.new_empty((len(a), b.shape[1]), dtype=dtype) if total is None else total
    for part, rows in zip(found.split(_block(found.t())), a.split(_block(found.t())), strict=True):
        product = torch.mm(rows, b)
        part.copy_(product) if total is None else part.add_(product)
    return found


def policy_loss(
    head: Head, plan: Plan, needs: Sequence[bool]
) -> tuple[tuple[Tensor, Tensor, Tensor], HeadGradient | None]:
    """(loss, logp ``[N]``, entropy ``[N]``) and the gradients that ``needs`` (hidden, weight, bias) asks for."""
    if not any(needs):
        return policy_pass(head, None, plan), None
    sink = HeadGradient(head, needs, plan.skip, equal=plan.boundaries is None)
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
    sink = HeadGradient(head, needs, skip)
    backward(head, sink, slice(0, head.n_rows), c, e, skip)
    sink.finish()
    return sink
