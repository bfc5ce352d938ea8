"""What a row's policy loss is: one function and one entry of ``SURROGATES`` each. Also the KL estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from revisual_fast.losses import tokens

if TYPE_CHECKING:
    from revisual_fast.losses.objective import PolicyObjective


@dataclass(frozen=True)
class Rows:
    """What a surrogate sees of ``N`` rows. Gradients flow through logp, log_ratio, ratio and entropy."""

    logp: Tensor  # [N] log-prob of the target
    entropy: Tensor  # [N] nats
    log_ratio: Tensor  # [N] logp - old, of each token by itself
    ratio: Tensor  # [N] current to old policy, at the objective's level
    advantage: Tensor  # [N]
    importance: Tensor | None  # [N] the rollout correction's weight; the result is multiplied by it afterwards
    objective: PolicyObjective
    cu_seqlens: Tensor | None = None  # [S+1]; None where the rows need not be whole sequences
    mask: Tensor | None = None  # [N] bool: rows that do not count have a loss of 0, whatever is returned; None = all do

    def sequence_sum(self, values: Tensor) -> Tensor:
        """``[N]`` -> ``[N]``: every row gets the sum over its sequence, of the rows that count. Differentiable.

        Raises ValueError in a surrogate that is not marked with :func:`whole_sequences`.
        """
        return tokens.sequence_sum(values, self._boundaries(), self.mask)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """``[N]`` -> ``[N]``: every row gets the mean over its sequence; otherwise as :meth:`sequence_sum`."""
        return tokens.sequence_mean(values, self._boundaries(), self.mask)

    def _boundaries(self) -> Tensor:
        if self.cu_seqlens is None:
            raise ValueError(
                "the surrogate may be called with a part of a sequence: mark it, "
                "surrogate=revisual_fast.losses.whole_sequences(surrogate)"
            )
        return self.cu_seqlens


Surrogate = Callable[[Rows], Tensor]
"""Rows -> loss ``[N]``, differentiable."""
_S = TypeVar("_S", bound=Surrogate)


def whole_sequences(surrogate: _S) -> _S:
    """Mark a surrogate (a decorator): it is called with whole sequences only, so that it may sum over them."""
    setattr(surrogate, "needs_whole_sequences", True)  # noqa: B010 - a function has any attribute, its type does not
    return surrogate


def _clip(r: Rows) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347), unequal bounds from DAPO (2503.14476), dual clip (1912.09729)."""
    o, advantage = r.objective, r.advantage
    capped = r.ratio if o.delta is None else r.ratio.clamp(max=o.delta)
    loss = -torch.minimum(capped * advantage, r.ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage)
    if o.dual_clip is None:
        return loss
    bound = -o.dual_clip * advantage
    return torch.where((advantage < 0) & (loss > bound), bound, loss)


def _cispo(r: Rows) -> Tensor:
    """MiniMax-M1's clipped importance weight times the log-prob (arXiv 2506.13585)."""
    return -r.ratio.detach().clamp(max=1 + r.objective.clip_high) * r.advantage * r.logp


def _sapo(r: Rows) -> Tensor:
    """Soft gate in place of the clip (arXiv 2511.20347); its slope at ratio 1 is 1."""
    tau = _by_sign(r.advantage, r.objective.sapo_tau_pos, r.objective.sapo_tau_neg)
    return -(4 / tau) * torch.sigmoid(tau * (r.ratio - 1)) * r.advantage


@whole_sequences
def _gmpo(r: Rows) -> Tensor:
    """Geometric mean over the sequence of the clipped token ratios, times the advantage (arXiv 2507.20673, eq. 4).

    A token's log-ratio is bounded on the side that its advantage pushes it to: above by ``clip_high`` where A >= 0,
    below by ``-clip_low`` where A < 0, both in nats.
    """
    o = r.objective
    clipped = torch.where(r.advantage < 0, r.log_ratio.clamp(min=-o.clip_low), r.log_ratio.clamp(max=o.clip_high))
    return -r.sequence_mean(clipped).exp() * r.advantage


@whole_sequences
def _vespo(r: Rows) -> Tensor:
    """Log-prob times a soft weight of the sequence, ``phi(W) = exp(lambda) W^k exp(-lambda W)`` (arXiv 2602.10693).

    ``W`` is the product of the sequence's token ratios and of its rollout-correction weights, where one of 0 counts as
    1e-8; phi(1) = 1, and no gradient goes through it.
    """
    o = r.objective
    log_w = r.log_ratio.detach() if r.importance is None else r.log_ratio.detach() + r.importance.clamp(min=1e-8).log()
    log_w = r.sequence_sum(log_w)  # its exponential may be infinite: phi is 0 then
    k = _by_sign(r.advantage, o.vespo_k_pos, o.vespo_k_neg)
    decay = _by_sign(r.advantage, o.vespo_lambda_pos, o.vespo_lambda_neg)
    return -(decay + k * log_w - decay * log_w.exp()).exp() * r.advantage * r.logp


def _reinforce(r: Rows) -> Tensor:
    return -r.advantage * r.logp


def _sft(r: Rows) -> Tensor:
    return -r.logp


def _by_sign(advantage: Tensor, positive: float, otherwise: float) -> Tensor:
    return torch.full_like(advantage, otherwise).masked_fill(advantage > 0, positive)


SURROGATES: dict[str, Surrogate] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "gmpo": _gmpo,
    "vespo": _vespo,
    "reinforce": _reinforce,
    "sft": _sft,
}
# KL forms: d = ref - logp [N] -> [N]. Schulman's estimators, joschu.net/blog/kl-approx.html
KL_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}
