// Row kernels for every architecture, one block a row: statistics (2 bytes a bf16 logit), gradient (4), and the whole
// loss in one kernel (6; the row is read again, while its end is still in a cache). Where a row fits into the shared
// memory of a cluster, row_cluster.cuh does the last in 4.
#pragma once

#include "row_kernels.cuh"

namespace revisual {

// The row's sums, in every thread of the block; nobody is still reading the row when they are known.
template <typename Z, bool FULL>
__device__ RowSum block_sum(const Z* row, const Span<Z>& span, const Reader<FULL>& read) {
    __shared__ float4 partial[MOST_WARPS];
    RowSum s = RowSum::none();
    const auto* packs = reinterpret_cast<const Pack<Z, VECTOR<Z>>*>(row + span.head);
    add_packs<FULL ? 1 : IN_FLIGHT>(s, packs, span.packs, span.head, threadIdx.x, blockDim.x, read);
    if (int(threadIdx.x) < span.edge()) {
        const int column = span.edge_column(threadIdx.x);
        const float z[1] = {read(logit_of(row[column]), column)};
        s.add(z, read.scale);
    }
    s = warp_sum(s);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = {s.top, s.sum, s.weighted, 0.0f};
    __syncthreads();
    return sum_of<MOST_WARPS>(partial, blockDim.x / WARP);
}

// The gradient of a row; zeros, without reading the row again, where it is 0.
template <typename Z, typename G, bool FULL>
__device__ void block_gradient(const Z* row, const Span<Z>& span, G* out, int V, int target,
                               const RowGradient& gradient, const Reader<FULL>& read) {
    if (gradient.is_zero()) return write_zeros(out, V);
    const auto* packs = reinterpret_cast<const Pack<Z, VECTOR<Z>>*>(row + span.head);
    write_packs<FULL ? 1 : IN_FLIGHT>(packs, span.packs, span.head, out + span.head, target, gradient, read,
                                      threadIdx.x, blockDim.x);
    if (int(threadIdx.x) < span.edge()) {
        const int column = span.edge_column(threadIdx.x);
        out[column] = gradient_of<Z, G>(row[column], column, target, gradient, read);
    }
}

template <typename Z, bool FULL>
__global__ void __launch_bounds__(WARP* MOST_WARPS, 2) statistics_kernel(Logits<Z> logits, StatisticsOut out) {
    const int64_t index = blockIdx.x;
    if (!logits.counts(index)) {
        if (threadIdx.x == 0) out.write(index, {0.0f, 0.0f, 0.0f, 1.0f});
        return;
    }
    const Z* row = logits.row(index);
    const int target = logits.target_of(index);
    const float target_logit = logits.target_logit(index, target);
    const Reader<FULL> read = logits.template reader<FULL>(logits.temperature_of(index));
    const RowSum sum = block_sum(row, Span<Z>(row, logits.V), read);
    if (threadIdx.x == 0) out.write(index, row_statistics_of(sum, read, target_logit, target));
}

template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP* MOST_WARPS, 2)
    gradient_kernel(Logits<Z> logits, G* out, int64_t out_stride, const int64_t* rows, const float* entropy,
                    const float* top, const float* sum, const float* c, const float* e) {
    const int64_t place = blockIdx.x, index = rows == nullptr ? place : rows[place];
    if (!logits.counts(index)) return write_zeros(out + place * out_stride, logits.V);
    const float temperature = logits.temperature_of(index);
    const Reader<FULL> read = logits.template reader<FULL>(temperature);
    const RowStatistics s{0.0f, entropy[index], top[index], sum[index]};
    const RowGradient gradient(s, read.scale, c[index], e == nullptr ? 0.0f : e[index], temperature);
    const Z* row = logits.row(index);
    block_gradient(row, Span<Z>(row, logits.V), out + place * out_stride, logits.V, logits.target_of(index), gradient,
                   read);
}

template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP* MOST_WARPS, 2)
    loss_kernel(Logits<Z> logits, G* out, int64_t out_stride, StatisticsOut statistics, Loss loss) {
    const int64_t index = blockIdx.x;
    G* out_row = out + index * out_stride;
    if (!logits.counts(index)) {
        if (threadIdx.x == 0) {
            statistics.write(index, {0.0f, 0.0f, 0.0f, 1.0f});
            loss.write(index, {0.0f, 0.0f, 0.0f});
        }
        return write_zeros(out_row, logits.V);
    }
    const Z* row = logits.row(index);
    const Span<Z> span(row, logits.V);
    const int target = logits.target_of(index);
    const float target_logit = logits.target_logit(index, target);  // before anybody writes to the row
    const Token<float> token = loss.token(index);
    const float temperature = logits.temperature_of(index);
    const Reader<FULL> read = logits.template reader<FULL>(temperature);
    const RowStatistics s = row_statistics_of(block_sum(row, span, read), read, target_logit, target);
    const RowLoss<float> r = loss.of(token, s);
    if (threadIdx.x == 0) {
        statistics.write(index, s);
        loss.write(index, r);
    }
    block_gradient(row, span, out_row, logits.V, target, RowGradient(s, read.scale, r.c, r.e, temperature), read);
}

}  // namespace revisual
