// Launches the kernel of row_cluster.cuh where the device has clusters and the row fits into one.
#define REVISUAL_TORCH
#include "row_cluster.cuh"
#include "rows_host.cuh"

namespace revisual {
namespace {

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
