"""Rollouts as a few tensors, for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from revisual_fast.rollout.engine import Rollout

__all__ = ["from_tensors", "to_tensors"]


def to_tensors(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """The S rollouts, one after the other: ids and logp [T], lengths, finished and version [S], and their masks' ids
    [nnz] with how many each token has [T]; a token of a rollout without mask has -1."""
    counts = [r.mask[0].diff() if r.mask is not None else torch.full((len(r.ids),), -1) for r in rollouts]
    return {
        "ids": torch.cat([r.ids for r in rollouts]),
        "logp": torch.cat([r.logp for r in rollouts]),
        "lengths": torch.tensor([len(r.ids) for r in rollouts]),
        "finished": torch.tensor([r.finished for r in rollouts]),
        "version": torch.tensor([r.version for r in rollouts]),
        "kept": torch.cat([torch.empty(0, dtype=torch.long), *(r.mask[1] for r in rollouts if r.mask is not None)]),
        "kept_count": torch.cat(counts),
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """What :func:`to_tensors` was given."""
    lengths = tensors["lengths"].tolist()
    ids, logp, counts = (tensors[name].split(lengths) for name in ("ids", "logp", "kept_count"))
    kept = tensors["kept"].split([int(c.clamp(min=0).sum()) for c in counts])
    rollouts = []
    for i, (finished, version) in enumerate(
        zip(tensors["finished"].tolist(), tensors["version"].tolist(), strict=True)
    ):
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), counts[i].cumsum(0)])
        mask = None if (counts[i] < 0).any() else (indptr, kept[i].clone())
        rollouts.append(Rollout(ids[i].clone(), logp[i].clone(), "stop" if finished else "length", mask, version))
    return rollouts
