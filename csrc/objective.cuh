// The built-in token-level objectives: a row's loss, c = dL/dlogp and e = dL/dH, from its log-prob and its entropy.
//
// The formulas of revisual_fast/losses with their derivatives written out. Compiled for the device and for the host:
// the tests run it in double over every combination of options against revisual_fast.losses. A row's loss is
//
//     weight (w l + kl_coef KL - entropy_coef H)
#pragma once

#include <cmath>

#include "common.cuh"

namespace revisual {

// By the numbers in kernels/plan.py.
enum Surrogate : int { CLIP, CISPO, SAPO, REINFORCE, SFT };
enum Kl : int { NO_KL, K1, K2, K3 };
enum Correction : int { NO_CORRECTION, GIVEN, TRUNCATE, MASK };

template <typename F>
struct Objective {
    int surrogate, kl, correction;
    bool kl_bias;      // the KL is multiplied by the ratio, gradient through both
    bool has_entropy;  // otherwise e is 0
    F clip_low, clip_high, dual_clip, delta;  // an absent dual_clip or delta is infinite
    F tau_pos, tau_neg, kl_coef, entropy_coef, rollout_cap;
};

template <typename F>
struct Token {
    F advantage, old, ref;
    F rollout;  // the correction's weight (GIVEN), or the engine's log-prob
    F weight;   // of the row in the loss
};

template <typename F>
struct RowLoss {
    F loss, c, e;
};

template <typename F>
struct Slope {  // a value and its derivative by logp
    F value, slope;
};

// The clipped surrogate (PPO, arXiv 1707.06347): unequal bounds (DAPO, 2503.14476), dual clip (1912.09729), delta
// (INTELLECT-2, 2505.07291).
template <typename F>
HOST_DEVICE Slope<F> clipped(const Objective<F>& o, F ratio, F advantage) {
    const F low = 1 - o.clip_low, high = 1 + o.clip_high;
    const F free = (ratio < o.delta ? ratio : o.delta) * advantage;
    const F bounded = ratio < low ? low : ratio > high ? high : ratio;
    const F held = bounded * advantage;
    const bool moves = free <= held ? ratio <= o.delta : ratio >= low && ratio <= high;
    const F loss = free <= held ? -free : -held;
    if (advantage < 0 && loss > -o.dual_clip * advantage) return {-o.dual_clip * advantage, F(0)};
    return {loss, moves ? -ratio * advantage : F(0)};
}

// Soft gate in place of the clip (arXiv 2511.20347).
template <typename F>
HOST_DEVICE Slope<F> gated(const Objective<F>& o, F ratio, F advantage) {
    const F tau = advantage > 0 ? o.tau_pos : o.tau_neg, x = tau * (ratio - 1);
    const F small = exp(x < 0 ? x : -x);
    const F gate = (x < 0 ? small : F(1)) / (1 + small);
    return {-4 / tau * gate * advantage, -4 * gate * (1 - gate) * advantage * ratio};
}

template <typename F>
HOST_DEVICE Slope<F> surrogate_loss(const Objective<F>& o, F logp, F ratio, F advantage) {
    switch (o.surrogate) {
        case CLIP: return clipped(o, ratio, advantage);
        case CISPO: {  // arXiv 2506.13585; no gradient through the ratio
            const F weight = (ratio < 1 + o.clip_high ? ratio : 1 + o.clip_high) * advantage;
            return {-weight * logp, -weight};
        }
        case SAPO: return gated(o, ratio, advantage);
        case REINFORCE: return {-advantage * logp, -advantage};
        default: return {-logp, F(-1)};
    }
}

// Schulman's estimators, joschu.net/blog/kl-approx.html, of d = ref - logp.
template <typename F>
HOST_DEVICE Slope<F> kl_penalty(int kl, F d) {
    if (kl == K1) return {-d, F(1)};
    if (kl == K2) return {d * d / 2, -d};
    const F excess = expm1(d);
    return {excess - d, -excess};
}

template <typename F>
HOST_DEVICE F importance(const Objective<F>& o, F logp, F rollout) {
    if (o.correction == GIVEN) return rollout;
    const F weight = exp(logp - rollout);
    return weight > o.rollout_cap ? (o.correction == TRUNCATE ? o.rollout_cap : F(0)) : weight;
}

template <typename F>
HOST_DEVICE RowLoss<F> token_objective(const Objective<F>& o, const Token<F>& t, F logp, F entropy) {
    const F ratio = exp(logp - t.old);
    Slope<F> row = surrogate_loss(o, logp, ratio, t.advantage);
    if (ratio != ratio) row = {ratio, ratio};  // comparisons drop a nan
    if (o.correction != NO_CORRECTION) {
        const F w = importance(o, logp, t.rollout);
        row = {row.value * w, row.slope * w};
    }
    if (o.kl != NO_KL) {
        Slope<F> kl = kl_penalty(o.kl, t.ref - logp);
        if (o.kl_bias) kl = {ratio * kl.value, ratio * (kl.value + kl.slope)};
        row = {row.value + o.kl_coef * kl.value, row.slope + o.kl_coef * kl.slope};
    }
    if (o.has_entropy) row.value -= o.entropy_coef * entropy;
    return {t.weight * row.value, t.weight * row.slope, o.has_entropy ? -t.weight * o.entropy_coef : F(0)};
}

}  // namespace revisual
