// Launches the kernels of packing_kernels.cuh.
#define REVISUAL_TORCH
#include <algorithm>

#include "packing_kernels.cuh"

using namespace revisual;

namespace {

// Enough threads for `work` items of one block, in whole warps.
int threads_for(int64_t work) { return int(std::clamp<int64_t>((work + 31) / 32 * 32, 32, MOST_THREADS)); }

unsigned blocks_for(int64_t rows) {
    REVISUAL_CHECK(rows < (int64_t(1) << 31), "too many rows for one launch");
    return unsigned(rows);
}

template <typename T>
bool aligned(const void* pointer, std::initializer_list<int64_t> elements) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 &&
           std::all_of(elements.begin(), elements.end(), [](int64_t n) { return n % VECTOR<T> == 0; });
}

// A [rows, width] matrix whose rows are contiguous.
template <typename T>
Rows<T> rows_of(const Tensor& tensor, ScalarType dtype, int64_t width, const char* name) {
    REVISUAL_CHECK(tensor.is_cuda(), std::string(name) + " must be on a CUDA device");
    REVISUAL_CHECK(tensor.scalar_type() == dtype, std::string(name) + " has the wrong dtype");
    REVISUAL_CHECK(tensor.dim() == 2 && tensor.size(1) == width, std::string(name) + " has the wrong shape");
    REVISUAL_CHECK(width <= 1 || tensor.stride(1) == 1, std::string(name) + "'s rows must be contiguous");
    return {static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.stride(0)};
}

// The same, of rows without gaps that a kernel fills.
template <typename T>
Rows<T> output_of(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t width, const char* name) {
    const Rows<T> out = rows_of<T>(tensor, dtype, width, name);
    REVISUAL_CHECK(out.count == rows, std::string(name) + " has the wrong shape");
    REVISUAL_CHECK(rows <= 1 || out.stride == width, std::string(name) + " must be contiguous");
    return {out.data, rows, width};
}

// Calls f with 16 bytes' elements of T where everything is aligned, else with 1.
template <typename T, typename F>
void with_vector(bool wide, F&& f) {
    if (wide) {
        f(std::integral_constant<int, VECTOR<T>>{});
    } else {
        f(std::integral_constant<int, 1>{});
    }
}

template <typename T, typename U>
Sums<T, U> sums_of(const int64_t* order, int64_t entries, const int64_t* indptr, int64_t segments, const Tensor& from,
                   const Tensor& to) {
    const int64_t width = from.size(1);
    REVISUAL_CHECK(from.size(0) == entries, "every row that is summed must have its place in order");
    return {order, indptr, rows_of<const T>(from, from.scalar_type(), width, "what is summed"),
            output_of<U>(to, to.scalar_type(), segments, width, "the sums"), width};
}

template <typename T, typename U>
void launch_sums(const Sums<T, U>& one, const Sums<T, U>& two, int64_t entries, unsigned tensors, cudaStream_t stream) {
    const auto fits = [](const Sums<T, U>& s) {
        return aligned<T>(s.from.data, {s.from.stride, s.width}) && aligned<T>(s.to.data, {});
    };
    const int64_t width = std::max(one.width, two.width);
    with_vector<T>(fits(one) && fits(two), [&](auto n) {
        constexpr int N = decltype(n)::value;
        const dim3 rows(blocks_for(one.to.count), tensors);
        segment_sums_kernel<N><<<rows, threads_for(width / N), 0, stream>>>(one, two);
        REVISUAL_CUDA(cudaGetLastError());
        if (entries < LONG_SEGMENT) return;
        const int64_t tiles = (width + 32 * N - 1) / (32 * N);
        REVISUAL_CHECK(tiles < 65536, "rows are too wide");
        const dim3 chunks(blocks_for(entries / LONG_SEGMENT), unsigned(tiles), tensors);
        long_sums_kernel<N><<<chunks, MOST_THREADS, 0, stream>>>(one, two);
        REVISUAL_CUDA(cudaGetLastError());
    });
}

