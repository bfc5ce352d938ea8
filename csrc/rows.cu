// Row kernels for every architecture, one block a row: statistics (2 bytes a bf16 logit), gradient (4), and the whole
// loss in one kernel (6; the row is read again, while its end is still in a cache). Where a row fits into the shared
// memory of a cluster, rows_cluster.cu does the last in 4.
#define REVISUAL_TORCH
#include "row_kernels.cuh"
#include "rows_host.cuh"

namespace revisual {

// The row's sums, in every thread of the block; nobody is still reading the row when they are known.
template <typename Z, bool FULL>
__device__ RowSum block_sum(const Z* row, const Span<Z>& span, const Reader<FULL>& read) {
    __shared__ float4 partial[MOST_WARPS];
    RowSum s = RowSum::none();
    const auto* packs = reinterpret_cast<const Pack<Z, VECTOR<Z>>*>(row + span.head);
    add_packs<FULL ? 1 : IN_FLIGHT>(s, packs, span.packs, span.head, threadIdx.x, blockDim.x, read);
    if (threadIdx.x < span.edge()) {
        const int column = span.edge_column(threadIdx.x);
        const float z[1] = {read(logit_of(row[column]), column)};
        s.add(z, read.scale);
    }
    s = warp_sum(s);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = {s.top, s.sum, s.weighted, 0.0f};
    __syncthreads();
    return sum_of(partial, blockDim.x / WARP);
}

template <typename Z, typename G, bool FULL>
__device__ void block_gradient(const Z* row, const Span<Z>& span, G* out, int target, const RowGradient& gradient,
                               const Reader<FULL>& read) {
    const auto* packs = reinterpret_cast<const Pack<Z, VECTOR<Z>>*>(row + span.head);
    write_packs<FULL ? 1 : IN_FLIGHT>(packs, span.packs, span.head, out + span.head, target, gradient, read, threadIdx.x,
                           blockDim.x);
    if (threadIdx.x < span.edge()) {
        const int column = span.edge_column(threadIdx.x);
        out[column] = gradient_of<Z, G>(row[column], column, target, gradient, read);
    }
}

template <typename Z, bool FULL>
__global__ void __launch_bounds__(WARP * MOST_WARPS, 2) statistics_kernel(Logits<Z> logits, StatisticsOut out) {
    const int64_t index = blockIdx.x;
    if (!logits.counts(index)) {
        if (threadIdx.x == 0) out.write(index, {0.0f, 0.0f, 0.0f, 1.0f});
        return;
    }
    const Z* row = logits.row(index);
    const int target = logits.target_of(index);
    const Z target_logit = row[target < 0 ? 0 : target];
    const Reader<FULL> read = logits.template reader<FULL>(logits.temperature_of(index));
    const RowSum sum = block_sum(row, Span<Z>(row, logits.V), read);
    if (threadIdx.x == 0) out.write(index, row_statistics_of(sum, read, target_logit, target));
}

template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP * MOST_WARPS, 2)
    gradient_kernel(Logits<Z> logits, G* out, int64_t out_stride, const int64_t* rows, const float* entropy,
                    const float* top, const float* sum, const float* c, const float* e) {
    const int64_t place = blockIdx.x, index = rows == nullptr ? place : rows[place];
    if (!logits.counts(index)) return write_zeros(out + place * out_stride, logits.V);
    const float temperature = logits.temperature_of(index);
    const Reader<FULL> read = logits.template reader<FULL>(temperature);
    const RowStatistics s{0.0f, entropy[index], top[index], sum[index]};
    const RowGradient gradient(s, read.scale, c[index], e == nullptr ? 0.0f : e[index], temperature);
    const Z* row = logits.row(index);
    block_gradient(row, Span<Z>(row, logits.V), out + place * out_stride, logits.target_of(index), gradient, read);
}

