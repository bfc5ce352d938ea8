"""Policy losses of trainers that hold ``[bs, resp]`` tensors and weigh tokens their own way, as objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from revisual_fast.losses import PolicyObjective, Rows, TokenBatch, counted

__all__ = ["bounded", "clipped_weight", "differ_within", "prepared"]


def prepared(
    objective: PolicyObjective,
    log_probs: Tensor,  # [bs, resp]
    old_log_probs: Tensor,  # [bs, resp]
    advantages: Tensor,  # [bs, resp]
    mask: Tensor,  # [bs, resp] bool
    weight: Tensor,  # [bs, resp]: what a token's loss counts
    importance: Tensor | None = None,  # [bs, resp] rollout-correction weight, used as given
) -> tuple[Tensor, TokenBatch]:
    """Log-probs [N], N = bs * resp, 0 outside of the mask; and the tokens the objective is then called with."""
    tokens = TokenBatch(
        advantages.flatten(),
        old_logp=old_log_probs.flatten(),
        cu_seqlens=torch.arange(len(mask) + 1, dtype=torch.int32) * mask.shape[1],
        weight=weight.flatten(),
        importance=None if importance is None else importance.flatten(),
        mask=mask.flatten(),
    )
    logp = log_probs.flatten()
    tokens, _ = objective.prepare(tokens, len(logp), logp.dtype, logp.device)
    return counted(logp, tokens.mask), tokens


def bounded(logp: Tensor, tokens: TokenBatch) -> Tensor:
    """``logp`` [N] within 20 nats of the old one, and constant beyond: the exponential stays finite."""
    assert tokens.old_logp is not None
    difference = logp.detach() - tokens.old_logp
    return torch.where(difference.abs() > 20, tokens.old_logp + difference.clamp(-20, 20), logp)


def differ_within(values: Tensor, mask: Tensor) -> bool:
    """Whether the values [bs, resp] of some response differ between its tokens; waits for the device."""
    first = values.gather(1, mask.int().argmax(1, keepdim=True))
    return bool(((values != first) & mask).any())


def clipped_weight(rows: Rows) -> Tensor:
    """CISPO (arXiv 2506.13585) with a lower bound of the weight as well."""
    o = rows.objective
    return -rows.ratio.detach().clamp(1 - o.clip_low, 1 + o.clip_high) * rows.advantage * rows.logp
