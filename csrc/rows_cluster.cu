// Launches the kernel of row_cluster.cuh where the device has clusters and the row fits into one.
#define REVISUAL_TORCH
#include "row_cluster.cuh"
#include "rows_host.cuh"

namespace revisual {
namespace {

// Dynamic shared memory that a block of this kernel may have, alone on a multiprocessor or as one of two.
struct Shared {
    int whole, half;
};

// Zero where the code or the device has no clusters.
template <typename Kernel>
Shared shared_bytes_of(Kernel* kernel) {
    const auto attribute = [](cudaDeviceAttr name, int device) {
        int value = 0;
        REVISUAL_CUDA(cudaDeviceGetAttribute(&value, name, device));
        return value;
    };
    int device = 0;
    REVISUAL_CUDA(cudaGetDevice(&device));
    cudaFuncAttributes code{};
    REVISUAL_CUDA(cudaFuncGetAttributes(&code, kernel));
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9 || code.ptxVersion < 90) return {0, 0};
    const int fixed = int(code.sharedSizeBytes);
    const int each = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / 2 -
                     attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - fixed, each / 128 * 128 - fixed};
}

}  // namespace

template <typename Z, typename G>
bool launch_cluster_loss(const Logits<Z>& logits, G* out, int64_t out_stride, const StatisticsOut& statistics,
                         const Loss& loss, int resident, cudaStream_t stream) {
    auto* kernel = is_full(logits) ? cluster_loss_kernel<Z, G, true> : cluster_loss_kernel<Z, G, false>;
    const Shared shared = shared_bytes_of(kernel);
    const ClusterPlan plan = plan_cluster(logits.V, sizeof(Z), resident > 1 ? shared.half : 0, shared.whole);
    if (plan.blocks == 0) return false;
    // Always the most, so that two threads of the host cannot take it from each other.
    REVISUAL_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.whole));
    REVISUAL_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                       cudaSharedmemCarveoutMaxShared));  // room for two blocks
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

#define REVISUAL_CLUSTER(Z, G)                                                                                     \
    template bool launch_cluster_loss<Z, G>(const Logits<Z>&, G*, int64_t, const StatisticsOut&, const Loss&, int, \
                                            cudaStream_t);
REVISUAL_CLUSTER(bf16, bf16)
REVISUAL_CLUSTER(fp16, fp16)
REVISUAL_CLUSTER(float, float)
REVISUAL_CLUSTER(float, bf16)
REVISUAL_CLUSTER(float, fp16)

}  // namespace revisual