template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP * MOST_WARPS, 2)
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
    const Z target_logit = row[target < 0 ? 0 : target];  // before anybody writes to the row
    const float temperature = logits.temperature_of(index);
    const Reader<FULL> read = logits.template reader<FULL>(temperature);
    const RowStatistics s = row_statistics_of(block_sum(row, span, read), read, target_logit, target);
    const RowLoss<float> r = token_objective(loss.objective, loss.token(index, s.logp), s.logp, s.entropy);
    if (threadIdx.x == 0) {
        statistics.write(index, s);
        loss.write(index, r);
    }
    block_gradient(row, span, out_row, target, RowGradient(s, read.scale, r.c, r.e, temperature), read);
}

int threads_for(int V) { return V <= 4096 ? 4 * WARP : MOST_WARPS * WARP; }

}  // namespace revisual

using namespace revisual;

void row_statistics(Tensor z, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
                    Tensor logp, Tensor entropy, Tensor top, Tensor sum) {
    with_type(z.scalar_type(), [&](auto element) {
        using Z = decltype(element);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        const StatisticsOut out = statistics_out(logits.n, logp, entropy, top, sum);
        if (logits.n == 0) return;
        auto* kernel = is_full(logits) ? statistics_kernel<Z, true> : statistics_kernel<Z, false>;
        kernel<<<unsigned(logits.n), threads_for(logits.V), 0, current_stream(z)>>>(logits, out);
        REVISUAL_CUDA(cudaGetLastError());
    });
}

void row_gradient(Tensor z, Tensor out, Optional rows, Optional bias, Tensor targets, Optional temperature,
                  Optional mask, double softcap, Tensor entropy, Tensor top, Tensor sum, Tensor c, Optional e) {
    with_types(z, out, [&](auto element, auto gradient) {
        using Z = decltype(element);
        using G = decltype(gradient);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        const int64_t places = out.size(0);
        check_out(out, rows.has_value() ? places : logits.n, logits.V);
        const int64_t n = logits.n;
        const auto* index = vector_of<const int64_t>(rows, places, ScalarType::Long, "index");
        const float* given[] = {floats(entropy, n, "entropy"), floats(top, n, "top"), floats(sum, n, "total"),
                                floats(c, n, "c"), floats(e, n, "e")};
        if (places == 0) return;
        auto* kernel = is_full(logits) ? gradient_kernel<Z, G, true> : gradient_kernel<Z, G, false>;
        kernel<<<unsigned(places), threads_for(logits.V), 0, current_stream(z)>>>(
            logits, static_cast<G*>(out.data_ptr()), out.stride(0), index, given[0], given[1], given[2], given[3],
            given[4]);
        REVISUAL_CUDA(cudaGetLastError());
    });
}

void row_loss(Tensor z, Tensor out, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
              Tensor logp, Tensor entropy, Tensor losses, Tensor c, Optional e, Optional advantages, Optional old,
              Optional ref, Optional rollout, Tensor weight, int64_t surrogate, int64_t kl, bool kl_bias,
              int64_t correction, std::vector<double> numbers, bool one_read) {
    with_types(z, out, [&](auto element, auto gradient) {
        using Z = decltype(element);
        using G = decltype(gradient);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        check_out(out, logits.n, logits.V);
        const StatisticsOut statistics = statistics_out(logits.n, logp, entropy, std::nullopt, std::nullopt);
        const Loss loss{objective_of(surrogate, kl, kl_bias, correction, e.has_value(), numbers),
                        floats(advantages, logits.n, "advantages"), floats(old, logits.n, "old_logp"),
                        floats(ref, logits.n, "ref_logp"), floats(rollout, logits.n, "rollout"),
                        floats(weight, logits.n, "weight"), floats(losses, logits.n, "losses"),
                        floats(c, logits.n, "c"), floats(e, logits.n, "e")};
        if (logits.n == 0) return;
        G* places = static_cast<G*>(out.data_ptr());
        const cudaStream_t stream = current_stream(z);
        if (one_read && launch_cluster_loss(logits, places, out.stride(0), statistics, loss, stream)) return;
        auto* kernel = is_full(logits) ? loss_kernel<Z, G, true> : loss_kernel<Z, G, false>;
        kernel<<<unsigned(logits.n), threads_for(logits.V), 0, stream>>>(logits, places, out.stride(0), statistics,
                                                                         loss);
        REVISUAL_CUDA(cudaGetLastError());
    });
}
