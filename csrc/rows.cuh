// The mathematics of a row of logits: its statistics and its gradient, as every row kernel uses them.
//
// Exponents are kept to base 2: x = z log2(e) / T, so that a probability costs one multiply-add and one ex2. A row is
// read in aligned packs of 16 bytes; the few elements before and after them, its edge, are read one by one, so that
// rows may begin anywhere. What a thread does with its share of a row is a function of the thread's number: the tests
// run all threads one after the other on the host.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace revisual {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;  // stands for minus infinity, so that p log p is 0 and not nan
constexpr float NOTHING = -1e20f;  // the largest exponent of no columns: above LOWEST's at any temperature in use

HOST_DEVICE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// x, but not minus infinity; nan stays nan.
HOST_DEVICE float finite_below(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(LOWEST));
    return y;
#else
    return x < LOWEST ? LOWEST : x;
#endif
}

// An element in fp32, finite below.
template <typename T>
HOST_DEVICE float logit_of(T element) {
    return finite_below(to_float(element));
}

// The elements of a pack, likewise; two at a time where that is one instruction.
template <typename T, int N>
HOST_DEVICE void logits_of(const Pack<T, N>& pack, float (&z)[N]) {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, bf16>) {
        uint32_t words[N / 2];
        memcpy(words, &pack, sizeof(pack));
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            uint32_t pair;  // 0xf149: -1e30
            asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(words[i]), "r"(0xf149f149u));
            z[2 * i] = float_of(pair << 16);
            z[2 * i + 1] = float_of(pair & 0xffff0000u);
        }
    } else
#endif
    {
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = logit_of(pack.at[i]);
    }
}

// tanh and its derivative, neither with cancellation: near 0 a Taylor polynomial stands for the quotient.
HOST_DEVICE void tanh_of(float x, float& tanh, float& slope) {
    const float y = x * x, e = expf(-2.0f * fabsf(x));
    const float near = 62.0f / 2835.0f + y * (-1382.0f / 155925.0f + y * (21844.0f / 6081075.0f));
    const float series = x * (1.0f + y * (-1.0f / 3.0f + y * (2.0f / 15.0f + y * (-17.0f / 315.0f + y * near))));
    tanh = y < 0.0625f ? series : copysignf((1.0f - e) / (1.0f + e), x);
    slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// From a raw logit to the z of the statistics: bias, then softcap (cap tanh(z / cap)); the temperature is in `scale`.
// FULL = false knows neither bias nor softcap and costs nothing.
template <bool FULL>
struct Reader {
    float scale;        // log2(e) / T
    float softcap;      // 0: none
    const float* bias;  // [V] or nullptr

    HOST_DEVICE float operator()(float z, int column, float* slope = nullptr) const {
        if constexpr (FULL) {
            float derivative = 1.0f;
            if (bias != nullptr) z = finite_below(z + bias[column]);
            if (softcap > 0.0f) {
                tanh_of(z / softcap, z, derivative);
                z *= softcap;
            }
            if (slope != nullptr) *slope = derivative;
        }
        return z;
    }
};

// Running sums over some columns of a row: the largest exponent, sum of 2^(x - top), sum of 2^(x - top) (x - top).
struct RowSum {
    float top, sum, weighted;

    HOST_DEVICE static RowSum none() { return {NOTHING, 0.0f, 0.0f}; }

    HOST_DEVICE void raise(float higher) {  // no-op unless higher > top; a nan is not
        if (!(higher > top)) return;
        const float d = top - higher, shrink = exp2_of(d);
        weighted = (weighted + sum * d) * shrink;
        sum *= shrink;
        top = higher;
    }

    template <int N>
    HOST_DEVICE void add(const float (&z)[N], float scale) {  // one exponential an element
        float highest = z[0];
#pragma unroll
        for (int i = 1; i < N; ++i) highest = fmaxf(highest, z[i]);
        raise(highest * scale);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float d = fmaf(z[i], scale, -top), p = exp2_of(d);
            sum += p;
            weighted = fmaf(p, d, weighted);
        }
    }

    HOST_DEVICE void merge(RowSum other) {
        raise(other.top);
        other.raise(top);
        sum += other.sum;
        weighted += other.weighted;
    }
};

