// The CUDA packing kernels themselves run on the host: see host_cuda.hpp. Each function below launches one of them.
#include "host_cuda.hpp"
//
#include <algorithm>
#include <cstdio>

#include "packing_kernels.cuh"

namespace {
std::vector<float> dynamic_shared;
}

float* revisual::angle_table() { return dynamic_shared.data(); }

using namespace revisual;

namespace {

int print(const std::exception_ptr& thrown) try {
    std::rethrow_exception(thrown);
} catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
}

// Runs the blocks of a grid one after the other, each with its threads at the same time. Returns 0, or prints why not.
template <typename F>
int launch(host::Index grid, int threads, int shared, F&& kernel) {
    for (unsigned at = 0; at < grid.x * grid.y * grid.z; ++at) {
        std::vector<std::exception_ptr> failed(threads);
        host::Block block(0, threads, nullptr, nullptr);
        dynamic_shared.assign(shared, float_of(0x7fc00000));
        const auto thread_of = [&](int thread) {
            try {
                host::block = &block;
                threadIdx = {unsigned(thread), 0, 0}, blockDim = {unsigned(threads), 1, 1}, gridDim = grid;
                blockIdx = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
                kernel();
            } catch (...) {
                failed[thread] = std::current_exception();
            }
        };
        std::vector<std::thread> running;
        for (int thread = 0; thread < threads; ++thread) running.emplace_back(thread_of, thread);
        for (auto& thread : running) thread.join();
        for (const std::exception_ptr& error : failed) {
            if (error) return print(error);
        }
    }
    return 0;
}

// Calls f with an element type (0 bf16, 1 fp16, 2 fp32) and the elements of an access.
template <typename F>
int with_type(int dtype, bool wide, F&& f) {
    const auto with = [&](auto zero) {
        using T = decltype(zero);
        return wide ? f(zero, std::integral_constant<int, VECTOR<T>>{}) : f(zero, std::integral_constant<int, 1>{});
    };
    if (dtype == 0) return with(bf16{});
    return dtype == 1 ? with(fp16{}) : with(float{});
}

}  // namespace

extern "C" {

// A matrix, and one of heads; the fields are those in test_host_packing.py.
struct Matrix {
    void* data;
    int64_t count, stride, width;
};

struct HeadsOf {
    void *in, *out;
    int64_t count, strides[4];
};
}

namespace {

template <typename T>
Rows<T> rows_of(const Matrix& matrix) {
    return {static_cast<T*>(matrix.data), matrix.count, matrix.stride};
}

template <int N, typename T, typename U>
int sum_rows(int threads, const int64_t* order, int64_t entries, const int64_t* indptr, const Matrix* from,
             const Matrix* to, unsigned tensors) {
    const auto of = [&](int i) {
        return Sums<T, U>{order, indptr, rows_of<const T>(from[i]), rows_of<U>(to[i]), from[i].width};
    };
    const Sums<T, U> one = of(0), two = of(int(tensors) - 1);
    const unsigned widest = unsigned(std::max(one.width, two.width)), tiles = (widest + 32 * N - 1) / (32 * N);
    return launch({unsigned(to[0].count), tensors, 1}, threads, 0, [&] { segment_sums_kernel<N>(one, two); }) ||
           launch({unsigned(entries / LONG_SEGMENT), tiles, tensors}, threads, 0,
                  [&] { long_sums_kernel<N>(one, two); });
}

template <typename T>
Heads<T> heads_of(const HeadsOf& h) {
    return {static_cast<const T*>(h.in),
            static_cast<T*>(h.out),
            int(h.count),
            h.strides[0],
            h.strides[1],
            h.strides[2],
            h.strides[3]};
}

}  // namespace

extern "C" {

int pack_embeddings(int dtype, bool wide, int threads, const int64_t* ids, const int64_t* feature_index,
                    const Matrix* table, const Matrix* features, const Matrix* out) {
    return with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        const Embedding<T> from{ids, feature_index, rows_of<const T>(*table), rows_of<const T>(*features)};
        return launch({unsigned(out->count), 1, 1}, threads, 0, [&] {
            pack_embeddings_kernel<decltype(n)::value>(from, static_cast<T*>(out->data), out->width);
        });
    });
}

int gather_pair(int dtype, bool wide, int threads, const int64_t* index, const Matrix* key, const Matrix* value,
                const Matrix* key_out, const Matrix* value_out) {
    return with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        return launch({unsigned(key_out->count), 2, 1}, threads, 0, [&] {
            gather_pair_kernel<decltype(n)::value>(index, rows_of<const T>(*key), rows_of<const T>(*value),
                                                   static_cast<T*>(key_out->data), static_cast<T*>(value_out->data),
                                                   key->width, value->width);
        });
    });
}

// `tensors` matrices, one or two.
int segment_sums(int dtype, bool wide, int threads, bool to_float, const int64_t* order, int64_t entries,
                 const int64_t* indptr, int tensors, const Matrix* from, const Matrix* to) {
    return with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        constexpr int N = decltype(n)::value;
        return to_float ? sum_rows<N, T, float>(threads, order, entries, indptr, from, to, unsigned(tensors))
                        : sum_rows<N, T, T>(threads, order, entries, indptr, from, to, unsigned(tensors));
    });
}

int mrope(int dtype, bool wide, int threads, const int64_t* positions, int64_t tokens, int64_t positions_stride,
          const float* inv_freq, const int8_t* axis, int half, float scaling, bool inverse, const HeadsOf* q,
          const HeadsOf* k) {
    return with_type(dtype, wide, [&](auto zero, auto n) {
        using T = decltype(zero);
        const Angles angles{positions, positions_stride, inv_freq, axis, half, scaling, inverse ? -scaling : scaling};
        return launch({unsigned(tokens), 1, 1}, threads, 2 * half,
                      [&] { mrope_kernel<decltype(n)::value>(angles, heads_of<T>(*q), heads_of<T>(*k)); });
    });
}

int cos_sins(const int64_t* positions, const float* inv_freq, int64_t n, float* cosine, float* sine) {
    for (int64_t i = 0; i < n; ++i) cos_sin(positions[i], inv_freq[i], cosine[i], sine[i]);
    return 0;
}
}
