"""What an objective knows about the rows besides their logits, sums over sequences, and aggregation weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from revisual_fast.losses.checks import one_of

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


@dataclass(frozen=True)
class TokenBatch:
    """What an objective knows about the rows besides their logits. All of it is constant: no gradient flows into it."""

    advantages: Tensor | None  # [N], or [S] with cu_seqlens (meant if N = S); None only for surrogate "sft"
    old_logp: Tensor | None = None  # [N] or None = on-policy: old := detach(logp), so the ratio is exactly 1
    ref_logp: Tensor | None = None  # [N] log-probs of the reference policy, needed by kl_coef != 0
    rollout_logp: Tensor | None = None  # [N] log-probs of the inference engine, needed by rollout_correction
    cu_seqlens: Tensor | None = None  # [S+1] int32: which rows form a sequence
    weight: Tensor | None = None  # [N] aggregation weight; None = derived from objective.aggregation
    importance: Tensor | None = None  # [N] rollout-correction weight; None = derived from rollout_logp
    mask: Tensor | None = None  # [N] bool; False = the row does not count: as if it were not there. None = all count

    def expanded(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> TokenBatch:
        """The same batch with ``[N]`` tensors of ``dtype`` on ``device``, detached, after a check of every shape.

        Whatever stands in rows that do not count becomes 0. The values of ``cu_seqlens`` are checked where it lies on
        the CPU; elsewhere that would stall the device. Raises ValueError, which names the field and the shape it should
        have.
        """
        for name in [f.name for f in fields(self) if getattr(self, f.name) is not None and device.type != "meta"]:
            if getattr(self, name).is_meta:
                raise ValueError(f"tokens.{name} is on the meta device and has no values: materialise it first")
        cu, sequences = self.cu_seqlens, None
        if cu is not None:
            _check_cu_seqlens(cu, n_rows)
            cu, sequences = cu.to(device, non_blocking=True).contiguous(), (len(cu) - 1,)
        out: dict[str, Tensor] = {}
        if self.mask is not None:
            check_mask(self.mask, n_rows)
            out["mask"] = self.mask.to(device, non_blocking=device.type == "cuda").contiguous()
        for name in self._row_fields():
            if name == "mask":
                continue
            value = getattr(self, name).detach().to(device=device, dtype=dtype, non_blocking=device.type == "cuda")
            if name == "advantages" and cu is not None and value.shape == sequences:
                value = value[segment_ids(cu, n_rows)]
            if value.shape != (n_rows,):
                shapes = f"[{n_rows}] (or [S] with cu_seqlens)" if name == "advantages" else f"[{n_rows}]"
                raise ValueError(f"tokens.{name} must be {shapes}, one value a row; got {list(value.shape)}")
            out[name] = counted(value, out.get("mask")).contiguous()
        return replace(self, cu_seqlens=cu, **out)

    def rows(self, rows: slice) -> TokenBatch:
        """Any rows of an expanded batch, without ``cu_seqlens``: for an objective whose scope is "row"."""
        return replace(self, cu_seqlens=None, **{name: getattr(self, name)[rows] for name in self._row_fields()})

    def sequences(self, sequences: slice, rows: slice) -> TokenBatch:
        """Whole consecutive sequences of an expanded batch: for an objective whose scope is "sequence".

        ``rows`` are the rows of these sequences, as host integers, so that nothing is read back from a device.
        """
        assert self.cu_seqlens is not None, "there are no sequences to cut"
        bounds = self.cu_seqlens[sequences.start : sequences.stop + 1]
        return replace(self.rows(rows), cu_seqlens=bounds - bounds[0])

    def _row_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "cu_seqlens" and getattr(self, f.name) is not None]


def check_mask(mask: Tensor, n_rows: int) -> None:
    """Raises ValueError if ``tokens.mask`` is not ``[N]`` bool."""
    if mask.shape != (n_rows,) or mask.dtype != torch.bool:
        raise ValueError(
            f"tokens.mask must be [{n_rows}] bool, one for each row; got {list(mask.shape)} {mask.dtype}: "
            f"mask.bool().flatten()"
        )


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values [N]`` with 0 where ``mask [N]`` is False; None counts every row. Differentiable."""
    return values if mask is None else values.masked_fill(~mask, 0)


