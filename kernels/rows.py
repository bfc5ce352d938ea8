"""The row kernels, whoever wrote them: statistics of logits ``[n, V]``, their gradient in place, or both in one kernel.

A backend is a module with three functions that launch a kernel each: ``statistics``, ``gradient`` and ``loss``.
``rows_triton`` is one, ``rows_cuda`` the other; plain torch works differently, on copies (``reference``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revisual_fast.kernels.plan import Inline, Part, Plan
from revisual_fast.kernels.reference import Transform


@dataclass(frozen=True)
class RawRows:
    """Raw logits and what turns them into those of the statistics."""

    z: Tensor  # [n, V]; rows may be strided
    targets: Tensor  # [n] int64
    transform: Transform
    bias: Tensor | None = None  # [V]

    def __post_init__(self) -> None:
        check_layout(self.z, self.targets, self.transform.temperature, self.bias)

    def vectors(self, count: int) -> list[Tensor]:
        """``count`` new ``[n]`` fp32 vectors."""
        return [self.z.new_empty(len(self.z), dtype=torch.float32) for _ in range(count)]


def check_layout(*tensors: Tensor | None) -> None:
    assert all(t is None or t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors), "rows and vectors are contiguous"


def row_kernels(backend: str) -> Any:
    """The module of a backend, ``triton`` or ``cuda``."""
    if backend == "cuda":
        from revisual_fast.kernels import rows_cuda

        return rows_cuda
    from revisual_fast.kernels import rows_triton

    return rows_triton


class KernelChunk:
    """Rows whose statistics a kernel has computed and whose gradient another one will; see :class:`plan.Chunk`."""

    def __init__(
        self,
        kernels: Any,  # of row_kernels
        rows: RawRows,
        out: Tensor | None = None,  # [n, V] where the gradient of all rows goes; may be the logits themselves
        dtype: torch.dtype | None = None,  # of the gradient where out is None
    ) -> None:
        self.kernels, self.rows, self.out, self.dtype = kernels, rows, out, dtype
        check_layout(out)
        self.logp, self.entropy, self.top, self.total = rows.vectors(4)
        if len(rows.z):
            kernels.statistics(rows, self.logp, self.entropy, self.top, self.total)

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`."""
        z, n = self.rows.z, len(self.rows.z) if index is None else len(index)
        whole = self.out is not None and index is None
        dz = self.out if whole else z.new_empty((n, z.shape[1]), dtype=self.dtype)
        assert dz is not None
        if n:
            of = (self.entropy, self.top, self.total, c.contiguous(), None if e is None else e.contiguous())
            self.kernels.gradient(self.rows, dz, index, *of)
        return dz


class SolvedChunk:
    """Rows whose gradient stands in ``dz`` already."""

    def __init__(self, logp: Tensor, entropy: Tensor, dz: Tensor) -> None:
        self.logp, self.entropy, self.dz = logp, entropy, dz

    def gradient(self, c: Tensor, e: Tensor | None, index: Tensor | None = None) -> Tensor:
        """See :class:`plan.Chunk`; ``c`` and ``e`` are those of :func:`solve`."""
        return self.dz if index is None else self.dz[index]


def solve(
    kernels: Any, rows: RawRows, plan: Plan, part: Part, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[KernelChunk | SolvedChunk, Tensor, Tensor, Tensor | None]:
    """The chunk, its loss, ``c`` and ``e``: in one kernel if the objective is inlined, else statistics first."""
    o: Inline | None = plan.inline
    if o is None:
        chunk = KernelChunk(kernels, rows, out, dtype)
        return chunk, *plan.gradients(chunk.logp, chunk.entropy, part)
    dz = rows.z.new_empty(rows.z.shape, dtype=dtype) if out is None else out
    check_layout(out, *o.vectors(part.rows))
    logp, entropy, loss, c, e = rows.vectors(5)
    if len(rows.z):
        kernels.loss(rows, dz, o, o.vectors(part.rows), logp, entropy, loss, c, e if o.has_entropy else None)
    return SolvedChunk(logp, entropy, dz), loss.sum(), c, e if o.has_entropy else None
