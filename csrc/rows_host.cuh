// From tensors to what the row kernels take, with the checks that keep a kernel inside its memory.
#pragma once

#include <vector>

#include "row_kernels.cuh"

namespace revisual {

// The vectors that stand beside rows: fp32, n elements, on the rows' device.
struct Beside {
    int64_t n;
    int device;

    explicit Beside(const Tensor& z) : n(z.size(0)), device(z.get_device_index()) {}

    float* operator()(const Optional& tensor, const char* name) const {
        return vector_of<float>(tensor, n, ScalarType::Float, name, device);
    }
};

inline void check_rows(const Tensor& z, const char* name) {
    REVISUAL_CHECK(z.is_cuda() && z.dim() == 2, std::string(name) + " must be [n, V] on a CUDA device");
    REVISUAL_CHECK(z.size(1) >= 1 && z.size(1) < (int64_t(1) << 31) - 64,
                   std::string(name) + " has too few or too many columns");
    REVISUAL_CHECK(z.size(1) == 1 || z.stride(1) == 1, std::string(name) + " must have contiguous rows");
    REVISUAL_CHECK(z.size(0) < (int64_t(1) << 31), std::string(name) + " has too many rows for a grid");
}

template <typename Z>
Logits<Z> logits_of(const Tensor& z, const Optional& bias, const Tensor& targets, const Optional& temperature,
                    const Optional& mask, double softcap) {
    check_rows(z, "logits");
    const Beside beside(z);
    const int64_t n = z.size(0), V = z.size(1);
    return {static_cast<const Z*>(z.data_ptr()),
            z.stride(0),
            n,
            int(V),
            vector_of<float>(bias, V, ScalarType::Float, "bias", beside.device),
            vector_of<const int64_t>(targets, n, ScalarType::Long, "targets", beside.device),
            beside(temperature, "temperature"),
            vector_of<const bool>(mask, n, ScalarType::Bool, "mask", beside.device),
            float(softcap)};
}

template <typename Z>
bool is_full(const Logits<Z>& logits) {
    return logits.bias != nullptr || logits.softcap > 0.0f;
}

inline void check_out(const Tensor& out, const Tensor& z, int64_t n) {
    check_rows(out, "the gradient");
    REVISUAL_CHECK(out.size(0) == n && out.size(1) == z.size(1), "the gradient must have the shape of the rows");
    REVISUAL_CHECK(n <= 1 || out.stride(0) >= out.size(1), "rows of the gradient must not overlap");
    REVISUAL_CHECK(out.get_device_index() == z.get_device_index(), "the gradient must be on the device of the rows");
}

// Element types of logits and gradient: the same, or fp32 logits and a 16-bit gradient.
template <typename F>
void with_types(const Tensor& z, const Tensor& out, F&& f) {
    const ScalarType from = z.scalar_type(), to = out.scalar_type();
    if (from == ScalarType::Float) return with_type(to, [&](auto gradient) { f(float{}, gradient); });
    REVISUAL_CHECK(from == to, "16-bit logits have a gradient of the same dtype");
    if (from == ScalarType::BFloat16) return f(bf16{}, bf16{});
    REVISUAL_CHECK(from == ScalarType::Half, "logits must be bfloat16, float16 or float32");
    f(fp16{}, fp16{});
}

inline Objective<float> objective_of(int64_t surrogate, int64_t kl, bool kl_bias, int64_t correction, bool has_entropy,
                                     const std::vector<double>& x) {
    REVISUAL_CHECK(x.size() == 9, "an objective has nine numbers");
    return {int(surrogate), int(kl),     int(correction), kl_bias,     has_entropy, float(x[0]), float(x[1]),
            float(x[2]),    float(x[3]), float(x[4]),     float(x[5]), float(x[6]), float(x[7]), float(x[8])};
}

// rows_cluster.cu: false where the device has no clusters, or the row does not fit into one. `resident`: blocks that a
// multiprocessor should hold at a time, 2 if the row allows it, or 1.
template <typename Z, typename G>
bool launch_cluster_loss(const Logits<Z>& logits, G* out, int64_t out_stride, const StatisticsOut& statistics,
                         const Loss& loss, int resident, cudaStream_t stream);

}  // namespace revisual