// The statistics of a row, natural units.
struct RowStatistics {
    float logp, entropy;
    float top, sum;  // of its RowSum: what the gradient needs besides
};

HOST_DEVICE RowStatistics statistics_of(const RowSum& s, float scale, float target /* z */) {
    const float log_sum = log2f(s.sum), logp = (fmaf(target, scale, -s.top) - log_sum) * LN2;
    const float entropy = (log_sum - s.weighted / s.sum) * LN2;
    return {logp > 0.0f ? 0.0f : logp, entropy < 0.0f ? 0.0f : entropy, s.top, s.sum};  // rounding must not do that
}

// dL/dz_j = (1/T) [c 1[j=y] - p_j (c + e (log p_j + H))] in terms of d = x - top: 2^d (a + b d), at the target plus c.
struct RowGradient {
    float scale, top, a, b, c;

    RowGradient() = default;
    HOST_DEVICE RowGradient(const RowStatistics& s, float scale, float c, float e, float temperature)
        : scale(scale), top(s.top), c(c / temperature) {
        const float share = e / temperature;
        a = -(this->c + share * (s.entropy - log2f(s.sum) * LN2)) / s.sum;
        b = -share * LN2 / s.sum;
    }

    HOST_DEVICE bool is_zero() const { return a == 0.0f && b == 0.0f && c == 0.0f; }

    HOST_DEVICE float at(float z) const {
        const float d = fmaf(z, scale, -top);
        return exp2_of(d) * fmaf(b, d, a);
    }
};

// How a row of V elements lies in memory: edge elements before its aligned packs, the packs, edge elements after them.
template <typename T>
struct Span {
    int head, packs, tail;

    HOST_DEVICE Span(const T* row, int V) {
        const int ahead = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
        head = ahead < V ? ahead : V;
        packs = (V - head) / VECTOR<T>;
        tail = V - head - packs * VECTOR<T>;
    }

    HOST_DEVICE int edge() const { return head + tail; }  // at most 2 (VECTOR - 1) elements
    HOST_DEVICE int edge_column(int i) const { return i < head ? i : head + packs * VECTOR<T> + (i - head); }
    HOST_DEVICE int column(int pack) const { return head + pack * VECTOR<T>; }
};

// The packs of a row that one block of a cluster takes: `each`, or what is left of them.
struct Share {
    int first, count;

    HOST_DEVICE Share(int packs, int rank, int each) {
        first = rank * each < packs ? rank * each : packs;
        count = first + each < packs ? each : packs - first;
    }
};

// Thread `thread` of `threads` adds its share of `count` packs, the first of which begins at `column`.
template <int IN_FLIGHT, typename T, bool FULL>
HOST_DEVICE void add_packs(RowSum& s, const Pack<T, VECTOR<T>>* packs, int count, int column, int thread, int threads,
                           const Reader<FULL>& read) {
    for (int base = thread; base < count; base += threads * IN_FLIGHT) {
        Pack<T, VECTOR<T>> loaded[IN_FLIGHT];
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u)
            if (u == 0 || base + u * threads < count) loaded[u] = load(packs + base + u * threads);
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u) {
            if (u > 0 && base + u * threads >= count) break;
            float z[VECTOR<T>];
            logits_of(loaded[u], z);
#pragma unroll
            for (int i = 0; i < VECTOR<T>; ++i) z[i] = read(z[i], column + (base + u * threads) * VECTOR<T> + i);
            s.add(z, read.scale);
        }
    }
}

// The gradient of one pack, rounded to G.
template <typename T, typename G, bool FULL>
HOST_DEVICE Pack<G, VECTOR<T>> gradient_of(const Pack<T, VECTOR<T>>& pack, int column, int target,
                                           const RowGradient& gradient, const Reader<FULL>& read) {
    float g[VECTOR<T>], slope[VECTOR<T>];
    logits_of(pack, g);
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) g[i] = gradient.at(read(g[i], column + i, &slope[i]));
    if (unsigned(target - column) < unsigned(VECTOR<T>)) {
#pragma unroll
        for (int i = 0; i < VECTOR<T>; ++i) g[i] += column + i == target ? gradient.c : 0.0f;
    }
    Pack<G, VECTOR<T>> out;
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) out.at[i] = from_float<G>(FULL ? g[i] * slope[i] : g[i]);
    return out;
}

