// Launches the row kernels.
#define REVISUAL_TORCH
#include "row_streaming.cuh"
#include "rows_host.cuh"

namespace revisual {

static int threads_for(int V) { return V <= 4096 ? 4 * WARP : MOST_WARPS * WARP; }

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
