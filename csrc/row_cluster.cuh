// The whole loss in one kernel that reads a row once: its logits stay in the shared memory of a thread-block cluster
// between the statistics and the gradient. 4 bytes a bf16 logit.
//
// A persistent cluster takes one row after another. Each of its blocks holds a share of the row, brought by one bulk
// copy that reports to an mbarrier, one or two rows ahead. Every warp sends its partial sums to all blocks; when the
// mbarrier of a block has seen all of them, its threads add them up, evaluate the objective and write the gradient of
// their share. (A cluster barrier would do as well, but its fence waits for the gradient of the row before to reach
// memory.) The partial sums have two places, used in turn: who sends to a place again has received the sums of the row
// in between, which every warp sent after it had read that place.
#pragma once

#include "cluster.cuh"
#include "row_kernels.cuh"

namespace revisual {

// What a block does with one row after the other.
template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP* MOST_WARPS, 2)
    cluster_loss_kernel(Logits<Z> logits, G* out, int64_t out_stride, StatisticsOut statistics, Loss loss,
                        ClusterPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    using Packs = Pack<Z, VECTOR<Z>>;
    __shared__ float4 partial[2][MOST_BLOCKS * MOST_WARPS];
    __shared__ uint64_t full[2], gathered[2];
    const int rank = int(cluster_rank()), warps = blockDim.x / WARP, thread = threadIdx.x;
    const int64_t clusters = gridDim.x / plan.blocks, first = blockIdx.x / plan.blocks;
    const auto stage_of = [&](int stage) { return reinterpret_cast<Packs*>(dynamic_shared()) + stage * plan.packs; };

    const auto fetch = [&](int64_t index, int stage) {  // by one thread
        const Z* row = logits.row(index);
        const Span<Z> span(row, logits.V);
        const Share share(span.packs, rank, plan.blocks);
        const uint32_t bytes = logits.counts(index) ? uint32_t(share.count) * 16 : 0;
        barrier_arrive(&full[stage], bytes);
        if (bytes > 0) bulk_copy(stage_of(stage), row + span.column(share.first), bytes, &full[stage]);
    };

    if (thread == 0) {
        for (uint64_t* barrier : {&full[0], &full[1], &gathered[0], &gathered[1]}) barrier_init(barrier);
        barriers_ready();
        for (int stage = 0; stage < plan.stages; ++stage)
            if (first + stage * clusters < logits.n) fetch(first + stage * clusters, stage);
    }
    cluster_sync();  // every block of the cluster has begun, and its barriers exist

    // What a row's work begins with, as it lies in memory: loads that nobody waits for until the row's turn has come.
    // The target's logit follows when its column has arrived, a row ahead.
    struct Ahead {
        unsigned char counts = 0;
        int64_t target = 0;
        float temperature = 1.0f;
    };
    const auto look_ahead = [&](int64_t index) {
        Ahead row;
        if (index >= logits.n) return row;
        row.counts = 1;
        if (logits.mask != nullptr) row.counts = reinterpret_cast<const unsigned char*>(logits.mask)[index];
        if (logits.temperature != nullptr) row.temperature = logits.temperature[index];
        row.target = logits.targets[index];
        return row;
    };
    const auto target_of = [&](const Ahead& row) {
        return row.target >= 0 && row.target < logits.V ? int(row.target) : -1;
    };
    const auto logit_at = [&](int64_t index, int column) {
        return index < logits.n ? logits.row(index)[column < 0 ? 0 : column] : Z{};
    };

    int stage = 0;
    uint32_t parity = 0, counted = 0;
    Ahead now = look_ahead(first), next = look_ahead(first + clusters), after;
    Z target_logit = logit_at(first, target_of(now)), next_logit;
    for (int64_t index = first; index < logits.n;
         index += clusters, now = next, next = after, target_logit = next_logit) {
        after = look_ahead(index + 2 * clusters);
        next_logit = logit_at(index + clusters, target_of(next));
        const int target = target_of(now);
        const Z* row = logits.row(index);
        const Span<Z> span(row, logits.V);
        const Share share(span.packs, rank, plan.blocks);
        G* out_row = out + index * out_stride;
        if (now.counts != 0) {
            const int column = span.column(share.first);
            const Reader<FULL> read = logits.template reader<FULL>(now.temperature);
            const int edge = rank == 0 && thread < span.edge() ? span.edge_column(thread) : -1;
            const Z edge_logit = row[edge < 0 ? 0 : edge];
            const Token<float> token = loss.token(index);
            barrier_wait(&full[stage], parity);

            RowSum s = RowSum::none();
            add_packs<1>(s, stage_of(stage), share.count, column, thread, blockDim.x, read);
            if (edge >= 0) {
                const float z[1] = {read(logit_of(edge_logit), edge)};
                s.add(z, read.scale);
            }
            s = warp_sum(s);
            const int turn = counted % 2, partials = plan.blocks * warps;
            if (thread == 0) barrier_arrive(&gathered[turn], partials * sizeof(float4));
            // Once all have sent, the row may be overwritten: the target's logit goes along, for it must have arrived.
            if (thread % WARP < plan.blocks)
                send({s.top, s.sum, s.weighted, logit_of(target_logit)}, &partial[turn][rank * warps + thread / WARP],
                     &gathered[turn], thread % WARP);
            barrier_wait(&gathered[turn], counted / 2 % 2);
            ++counted;
            const RowStatistics found =
                row_statistics_of(sum_of(partial[turn], partials), read, partial[turn][0].w, target);
            const RowLoss<float> r = loss.of(token, found);
            if (rank == 0 && thread == 0) {
                statistics.write(index, found);
                loss.write(index, r);
            }
            const RowGradient gradient(found, read.scale, r.c, r.e, now.temperature);
            if (gradient.is_zero()) {
                write_zeros(out_row + column, share.count * VECTOR<Z>);
            } else {
                write_packs<1>(stage_of(stage), share.count, column, out_row + column, target, gradient, read, thread,
                               blockDim.x);
            }
            if (edge >= 0) out_row[edge] = gradient_of<Z, G>(edge_logit, edge, target, gradient, read);
        } else {
            barrier_wait(&full[stage], parity);  // nothing was asked for: it keeps the phases in step
            write_zeros(out_row + span.column(share.first), share.count * VECTOR<Z>);
            if (rank == 0 && thread < span.edge()) out_row[span.edge_column(thread)] = G{};
            if (rank == 0 && thread == 0) {
                statistics.write(index, {0.0f, 0.0f, 0.0f, 1.0f});
                loss.write(index, {0.0f, 0.0f, 0.0f});
            }
        }
        __syncthreads();  // everybody has read the stage
        if (thread == 0 && index + plan.stages * clusters < logits.n) fetch(index + plan.stages * clusters, stage);
        if (++stage == plan.stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    cluster_sync();  // nobody leaves while another may still write into its memory
#else
    __trap();  // the host does not launch it there
#endif
}

}  // namespace revisual
