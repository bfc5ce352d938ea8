// Launches the row kernels.
#define REVISUAL_TORCH
#include "row_streaming.cuh"
#include "rows_host.cuh"

namespace revisual {

static int threads_for(int V) { return V <= 4096 ? 4 * WARP : MOST_WARPS * WARP; }

}  // namespace revisual

using namespace revisual;

void row_statistics(Tensor z, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
                    Tensor logp, Tensor entropy, Tensor top, Tensor total) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    with_type(z.scalar_type(), [&](auto element) {
        using Z = decltype(element);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        const Beside beside(z);
        const StatisticsOut out{beside(logp, "logp"), beside(entropy, "entropy"), beside(top, "top"),
                                beside(total, "total")};
        if (logits.n == 0) return;
        auto* kernel = is_full(logits) ? statistics_kernel<Z, true> : statistics_kernel<Z, false>;
        kernel<<<unsigned(logits.n), threads_for(logits.V), 0, current_stream(z)>>>(logits, out);
        REVISUAL_CUDA(cudaGetLastError());
    });
}

void row_gradient(Tensor z, Tensor out, Optional index, Optional bias, Tensor targets, Optional temperature,
                  Optional mask, double softcap, Tensor entropy, Tensor top, Tensor total, Tensor c, Optional e) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    with_types(z, out, [&](auto element, auto gradient) {
        using Z = decltype(element);
        using G = decltype(gradient);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        const int64_t places = index.has_value() ? out.size(0) : logits.n;
        check_out(out, z, places);
        const Beside beside(z);
        const auto* rows = vector_of<const int64_t>(index, places, ScalarType::Long, "index", beside.device);
        const float *H = beside(entropy, "entropy"), *tops = beside(top, "top"), *sums = beside(total, "total");
        const float *cs = beside(c, "c"), *es = beside(e, "e");
        if (places == 0) return;
        auto* kernel = is_full(logits) ? gradient_kernel<Z, G, true> : gradient_kernel<Z, G, false>;
        kernel<<<unsigned(places), threads_for(logits.V), 0, current_stream(z)>>>(
            logits, static_cast<G*>(out.data_ptr()), out.stride(0), rows, H, tops, sums, cs, es);
        REVISUAL_CUDA(cudaGetLastError());
    });
}

void row_loss(Tensor z, Tensor out, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
              Tensor logp, Tensor entropy, Tensor losses, Tensor c, Optional e, Optional advantages, Optional old,
              Optional ref, Optional rollout, Tensor weight, int64_t surrogate, int64_t kl, bool kl_bias,
              int64_t correction, std::vector<double> numbers, int64_t resident) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    with_types(z, out, [&](auto element, auto gradient) {
        using Z = decltype(element);
        using G = decltype(gradient);
        const Logits<Z> logits = logits_of<Z>(z, bias, targets, temperature, mask, softcap);
        check_out(out, z, logits.n);
        const Beside beside(z);
        const StatisticsOut statistics{beside(logp, "logp"), beside(entropy, "entropy"), nullptr, nullptr};
        const Loss loss{objective_of(surrogate, kl, kl_bias, correction, e.has_value(), numbers),
                        beside(advantages, "advantages"),
                        beside(old, "old_logp"),
                        beside(ref, "ref_logp"),
                        beside(rollout, "rollout"),
                        beside(weight, "weight"),
                        beside(losses, "losses"),
                        beside(c, "c"),
                        beside(e, "e")};
        if (logits.n == 0) return;
        G* places = static_cast<G*>(out.data_ptr());
        const cudaStream_t stream = current_stream(z);
        const bool once =
            resident > 0 && launch_cluster_loss(logits, places, out.stride(0), statistics, loss, int(resident), stream);
        if (once) return;
        auto* kernel = is_full(logits) ? loss_kernel<Z, G, true> : loss_kernel<Z, G, false>;
        kernel<<<unsigned(logits.n), threads_for(logits.V), 0, stream>>>(logits, places, out.stride(0), statistics,
                                                                         loss);
        REVISUAL_CUDA(cudaGetLastError());
    });
}