template <typename T>
Heads<T> heads_of(const Tensor& in, const Tensor& out, const char* name) {
    const std::string what(name);
    REVISUAL_CHECK(in.is_cuda() && out.is_cuda(), what + " must be on a CUDA device");
    REVISUAL_CHECK(in.scalar_type() == out.scalar_type(), what + " has the wrong dtype");
    REVISUAL_CHECK(in.dim() == 3 && out.dim() == 3, what + " must be [T, heads, d]");
    for (int i = 0; i < 3; ++i) REVISUAL_CHECK(in.size(i) == out.size(i), what + "'s output has another shape");
    REVISUAL_CHECK(in.stride(2) == 1 && out.stride(2) == 1, what + "'s heads must be contiguous");
    return {static_cast<const T*>(in.data_ptr()),
            static_cast<T*>(out.data_ptr()),
            int(in.size(1)),
            in.stride(0),
            in.stride(1),
            out.stride(0),
            out.stride(1)};
}

template <typename T>
bool aligned(const Heads<T>& h) {
    return aligned<T>(h.in, {h.in_token, h.in_head}) && aligned<T>(h.out, {h.out_token, h.out_head});
}

}  // namespace

void pack_embeddings(Tensor ids, Tensor table, Optional features, Tensor feature_index, Tensor out) {
    const int64_t tokens = ids.size(0), width = table.size(1);
    const ScalarType dtype = table.scalar_type();
    const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        Embedding<T> from{vector_of<const int64_t>(ids, tokens, ScalarType::Long, "ids"),
                          vector_of<const int64_t>(feature_index, tokens, ScalarType::Long, "feature_index"),
                          rows_of<const T>(table, dtype, width, "table"),
                          {nullptr, 0, 0}};
        if (features.has_value()) from.features = rows_of<const T>(*features, dtype, width, "features");
        const Rows<T> to = output_of<T>(out, dtype, tokens, width, "out");
        if (tokens == 0 || width == 0) return;
        const bool wide = aligned<T>(from.table.data, {from.table.stride, width}) && aligned<T>(to.data, {}) &&
                          aligned<T>(from.features.data, {from.features.stride});
        with_vector<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            pack_embeddings_kernel<N>
                <<<blocks_for(tokens), threads_for(width / N), 0, current_stream(table)>>>(from, to.data, width);
            REVISUAL_CUDA(cudaGetLastError());
        });
    });
}

void gather_pair(Tensor key, Tensor value, Tensor index, Tensor key_out, Tensor value_out) {
    const int64_t rows = index.size(0), widths[2] = {key.size(1), value.size(1)};
    const ScalarType dtype = key.scalar_type();
    const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const int64_t* at = vector_of<const int64_t>(index, rows, ScalarType::Long, "index");
        const auto k = rows_of<const T>(key, dtype, widths[0], "key");
        const auto v = rows_of<const T>(value, dtype, widths[1], "value");
        const auto k_out = output_of<T>(key_out, dtype, rows, widths[0], "key_out");
        const auto v_out = output_of<T>(value_out, dtype, rows, widths[1], "value_out");
        REVISUAL_CHECK(k.count == v.count, "key and value have different lengths");
        if (rows == 0) return;
        const bool wide = aligned<T>(k.data, {k.stride, widths[0]}) && aligned<T>(v.data, {v.stride, widths[1]}) &&
                          aligned<T>(k_out.data, {}) && aligned<T>(v_out.data, {});
        with_vector<T>(wide, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int threads = threads_for(std::max(widths[0], widths[1]) / N);
            gather_pair_kernel<N><<<dim3(blocks_for(rows), 2), threads, 0, current_stream(key)>>>(
                at, k, v, k_out.data, v_out.data, widths[0], widths[1]);
            REVISUAL_CUDA(cudaGetLastError());
        });
    });
}

