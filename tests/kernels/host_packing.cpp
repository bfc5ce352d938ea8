// The device functions of csrc/packing.cuh on the host: every launcher below goes through all blocks and threads of its
// kernel one after the other, with a barrier wherever the kernel has one.
#include <vector>

#include "packing.cuh"

using namespace revisual;

namespace {

// Calls f with an element type (0 bf16, 1 fp16, 2 fp32) and the elements of an access.
template <typename F>
void with_type(int dtype, bool wide, F&& f) {
    const auto with = [&](auto zero) {
        using T = decltype(zero);
        if (wide) {
            f(zero, std::integral_constant<int, VECTOR<T>>{});
        } else {
            f(zero, std::integral_constant<int, 1>{});
        }
    };
    if (dtype == 0) return with(bf16{});
    if (dtype == 1) return with(fp16{});
    return with(float{});
}

template <typename T>
Rows<T> rows_of(void* data, int64_t count, int64_t stride) {
    return {static_cast<T*>(data), count, stride};
}

template <int N, typename T, typename U>
void sum_rows(const Sums<T, U>& sums, int64_t entries, int threads) {
    for (int64_t segment = 0; segment < sums.to.count; ++segment) {
        for (int i = 0; i < threads; ++i) sum_short<N>(sums, segment, i, threads);
    }
    for (int64_t chunk = 0; chunk < entries / LONG_SEGMENT; ++chunk) {
        const int64_t segment = long_segment(sums, chunk);
        for (int64_t tile = 0; segment != -1 && tile < sums.width; tile += 32 * N) {
            std::vector<float> partial(threads * N, float_of(0x7fc00000));
            for (int i = 0; i < threads; ++i) sum_long<N>(sums, segment, tile, i, threads, partial.data());
            for (int i = 0; i < threads; ++i) sum_partial<N>(sums, segment, tile, i, threads, partial.data());
        }
    }
}

}  // namespace

extern "C" {

void pack_embeddings(int dtype, bool wide, int threads, const int64_t* ids, const int64_t* feature_index,
                     int64_t tokens, void* table, int64_t vocab, int64_t table_stride, void* features,
                     int64_t n_features, int64_t features_stride, void* out, int64_t width) {
    with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        const Embedding<T> from{ids, feature_index, rows_of<const T>(table, vocab, table_stride),
                                rows_of<const T>(features, n_features, features_stride)};
        for (int64_t t = 0; t < tokens; ++t) {
            T* row = static_cast<T*>(out) + t * width;
            for (int i = 0; i < threads; ++i) {
                copy_row<decltype(n)::value>(embedding_at(from, t), row, width, i, threads);
            }
        }
    });
}

void segment_sums(int dtype, bool wide, int threads, bool to_float, const int64_t* order, int64_t entries,
                  const int64_t* indptr, int64_t segments, void* from, int64_t stride, void* to, int64_t width) {
    with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        const Rows<const T> source = rows_of<const T>(from, 0, stride);
        if (to_float) {
            sum_rows<decltype(n)::value>(
                Sums<T, float>{order, indptr, source, rows_of<float>(to, segments, width), width}, entries, threads);
        } else {
            sum_rows<decltype(n)::value>(
                Sums<T, T>{order, indptr, source, rows_of<T>(to, segments, width), width}, entries, threads);
        }
    });
}

void mrope(int dtype, bool wide, const int64_t* positions, int64_t tokens, int64_t positions_stride,
           const float* inv_freq, const int8_t* axis, int half, float scaling, bool inverse, void* in, void* out,
           int count, const int64_t* strides) {
    with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        constexpr int N = decltype(n)::value;
        const Angles angles{positions, positions_stride, inv_freq, axis, half, scaling, inverse ? -scaling : scaling};
        const Heads<T> heads{static_cast<const T*>(in), static_cast<T*>(out), count,
                             strides[0], strides[1], strides[2], strides[3]};
        std::vector<float> table(2 * half);
        for (int64_t t = 0; t < tokens; ++t) {
            for (int i = 0; i < half; ++i) fill_table(angles, t, i, table.data());
            for (int job = 0; job < count * (half / N); ++job) rotate<N>(heads, t, job, half, table.data());
        }
    });
}

void cos_sins(const int64_t* positions, const float* inv_freq, int64_t n, float* cosine, float* sine) {
    for (int64_t i = 0; i < n; ++i) cos_sin(positions[i], inv_freq[i], cosine[i], sine[i]);
}
}
