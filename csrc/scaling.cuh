// x *= by, where nothing is touched if by is 1: the host need not know what it is.
#pragma once

#include "common.cuh"

namespace revisual {

// Rows of any alignment; blockIdx.y takes one row after another, blockIdx.x and the threads share its packs.
template <typename T>
__global__ void scale_kernel(T* x, int64_t rows, int64_t columns, int64_t stride, const float* by) {
    const float factor = *by;
    if (factor == 1.0f) return;
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        T* begin = x + row * stride;
        const int64_t ahead = int64_t(16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16 / int64_t(sizeof(T));
        const int64_t head = ahead < columns ? ahead : columns, packs = (columns - head) / VECTOR<T>;
        auto* aligned = reinterpret_cast<Pack<T, VECTOR<T>>*>(begin + head);
        for (int64_t i = thread; i < packs; i += threads) {
            Pack<T, VECTOR<T>> pack = load(aligned + i);
#pragma unroll
            for (int j = 0; j < VECTOR<T>; ++j) pack.at[j] = from_float<T>(to_float(pack.at[j]) * factor);
            store(aligned + i, pack);
        }
        const int64_t edge = columns - packs * VECTOR<T>;  // elements before and after the packs
        if (thread < edge) {
            T& element = begin[thread < head ? thread : thread + packs * VECTOR<T>];
            element = from_float<T>(to_float(element) * factor);
        }
    }
}

}  // namespace revisual
