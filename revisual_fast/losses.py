"""Policy objectives as functions of ``[N]`` vectors: log-prob and entropy of every row in, one scalar loss out.

The loss is ``sum_t weight_t * (w_t * l_t + kl_coef * KL_t - entropy_coef * H_t)``: the surrogate gives ``l``, the
rollout correction ``w``, the aggregation ``weight``. ``N`` rows have a target; sequence ``s`` of ``S`` owns the rows
``cu_seqlens[s] : cu_seqlens[s + 1]``. The ratio of a row to the policy that sampled it is ``r = exp(logp - old)`` at
token level and ``exp(mean over the sequence of (logp - old))`` at sequence level, with the gradient through the mean
(GSPO, arXiv 2507.18071). A new surrogate is one function and one entry of ``SURROGATES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Objective", "PolicyObjective", "TokenBatch", "aggregation_weights", "loss_gradients", "segment_ids"]


@dataclass(frozen=True)
class TokenBatch:
    """What an objective knows about the rows besides their logits. All of it is constant: no gradient flows into it."""

    advantages: Tensor | None  # [N], or [S] with cu_seqlens; None only where the surrogate has none ("sft")
    old_logp: Tensor | None = None  # [N] or None = on-policy: old := detach(logp), so the ratio is exactly 1
    ref_logp: Tensor | None = None  # [N] log-probs of the reference policy, needed by kl_coef != 0
    rollout_logp: Tensor | None = None  # [N] log-probs of the inference engine, needed by rollout_correction
    cu_seqlens: Tensor | None = None  # [S+1] int32: which rows form a sequence
    weight: Tensor | None = None  # [N] aggregation weight; None = derived from objective.aggregation
    importance: Tensor | None = None  # [N] rollout-correction weight; None = derived from rollout_logp

    def expanded(self, n_rows: int, dtype: torch.dtype, device: torch.device) -> TokenBatch:
        """The same batch with ``[N]`` tensors of ``dtype`` on ``device``, detached, after a check of every shape.

        The values of ``cu_seqlens`` are checked where it lies on the CPU; elsewhere that would stall the device.
        Raises ValueError, which names the field and the shape it should have.
        """
        cu, sequences = self.cu_seqlens, None
        if cu is not None:
            _check_cu_seqlens(cu, n_rows)
            cu, sequences = cu.to(device), (len(cu) - 1,)
        out: dict[str, Tensor] = {}
        for name in self._row_fields():
            value = getattr(self, name).detach().to(device=device, dtype=dtype)
            if name == "advantages" and cu is not None and value.shape == sequences:
                value = value[segment_ids(cu, n_rows)]
            if value.shape != (n_rows,):
                shapes = f"[{n_rows}] (or [S] with cu_seqlens)" if name == "advantages" else f"[{n_rows}]"
                raise ValueError(f"tokens.{name} must be {shapes}, one value a row; got {list(value.shape)}")
            out[name] = value
        return replace(self, cu_seqlens=cu, **out)

    def rows(self, rows: slice) -> TokenBatch:
        """The rows of an expanded batch, without ``cu_seqlens``: only row-local objectives can be cut like this."""
        return replace(self, cu_seqlens=None, **{name: getattr(self, name)[rows] for name in self._row_fields()})

    def _row_fields(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "cu_seqlens" and getattr(self, f.name) is not None]


def _check_cu_seqlens(cu_seqlens: Tensor, n_rows: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens.cu_seqlens must be [S+1] int32; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"tokens.cu_seqlens must rise from 0 to N = {n_rows}; got {cu_seqlens.tolist()}")


def segment_ids(cu_seqlens: Tensor, n_rows: int) -> Tensor:
    """``[S+1]`` boundaries -> ``[N]`` int64, the sequence of every row. No host sync: the length is given."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=n_rows)


def segment_sum(values: Tensor, ids: Tensor, n_segments: int) -> Tensor:
    """``[N]`` values and segment ids -> ``[S]`` sums, differentiable."""
    return values.new_zeros(n_segments).index_add(0, ids, values)


# Surrogates: (ratio [N], logp [N], advantage [N], objective) -> loss [N]


def _clip(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347), unequal bounds from DAPO (2503.14476), dual clip (1912.09729)."""
    capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
    loss = -torch.minimum(capped * advantage, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage)
    if o.dual_clip is None:
        return loss
    bound = -o.dual_clip * advantage
    return torch.where((advantage < 0) & (loss > bound), bound, loss)


def _cispo(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
    """MiniMax-M1's clipped importance weight times the log-prob (arXiv 2506.13585)."""
    return -ratio.detach().clamp(max=1 + o.clip_high) * advantage * logp


