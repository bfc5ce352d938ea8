"""verl's policy losses as this package's objectives, under names of their own.

``loss_mode: revisual_fast`` is what verl calls vanilla, ``revisual_fast_gspo`` its gspo, and so on: the same settings,
metrics and aggregation. :func:`register_objective` adds any other :class:`PolicyObjective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss

from revisual_fast.integrations import seams
from revisual_fast.integrations.padded_loss import bounded, clipped_weight, differ_within, prepared
from revisual_fast.losses import PolicyObjective, TokenBatch, counted, sequence_mean
from revisual_fast.objective_metrics import policy_metrics

__all__ = ["NAME", "POLICY_LOSSES", "PolicyLoss", "register_objective"]

NAME = "revisual_fast"
Metrics = Callable[[PolicyObjective, Tensor, TokenBatch], dict[str, Tensor]]
"""(objective, logp [N], prepared tokens) -> 0-d tensors."""


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss as ``verl.trainer.ppo.core_algos.register_policy_loss`` takes it.

    ``objective`` makes the objective from verl's actor configuration; it is aggregated by ``aggregation``, or else by
    verl's ``loss_agg_mode``. ``bounded``: log-ratios end 20 nats from 0, as in verl. ``whole``: verl's gradient is this
    objective's if all tokens of a response have one advantage, and ``one_weight`` if one rollout weight as well.
    """

    objective: Callable[[Any], PolicyObjective]
    metrics: Metrics
    aggregation: str | None = None  # one of verl's modes, or "batch-mean": 1 / bs for a response, with tokens or not
    bounded: bool = False
    whole: bool = False
    one_weight: bool = False

    def __call__(
        self,
        old_log_prob: Tensor,  # [bs, resp]
        log_prob: Tensor,  # [bs, resp]
        advantages: Tensor,  # [bs, resp]
        response_mask: Tensor,  # [bs, resp] bool, or 0 and 1
        loss_agg_mode: str = "token-mean",
        config: Any = None,  # verl's ActorConfig
        rollout_is_weights: Tensor | None = None,  # [bs, resp]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss (scalar, differentiable in ``log_prob``) and metrics; nothing outside of the mask matters.

        Raises ValueError without a configuration, and where advantages or weights differ within a response although the
        objective is of whole responses.
        """
        if config is None:
            raise ValueError("verl's policy losses need config=<the actor's configuration>")
        mask = response_mask.bool()
        _check_whole("advantages", advantages if self.whole else None, mask)
        _check_whole("rollout_is_weights", rollout_is_weights if self.one_weight else None, mask)
        objective, weights = self.objective(config), rollout_is_weights
        if weights is not None:  # used as given: the objective is told that there is a correction, and no more
            objective = replace(objective, rollout_correction="truncate")
        weight = _weights(self.aggregation or loss_agg_mode, mask, log_prob.dtype, config.global_batch_info)
        logp, tokens = prepared(objective, log_prob, old_log_prob, advantages, mask, weight, weights)
        if objective.surrogate == "gmpo" and tokens.importance is not None:
            tokens = replace(tokens, importance=_geometric_mean(tokens.importance, tokens))
        logp = bounded(logp, tokens) if self.bounded else logp
        loss = objective(logp, torch.zeros_like(logp), tokens)
        with torch.no_grad():
            metrics = self.metrics(objective, logp.detach(), tokens)
        read = torch.stack(list(metrics.values())).tolist() if metrics else []
        return loss, dict(zip((f"actor/{name}" for name in metrics), read, strict=True))


def _check_whole(name: str, values: Tensor | None, mask: Tensor) -> None:
    """Raises ValueError where the values [bs, resp] of a response differ."""
    if values is not None and differ_within(values, mask):
        raise ValueError(
            f"{name} differ between the tokens of a response, and this loss has one ratio for the whole of it: use "
            "verl's own loss_mode, or one value for each response"
        )


def _weights(mode: str, mask: Tensor, dtype: torch.dtype, info: dict[str, Any]) -> Tensor:
    """[bs, resp] weight of every token: verl's aggregation is linear in the losses, so its gradient is the weights."""
    if mode == "batch-mean":
        return mask.to(dtype) / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1))
    with torch.enable_grad():
        losses = torch.zeros(mask.shape, dtype=dtype, device=mask.device, requires_grad=True)
        total = agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **info)
        return torch.autograd.grad(total, losses)[0]


def _geometric_mean(weights: Tensor, tokens: TokenBatch) -> Tensor:
    """[N] rollout weights -> each the geometric mean of its response, where one of 0 counts as 1e-10."""
    assert tokens.cu_seqlens is not None
    return sequence_mean((weights + 1e-10).log(), tokens.cu_seqlens, tokens.mask).exp()


# verl's settings


