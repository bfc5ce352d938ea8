// What one thread of the packing kernels does: copies of rows, sums of rows, and M-RoPE's angles and rotations.
//
// Nothing here knows of blocks or warps. A kernel calls these functions with its thread's numbers, and the tests call
// the same functions on the host with every number in turn.
#pragma once

#include <cmath>

#include "common.cuh"

namespace revisual {

// Rows of elements that lie side by side; the rows themselves lie anywhere.
template <typename T>
struct Rows {
    T* data;
    int64_t count, stride;
};

// The row, or nullptr where there is none of this number.
template <typename T>
HOST_DEVICE const T* row_at(const Rows<const T>& rows, int64_t i) {
    return i >= 0 && i < rows.count ? rows.data + i * rows.stride : nullptr;
}

// N elements as one access takes them.
template <int N, typename T>
HOST_DEVICE const Pack<T, N>* pack_at(const T* place) {
    return reinterpret_cast<const Pack<T, N>*>(place);
}

template <int N, typename T>
HOST_DEVICE Pack<T, N>* pack_at(T* place) {
    return reinterpret_cast<Pack<T, N>*>(place);
}

// This thread's share of one row, N elements at a time; nan where there is no row to copy.
template <int N, typename T>
HOST_DEVICE void copy_row(const T* row, T* out, int64_t width, int thread, int threads) {
    for (int64_t column = int64_t(thread) * N; column < width; column += int64_t(threads) * N) {
        Pack<T, N> pack;
        if (row == nullptr) {
            for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(float_of(0x7fc00000));
        } else {
            pack = load(pack_at<N>(row + column));
        }
        store(pack_at<N>(out + column), pack);
    }
}

// Where a packed row's embedding lies: in the table, or among the features unless its feature_index is -1.
template <typename T>
struct Embedding {
    const int64_t *ids, *feature_index;
    Rows<const T> table, features;
};

template <typename T>
HOST_DEVICE const T* embedding_at(const Embedding<T>& from, int64_t t) {
    const int64_t feature = from.feature_index[t];
    return feature == -1 ? row_at(from.table, from.ids[t]) : row_at(from.features, feature);
}

// Sums of rows: segment s adds up the rows order[indptr[s]] .. order[indptr[s + 1] - 1] of `from` into row s of `to`.
template <typename T, typename U>
struct Sums {
    const int64_t *order, *indptr;
    Rows<const T> from;
    Rows<U> to;
    int64_t width;
};

// Entries from which on a segment is too much for one block and one thread a column: there, every 32 N columns get a
// block of their own, and its warps share the entries.
constexpr int64_t LONG_SEGMENT = 32;

template <typename T, typename U>
HOST_DEVICE bool is_long(const Sums<T, U>& sums, int64_t segment) {
    return sums.indptr[segment + 1] - sums.indptr[segment] >= LONG_SEGMENT;
}

// The long segment that begins among the LONG_SEGMENT entries of this chunk, or -1. There is at most one, and the last
// entry of the chunk belongs to it. So all long segments are found by chunks, whose number the host knows.
template <typename T, typename U>
HOST_DEVICE int64_t long_segment(const Sums<T, U>& sums, int64_t chunk) {
    const int64_t begin = chunk * LONG_SEGMENT, end = begin + LONG_SEGMENT;
    int64_t low = 0, high = sums.to.count;  // before `low` segments begin before `end`, from `high` on none does
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sums.indptr[middle] < end) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const int64_t segment = low - 1;
    return segment >= 0 && sums.indptr[segment] >= begin && is_long(sums, segment) ? segment : -1;
}

// Adds every step-th row of [first, last), in this order, AHEAD of them in flight.
template <int N, typename T, typename U>
HOST_DEVICE void add_rows(const Sums<T, U>& sums, int64_t first, int64_t last, int step, int64_t column,
                          float (&total)[N]) {
    constexpr int AHEAD = 4;
    const T* from = sums.from.data + column;
    int64_t entry = first;
    for (; entry + (AHEAD - 1) * step < last; entry += AHEAD * step) {
        Pack<T, N> packs[AHEAD];
        for (int j = 0; j < AHEAD; ++j) {
            packs[j] = load(pack_at<N>(from + sums.order[entry + j * step] * sums.from.stride));
        }
        for (const Pack<T, N>& pack : packs) {
            for (int i = 0; i < N; ++i) total[i] += to_float(pack.at[i]);
        }
    }
#pragma unroll 1  // fewer than AHEAD
    for (; entry < last; entry += step) {
        const Pack<T, N> pack = load(pack_at<N>(from + sums.order[entry] * sums.from.stride));
        for (int i = 0; i < N; ++i) total[i] += to_float(pack.at[i]);
    }
}

// The N sums from `column` on, rounded to U, in accesses of at most 16 bytes.
template <int N, typename T, typename U>
HOST_DEVICE void store_sums(const Sums<T, U>& sums, int64_t segment, int64_t column, const float (&total)[N]) {
    constexpr int M = N < VECTOR<U> ? N : VECTOR<U>;
    U* out = sums.to.data + segment * sums.to.stride + column;
    for (int start = 0; start < N; start += M) {
        Pack<U, M> pack;
        for (int i = 0; i < M; ++i) pack.at[i] = from_float<U>(total[start + i]);
        store(pack_at<M>(out + start), pack);
    }
}

