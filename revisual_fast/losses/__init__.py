"""Policy objectives as functions of ``[N]`` vectors: log-prob and entropy of every row in, one scalar loss out.

The loss is ``sum_t weight_t * (w_t * l_t + kl_coef * KL_t - entropy_coef * H_t)``: the surrogate gives ``l``, the
rollout correction ``w``, the aggregation ``weight``. ``N`` rows have a target; sequence ``s`` of ``S`` owns the rows
``cu_seqlens[s] : cu_seqlens[s + 1]``. The ratio of a row to the policy that sampled it is ``r = exp(logp - old)`` at
token level and ``exp(mean over the sequence of (logp - old))`` at sequence level, with the gradient through the mean
(GSPO, arXiv 2507.18071). Rows where ``mask`` is False are as good as not there. A new surrogate is one function and one
entry of ``SURROGATES`` in ``surrogates.py``.

A caller's own surrogate takes :class:`Rows`; KL, correction, mask and aggregation are added to it as usual::

    mine = PolicyObjective(surrogate=lambda r: -r.ratio.detach().clamp(max=2) * r.advantage * r.logp, kl_coef=0.01)

A caller's own objective takes everything and is the whole loss::

    def objective(logp, entropy, tokens):  # [N], [N], TokenBatch -> scalar
        return -(tokens.advantages * logp).mean() - 0.01 * entropy.mean()

Of rows that do not count it gets zeros, and whatever gradient it gives them is dropped; a mean has to heed
``tokens.mask`` by itself. Where no gradient is wanted it is called under ``torch.no_grad``.
"""

from revisual_fast.losses.objective import PRESETS, Objective, PolicyObjective, loss_gradients, loss_value
from revisual_fast.losses.surrogates import KL_FORMS, SURROGATES, Rows, Surrogate, whole_sequences
from revisual_fast.losses.tokens import (
    AGGREGATIONS,
    TokenBatch,
    aggregation_weights,
    check_mask,
    counted,
    segment_ids,
    segment_mean,
    segment_sum,
    sequence_mean,
    sequence_sum,
)

__all__ = [
    "AGGREGATIONS",
    "KL_FORMS",
    "PRESETS",
    "SURROGATES",
    "Objective",
    "PolicyObjective",
    "Rows",
    "Surrogate",
    "TokenBatch",
    "aggregation_weights",
    "check_mask",
    "counted",
    "loss_gradients",
    "loss_value",
    "segment_ids",
    "segment_mean",
    "segment_sum",
    "sequence_mean",
    "sequence_sum",
    "whole_sequences",
]