def _sapo(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
    """Soft gate in place of the clip (arXiv 2511.20347); its slope at ratio 1 is 1."""
    tau = torch.full_like(advantage, o.sapo_tau_neg).masked_fill(advantage > 0, o.sapo_tau_pos)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage


def _reinforce(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
    return -advantage * logp


def _sft(ratio: Tensor, logp: Tensor, advantage: Tensor, o: PolicyObjective) -> Tensor:
    return -logp


Surrogate = Callable[[Tensor, Tensor, Tensor, "PolicyObjective"], Tensor]
SURROGATES: dict[str, Surrogate] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "reinforce": _reinforce,
    "sft": _sft,
}
# KL forms: d = ref - logp [N] -> [N]. Schulman's estimators, joschu.net/blog/kl-approx.html
KL_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}
LEVELS = ("token", "sequence")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence_mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
    "bnpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    "luspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_sum"},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0, "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "token_mean"},
    "reinforce": {"surrogate": "reinforce", "aggregation": "token_mean"},
    "sft": {"surrogate": "sft", "aggregation": "token_mean"},
}


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised. Two axes, two fields: the surrogate is a token's loss, the aggregation how tokens are weighed.

    ``surrogate`` is a name of ``SURROGATES`` or a callable ``(ratio, logp, advantage, objective) -> loss``, each
    ``[N]``. ``kl_bias_correction`` multiplies the KL by the ratio, gradient through both. ``rollout_correction``
    multiplies the surrogate by ``w = exp(old - rollout_logp)`` (token level) or the exponential of the sequence's sum,
    detached: ``truncate`` gives ``min(w, rollout_cap)``, ``mask`` gives 0 where ``w > rollout_cap``. Raises ValueError
    for a value outside its range or an unknown name.
    """

    surrogate: str | Surrogate = "clip"
    level: str = "token"  # token | sequence: what the ratio is taken over
    clip_low: float = 0.2
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
    aggregation: str = "token_mean"
    constant_length: float | None = None  # tokens; needed by aggregation="constant"
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05

    def __post_init__(self) -> None:
        if not callable(self.surrogate):
            _one_of("surrogate", self.surrogate, SURROGATES, " or a callable")
        _one_of("level", self.level, LEVELS)
        _one_of("kl", self.kl, KL_FORMS)
        _one_of("rollout_correction", self.rollout_correction, (None, "truncate", "mask"))
        _one_of("rollout_level", self.rollout_level, LEVELS)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        for name in ("clip_low", "clip_high", "kl_coef"):
            _at_least(name, getattr(self, name), 0, or_equal=True)
        for name in ("delta", "rollout_cap", "constant_length", "sapo_tau_pos", "sapo_tau_neg"):
            _at_least(name, getattr(self, name), 0)
        _at_least("dual_clip", self.dual_clip, 1)
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite; got {self.entropy_coef!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PolicyObjective:
        """A published objective by name; every field can be overridden. Raises ValueError for an unknown name.

        grpo 2402.03300, dapo 2503.14476, dr_grpo 2503.20783 (give it ``constant_length``), gspo 2507.18071,
        cispo 2506.13585, sapo 2511.20347, luspo 2602.05261 (with gspo's clip range).
        """
        _one_of("preset", name, PRESETS)
        unknown = sorted(set(overrides) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"PolicyObjective has no {unknown}; it has {[f.name for f in fields(cls)]}")
        return cls(**{**PRESETS[name], **overrides})

    def prepare(
        self, tokens: TokenBatch, n_rows: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[TokenBatch, bool]:
        """Expand the batch to ``[N]``, derive ``weight`` (and ``importance`` where ``old_logp`` is known) once.

        Returns the batch and whether the objective is row-local on it: can be evaluated on any subset of the rows.
        Raises ValueError if the batch lacks a field that the objective needs.
        """
        self._require(tokens)
        tokens = tokens.expanded(n_rows, dtype, device)
        if tokens.weight is None:
            shape: tuple[Any, ...] = (n_rows, tokens.cu_seqlens, self.constant_length)
            tokens = replace(tokens, weight=aggregation_weights(self.aggregation, *shape, dtype=dtype, device=device))
        corrected = self.rollout_correction is not None and tokens.importance is None
        if corrected and tokens.old_logp is not None:
            tokens = replace(tokens, importance=self.rollout_weight(tokens.old_logp, tokens))
            corrected = False
        return tokens, self.level == "token" and not (corrected and self.rollout_level == "sequence")

    def _require(self, tokens: TokenBatch) -> None:
        missing = []
        if tokens.advantages is None and self.surrogate != "sft":
            missing.append("advantages: only surrogate='sft' goes without")
        if self.kl_coef != 0 and tokens.ref_logp is None:
            missing.append("ref_logp: pass it, or set kl_coef=0")
        corrected = self.rollout_correction is not None and tokens.importance is None
        if corrected and tokens.rollout_logp is None:
            missing.append("rollout_logp: pass it, or set rollout_correction=None")
        if tokens.cu_seqlens is None and self.level == "sequence":
            missing.append("cu_seqlens: level='sequence' needs to know which rows form a sequence")
        if tokens.cu_seqlens is None and corrected and self.rollout_level == "sequence":
            missing.append("cu_seqlens: rollout_level='sequence' needs to know which rows form a sequence")
        if missing:
            raise ValueError("the objective needs tokens." + "; tokens.".join(missing))

    def ratio(self, logp: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` ratio of the current to the old policy, at the objective's level."""
        log_ratio = logp - (logp.detach() if tokens.old_logp is None else tokens.old_logp)
        if self.level == "sequence":
            assert tokens.cu_seqlens is not None, "prepare() checks this"
            ids = segment_ids(tokens.cu_seqlens, len(logp))
            lengths = tokens.cu_seqlens.diff()
            log_ratio = (segment_sum(log_ratio, ids, len(lengths)) / lengths.clamp(min=1))[ids]
        return log_ratio.exp()

    def rollout_weight(self, old_logp: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` detached weight that corrects for the engine's log-probs (TIS, IcePop)."""
        assert tokens.rollout_logp is not None, "prepare() checks this"
        log_weight = old_logp.detach() - tokens.rollout_logp
        if self.rollout_level == "sequence":
            assert tokens.cu_seqlens is not None, "prepare() checks this"
            ids = segment_ids(tokens.cu_seqlens, len(log_weight))
            log_weight = segment_sum(log_weight, ids, len(tokens.cu_seqlens) - 1)[ids]
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

    def rows(self, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        """``[N]`` loss of every row before aggregation; ``tokens`` must have been prepared."""
        ratio = self.ratio(logp, tokens)
        advantage = torch.ones_like(logp) if tokens.advantages is None else tokens.advantages
        surrogate = self.surrogate if callable(self.surrogate) else SURROGATES[self.surrogate]
        loss = surrogate(ratio, logp, advantage, self)
        if loss.shape != logp.shape:
            raise ValueError(f"the surrogate must return one loss a row, {list(logp.shape)}; got {list(loss.shape)}")
        importance = self.importance(logp, tokens)
        if importance is not None:
            loss = importance * loss
        if self.kl_coef != 0:
            assert tokens.ref_logp is not None, "prepare() checks this"
            kl = KL_FORMS[self.kl](tokens.ref_logp - logp)
            loss = loss + self.kl_coef * (ratio * kl if self.kl_bias_correction else kl)
        return loss if self.entropy_coef == 0 else loss - self.entropy_coef * entropy

    def __call__(self, logp: Tensor, entropy: Tensor, tokens: TokenBatch) -> Tensor:
        """Scalar loss of the rows: ``sum(weight * rows)``; ``tokens`` must have been prepared."""
        assert tokens.weight is not None, "prepare() derives it"
        return (tokens.weight * self.rows(logp, entropy, tokens)).sum()


Objective = PolicyObjective | Callable[[Tensor, Tensor, TokenBatch], Tensor]
"""Also any callable ``(logp [N], entropy [N], tokens) -> scalar loss``, differentiable in its first two arguments."""


def aggregation_weights(
    aggregation: str,
    n_rows: int,
    cu_seqlens: Tensor | None = None,
    constant_length: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """``[N]`` weights of the rows in the loss.

    token_mean ``1/N``; sequence_mean ``1/(S n_s)``; sequence_sum ``1/S``; constant ``1/(S constant_length)``, where
    ``S`` counts sequences without rows too. A caller that spreads a batch over micro-batches or ranks computes them
    once for the whole batch and gives each part its own. Raises ValueError if an argument that is needed is missing.
    """
    _one_of("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "token_mean":
        return torch.full((n_rows,), 1 / max(n_rows, 1), dtype=dtype, device=device)
    if cu_seqlens is None:
        raise ValueError(f"aggregation={aggregation!r} counts sequences: pass tokens.cu_seqlens, or tokens.weight")
    n_sequences = max(len(cu_seqlens) - 1, 1)
    if aggregation == "sequence_mean":
        cu_seqlens = cu_seqlens.to(device)
        return (1 / (n_sequences * cu_seqlens.diff().to(dtype)))[segment_ids(cu_seqlens, n_rows)]
    if aggregation == "sequence_sum":
        return torch.full((n_rows,), 1 / n_sequences, dtype=dtype, device=device)
    if constant_length is None:
        raise ValueError("aggregation='constant' needs constant_length: the longest completion allowed, in tokens")
    return torch.full((n_rows,), 1 / (n_sequences * constant_length), dtype=dtype, device=device)


def loss_gradients(
    objective: Objective, logp: Tensor, entropy: Tensor, tokens: TokenBatch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (scalar), ``c = dL/dlogp [N]`` and ``e = dL/dH [N]``, or None where the loss does not contain the entropy.

    Every objective reduces to these two numbers a row, whatever the backend. Raises ValueError if a user's objective
    does not return a scalar.
    """
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = objective(logp, entropy, tokens)
    if loss.ndim != 0:
        raise ValueError(f"an objective must return a scalar loss; got {list(loss.shape)}: sum it with tokens.weight")
    if not loss.requires_grad:
        return loss, torch.zeros_like(logp), None
    c, e = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(logp) if c is None else c, e


def _one_of(name: str, value: object, known: Iterable[object], also: str = "") -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; it is one of {', '.join(map(str, known))}{also}")


def _at_least(name: str, value: float | None, bound: float, or_equal: bool = False) -> None:
    if value is not None and not (value > bound or (or_equal and value == bound)):
        raise ValueError(f"{name} must be {'>=' if or_equal else '>'} {bound}; got {value!r}")
