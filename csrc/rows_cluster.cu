// The whole loss in one kernel that reads a row once: its logits stay in the shared memory of a thread-block cluster
// between the statistics and the gradient. 4 bytes a bf16 logit.
//
// A persistent cluster takes every so-manieth row. Each of its blocks holds a share of the row, brought by one bulk copy
// that reports to an mbarrier, one or two rows ahead. Every warp sends its partial sums to all blocks; when the mbarrier
// of a block has seen all of them, its threads add them up, evaluate the objective and write the gradient of their share.
// (A cluster barrier would do as well, but its fence waits for the gradient of the row before to reach memory.) The
// partial sums have two places, used in turn: who sends to a place again has received the sums of the row in between,
// which every warp sent after it had read that place.
#define REVISUAL_TORCH
#include <cooperative_groups.h>

#include "rows_host.cuh"

namespace revisual {
namespace {

namespace cg = cooperative_groups;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// The one arrival of a phase; the phase ends when `bytes` more have been copied.
__device__ void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
}

// Global to shared memory, both 16-byte aligned; `bytes` is a multiple of 16.
__device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Partial sums to the same place in the shared memory of block `rank`, whose barrier sees 16 bytes arrive.
__device__ void send(const RowSum& s, float4* place, uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there, seen;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 seen, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %5}, [seen];\n}" ::"r"(
            shared_address(place)),
        "r"(shared_address(barrier)), "r"(rank), "f"(s.top), "f"(s.sum), "f"(s.weighted)
        : "memory");
}

#endif

// What a block does with one row after the other.
template <typename Z, typename G, bool FULL>
__global__ void __launch_bounds__(WARP * MOST_WARPS, 1)
    cluster_loss_kernel(Logits<Z> logits, G* out, int64_t out_stride, StatisticsOut statistics, Loss loss,
                        ClusterPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    using Packs = Pack<Z, VECTOR<Z>>;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float4 partial[2][MOST_BLOCKS * MOST_WARPS];
    __shared__ uint64_t full[2], gathered[2];
    const cg::cluster_group cluster = cg::this_cluster();
    const int rank = int(cluster.block_rank()), warps = blockDim.x / WARP, thread = threadIdx.x;
    const int64_t clusters = gridDim.x / plan.blocks, first = blockIdx.x / plan.blocks;
    const auto stage_of = [&](int stage) { return reinterpret_cast<Packs*>(memory) + int64_t(stage) * plan.packs; };

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
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int stage = 0; stage < plan.stages; ++stage)
            if (first + stage * clusters < logits.n) fetch(first + stage * clusters, stage);
    }
    cluster.sync();  // every block of the cluster has begun, and its barriers exist

    int stage = 0;
    uint32_t parity = 0, counted = 0;
    for (int64_t index = first; index < logits.n; index += clusters) {
        const Z* row = logits.row(index);
        const Span<Z> span(row, logits.V);
        const Share share(span.packs, rank, plan.blocks);
        G* out_row = out + index * out_stride;
        barrier_wait(&full[stage], parity);
        if (logits.counts(index)) {
            const int target = logits.target_of(index), column = span.column(share.first);
            const Z target_logit = row[target < 0 ? 0 : target];
            const float temperature = logits.temperature_of(index);
            const Reader<FULL> read = logits.template reader<FULL>(temperature);
            const int edge = rank == 0 && thread < span.edge() ? span.edge_column(thread) : -1;
            const Z edge_logit = row[edge < 0 ? 0 : edge];

            RowSum s = RowSum::none();
            add_packs<1>(s, stage_of(stage), share.count, column, thread, blockDim.x, read);
            if (edge >= 0) {
                const float z[1] = {read(logit_of(edge_logit), edge)};
                s.add(z, read.scale);
            }
            s = warp_sum(s);
            const int turn = counted % 2, partials = plan.blocks * warps;
            if (thread == 0) barrier_arrive(&gathered[turn], partials * sizeof(float4));
            if (thread % WARP < plan.blocks)
                send(s, &partial[turn][rank * warps + thread / WARP], &gathered[turn], thread % WARP);
            barrier_wait(&gathered[turn], counted / 2 % 2);
            ++counted;
            const RowStatistics found = row_statistics_of(sum_of(partial[turn], partials), read, target_logit, target);
            const RowLoss<float> r = token_objective(loss.objective, loss.token(index, found.logp), found.logp, found.entropy);
            if (rank == 0 && thread == 0) {
                statistics.write(index, found);
                loss.write(index, r);
            }
            const RowGradient gradient(found, read.scale, r.c, r.e, temperature);
            write_packs<1>(stage_of(stage), share.count, column, out_row + column, target, gradient, read, thread,
                           blockDim.x);
            if (edge >= 0) out_row[edge] = gradient_of<Z, G>(edge_logit, edge, target, gradient, read);
        } else {
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
    cluster.sync();  // nobody leaves while another may still write into its memory
#else
    __trap();  // the host does not launch it there
#endif
}

// Shared memory that a block of this kernel may ask for, or 0 where its code or the device has no clusters.
template <typename Kernel>
int shared_bytes_of(Kernel* kernel) {
    int device = 0, major = 0, limit = 0;
    cudaFuncAttributes attributes{};
    REVISUAL_CUDA(cudaGetDevice(&device));
    REVISUAL_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 9) return 0;
    REVISUAL_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    if (attributes.ptxVersion < 90) return 0;
    REVISUAL_CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return limit - int(attributes.sharedSizeBytes);
}

}  // namespace

template <typename Z, typename G>
bool launch_cluster_loss(const Logits<Z>& logits, G* out, int64_t out_stride, const StatisticsOut& statistics,
                         const Loss& loss, cudaStream_t stream) {
    auto* kernel = is_full(logits) ? cluster_loss_kernel<Z, G, true> : cluster_loss_kernel<Z, G, false>;
    const ClusterPlan plan = plan_cluster(logits.V, sizeof(Z), shared_bytes_of(kernel));
    if (plan.blocks == 0) return false;
    REVISUAL_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.bytes())));
    cudaLaunchAttribute shape{};
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim = {unsigned(plan.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(plan.blocks);
    config.blockDim = WARP * MOST_WARPS;
    config.dynamicSmemBytes = plan.bytes();
    config.stream = stream;
    config.attrs = &shape;
    config.numAttrs = 1;
    int clusters = 0;
    REVISUAL_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    if (clusters == 0) return false;
    config.gridDim = unsigned(plan.blocks * (clusters < logits.n ? clusters : logits.n));
    REVISUAL_CUDA(cudaLaunchKernelEx(&config, kernel, logits, out, out_stride, statistics, loss, plan));
    return true;
}

#define REVISUAL_CLUSTER(Z, G)                                                                               \
    template bool launch_cluster_loss<Z, G>(const Logits<Z>&, G*, int64_t, const StatisticsOut&, const Loss&, \
                                            cudaStream_t);
REVISUAL_CLUSTER(bf16, bf16)
REVISUAL_CLUSTER(fp16, fp16)
REVISUAL_CLUSTER(float, float)
REVISUAL_CLUSTER(float, bf16)
REVISUAL_CLUSTER(float, fp16)

}  // namespace revisual