void segment_sums(Tensor order, Tensor indptr, Tensor first, Optional second, Tensor first_out, Optional second_out) {
    const int64_t entries = order.size(0), segments = indptr.size(0) - 1;
    const ScalarType dtype = first.scalar_type(), out_dtype = first_out.scalar_type();
    const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
    REVISUAL_CHECK(second.has_value() == second_out.has_value(), "the second sums need a second input");
    REVISUAL_CHECK(!second.has_value() || (second->scalar_type() == dtype && second_out->scalar_type() == out_dtype),
                   "both tensors must have the same dtype");
    REVISUAL_CHECK(out_dtype == dtype || out_dtype == ScalarType::Float, "sums are fp32, or of their input's dtype");
    const int64_t* rows = vector_of<const int64_t>(order, entries, ScalarType::Long, "order");
    const int64_t* bounds = vector_of<const int64_t>(indptr, segments + 1, ScalarType::Long, "indptr");
    if (segments <= 0) return;
    const cudaStream_t stream = current_stream(first);
    with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto launch = [&](auto out_zero) {
            using U = decltype(out_zero);
            const auto of = [&](const Tensor& from, const Tensor& to) {
                return sums_of<T, U>(rows, entries, bounds, segments, from, to);
            };
            const Sums<T, U> one = of(first, first_out), two = second.has_value() ? of(*second, *second_out) : one;
            if (std::max(one.width, two.width) > 0) {
                launch_sums(one, two, entries, second.has_value() ? 2 : 1, stream);
            }
        };
        if (out_dtype == dtype) {
            launch(T{});
        } else {
            launch(float{});
        }
    });
}

void mrope(Tensor q, Optional k, Tensor positions, Tensor inv_freq, Tensor axis, double scaling, bool inverse,
           Tensor q_out, Optional k_out) {
    const int64_t tokens = q.size(0), half = inv_freq.size(0);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    REVISUAL_CHECK(q.size(2) == 2 * half && half <= 6144, "inv_freq must be [d / 2], with d at most 12288");
    REVISUAL_CHECK(k.has_value() == k_out.has_value(), "k's output goes with k");
    REVISUAL_CHECK(
        !k.has_value() || (k->scalar_type() == q.scalar_type() && k->size(0) == tokens && k->size(2) == 2 * half),
        "k does not fit q");
    REVISUAL_CHECK(positions.is_cuda() && positions.scalar_type() == ScalarType::Long && positions.dim() == 2 &&
                       positions.size(0) == 3 && positions.size(1) == tokens,
                   "positions must be [3, T] int64 on a CUDA device");
    REVISUAL_CHECK(tokens <= 1 || positions.stride(1) == 1, "each of the three positions must be contiguous");
    const Angles angles{static_cast<const int64_t*>(positions.data_ptr()),
                        positions.stride(0),
                        vector_of<const float>(inv_freq, half, ScalarType::Float, "inv_freq"),
                        vector_of<const int8_t>(axis, half, ScalarType::Char, "axis"),
                        int(half),
                        float(scaling),
                        float(inverse ? -scaling : scaling)};
    with_type(q.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        const Heads<T> of_q = heads_of<T>(q, q_out, "q");
        const Heads<T> of_k = k.has_value() ? heads_of<T>(*k, *k_out, "k") : Heads<T>{};
        if (tokens == 0 || half == 0 || of_q.count + of_k.count == 0) return;
        with_vector<T>(half % VECTOR<T> == 0 && aligned(of_q) && aligned(of_k), [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int threads = threads_for((of_q.count + of_k.count) * (half / N));
            mrope_kernel<N>
                <<<blocks_for(tokens), threads, 2 * half * sizeof(float), current_stream(q)>>>(angles, of_q, of_k);
            REVISUAL_CUDA(cudaGetLastError());
        });
    });
}
