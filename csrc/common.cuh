// What all kernels share: element types, 16-byte packs, and the way from a tensor to a launch.
//
// The half of this file that needs neither a CUDA compiler nor torch is also compiled for the host, where the tests run
// it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace revisual {

// Elements as they lie in memory. Arithmetic is fp32: to_float and from_float are the only ways in and out.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

HOST_DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

HOST_DEVICE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

HOST_DEVICE float to_float(float x) { return x; }
HOST_DEVICE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
HOST_DEVICE float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

template <typename T>
struct Rounded;  // from fp32, to nearest, ties to even

template <>
struct Rounded<float> {
    HOST_DEVICE static float from(float x) { return x; }
};

template <>
struct Rounded<bf16> {
    HOST_DEVICE static bf16 from(float x) {
#ifdef __CUDA_ARCH__
        return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
        const uint32_t bits = bits_of(x);
        if (x != x) return {0x7fff};
        return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
    }
};

template <>
struct Rounded<fp16> {
    HOST_DEVICE static fp16 from(float x) {
#ifdef __CUDA_ARCH__
        return {__half_as_ushort(__float2half_rn(x))};
#else
        const _Float16 half = static_cast<_Float16>(x);
        fp16 out;
        memcpy(&out, &half, 2);
        return out;
#endif
    }
};

template <typename T>
HOST_DEVICE T from_float(float x) {
    return Rounded<T>::from(x);
}

// N elements that are read or written in one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

#ifdef __CUDACC__
template <int BYTES>
struct Word;  // what one access moves
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};
#endif

// One access, whatever the compiler thinks of the elements by themselves; a store goes to global memory.
template <typename T, int N>
HOST_DEVICE Pack<T, N> load(const Pack<T, N>* place) {
#ifdef __CUDA_ARCH__
    const auto word = *reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(place);
    Pack<T, N> pack;
    memcpy(&pack, &word, sizeof(word));
    return pack;
#else
    return *place;
#endif
}

template <typename T, int N>
HOST_DEVICE void store(Pack<T, N>* place, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
    typename Word<sizeof(T) * N>::type word;
    memcpy(&word, &pack, sizeof(word));
    __stwb(reinterpret_cast<typename Word<sizeof(T) * N>::type*>(place), word);
#else
    *place = pack;
#endif
}

template <typename T>
constexpr int VECTOR = 16 / sizeof(T);  // elements of the widest access

}  // namespace revisual

#ifdef REVISUAL_TORCH  // launchers: from tensors to pointers, sizes and a stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

// Only a torch with CUDA has it. Weak, so that the library loads, and shows its schemas, where torch has none.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace revisual {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#define REVISUAL_CHECK(condition, message) \
    if (!(condition)) throw std::runtime_error(std::string("revisual_fast CUDA kernels: ") + (message))

// Throws, and leaves no error behind for the next launch to be blamed for.
inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string("revisual_fast CUDA kernels: ") + what + ": " + cudaGetErrorString(error));
}

#define REVISUAL_CUDA(call) check_cuda(call, #call)

inline cudaStream_t current_stream(const Tensor& tensor) {
    REVISUAL_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    REVISUAL_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

// A vector of n elements that lie side by side on a device (-1: any); nullptr where it is absent.
template <typename T>
T* vector_of(const Optional& tensor, int64_t n, ScalarType dtype, const char* name, int device = -1) {
    if (!tensor.has_value()) return nullptr;
    REVISUAL_CHECK(tensor->is_cuda() && (device < 0 || tensor->get_device_index() == device),
                   std::string(name) + " must be on the CUDA device of the rows");
    REVISUAL_CHECK(tensor->scalar_type() == dtype, std::string(name) + " has the wrong dtype");
    REVISUAL_CHECK(tensor->dim() == 1 && tensor->size(0) == n, std::string(name) + " has the wrong shape");
    REVISUAL_CHECK(n <= 1 || tensor->stride(0) == 1, std::string(name) + " must be contiguous");
    return static_cast<T*>(tensor->data_ptr());
}

// Calls f with a value of the element type that dtype names.
template <typename F>
void with_type(ScalarType dtype, F&& f) {
    if (dtype == ScalarType::BFloat16) return f(bf16{});
    if (dtype == ScalarType::Half) return f(fp16{});
    if (dtype == ScalarType::Float) return f(float{});
    throw std::runtime_error("revisual_fast CUDA kernels: bfloat16, float16 or float32 wanted");
}

}  // namespace revisual
#endif