template <typename T, typename G, bool FULL>
HOST_DEVICE G gradient_of(T element, int column, int target, const RowGradient& gradient, const Reader<FULL>& read) {
    float slope = 1.0f;
    const float g = gradient.at(read(logit_of(element), column, &slope)) + (column == target ? gradient.c : 0.0f);
    return from_float<G>(FULL ? g * slope : g);
}

// Writes a pack: at once if its place is aligned, else one by one.
template <typename G, int N>
HOST_DEVICE void store_pack(G* place, const Pack<G, N>& pack, bool aligned) {
    if (aligned) return store(reinterpret_cast<Pack<G, N>*>(place), pack);
#pragma unroll
    for (int i = 0; i < N; ++i) place[i] = pack.at[i];
}

// Thread `thread` of `threads` writes the gradient of its share of `count` packs to `out`, where that of the first
// begins; all of them are aligned there, or none. Read from the last to the first: the last are still in a cache.
template <int IN_FLIGHT, typename T, typename G, bool FULL>
HOST_DEVICE void write_packs(const Pack<T, VECTOR<T>>* packs, int count, int column, G* out, int target,
                             const RowGradient& gradient, const Reader<FULL>& read, int thread, int threads) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % sizeof(Pack<G, VECTOR<T>>) == 0;
    for (int last = count - 1 - thread; last >= 0; last -= threads * IN_FLIGHT) {
        Pack<T, VECTOR<T>> loaded[IN_FLIGHT];
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u)
            if (u == 0 || u * threads <= last) loaded[u] = load(packs + last - u * threads);
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u) {
            if (u > 0 && u * threads > last) break;
            const int at = (last - u * threads) * VECTOR<T>;
            store_pack(out + at, gradient_of<T, G>(loaded[u], column + at, target, gradient, read), aligned);
        }
    }
}

// How the cluster kernel lays a row of V elements into shared memory.
struct ClusterPlan {
    int blocks, stages;  // blocks of a cluster; rows that a block holds at a time. blocks = 0: it does not pay, or fit
    int packs;  // of a block's share; the last blocks may have fewer

    HOST_DEVICE size_t bytes() const { return size_t(stages) * packs * 16; }
};

constexpr int MOST_BLOCKS = 8;  // what every device with clusters can do
constexpr int SHORTEST_ROW = 32 * 1024;  // bytes; a shorter row stays in the first cache between two readings

// The smallest cluster whose blocks hold `stages` stages in `shared` bytes each.
HOST_DEVICE ClusterPlan smallest_cluster(int V, int element_bytes, int stages, int shared) {
    const int packs = V / (16 / element_bytes);
    for (int blocks = 1; blocks <= MOST_BLOCKS; blocks *= 2) {
        const ClusterPlan plan{blocks, stages, (packs + blocks - 1) / blocks};
        if (shared > 0 && plan.bytes() <= size_t(shared)) return plan;
    }
    return {0, 0, 0};
}

// Two blocks on a multiprocessor, of `half` bytes each, if the row allows it: one works while the other waits for its
// neighbours, or, with one stage each, for its row. Else one, of `whole` bytes; with one stage only where eight blocks
// cannot hold two.
HOST_DEVICE ClusterPlan plan_cluster(int V, int element_bytes, int half, int whole) {
    if (int64_t(V) * element_bytes < SHORTEST_ROW) return {0, 0, 0};
    for (const int shared : {half, whole})
        for (const int stages : {2, 1}) {
            const ClusterPlan plan = smallest_cluster(V, element_bytes, stages, shared);
            if (plan.blocks > 0) return plan;
        }
    return {0, 0, 0};
}

}  // namespace revisual
