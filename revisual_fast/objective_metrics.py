"""What is worth watching of a policy loss, from the same ``[N]`` vectors: 0-d tensors, nothing read back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revisual_fast.losses import Objective, PolicyObjective, TokenBatch, counted, segment_mean

__all__ = ["metric_names", "policy_metrics"]

_OF_A_FUNCTION = PolicyObjective(surrogate="reinforce")
"""Stands for a caller's own objective, of which only entropy, token ratio and KL are known."""


def metric_names(objective: Objective, tokens: TokenBatch) -> tuple[str, ...]:
    """The keys of :func:`policy_metrics`, in order: they follow from the settings and from which fields are there."""
    o = objective if isinstance(objective, PolicyObjective) else _OF_A_FUNCTION
    names = ["entropy", "ratio/mean", "ratio/max"]
    names += ["clip_fraction"] * (o.surrogate in ("clip", "cispo", "gmpo"))
    names += ["masked_sequences"] * (o.off_policy_mask is not None)
    names += ["kl"] * (tokens.ref_logp is not None)
    names += ["importance/mean", "importance/max"] * (o.rollout_correction is not None)
    return tuple(names)


@torch.no_grad()
def policy_metrics(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    """0-d tensors, plain means and maxima over the rows that count (0 if there are none), without host sync.

    ``entropy``; ``ratio/mean``, ``ratio/max`` at the objective's level; ``clip_fraction`` (clip, cispo, gmpo), the
    share of rows whose bound is active; ``masked_sequences``, the share of sequences that ``off_policy_mask`` takes
    out; ``kl``, the k3 estimate to the reference, where ``ref_logp`` is given; ``importance/mean``, ``importance/max``
    with a rollout correction. ``tokens`` must have been prepared. Of a caller's own function only entropy, token ratio
    and kl are known.
    """
    o = objective if isinstance(objective, PolicyObjective) else _OF_A_FUNCTION
    ratio, importance, mask = o.ratio(logp, tokens), o.importance(logp, tokens), tokens.mask
    metrics = {"entropy": _mean(entropy, mask), "ratio/mean": _mean(ratio, mask), "ratio/max": _max(ratio, mask)}
    clipped = _clipped(o, o.log_ratio(logp, tokens) if o.surrogate == "gmpo" else ratio, tokens)
    if clipped is not None:
        metrics["clip_fraction"] = _mean(clipped.to(logp.dtype), mask)
    if o.off_policy_mask is not None:
        metrics["masked_sequences"] = _sequence_share(o.masked(logp, tokens), logp, tokens)
    if tokens.ref_logp is not None:
        difference = tokens.ref_logp - logp
        metrics["kl"] = _mean(torch.expm1(difference) - difference, mask)
    if importance is not None:
        metrics["importance/mean"], metrics["importance/max"] = _mean(importance, mask), _max(importance, mask)
    return metrics


def _clipped(o: PolicyObjective, ratio: Tensor, tokens: TokenBatch) -> Tensor | None:
    """``[N]`` bool, or None for a surrogate without bounds; of gmpo, ``ratio`` is the log-ratio."""
    if o.surrogate == "cispo":
        return ratio > 1 + o.clip_high
    if o.surrogate not in ("clip", "gmpo"):
        return None
    assert tokens.advantages is not None, "prepare() checks this"
    positive, negative = tokens.advantages > 0, tokens.advantages < 0
    if o.surrogate == "gmpo":
        return (positive & (ratio > o.clip_high)) | (negative & (ratio < -o.clip_low))
    top, delta = 1 + o.clip_high, math.inf if o.delta is None else o.delta
    clipped = (positive & (ratio > min(top, delta))) | (negative & (ratio < 1 - o.clip_low))
    for bound in (max(top, delta), math.inf if o.dual_clip is None else o.dual_clip):
        clipped |= negative & (ratio > bound)
    return clipped


def _sequence_share(masked: Tensor | None, logp: Tensor, tokens: TokenBatch) -> Tensor:
    """Mean over the sequences of the share of their rows that is masked: all or nothing with one advantage each."""
    if masked is None:
        return logp.new_zeros(())
    assert tokens.cu_seqlens is not None, "prepare() checks this"
    return _mean(segment_mean(masked.to(logp.dtype), tokens.cu_seqlens, tokens.mask))


def _mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    return counted(values, mask).sum() / (max(len(values), 1) if mask is None else mask.sum().clamp(min=1))


def _max(values: Tensor, mask: Tensor | None) -> Tensor:
    if len(values) == 0:
        return values.new_zeros(())
    return values.max() if mask is None else values.masked_fill(~mask, -math.inf).max().masked_fill(~mask.any(), 0)
