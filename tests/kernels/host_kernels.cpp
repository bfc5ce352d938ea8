// The CUDA row kernels themselves, not only their mathematics, run on the host: see host_cuda.hpp.
#include "host_cuda.hpp"
//
#include "row_cluster.cuh"
#include "row_streaming.cuh"
#include "scaling.cuh"

namespace revisual {

void barrier_init(uint64_t* barrier) {
    const host::BarrierState fresh{0, 1, 0};
    memcpy(barrier, &fresh, 8);
}

void barriers_ready() {}

void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
    const std::lock_guard lock(host::block->cluster->mutex);
    host::block->cluster->update(barrier, 1, int(bytes));
}

void barrier_wait(uint64_t* barrier, uint32_t parity) { host::block->cluster->wait(barrier, parity); }

void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes % 16) throw host::Stuck("a bulk copy must be aligned");
    memset(to, 0xff, bytes);
    host::Cluster* cluster = host::block->cluster;
    cluster->later([=] {
        memcpy(to, from, bytes);
        cluster->update(barrier, 0, -int(bytes));
    });
}

void send(float4 value, float4* place, uint64_t* barrier, uint32_t rank) {
    host::Cluster* cluster = host::block->cluster;
    const auto there = [&](void* here) {
        return static_cast<char*>(here) - host::block->base + cluster->blocks[rank]->base;
    };
    auto* to = reinterpret_cast<float4*>(there(place));
    auto* seen = reinterpret_cast<uint64_t*>(there(barrier));
    cluster->later([=] {
        *to = value;
        cluster->update(seen, 0, -16);
    });
}

uint32_t cluster_rank() { return uint32_t(host::block->rank); }
void cluster_sync() { host::block->cluster->meeting.wait(); }
unsigned char* dynamic_shared() {
    alignas(128) static unsigned char memory[1 << 17];
    return memory;
}

}  // namespace revisual

using namespace revisual;

extern "C" {

// What a kernel is launched with; the fields are those of `Launch` in test_host_kernels.py.
struct Launch {
    int kernel;  // 0 statistics, 1 gradient, 2 loss, 3 loss in clusters, 4 scaling of `out` by weight[0]
    int from, to, threads, blocks, clusters, stages, packs, seed;
    int64_t n, V, places, stride, out_stride;
    void *z, *out;
    const float* bias;
    const int64_t *targets, *index;
    const float* temperature;
    const bool* mask;
    float softcap;
    float *logp, *entropy, *top, *sum, *losses, *c, *e;
    const float *advantages, *old, *ref, *rollout, *weight;
    int surrogate, kl, kl_bias, correction;
    float numbers[9];
};
}

namespace {

template <bool FULL, typename Z, typename G>
void kernel(const Launch& l) {
    const Logits<Z> logits{
        static_cast<const Z*>(l.z), l.stride, l.n, int(l.V), l.bias, l.targets, l.temperature, l.mask, l.softcap};
    const StatisticsOut statistics{l.logp, l.entropy, l.kernel > 1 ? nullptr : l.top, l.kernel > 1 ? nullptr : l.sum};
    const float* x = l.numbers;
    const Loss loss{{l.surrogate, l.kl, l.correction, l.kl_bias != 0, l.e != nullptr, x[0], x[1], x[2], x[3], x[4],
                     x[5], x[6], x[7], x[8]},
                    l.advantages,
                    l.old,
                    l.ref,
                    l.rollout,
                    l.weight,
                    l.losses,
                    l.c,
                    l.e};
    G* out = static_cast<G*>(l.out);
    if (l.kernel == 0) return statistics_kernel<Z, FULL>(logits, statistics);
    if (l.kernel == 1)
        return gradient_kernel<Z, G, FULL>(logits, out, l.out_stride, l.index, l.entropy, l.top, l.sum, l.c, l.e);
    if (l.kernel == 4) return scale_kernel(out, l.n, l.V, l.out_stride, l.weight);
    if (l.kernel == 2) return loss_kernel<Z, G, FULL>(logits, out, l.out_stride, statistics, loss);
    cluster_loss_kernel<Z, G, FULL>(logits, out, l.out_stride, statistics, loss, {l.blocks, l.stages, l.packs});
}

template <typename Z, typename G>
void choose(const Launch& l) {
    l.bias != nullptr || l.softcap > 0 ? kernel<true, Z, G>(l) : kernel<false, Z, G>(l);
}

using Thread = void (*)(const Launch*, host::Block*, int, int, int, std::exception_ptr*);

}  // namespace

extern "C" {

char anchor[16];  // where a copy's static variables are, give or take

// One thread of one block; `thread_address` and `anchor_address` let the first copy start those of the others.
void thread_of(const Launch* l, host::Block* block, int thread, int at, int grid, std::exception_ptr* failed) try {
    host::block = block;
    threadIdx.x = unsigned(thread), blockDim.x = unsigned(l->threads);
    blockIdx.x = unsigned(at), gridDim.x = unsigned(grid), gridDim.y = 1;
    if (l->kernel == 4) {  // blocks across the rows, the others down
        gridDim = {unsigned(l->blocks), unsigned(grid / l->blocks)};
        blockIdx = {unsigned(at % l->blocks), unsigned(at / l->blocks)};
    }
    if (l->from == 0) return choose<bf16, bf16>(*l);
    if (l->from == 1) return choose<fp16, fp16>(*l);
    l->to == 0 ? choose<float, bf16>(*l) : choose<float, float>(*l);
} catch (...) {
    *failed = std::current_exception();
}

void* thread_address() { return reinterpret_cast<void*>(&thread_of); }
void* anchor_address() { return anchor; }

// Runs the kernel; the copies' addresses are those that the functions above gave. Returns 0, or 1 and a message.
int launch(const Launch* l, void* const* threads, void* const* anchors, char* message) {
    const int size = l->kernel == 3 ? l->blocks : 1, grid = l->kernel == 3 ? size * l->clusters : int(l->places);
    std::exception_ptr failed;
    for (int first = 0; first < grid && !failed; first += size) {
        host::Cluster cluster(size * l->threads, l->seed + first);
        std::vector<std::unique_ptr<host::Block>> blocks;
        for (int rank = 0; rank < size; ++rank) {
            blocks.push_back(
                std::make_unique<host::Block>(rank, l->threads, &cluster, static_cast<char*>(anchors[rank])));
            cluster.blocks.push_back(blocks.back().get());
        }
        std::vector<std::thread> running;
        for (int rank = 0; rank < size; ++rank)
            for (int thread = 0; thread < l->threads; ++thread)
                running.emplace_back(Thread(threads[rank]), l, blocks[rank].get(), thread, first + rank, grid, &failed);
        std::thread carrier(&host::Cluster::carry, &cluster);
        for (auto& thread : running) thread.join();
        {
            const std::lock_guard lock(cluster.mutex);
            cluster.done = true;
            cluster.changed.notify_all();
        }
        carrier.join();
    }
    if (!failed) return 0;
    try {
        std::rethrow_exception(failed);
    } catch (const std::exception& error) {
        strncpy(message, error.what(), 255);
    }
    return 1;
}
}
