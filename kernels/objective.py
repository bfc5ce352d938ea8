"""The built-in token-level objectives for the one-kernel path: loss, dL/dlogp and dL/dH of a row, in Triton.

The same formulas as ``revisual_fast.losses``, with their derivatives written out; the tests sweep all combinations
against it. Which ones there are: ``SURROGATES`` and ``KL_FORMS``. A row's loss is
``weight (w l + kl_coef KL - entropy_coef H)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from revisual_fast.kernels.plan import CORRECTIONS, KL_FORMS, SURROGATES

CLIP = tl.constexpr(SURROGATES["clip"])
CISPO = tl.constexpr(SURROGATES["cispo"])
SAPO = tl.constexpr(SURROGATES["sapo"])
REINFORCE = tl.constexpr(SURROGATES["reinforce"])
K1 = tl.constexpr(KL_FORMS["k1"])
K2 = tl.constexpr(KL_FORMS["k2"])
GIVEN = tl.constexpr(CORRECTIONS["given"])
TRUNCATE = tl.constexpr(CORRECTIONS["truncate"])


@triton.jit
def expm1(x):
    """``exp(x) - 1`` without cancellation: a Taylor polynomial where |x| < 1/2."""
    s = 1.0 + x / 8.0 * (1.0 + x / 9.0)
    s = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * s))
    s = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * s)))
    return tl.where(tl.abs(x) < 0.5, s, tl.exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def surrogate_loss(
    logp, ratio, advantage, clip_low, clip_high, dual_clip, delta, tau_pos, tau_neg, SURROGATE: tl.constexpr
):
    """(l, dl/dlogp); an absent ``dual_clip`` or ``delta`` is infinite."""
    if SURROGATE == CLIP:
        free = tl.minimum(ratio, delta) * advantage
        clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * advantage
        inside = (ratio >= 1.0 - clip_low) & (ratio <= 1.0 + clip_high)
        moves = tl.where(free <= clipped, ratio <= delta, inside)
        loss = -tl.minimum(free, clipped)
        slope = tl.where(moves, -ratio * advantage, 0.0)
        bound = tl.where(advantage < 0, -dual_clip * advantage, float("inf"))
        return tl.minimum(loss, bound), tl.where(loss > bound, 0.0, slope)
    elif SURROGATE == CISPO:
        weight = tl.minimum(ratio, 1.0 + clip_high) * advantage
        return -weight * logp, -weight
    elif SURROGATE == SAPO:
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        gate = sigmoid(tau * (ratio - 1.0))
        return -4.0 / tau * gate * advantage, -4.0 * gate * (1.0 - gate) * advantage * ratio
    elif SURROGATE == REINFORCE:
        return -advantage * logp, -advantage
    else:
        return -logp, -1.0 + 0.0 * logp


@triton.jit
def kl_penalty(d, KL: tl.constexpr):
    """(KL, dKL/dlogp) for ``d = ref - logp``."""
    if KL == K1:
        return -d, 1.0 + 0.0 * d
    elif KL == K2:
        return d * d / 2.0, -d
    else:
        excess = expm1(d)
        return excess - d, -excess


@triton.jit
def token_objective(
    logp,
    entropy,
    advantage,
    old,
    ref,
    rollout,  # the correction's weight, or the engine's log-prob where the weight depends on logp
    weight,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    kl_coef,
    entropy_coef,
    rollout_cap,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_BIAS: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """(loss, c, e) of a row, aggregation weight included."""
    ratio = tl.exp(logp - old)
    loss, c = surrogate_loss(logp, ratio, advantage, clip_low, clip_high, dual_clip, delta, tau_pos, tau_neg, SURROGATE)
    loss = tl.where(ratio == ratio, loss, ratio)  # minimum and maximum drop a nan
    c = tl.where(ratio == ratio, c, ratio)
    if CORRECTION != 0:
        importance = rollout
        if CORRECTION != GIVEN:
            importance = tl.exp(logp - rollout)
            rest = rollout_cap if CORRECTION == TRUNCATE else 0.0
            importance = tl.where(importance > rollout_cap, rest, importance)
        loss, c = loss * importance, c * importance
    if KL != 0:
        kl, slope = kl_penalty(ref - logp, KL)
        if KL_BIAS:
            slope = ratio * (kl + slope)
            kl = ratio * kl
        loss += kl_coef * kl
        c += kl_coef * slope
    return weight * (loss - entropy_coef * entropy), weight * c, -weight * entropy_coef