def _check_cu_seqlens(cu_seqlens: Tensor, n_rows: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens.cu_seqlens must be [S+1] int32; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"tokens.cu_seqlens must rise from 0 to N = {n_rows}; got {cu_seqlens.tolist()}")


# Sums over sequences. No host sync (lengths are given, ``unsafe`` leaves out checks that read back) and no atomics, so
# that two runs agree to the last bit.


def segment_ids(cu_seqlens: Tensor, n_rows: int) -> Tensor:
    """``[S+1]`` boundaries -> ``[N]`` int64, the sequence of every row."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=n_rows)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[N]`` -> ``[S]``, the sum of every sequence, 0 for one without rows; added up in fp64."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True).to(values.dtype)


class _SequenceSum(torch.autograd.Function):
    """Its matrix is symmetric, so its backward pass is itself: a gather's own backward would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return segment_sum(values, cu_seqlens)[segment_ids(cu_seqlens, len(values))]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return _SequenceSum.apply(d_out, cu_seqlens), None


def sequence_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[N]`` -> ``[N]``: every row gets the sum over its sequence. Differentiable.

    With a ``mask [N]``, it is that of the rows that count; the others are left out and get 0.
    """
    return counted(_SequenceSum.apply(counted(values, mask), cu_seqlens), mask)


def sequence_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[N]`` -> ``[N]``: every row gets the mean over its sequence; otherwise as :func:`sequence_sum`."""
    lengths = _lengths(cu_seqlens, mask)[segment_ids(cu_seqlens, len(values))]
    return sequence_sum(values, cu_seqlens, mask) / lengths


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[N]`` -> ``[S]``, the mean over the rows of each sequence that count, 0 for one without such rows."""
    return segment_sum(counted(values, mask), cu_seqlens) / _lengths(cu_seqlens, mask)


def _lengths(cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """``[S]`` int: how many rows of each sequence count, at least 1 so that one can divide by it."""
    lengths = cu_seqlens.diff() if mask is None else segment_sum(mask.double(), cu_seqlens).to(cu_seqlens.dtype)
    return lengths.clamp(min=1)


def aggregation_weights(
    aggregation: str,
    n_rows: int,
    cu_seqlens: Tensor | None = None,
    constant_length: float | None = None,
    *,
    mask: Tensor | None = None,  # [N] bool, the rows that count
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """``[N]`` weights of the rows in the loss.

    token_mean ``1/N``; sequence_mean ``1/(S n_s)``; sequence_sum ``1/S``; constant ``1/(S constant_length)``, where
    ``S`` counts sequences without rows too. With a ``mask`` only its rows are in ``N`` and ``n_s``, and the others get
    0. A caller that spreads a batch over micro-batches or ranks computes them once for the whole batch and gives each
    part its own. Raises ValueError if an argument that is needed is missing.
    """
    one_of("aggregation", aggregation, AGGREGATIONS)
    if mask is not None:
        check_mask(mask, n_rows)
        device = mask.device if device is None else device
        mask = mask.to(device, non_blocking=device.type == "cuda")
    return counted(_weights(aggregation, n_rows, cu_seqlens, constant_length, mask, dtype, device), mask)


def _weights(
    aggregation: str,
    n_rows: int,
    cu_seqlens: Tensor | None,
    constant_length: float | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    if aggregation == "token_mean":
        if mask is not None:
            return mask.sum().clamp(min=1).double().reciprocal().to(dtype).expand(n_rows)
        return torch.full((n_rows,), 1 / max(n_rows, 1), dtype=dtype, device=device)
    if cu_seqlens is None:
        raise ValueError(f"aggregation={aggregation!r} counts sequences: pass tokens.cu_seqlens, or tokens.weight")
    n_sequences = max(len(cu_seqlens) - 1, 1)
    if aggregation == "sequence_mean":
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return (1 / (n_sequences * _lengths(cu_seqlens, mask).to(dtype)))[segment_ids(cu_seqlens, n_rows)]
    if aggregation == "sequence_sum":
        return torch.full((n_rows,), 1 / n_sequences, dtype=dtype, device=device)
    if constant_length is None:
        raise ValueError("aggregation='constant' needs constant_length: the longest completion allowed, in tokens")
    return torch.full((n_rows,), 1 / (n_sequences * constant_length), dtype=dtype, device=device)
