// What the row kernels take, and the steps that all of them have: reading what belongs to a row, adding up over a
// block.
#pragma once

#include "objective.cuh"
#include "rows.cuh"

namespace revisual {

constexpr int WARP = 32;
constexpr int MOST_WARPS = 16;
constexpr int IN_FLIGHT = 4;  // packs that a thread has asked for before it uses the first

template <typename Z>
struct Logits {
    const Z* z;
    int64_t stride, n;
    int V;
    const float* bias;         // [V] or nullptr
    const int64_t* targets;    // [n]
    const float* temperature;  // [n] or nullptr
    const bool* mask;          // [n] or nullptr; false: the row does not count
    float softcap;             // 0: none

    __device__ bool counts(int64_t row) const { return mask == nullptr || mask[row]; }
    __device__ float temperature_of(int64_t row) const { return temperature == nullptr ? 1.0f : temperature[row]; }
    __device__ const Z* row(int64_t row) const { return z + row * stride; }

    // The target's column, or -1: the host may not look at the targets, so a wrong one has to be loud.
    __device__ int target_of(int64_t row) const {
        const int64_t target = targets[row];
        return target >= 0 && target < V ? int(target) : -1;
    }

    // Raw, for row_statistics_of.
    __device__ float target_logit(int64_t row, int target) const {
        return logit_of(this->row(row)[target < 0 ? 0 : target]);
    }

    template <bool FULL>
    __device__ Reader<FULL> reader(float temperature) const {
        return {LOG2E / temperature, softcap, bias};
    }
};

struct StatisticsOut {  // [n] each; top and sum may be nullptr
    float *logp, *entropy, *top, *sum;

    __device__ void write(int64_t row, const RowStatistics& s) const {
        logp[row] = s.logp;
        entropy[row] = s.entropy;
        if (top != nullptr) top[row] = s.top;
        if (sum != nullptr) sum[row] = s.sum;
    }
};

struct Loss {  // the objective, its vectors and what it writes: [n] each
    Objective<float> objective;
    const float *advantages, *old, *ref, *rollout, *weight;  // all but the last may be nullptr
    float *losses, *c, *e;                                   // e may be nullptr

    // What is known before the row's log-prob is; on-policy, `old` is that log-prob.
    __device__ Token<float> token(int64_t row) const {
        return {advantages == nullptr ? 1.0f : advantages[row], old == nullptr ? 0.0f : old[row],
                ref == nullptr ? 0.0f : ref[row], rollout == nullptr ? 1.0f : rollout[row], weight[row]};
    }

    __device__ RowLoss<float> of(Token<float> token, const RowStatistics& s) const {
        if (old == nullptr) token.old = s.logp;
        return token_objective(objective, token, s.logp, s.entropy);
    }

    __device__ void write(int64_t row, const RowLoss<float>& r) const {
        losses[row] = r.loss;
        c[row] = r.c;
        if (e != nullptr) e[row] = r.e;
    }
};

// The sum over each LANES neighbouring lanes of a warp, in all of them: the largest exponent first, so that every lane
// scales its sums once.
template <int LANES = WARP>
__device__ RowSum warp_sum(RowSum s) {
    float top = s.top;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
    s.raise(top);
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        s.sum += __shfl_xor_sync(~0u, s.sum, offset);
        s.weighted += __shfl_xor_sync(~0u, s.weighted, offset);
    }
    return s;
}

// The sum over `count` partial sums (top, sum, weighted), at most MOST, in every lane of a warp.
template <int MOST>
__device__ RowSum sum_of(const float4* partial, int count) {
    const int lane = threadIdx.x % MOST;
    RowSum s = RowSum::none();
    if (lane < count) s = {partial[lane].x, partial[lane].y, partial[lane].z};
    return warp_sum<MOST>(s);
}

// Statistics of a row whose sums and raw target logit are known; nan where there is no such target.
template <bool FULL>
__device__ RowStatistics row_statistics_of(const RowSum& sum, const Reader<FULL>& read, float target_logit,
                                           int target) {
    RowStatistics s = statistics_of(sum, read.scale, read(target_logit, target < 0 ? 0 : target));
    if (target < 0) s.logp = NAN;
    return s;
}

// A block writes zeros to a row, or to the part of it that begins at `out`.
template <typename G>
__device__ void write_zeros(G* out, int count) {
    const Span<G> span(out, count);
    Pack<G, VECTOR<G>> zeros{};
    for (int i = threadIdx.x; i < span.packs; i += blockDim.x)
        store(reinterpret_cast<Pack<G, VECTOR<G>>*>(out + span.column(i)), zeros);
    for (int i = threadIdx.x; i < span.edge(); i += blockDim.x) out[span.edge_column(i)] = G{};
}

}  // namespace revisual
