"""The objective: surrogate, KL, rollout correction, mask and aggregation in one frozen value."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from revisual_fast.losses.checks import at_least, one_of
from revisual_fast.losses.surrogates import KL_FORMS, SURROGATES, Rows, Surrogate
from revisual_fast.losses.tokens import (
    AGGREGATIONS,
    TokenBatch,
    aggregation_weights,
    counted,
    sequence_mean,
    sequence_sum,
)

LEVELS = ("token", "sequence")
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence_mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
    "bnpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    "luspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_sum"},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0, "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "token_mean"},
    "gmpo": {"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "aggregation": "sequence_mean"},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    "reinforce": {"surrogate": "reinforce", "aggregation": "token_mean"},
    "sft": {"surrogate": "sft", "aggregation": "token_mean"},
}


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised. Two axes, two fields: the surrogate is a token's loss, the aggregation how tokens are weighed.

    ``surrogate`` is a name of ``SURROGATES`` or a function of :class:`Rows`, such as ``lambda r: -r.advantage *
    r.logp``. ``kl_bias_correction`` multiplies the KL by the ratio, gradient through both. ``rollout_correction``
    multiplies the surrogate by ``w = exp(old - rollout_logp)`` (token level) or the exponential of the sequence's sum,
    detached: ``truncate`` gives ``min(w, rollout_cap)``, ``mask`` gives 0 where ``w > rollout_cap``; vespo takes ``w``
    into its own weight instead. ``off_policy_mask`` takes the surrogate, not KL and entropy, from rows with a negative
    advantage in sequences where the mean of ``rollout_logp - logp`` exceeds it, in nats (``old_logp`` where there is no
    ``rollout_logp``; on-policy without either nothing is masked). gmpo and vespo weigh whole sequences at
    ``level="token"``. Raises ValueError for a value outside its range, an unknown name, or settings that exclude each
    other.
    """

    surrogate: str | Surrogate = "clip"
    level: str = "token"  # token | sequence: what the ratio is taken over
    clip_low: float = 0.2  # the ratio may fall to 1 - clip_low; gmpo: its log to -clip_low, in nats
    clip_high: float = 0.2
    dual_clip: float | None = None  # > 1: a negative advantage's loss is at most -dual_clip * A
    delta: float | None = None  # upper bound of the ratio that is not clipped (INTELLECT-2, arXiv 2505.07291)
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    rollout_correction: str | None = None  # None | truncate | mask
    rollout_cap: float = 2.0
    rollout_level: str = "token"  # token | sequence
    off_policy_mask: float | None = None  # nats a token, > 0 (DeepSeek-V3.2, arXiv 2512.02556, eq. 9)
    aggregation: str = "token_mean"
    constant_length: float | None = None  # tokens; needed by aggregation="constant"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0  # how fast the weight of sequences that have become unlikely falls, A > 0
    vespo_lambda_pos: float = 3.0  # how fast that of sequences that have become likely does
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    key: str = field(init=False, repr=False, compare=False)  # from_key(key) == self; "" with a callable surrogate

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            one_of("surrogate", self.surrogate, SURROGATES, " or a callable")
        one_of("level", self.level, LEVELS)
        one_of("kl", self.kl, KL_FORMS)
        one_of("rollout_correction", self.rollout_correction, (None, "truncate", "mask"))
        one_of("rollout_level", self.rollout_level, LEVELS)
        one_of("aggregation", self.aggregation, AGGREGATIONS)
        for name in ("clip_low", "clip_high", "kl_coef", "vespo_k_pos", "vespo_k_neg"):
            at_least(name, getattr(self, name), 0, or_equal=True)
        for name in ("delta", "rollout_cap", "off_policy_mask", "constant_length", "sapo_tau_pos", "sapo_tau_neg"):
            at_least(name, getattr(self, name), 0)
        for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
            at_least(name, getattr(self, name), 0)
        at_least("dual_clip", self.dual_clip, 1)
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite; got {self.entropy_coef!r}")
        self._check_combinations()
        object.__setattr__(self, "key", self._key())

    def _check_combinations(self) -> None:
        if self.surrogate in ("gmpo", "vespo") and self.level == "sequence":
            raise ValueError(f"surrogate={self.surrogate!r} weighs whole sequences by itself: leave level='token'")
        if self.surrogate == "vespo" and self.rollout_correction and self.rollout_level == "sequence":
            raise ValueError("surrogate='vespo' multiplies the tokens' corrections: leave rollout_level='token'")

    def _key(self) -> str:
        if callable(self.surrogate):
            return ""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        number = {n: isinstance(v, numbers.Real) and not isinstance(v, bool) for n, v in values.items()}
        return json.dumps({name: float(value) if number[name] else value for name, value in values.items()})

    @classmethod
    @lru_cache
    def from_key(cls, key: str) -> PolicyObjective:
        """The objective whose ``key`` this is. Raises ValueError for that of an objective with a callable surrogate."""
        if not key:
            raise ValueError("an objective with a callable surrogate has no key; pass the objective itself")
        return cls(**json.loads(key))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PolicyObjective:
        """A published objective by name; every field can be overridden. Raises ValueError for an unknown name.

        grpo 2402.03300, dapo 2503.14476, dr_grpo 2503.20783 (give it ``constant_length``), gspo 2507.18071,
        cispo 2506.13585, sapo 2511.20347, luspo 2602.05261 (with gspo's clip range), gmpo 2507.20673,
        vespo 2602.10693.
        """
        one_of("preset", name, PRESETS)
        known = [f.name for f in fields(cls) if f.init]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"PolicyObjective has no {unknown}; it has {known}")
        return cls(**{**PRESETS[name], **overrides})

    def prepare(
        self, tokens: TokenBatch, n_rows: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[TokenBatch, str]:
        """Expand the batch to ``[N]``, derive ``weight`` (and ``importance`` where ``old_logp`` is known) once.

        Returns the batch and the objective's scope on it: "row", it can be evaluated on any rows
        (:meth:`TokenBatch.rows`), or "sequence", on any whole sequences (:meth:`TokenBatch.sequences`). Raises
        ValueError if the batch lacks a field that the objective needs.
        """
        self._require(tokens)
        tokens = tokens.expanded(n_rows, dtype, device)
        if tokens.weight is None:
            shape: tuple[Any, ...] = (n_rows, tokens.cu_seqlens, self.constant_length)
            weight = aggregation_weights(self.aggregation, *shape, mask=tokens.mask, dtype=dtype, device=device)
            tokens = replace(tokens, weight=weight)
        if self._derives_importance(tokens) and tokens.old_logp is not None:
            tokens = replace(tokens, importance=self.rollout_weight(tokens.old_logp, tokens))
        return tokens, "sequence" if self._why_sequences(tokens) else "row"

    def _derives_importance(self, tokens: TokenBatch) -> bool:
        return self.rollout_correction is not None and tokens.importance is None

    @property
    def _surrogate(self) -> Surrogate:
        return self.surrogate if callable(self.surrogate) else SURROGATES[self.surrogate]

    @property
    def _whole(self) -> bool:
        """Whether the surrogate gets whole sequences."""
        return self.level == "sequence" or getattr(self._surrogate, "needs_whole_sequences", False)

    def _why_sequences(self, tokens: TokenBatch) -> str | None:
        """The setting for which rows of a sequence have to stay together, or None."""
        if self.level == "sequence":
            return "level='sequence'"
        if self._whole:
            return f"surrogate={self.surrogate if isinstance(self.surrogate, str) else 'a function'!r}"
        if self._derives_importance(tokens) and self.rollout_level == "sequence":
            return "rollout_level='sequence'"
        return None if self._sampled(tokens) is None else "off_policy_mask"

    def _require(self, tokens: TokenBatch) -> None:
        missing = []
        if tokens.advantages is None and self.surrogate != "sft":
            missing.append("advantages: only surrogate='sft' goes without")
        if self.kl_coef != 0 and tokens.ref_logp is None:
            missing.append("ref_logp: pass it, or set kl_coef=0")
        if self._derives_importance(tokens) and tokens.rollout_logp is None:
            missing.append("rollout_logp: pass it, or set rollout_correction=None")
        reason = self._why_sequences(tokens)
        if tokens.cu_seqlens is None and reason is not None:
            missing.append(f"cu_seqlens: {reason} needs to know which rows form a sequence")
        if missing:
            raise ValueError("the objective needs tokens." + "; tokens.".join(missing))

    def log_ratio(self, logp: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` log of the ratio of the current to the old policy, token by token."""
        return logp - (logp.detach() if tokens.old_logp is None else tokens.old_logp)

    def ratio(self, logp: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` ratio of the current to the old policy, at the objective's level."""
        return self._ratio(self.log_ratio(logp, tokens), tokens)

    def _ratio(self, log_ratio: Tensor, tokens: TokenBatch) -> Tensor:
        if self.level == "sequence":
            assert tokens.cu_seqlens is not None, "prepare() checks this"
            log_ratio = sequence_mean(log_ratio, tokens.cu_seqlens, tokens.mask)
        return log_ratio.exp()

    def rollout_weight(self, old_logp: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` detached weight that corrects for the engine's log-probs (TIS, IcePop)."""
        assert tokens.rollout_logp is not None, "prepare() checks this"
        log_weight = old_logp.detach() - tokens.rollout_logp
        if self.rollout_level == "sequence":
            assert tokens.cu_seqlens is not None, "prepare() checks this"
            log_weight = sequence_sum(log_weight, tokens.cu_seqlens, tokens.mask)
        weight = log_weight.exp()
        if self.rollout_correction == "truncate":
            return weight.clamp(max=self.rollout_cap)
        return weight.masked_fill(weight > self.rollout_cap, 0.0)

    def importance(self, logp: Tensor, tokens: TokenBatch) -> Tensor | None:
        """``[N]`` rollout-correction weight, or None where the objective has none."""
        if self.rollout_correction is None:
            return None
        if tokens.importance is not None:
            return tokens.importance
        return self.rollout_weight(logp, tokens)  # on-policy; prepare() has done it where old_logp is known

    def _sampled(self, tokens: TokenBatch) -> Tensor | None:
        """``[N]`` log-probs at sampling that the mask compares to, or None where it cannot mask anything."""
        if self.off_policy_mask is None or tokens.advantages is None:  # no advantage is not a negative one
            return None
        return tokens.old_logp if tokens.rollout_logp is None else tokens.rollout_logp

    def masked(self, logp: Tensor, tokens: TokenBatch) -> Tensor | None:
        """``[N]`` bool, the rows that ``off_policy_mask`` takes the surrogate from, or None where there are none."""
        sampled = self._sampled(tokens)
        if sampled is None or self.off_policy_mask is None:
            return None
        assert tokens.cu_seqlens is not None, "prepare() checks this"
        assert tokens.advantages is not None, "without advantages nothing is masked"
        drift = sequence_mean(sampled - logp.detach(), tokens.cu_seqlens, tokens.mask)
        return (tokens.advantages < 0) & (drift > self.off_policy_mask)

    def rows(self, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` loss of every row before aggregation; ``tokens`` must have been prepared.

        Of rows that do not count log-prob and entropy must be 0, and so is the loss.
        """
        log_ratio, importance = self.log_ratio(logp, tokens), self.importance(logp, tokens)
        ratio = self._ratio(log_ratio, tokens)
        advantage = torch.ones_like(logp) if tokens.advantages is None else tokens.advantages
        boundaries = tokens.cu_seqlens if self._whole else None
        seen = Rows(logp, entropy, log_ratio, ratio, advantage, importance, self, boundaries, tokens.mask)
        loss = self._surrogate(seen)
        if loss.shape != logp.shape:
            raise ValueError(f"the surrogate must return one loss a row, {list(logp.shape)}; got {list(loss.shape)}")
        if importance is not None and self.surrogate != "vespo":
            loss = importance * loss
        masked = self.masked(logp, tokens)
        if masked is not None:
            loss = loss.masked_fill(masked, 0.0)
        if self.kl_coef != 0:
            assert tokens.ref_logp is not None, "prepare() checks this"
            kl = KL_FORMS[self.kl](tokens.ref_logp - logp)
            loss = loss + self.kl_coef * (ratio * kl if self.kl_bias_correction else kl)
        loss = loss if self.entropy_coef == 0 else loss - self.entropy_coef * entropy
        return counted(loss, tokens.mask)

    def __call__(self, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        """Scalar loss of the rows: ``sum(weight * rows)``; ``tokens`` must have been prepared."""
        assert tokens.weight is not None, "prepare() derives it"
        return (tokens.weight * self.rows(logp, entropy, tokens)).sum()


Objective = PolicyObjective | Callable[[Tensor, Tensor, TokenBatch], Tensor]
"""Also any callable ``(logp [N], entropy [N], tokens) -> scalar loss``, differentiable in its first two arguments."""


def loss_gradients(
    objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (scalar), ``c = dL/dlogp [N]`` and ``e = dL/dH [N]``, or None where the loss does not contain the entropy.

    Every objective reduces to these two numbers a row, whatever the backend. A row that does not count has a log-prob
    and an entropy of 0 for the objective, and ``c = e = 0``. Raises ValueError if a user's objective
    does not return a scalar.
    """
    # Hooks of whoever calls, activation checkpointing above all, have no business with this small graph.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x), torch.enable_grad():
        return _loss_gradients(objective, logp, entropy, tokens)


def loss_value(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
    """Loss (scalar), forward only: no graph of the objective is made. Otherwise as :func:`loss_gradients`."""
    with torch.no_grad():
        return _loss(objective, logp.detach(), entropy.detach(), tokens)


def _loss(objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
    loss = objective(counted(logp, tokens.mask), counted(entropy, tokens.mask), tokens)
    if loss.ndim != 0:
        raise ValueError(f"an objective must return a scalar loss; got {list(loss.shape)}: sum it with tokens.weight")
    return loss


def _loss_gradients(
    objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch
) -> tuple[Tensor, Tensor, Tensor | None]:
    logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    loss = _loss(objective, logp, entropy, tokens)
    if not loss.requires_grad:
        return loss, torch.zeros_like(logp), None
    c, e = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(logp) if c is None else c, e
