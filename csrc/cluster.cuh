// What blocks of a cluster do for one another: barriers in shared memory that count bytes, copies that report to them.
//
// From compute capability 9.0 on. The host build has the declarations only: the tests bring their own.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#define CLUSTER_DEVICE __device__ __forceinline__
#else
#define CLUSTER_DEVICE
#endif

namespace revisual {

// A barrier's phase ends with its one arrival and as many bytes as that announced.
CLUSTER_DEVICE void barrier_init(uint64_t* barrier);
CLUSTER_DEVICE void barriers_ready();  // after barrier_init, for copies and for the other blocks
CLUSTER_DEVICE void barrier_arrive(uint64_t* barrier, uint32_t bytes);
CLUSTER_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity);  // until the phase of that parity has ended

// Global to shared memory, both 16-byte aligned; `bytes` is a multiple of 16.
CLUSTER_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier);

// 16 bytes to the same place in the shared memory of block `rank`, whose barrier sees them arrive.
CLUSTER_DEVICE void send(float4 value, float4* place, uint64_t* barrier, uint32_t rank);

CLUSTER_DEVICE uint32_t cluster_rank();
CLUSTER_DEVICE void cluster_sync();
CLUSTER_DEVICE unsigned char* dynamic_shared();  // what the launch asked for

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

CLUSTER_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

CLUSTER_DEVICE void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

CLUSTER_DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

CLUSTER_DEVICE void barrier_arrive(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// The default, acquire at the scope of the block, for data from other blocks too: it lies in this block's own memory,
// and the scope of the cluster would invalidate the first cache.
CLUSTER_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
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

CLUSTER_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

CLUSTER_DEVICE void send(float4 value, float4* place, uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there, seen;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 seen, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [seen];\n}" ::"r"(
            shared_address(place)),
        "r"(shared_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
}

CLUSTER_DEVICE uint32_t cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
CLUSTER_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
CLUSTER_DEVICE unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

#endif

}  // namespace revisual
