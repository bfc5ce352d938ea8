"""verl's fused head, ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, by :func:`linear_logprob`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

from revisual_fast.integrations.seams import warn_once
from revisual_fast.ops import gather_rows, linear_logprob

__all__ = ["linear_cross_entropy", "needed_rows"]

_NEEDED: ContextVar[Tensor | None] = ContextVar("revisual_fast_needed_rows", default=None)


@contextmanager
def needed_rows(needed: Tensor | None) -> Iterator[None]:
    """Inside, the head computes only the rows where ``needed [rows]`` is True; the others, which nobody reads, are nan.

    For a head that is called with exactly as many rows; None: all of them.
    """
    token = _NEEDED.set(needed)
    try:
        yield
    finally:
        _NEEDED.reset(token)


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...] int
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy, ``[rows]`` fp32 each; differentiable, any device, any hidden size.

    Rows whose upstream gradient is 0, a prompt's for example, take no part in the backward products. Other reductions
    and a vocabulary that is split over processes are left to verl's own kernels, with one warning.
    """
    if dist_process_group is not None or reduction.lower() != "none":
        what = "a vocabulary split over processes" if dist_process_group is not None else f"reduction={reduction!r}"
        warn_once(f"revisual_fast: {what} is left to verl's own linear_cross_entropy")
        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if torch.promote_types(rows.dtype, weight.dtype) != weight.dtype:
        rows = rows.to(weight.dtype)
    needed = _NEEDED.get()
    if needed is None or needed.shape != targets.shape:
        return linear_logprob(rows, weight, targets, temperature=temperature)
    index = needed.nonzero().flatten()
    found = linear_logprob(gather_rows(rows, index), weight, targets[index], temperature=temperature)
    logp, entropy = (torch.full_like(targets, torch.nan, dtype=x.dtype).index_copy(0, index, x) for x in found)
    return logp, entropy