def _clips(config: Any) -> dict[str, Any]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def _vanilla(config: Any) -> PolicyObjective:
    return PolicyObjective(**_clips(config), dual_clip=config.get("clip_ratio_c", 3.0))


def _gspo(config: Any) -> PolicyObjective:
    return PolicyObjective(level="sequence", **_clips(config))


def _sapo(config: Any) -> PolicyObjective:
    return PolicyObjective(surrogate="sapo", sapo_tau_pos=config.tau_pos, sapo_tau_neg=config.tau_neg)


def _gpg(config: Any) -> PolicyObjective:
    return PolicyObjective(surrogate="reinforce")


def _cispo(config: Any) -> PolicyObjective:
    return PolicyObjective(surrogate=clipped_weight, **_clips(config))


def _geo_mean(config: Any) -> PolicyObjective:
    return PolicyObjective(surrogate="gmpo", **_clips(config))


# verl's metrics


def _mean(values: Tensor, tokens: TokenBatch) -> Tensor:
    assert tokens.mask is not None
    return counted(values.float(), tokens.mask).sum() / (tokens.mask.sum() + 1e-8)


def _of_clip(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    assert tokens.advantages is not None
    ratio, minus = o.ratio(logp, tokens), -tokens.advantages
    free, held = minus * ratio, minus * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    lower = torch.zeros_like(minus)
    if o.dual_clip is not None:
        lower = (torch.maximum(free, held) > minus * o.dual_clip) & (minus > 0)
    return _verls(held > free, lower, o, logp, tokens)


def _of_sapo(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    return _verls(torch.zeros_like(logp), torch.zeros_like(logp), o, logp, tokens)


def _of_cispo(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    ratio = o.ratio(logp, tokens)
    clipped = (ratio < 1 - o.clip_low) | (ratio > 1 + o.clip_high)
    return _verls(clipped, torch.zeros_like(logp), o, bounded(logp, tokens), tokens)


def _of_geo_mean(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    assert tokens.advantages is not None
    log_ratio = o.log_ratio(logp, tokens)
    clipped = (log_ratio < -o.clip_low) | (log_ratio > o.clip_high)
    return _verls(clipped & (tokens.advantages > 0), clipped & (tokens.advantages < 0), o, logp, tokens)


def _verls(clipped: Tensor, lower: Tensor, o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    kl = _mean(-o.log_ratio(logp, tokens), tokens)
    return {"pg_clipfrac": _mean(clipped, tokens), "ppo_kl": kl, "pg_clipfrac_lower": _mean(lower, tokens)}


def _of_gpg(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    return {}


def _of_any(o: PolicyObjective, logp: Tensor, tokens: TokenBatch) -> dict[str, Tensor]:
    """verl's estimate of the KL, and this package's metrics of the objective; the entropy is verl's business."""
    found = policy_metrics(o, logp, torch.zeros_like(logp), tokens)
    del found["entropy"]
    return {"ppo_kl": _mean(-o.log_ratio(logp, tokens), tokens), **found}


POLICY_LOSSES: dict[str, PolicyLoss] = {
    NAME: PolicyLoss(_vanilla, _of_clip, bounded=True),
    f"{NAME}_gspo": PolicyLoss(_gspo, _of_clip, whole=True, one_weight=True),
    f"{NAME}_sapo": PolicyLoss(_sapo, _of_sapo, aggregation="seq-mean-token-mean", bounded=True),
    f"{NAME}_gpg": PolicyLoss(_gpg, _of_gpg),
    f"{NAME}_cispo": PolicyLoss(_cispo, _of_cispo),
    f"{NAME}_geo_mean": PolicyLoss(_geo_mean, _of_geo_mean, aggregation="batch-mean", whole=True),
}
"""``actor.policy_loss.loss_mode`` -> the loss; without the prefix, verl's name."""


def register_objective(name: str, objective: PolicyObjective) -> None:
    """Make ``objective`` the loss of ``loss_mode: <name>`` until ``unpatch``; its aggregation is verl's loss_agg_mode.

    Raises ValueError for a name that verl or this package has given, and for terms that verl adds or weighs by itself.
    """
    if name in POLICY_LOSS_REGISTRY and getattr(POLICY_LOSS_REGISTRY[name], "metrics", None) is not _of_any:
        raise ValueError(f"loss_mode {name!r} exists already: choose another name")
    for field, instead in (("kl_coef", "use_kl_loss and kl_loss_coef"), ("entropy_coef", "entropy_coeff")):
        if getattr(objective, field) != 0:
            raise ValueError(f"{field}={getattr(objective, field)}: verl adds this term itself; set actor.{instead}")
    if objective.rollout_correction is not None:
        raise ValueError("rollout_correction: verl computes the weights itself; set algorithm.rollout_correction")
    seams.replace("verl", POLICY_LOSS_REGISTRY, name, PolicyLoss(lambda config: objective, _of_any, bounded=True))
