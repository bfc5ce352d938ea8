"""Drawing tokens: one number in [0, 1) for each, so that a completion depends on nothing but its own numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from revisual_fast.ranges import ranged
from revisual_fast.rollout.engine import Sampling

__all__ = ["Drawn", "sample"]

BLOCK = 256
"""Ids whose weights are added up before one of the sums is drawn: a running sum over a large vocabulary would round."""


class Drawn(NamedTuple):
    """One token for each row."""

    token: Tensor  # [S] int64
    logp: Tensor  # [S] fp32: of the distribution sampled from
    kept: tuple[Tensor, Tensor] | None  # counts [S] and ids [nnz] int64, row after row: what top-k and top-p left


@ranged("sample")
def sample(
    logits: Tensor,  # [S, V] fp32
    sampling: Sampling,
    uniform: Tensor,  # [S] fp64 in [0, 1)
) -> Drawn:
    """Draw by inverting the distribution function at ``uniform``; greedy where the temperature is 0.

    A greedy token's log-prob is that of the whole distribution at temperature 1, and no ids are left out.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return Drawn(token, _at(logits, token) - logits.logsumexp(-1), None)
    scaled, kept = logits / sampling.temperature, None
    if sampling.truncated:
        scaled = _truncate(scaled, sampling)
        if sampling.masks:
            inside = scaled > -torch.inf
            kept = inside.sum(-1), inside.nonzero()[:, 1]
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # [S, V / BLOCK, BLOCK]
    block, rest, total = _pick(blocks.sum(-1), uniform)
    inside_block = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    token = (block * BLOCK + _pick(inside_block, rest)[0]).clamp_(max=logits.shape[1] - 1)  # of logits that are nan
    return Drawn(token, _at(scaled, token) - top[:, 0] - total.log().float(), kept)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None])[:, 0]


def _pick(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weights [S, W] >= 0, uniform [S] fp64 -> index [S] drawn by weight, what is left of ``uniform`` within it (again
    in [0, 1)), and the sum of the weights, fp64. An index of weight 0 is never drawn."""
    ends = weights.double().cumsum(-1)
    total = ends[:, -1]
    point = torch.minimum(uniform * total, total * (1 - 1e-15))
    index = torch.searchsorted(ends, point[:, None], right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
    width = _at(weights, index).double()
    rest = (point - _at(ends, index)) / width + 1
    return index, rest.clamp_(0, 1 - 1e-15), total


def _truncate(scaled: Tensor, sampling: Sampling) -> Tensor:
    """-inf outside the top-k (ties stay), then outside the smallest set whose probability reaches top_p."""
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scaled.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p)
        scaled = scaled.masked_fill(drop, -torch.inf)
    return scaled
