"""M-RoPE: rotary position embedding in which a frequency takes one of three positions (time, height, width).

Qwen2-VL, arXiv 2409.12191, section 2.1. With ``half = d / 2`` frequencies, token ``t`` turns the pair of elements
``(x_i, x_{i + half})`` of every head by ``a = positions[axis[i], t] inv_freq[i]``::

    x_i -> scaling (x_i cos a - x_{i + half} sin a)        x_{i + half} -> scaling (x_{i + half} cos a + x_i sin a)

Angles are computed where they are used, once a token, so that no ``[T, d]`` tables of cosines lie in memory. They are
exact products in fp64, reduced to a quarter turn there, so that cosine and sine are right to fp32's last place at any
position; everything else is fp32 (all fp64 for fp64), rounded once to the dtype of q and k. Ops by themselves: the
models that ``revisual_fast.policy`` loads bring their own rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revisual_fast.kernels.dispatch import CUDA_DTYPES
from revisual_fast.kernels.plan import statistics_dtype
from revisual_fast.kernels.row_sums import packing_backend
from revisual_fast.ranges import ranged, span

__all__ = ["mrope", "mrope_", "mrope_axis"]


# the compiler loses the gradient where forward makes a copy_, or a .to() that changes nothing
_uncompiled = torch.compiler.disable(reason="the gradient of a compiled M-RoPE would be 0 in some torch releases")


def mrope_axis(section: Sequence[int], interleaved: bool = False) -> Tensor:
    """Which of the three positions each frequency takes: ``[sum(section)]`` int8, on the CPU.

    ``section`` counts the frequencies of time, height and width. They lie in that order (Qwen2-VL and Qwen2.5-VL), or
    ``interleaved`` as time, height, width, time, ... until height and width are used up, then time (Qwen3-VL, arXiv
    2511.21631). Raises ValueError for counts that cannot be laid out so.
    """
    if len(section) != 3 or min(section) < 0:
        raise ValueError(f"section must count the frequencies of time, height and width; got {list(section)}")
    time, height, width = section
    if not interleaved:
        return torch.tensor([0] * time + [1] * height + [2] * width, dtype=torch.int8)
    axis = torch.zeros(time + height + width, dtype=torch.int8)
    for which, count in ((1, height), (2, width)):
        axis[which : 3 * count : 3] = which
        if int((axis == which).sum()) != count:
            raise ValueError(
                f"section {list(section)} cannot be interleaved: there is too little time between the rest"
            )
    return axis


@dataclass(frozen=True)
class _Rotation:
    """What turns q and k, but for the direction."""

    positions: Tensor  # [3, T] int64
    inv_freq: Tensor  # [d / 2] fp32
    axis: Tensor  # [d / 2] int8
    scaling: float
    backend: str

    def apply(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], inverse: bool = False) -> None:
        """Turn one or two tensors ``[T, heads, d]`` in one launch; an output may be its input."""
        if self.backend == "torch":
            for x, out in zip(inputs, outputs, strict=True):
                out.copy_(_rotate_by_torch(x, self, inverse))
            return
        angles = self.positions, self.inv_freq, self.axis, self.scaling, inverse
        if self.backend == "cuda":
            (q, k), (q_out, k_out) = [*inputs, None][:2], [*outputs, None][:2]
            torch.ops.revisual_fast_cuda.mrope(q, k, *angles, q_out, k_out)
        else:
            from revisual_fast.kernels import packing_triton

            packing_triton.mrope(inputs, outputs, *angles)

    def backward(self, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients turned back, into new tensors: somebody else may hold the incoming ones."""
        given = [x if x.stride(-1) == 1 else x.contiguous() for x in upstream if x is not None]
        turned = [_like(x) for x in given]
        if given:
            with span("revisual_fast.mrope_backward"):
                self.apply(given, turned, inverse=True)
        rest = iter(turned)
        return [None if x is None else next(rest) for x in upstream]


@_uncompiled
@ranged("revisual_fast.mrope")
def mrope(
    q: Tensor,  # [T, H, d] bf16, fp16, fp32 or fp64
    k: Tensor,  # [T, Hkv, d], same dtype
    positions: Tensor,  # [3, T] int64
    inv_freq: Tensor,  # [d / 2] fp32
    axis: Tensor,  # [d / 2] int8, as mrope_axis gives it
    scaling: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`mrope_`, into new tensors with the strides of q and k; q and k may share memory, and be leaves, views
    or expanded. For q and k that are views of a projection it is the one to take where a gradient is wanted: it moves
    as many bytes, and spares the backward pass the copies that autograd makes for views that were changed in place.
    Like that op, it breaks the graph of ``torch.compile``.
    """
    rotation = _rotation(q, k, positions, inv_freq, axis, scaling, backend)
    return _OutOfPlace.apply(q, k, rotation)


@_uncompiled
@ranged("revisual_fast.mrope_")
def mrope_(
    q: Tensor,  # [T, H, d] bf16, fp16, fp32 or fp64
    k: Tensor,  # [T, Hkv, d], same dtype
    positions: Tensor,  # [3, T] int64
    inv_freq: Tensor,  # [d / 2] fp32
    axis: Tensor,  # [d / 2] int8, as mrope_axis gives it
    scaling: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Apply M-RoPE to q and k in place and return them; differentiable. For autograd, too, q and k are changed.

    Any strides over tokens and heads will do, so that ``x[0].transpose(0, 1)`` serves for ``x [1, H, T, d]``. ``auto``
    is cuda, triton or torch on a CUDA device, the first that can run, and torch elsewhere; fp64 runs on torch. A
    frequency whose axis is not 0, 1 or 2 gives nan.

    Under ``torch.compile`` both ops break the graph and run as they are: in some torch releases (2.11 is one) the
    compiler makes the gradient of such functions 0. With ``fullgraph=True`` it refuses them.

    Raises ValueError for what does not fit, and for tensors that cannot be changed in place: leaves that require a
    gradient, expanded ones, and q and k that share memory. Autograd itself refuses, by a RuntimeError, the outputs of
    ``split``, ``chunk`` and ``unbind``, and views of a leaf; for all of these there is :func:`mrope`.
    """
    rotation = _rotation(q, k, positions, inv_freq, axis, scaling, backend)
    for name, x in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError(f"{name} is a leaf that requires a gradient and cannot be changed in place; use mrope")
        if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"{name} is expanded and cannot be changed in place; use mrope")
    if _share_memory(q, k):
        raise ValueError("q and k share memory and cannot both be changed in place; use mrope")
    same = [q.detach(), k.detach()]
    rotation.apply(same, same)
    # one launch, but two steps for autograd, which lets a function that changes a view have only one output
    return _InPlace.apply(q, rotation), _InPlace.apply(k, rotation)


