// Kernels around packed rows: their input embeddings, the keys and values of shared prompts, the sums that are the
// gradients of both, and M-RoPE. All are bound by the bytes they move; none uses atomics.
#pragma once

#include "packing.cuh"

namespace revisual {

constexpr int MOST_THREADS = 256;  // of a block
constexpr int SUM_BLOCKS = 4;      // of sums on a multiprocessor: registers enough to have several rows in flight

template <int N, typename T>
__global__ void pack_embeddings_kernel(Embedding<T> from, T* out, int64_t width) {
    const int64_t t = blockIdx.x;
    copy_row<N>(embedding_at(from, t), out + t * width, width, threadIdx.x, blockDim.x);
}

// One block a row and tensor: blockIdx.y says which of the two.
template <int N, typename T>
__global__ void gather_pair_kernel(const int64_t* index, Rows<const T> key, Rows<const T> value, T* key_out,
                                   T* value_out, int64_t key_width, int64_t value_width) {
    const int64_t row = blockIdx.x;
    if (blockIdx.y == 0) {
        copy_row<N>(row_at(key, index[row]), key_out + row * key_width, key_width, threadIdx.x, blockDim.x);
    } else {
        copy_row<N>(row_at(value, index[row]), value_out + row * value_width, value_width, threadIdx.x, blockDim.x);
    }
}

// One block a segment and tensor: blockIdx.y says which of the two, in a branch, since choosing between the structures
// would put them on the stack and make every access one of unknown memory.
template <int N, typename T, typename U>
__global__ void __launch_bounds__(MOST_THREADS, SUM_BLOCKS) segment_sums_kernel(Sums<T, U> one, Sums<T, U> two) {
    if (blockIdx.y == 0) {
        sum_short<N>(one, blockIdx.x, threadIdx.x, blockDim.x);
    } else {
        sum_short<N>(two, blockIdx.x, threadIdx.x, blockDim.x);
    }
}

// One block for every chunk of entries, 32 N columns and tensor. Few chunks have a segment that begins there and is
// long; the blocks of the others have nothing to do.
template <int N, typename T, typename U>
__global__ void __launch_bounds__(MOST_THREADS, SUM_BLOCKS) long_sums_kernel(Sums<T, U> one, Sums<T, U> two) {
    __shared__ float partial[MOST_THREADS * N];
    const int64_t segment = long_segment(one, blockIdx.x), tile = int64_t(blockIdx.y) * 32 * N;
    if (segment == -1) return;  // all threads of the block
    if (blockIdx.z == 0) {
        sum_long<N>(one, segment, tile, threadIdx.x, blockDim.x, partial);
        __syncthreads();
        sum_partial<N>(one, segment, tile, threadIdx.x, blockDim.x, partial);
    } else {
        sum_long<N>(two, segment, tile, threadIdx.x, blockDim.x, partial);
        __syncthreads();
        sum_partial<N>(two, segment, tile, threadIdx.x, blockDim.x, partial);
    }
}

#ifdef __CUDACC__
__device__ __forceinline__ float* angle_table() {  // what the launch asked for
    extern __shared__ float table[];
    return table;
}
#else
float* angle_table();  // the tests have one
#endif

// One block a token: its angles once, for all heads of q and k.
template <int N, typename T>
__global__ void mrope_kernel(Angles angles, Heads<T> q, Heads<T> k) {
    float* table = angle_table();  // cosines, then sines
    const int64_t t = blockIdx.x;
    for (int i = threadIdx.x; i < angles.half; i += blockDim.x) fill_table(angles, t, i, table);
    __syncthreads();
    const int groups = angles.half / N, q_jobs = q.count * groups, jobs = q_jobs + k.count * groups;
    for (int job = threadIdx.x; job < jobs; job += blockDim.x) {
        if (job < q_jobs) {
            rotate<N>(q, t, job, angles.half, table);
        } else {
            rotate<N>(k, t, job - q_jobs, angles.half, table);
        }
    }
}

}  // namespace revisual
