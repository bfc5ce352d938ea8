"""What is worth watching of a policy loss, from the same ``[N]`` vectors: 0-d tensors, nothing read back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revisual_fast.losses import Objective, PolicyObjective, TokenBatch, counted, segment_mean

__all__ = ["metric_names", "metric_values", "policy_metrics"]

_OF_A_FUNCTION = PolicyObjective(surrogate="reinforce")
"""Stands for a caller's own objective, of which only entropy, token ratio and KL are known."""


def metric_names(objective: Objective, tokens: TokenBatch) -> tuple[str, ...]:
    """The keys of :func:`policy_metrics`, in order: they follow from the settings and from which fields are there."""
    o = objective if isinstance(objective, PolicyObjective) else _OF_A_FUNCTION
    corrected = o.rollout_correction is not None
    means = ["entropy", "ratio/mean"] + ["importance/mean"] * corrected
    means += ["clip_fraction"] * (o.surrogate in ("clip", "cispo", "gmpo")) + ["kl"] * (tokens.ref_logp is not None)
    maxima = ["ratio/max"] + ["importance/max"] * corrected
    return (*means, *maxima, *["masked_sequences"] * (o.off_policy_mask is not None))


def policy_metrics(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    """0-d tensors, plain means and maxima over the rows that count (0 if there are none), without host sync.

    ``entropy``; ``ratio/mean``, ``ratio/max`` at the objective's level; ``clip_fraction`` (clip, cispo, gmpo), the
    share of rows whose bound is active; ``masked_sequences``, the share of sequences that ``off_policy_mask`` takes
    out; ``kl``, the k3 estimate to the reference, where ``ref_logp`` is given; ``importance/mean``, ``importance/max``
    with a rollout correction. ``tokens`` must have been prepared. Of a caller's own function only entropy, token ratio
    and kl are known.
    """
    values = metric_values(objective, logp, entropy, tokens)
    return dict(zip(metric_names(objective, tokens), values.unbind(), strict=True))


@torch.no_grad()
def metric_values(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
    """``[M]`` the values of :func:`policy_metrics`, in order: every mean and maximum from one ``[k, N]`` tensor, so
    that few kernels are launched.
    """
    o, mask = objective if isinstance(objective, PolicyObjective) else _OF_A_FUNCTION, tokens.mask
    if len(logp) == 0:
        return logp.new_zeros(len(metric_names(objective, tokens)))
    weights = [o.ratio(logp, tokens)]
    importance = o.importance(logp, tokens)
    weights += [] if importance is None else [importance]
    others = []
    clipped = _clipped(o, o.log_ratio(logp, tokens) if o.surrogate == "gmpo" else weights[0], tokens)
    if clipped is not None:
        others.append(clipped.to(logp.dtype))
    if tokens.ref_logp is not None:
        difference = tokens.ref_logp - logp
        others.append(torch.expm1(difference) - difference)
    rows = counted(torch.stack([entropy, *weights, *others]), mask)
    means = rows.mean(dim=1) if mask is None else rows.sum(dim=1) / mask.sum().clamp(min=1)
    maxima = rows[1 : 1 + len(weights)].amax(dim=1)  # none is negative, so a row that does not count is no maximum
    shares = [] if o.off_policy_mask is None else [_sequence_share(o.masked(logp, tokens), logp, tokens).reshape(1)]
    return torch.cat([means, maxima, *shares])


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
    clipped = torch.where(positive, ratio > min(top, delta), negative & (ratio < 1 - o.clip_low))
    beyond = min(max(top, delta), math.inf if o.dual_clip is None else o.dual_clip)
    return clipped if beyond == math.inf else clipped | (negative & (ratio > beyond))


def _sequence_share(masked: Tensor | None, logp: Tensor, tokens: TokenBatch) -> Tensor:
    """Mean over the sequences of the share of their rows that is masked: all or nothing with one advantage each."""
    if masked is None:
        return logp.new_zeros(())
    assert tokens.cu_seqlens is not None, "prepare() checks this"
    return segment_mean(masked.to(logp.dtype), tokens.cu_seqlens, tokens.mask).mean()