// A short segment: this thread's columns, each added up from the first entry to the last. An empty one is 0.
template <int N, typename T, typename U>
HOST_DEVICE void sum_short(const Sums<T, U>& sums, int64_t segment, int thread, int threads) {
    if (is_long(sums, segment)) return;
    const int64_t first = sums.indptr[segment], last = sums.indptr[segment + 1];
    for (int64_t column = int64_t(thread) * N; column < sums.width; column += int64_t(threads) * N) {
        float total[N] = {};
        add_rows<N>(sums, first, last, 1, column, total);
        store_sums<N>(sums, segment, column, total);
    }
}

// A long segment's 32 N columns from `tile` on: first every warp adds up its own entries into partial[warp][N][32] ...
template <int N, typename T, typename U>
HOST_DEVICE void sum_long(const Sums<T, U>& sums, int64_t segment, int64_t tile, int thread, int threads,
                          float* partial) {
    const int warp = thread / 32, warps = threads / 32, lane = thread % 32;
    const int64_t column = tile + lane * N;
    if (column >= sums.width) return;
    float total[N] = {};
    add_rows<N>(sums, sums.indptr[segment] + warp, sums.indptr[segment + 1], warps, column, total);
    for (int i = 0; i < N; ++i) partial[(warp * N + i) * 32 + lane] = total[i];
}

// ... and then the first warp adds up the warps' sums, from the first warp's to the last's.
template <int N, typename T, typename U>
HOST_DEVICE void sum_partial(const Sums<T, U>& sums, int64_t segment, int64_t tile, int thread, int threads,
                             const float* partial) {
    const int64_t column = tile + thread * N;
    if (thread >= 32 || column >= sums.width) return;
    float total[N] = {};
    for (int warp = 0; warp < threads / 32; ++warp) {
        for (int i = 0; i < N; ++i) total[i] += partial[(warp * N + i) * 32 + thread];
    }
    store_sums<N>(sums, segment, column, total);
}

// Angles of M-RoPE: frequency i of token t turns by positions[axis[i], t] inv_freq[i].
struct Angles {
    const int64_t* positions;  // [3, tokens]
    int64_t stride;            // between the three
    const float* inv_freq;     // [half]
    const int8_t* axis;        // [half]
    int half;
    float cos_scaling, sin_scaling;  // the second is negative for the inverse rotation
};

// Cosine and sine of an angle that may be as large as a position. The angle is exact in double precision and is reduced
// there to a quarter turn around 0, where the power series end below half a unit of fp32's last place.
HOST_DEVICE void cos_sin(int64_t position, float inv_freq, float& cosine, float& sine) {
    const double quarters = double(position) * double(inv_freq) * 0.63661977236758134308;  // 2 / pi
    const double nearest = rint(quarters);
    const float x = float((quarters - nearest) * 1.57079632679489661923), y = x * x;  // |x| <= pi / 4
    const float s = x + x * y * (-1 / 6.f + y * (1 / 120.f + y * (-1 / 5040.f + y * (1 / 362880.f))));
    const float c = 1 - y * (1 / 2.f - y * (1 / 24.f - y * (1 / 720.f - y * (1 / 40320.f - y * (1 / 3628800.f)))));
    const int quadrant = int(int64_t(nearest) & 3);
    const float odd_c = quadrant & 1 ? s : c, odd_s = quadrant & 1 ? c : s;
    cosine = quadrant == 1 || quadrant == 2 ? -odd_c : odd_c;
    sine = quadrant >= 2 ? -odd_s : odd_s;
}

// Cosine and sine of frequency i for token t into table[i] and table[half + i]; nan for an axis that is not 0, 1 or 2.
HOST_DEVICE void fill_table(const Angles& angles, int64_t t, int i, float* table) {
    const int axis = angles.axis[i];
    float cosine = float_of(0x7fc00000), sine = cosine;
    if (axis >= 0 && axis < 3) cos_sin(angles.positions[axis * angles.stride + t], angles.inv_freq[i], cosine, sine);
    table[i] = cosine * angles.cos_scaling;
    table[angles.half + i] = sine * angles.sin_scaling;
}

// The heads of one tensor [tokens, heads, 2 half], strided over tokens and heads; `out` may be `in`.
template <typename T>
struct Heads {
    const T* in;
    T* out;
    int count;
    int64_t in_token, in_head, out_token, out_head;
};

// Job j of token t: N of a head's pairs (i, i + half), turned by the table's angles.
template <int N, typename T>
HOST_DEVICE void rotate(const Heads<T>& heads, int64_t t, int job, int half, const float* table) {
    const int groups = half / N, head = job / groups, first = (job % groups) * N;
    const T* in = heads.in + t * heads.in_token + head * heads.in_head + first;
    T* out = heads.out + t * heads.out_token + head * heads.out_head + first;
    Pack<T, N> a = load(pack_at<N>(in)), b = load(pack_at<N>(in + half));
    for (int i = 0; i < N; ++i) {
        const float x = to_float(a.at[i]), y = to_float(b.at[i]);
        const float cosine = table[first + i], sine = table[half + first + i];
        a.at[i] = from_float<T>(x * cosine - y * sine);
        b.at[i] = from_float<T>(y * cosine + x * sine);
    }
    store(pack_at<N>(out), a);
    store(pack_at<N>(out + half), b);
}

}  // namespace revisual