def _rotation(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, axis: Tensor, scaling: float, backend: str
) -> _Rotation:
    for name, x in (("q", q), ("k", k)):
        fits = x.ndim == 3 and x.shape[::2] == q.shape[::2] and x.dtype == q.dtype and x.is_floating_point()
        if not fits or x.shape[2] % 2 or x.device != q.device:
            raise ValueError(
                f"{name} must be [T, heads, d] of floating-point numbers, d even, and q and k alike in T, d, dtype and "
                f"device; got {list(x.shape)} {x.dtype} on {x.device}"
            )
        if x.stride(2) != 1 and x.numel() > 0:
            raise ValueError(f"the elements of a head must lie side by side; {name} has the strides {x.stride()}")
    tokens, half = len(q), q.shape[2] // 2
    for name, x, shape, dtype in (
        ("positions", positions, (3, tokens), torch.int64),
        ("inv_freq", inv_freq, (half,), torch.float32),
        ("axis", axis, (half,), torch.int8),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} on {q.device}; got {list(x.shape)} {x.dtype} on {x.device}"
            )
    if backend == "triton" and q.dtype not in CUDA_DTYPES:
        raise ValueError(f"backend='triton' has no rotation of {q.dtype}; use backend='auto' or 'torch'")
    backend = packing_backend(backend, q) if q.dtype in CUDA_DTYPES or backend == "cuda" else "torch"
    positions = positions if positions.stride(1) == 1 else positions.contiguous()
    return _Rotation(positions, inv_freq.contiguous(), axis.contiguous(), scaling, backend)


def _share_memory(
    q: Tensor,  # [T, H, d]
    k: Tensor,  # [T, Hkv, d]
) -> bool:
    """Whether an element is in both; where the tokens of q and of k lie at different distances, whether one may be."""
    if q.numel() == 0 or k.numel() == 0 or q.untyped_storage()._cdata != k.untyped_storage()._cdata:
        return False
    ends = [sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) for x in (q, k)]
    apart = k.storage_offset() - q.storage_offset()
    if not -ends[1] <= apart <= ends[0]:
        return False
    tokens, width, step = len(q), q.shape[2], max(1, q.stride(0))  # the step of a single token does not matter
    if tokens > 1 and step != k.stride(0):
        return True
    for head in range(q.shape[1]):
        for other in range(k.shape[1]):
            gap = int(apart + other * k.stride(1) - head * q.stride(1))  # of these heads of the same token
            later = min(max(round(gap / step), 1 - tokens), tokens - 1)
            if abs(gap - later * step) < width:
                return True
    return False


def _rotate_by_torch(x: Tensor, rotation: _Rotation, inverse: bool) -> Tensor:
    wide = statistics_dtype(x.dtype)
    axis = rotation.axis.clamp(0, 2)
    position = rotation.positions.index_select(0, axis.long())  # [d / 2, T]
    inv_freq = torch.where(axis == rotation.axis, rotation.inv_freq.double(), torch.nan)
    angle = (position.double() * inv_freq[:, None]).T[:, None]  # [T, 1, d / 2]
    cosine = angle.cos().to(wide) * rotation.scaling
    sine = angle.sin().to(wide) * (-rotation.scaling if inverse else rotation.scaling)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)


def _like(x: Tensor) -> Tensor:
    """An empty tensor with the strides of ``x`` where these leave no gaps; heads are contiguous in any case."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


class _OutOfPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor]:
        ctx.rotation = rotation
        ctx.set_materialize_grads(False)
        q_out, k_out = _like(q), _like(k)
        rotation.apply([q, k], [q_out, k_out])
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        d_q, d_k = ctx.rotation.backward(
            [x if needed else None for x, needed in zip(upstream, ctx.needs_input_grad, strict=False)]
        )
        return d_q, d_k, None


class _InPlace(torch.autograd.Function):
    """Tells autograd of the rotation of ``x``, which has been done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: _Rotation) -> Tensor:
        ctx.rotation = rotation
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        return ctx.rotation.backward([upstream])[0], None
