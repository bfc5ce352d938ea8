// The whole loss in one kernel that reads a row once: its logits stay in the shared memory of a thread-block cluster
// between the statistics and the gradient. 4 bytes a bf16 logit.
//
// A persistent cluster takes one row after another. Each of its blocks holds a share of the row, brought by one bulk
// copy that reports to an mbarrier, one or two rows ahead. A block adds up its share; its first warp sends the sum to
// all blocks and, when the mbarrier of its own has seen theirs, adds them up, evaluates the objective and leaves the
// gradient's numbers for the other warps, so that what a row costs beside its logits is one warp's work and not every
// warp's. (A cluster barrier would do as well, but its fence waits for the gradient of the row before to reach memory.)
// The sums of the blocks have two places, used in turn: who sends to a place again has received the sums of the row in
// between, which every block sent after it had read that place.
#pragma once

#include "cluster.cuh"
#include "row_kernels.cuh"

namespace revisual {

// What the first warp of a block leaves for all of them before a row's turn comes.
struct Opening {
    float temperature, scale;  // scale: of the row's Reader
    int target, counts;  // its column, or -1; 0 where the row does not count
};

// What a block does with one row after the other.
template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP* MOST_WARPS, 2)
    cluster_loss_kernel(Logits<Z> logits, G* out, int64_t out_stride, StatisticsOut statistics, Loss loss,
                        ClusterPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    static_assert(2 * (VECTOR<Z> - 1) <= WARP, "the first warp has a lane for each element of the edge");
    using Packs = Pack<Z, VECTOR<Z>>;
    __shared__ float4 of_warp[MOST_WARPS], of_block[2][MOST_BLOCKS];
    __shared__ Opening opening[2];  // used in turn: one is read while the other is written
    __shared__ RowGradient found_gradient;
    __shared__ uint64_t full[2], gathered[2];
    const int rank = int(cluster_rank()), thread = threadIdx.x;
    const bool leads = thread < WARP;
    const int64_t clusters = gridDim.x / plan.blocks, first = blockIdx.x / plan.blocks;
    const auto stage_of = [&](int stage) { return reinterpret_cast<Packs*>(dynamic_shared()) + stage * plan.packs; };

    const auto fetch = [&](int64_t index, int stage, bool asked) {  // by one thread
        const Z* row = logits.row(index);
        const Span<Z> span(row, logits.V);
        const Share share(span.packs, rank, plan.packs);
        const uint32_t bytes = asked ? uint32_t(share.count) * 16 : 0;
        barrier_arrive(&full[stage], bytes);
        if (bytes > 0) bulk_copy(stage_of(stage), row + span.column(share.first), bytes, &full[stage]);
    };

    // What a row's work begins with, as it lies in memory: loads of the first warp that nobody waits for until the row
    // before has been done. The target's logit follows when its column has arrived.
    struct Ahead {
        unsigned char counts = 0;
        int64_t target = 0;
        float temperature = 1.0f;
    };
    const auto counts = [&](int64_t index) -> unsigned char {
        if (index >= logits.n) return 0;
        return logits.mask == nullptr ? 1 : reinterpret_cast<const unsigned char*>(logits.mask)[index];
    };
    const auto look_ahead = [&](int64_t index) {
        Ahead row;
        if (index >= logits.n) return row;
        return Ahead{counts(index), logits.targets[index], logits.temperature_of(index)};
    };
    const auto open = [&](const Ahead& row, int64_t index, Opening& opening) {  // returns the target's logit
        const int target = row.target >= 0 && row.target < logits.V ? int(row.target) : -1;
        if (thread == 0) opening = {row.temperature, LOG2E / row.temperature, target, row.counts};
        return index < logits.n ? logits.row(index)[target < 0 ? 0 : target] : Z{};
    };

    Z target_logit{};
    if (leads) target_logit = open(look_ahead(first), first, opening[0]);
    if (thread == 0) {
        for (uint64_t* barrier : {&full[0], &full[1], &gathered[0], &gathered[1]}) barrier_init(barrier);
        barriers_ready();
        for (int stage = 0; stage < plan.stages; ++stage) {
            const int64_t index = first + stage * clusters;
            if (index < logits.n) fetch(index, stage, counts(index));
        }
    }
    cluster_sync();  // every block of the cluster has begun, and its barriers exist

    int stage = 0, turn = 0;
    uint32_t parity = 0, counted = 0;
    for (int64_t index = first; index < logits.n; index += clusters, turn ^= 1) {
        const Opening& now = opening[turn];
        const Z* row = logits.row(index);
        const Span<Z> span(row, logits.V);
        const Share share(span.packs, rank, plan.packs);
        const int column = span.column(share.first);
        const int64_t coming = index + plan.stages * clusters;
        Ahead next;
        unsigned char coming_counts = 0;
        int edge = -1;
        Z edge_logit{};
        if (leads) {
            next = look_ahead(index + clusters);
            coming_counts = counts(coming);
            if (rank == 0 && thread < span.edge()) edge = span.edge_column(thread);
            if (edge >= 0) edge_logit = row[edge];
        }
        G* out_row = out + index * out_stride;
        if (now.counts != 0) {
            const Reader<FULL> read{now.scale, logits.softcap, logits.bias};
            barrier_wait(&full[stage], parity);

            RowSum s = RowSum::none();
            add_packs<1>(s, stage_of(stage), share.count, column, thread, blockDim.x, read);
            if (edge >= 0) {
                const float z[1] = {read(logit_of(edge_logit), edge)};
                s.add(z, read.scale);
            }
            s = warp_sum(s);
            if (thread % WARP == 0) of_warp[thread / WARP] = {s.top, s.sum, s.weighted, 0.0f};
            __syncthreads();  // all warps have added up their part
            if (leads) {
                const Token<float> token = loss.token(index);  // it comes while the sums travel
                s = sum_of<MOST_WARPS>(of_warp, blockDim.x / WARP);
                const int place = counted % 2;
                if (thread == 0) barrier_arrive(&gathered[place], plan.blocks * sizeof(float4));
                // Once all have sent, the row may be overwritten: the target's logit goes along, for it must have
                // arrived.
                if (thread < plan.blocks)
                    send({s.top, s.sum, s.weighted, logit_of(target_logit)}, &of_block[place][rank], &gathered[place],
                         thread);
                barrier_wait(&gathered[place], counted / 2 % 2);
                ++counted;
                const RowStatistics found = row_statistics_of(sum_of<MOST_BLOCKS>(of_block[place], plan.blocks), read,
                                                              of_block[place][0].w, now.target);
                const RowLoss<float> r = loss.of(token, found);
                if (thread == 0) found_gradient = RowGradient(found, read.scale, r.c, r.e, now.temperature);
                if (rank == 0 && thread == 0) {
                    statistics.write(index, found);
                    loss.write(index, r);
                }
            }
            __syncthreads();  // the gradient's numbers are there
            const RowGradient gradient = found_gradient;
            const int target = now.target;
            if (gradient.is_zero()) {
                write_zeros(out_row + column, share.count * VECTOR<Z>);
            } else {
                write_packs<1>(stage_of(stage), share.count, column, out_row + column, target, gradient, read, thread,
                               blockDim.x);
            }
            if (edge >= 0) out_row[edge] = gradient_of<Z, G>(edge_logit, edge, target, gradient, read);
        } else {
            barrier_wait(&full[stage], parity);  // nothing was asked for: it keeps the phases in step
            write_zeros(out_row + column, share.count * VECTOR<Z>);
            if (edge >= 0) out_row[edge] = G{};
            if (rank == 0 && thread == 0) {
                statistics.write(index, {0.0f, 0.0f, 0.0f, 1.0f});
                loss.write(index, {0.0f, 0.0f, 0.0f});
            }
        }
        if (leads) target_logit = open(next, index + clusters, opening[turn ^ 1]);
        __syncthreads();  // everybody has read the stage and the gradient's numbers, and the next opening is there
        if (thread == 0 && coming < logits.n) fetch(coming, stage, coming_counts);
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
