"""How far the trainer's log-probs are from those that the engine sampled with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mismatch_metrics"]


def mismatch_metrics(differences: Sequence[Tensor]) -> dict[str, float]:
    """The distribution of d = trainer - engine, in nats a token, over all tokens of ``differences`` (each [n] fp32).

    ``kl`` estimates KL(engine || trainer) from the engine's own samples, each token giving exp(d) - d - 1 >= 0 (the k3
    estimator, http://joschu.net/blog/kl-approx.html); ``p01`` and ``p99`` are quantiles. Without tokens there is
    nothing to say: {}.
    """
    if not sum(len(d) for d in differences):
        return {}
    d = torch.cat([d.cpu() for d in differences]).double().sort().values
    return {
        "mismatch/mean": float(d.mean()),
        "mismatch/std": float(d.std(correction=0)),
        "mismatch/min": float(d[0]),
        "mismatch/p01": float(d[round(0.01 * (len(d) - 1))]),
        "mismatch/p99": float(d[round(0.99 * (len(d) - 1))]),
        "mismatch/max": float(d[-1]),
        "mismatch/kl": float((d.exp() - d - 1).mean()),
    }
