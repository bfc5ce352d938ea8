// The mathematics of the CUDA row kernels, compiled for the host: what the threads of a block or a cluster do, one
// thread after the other. Driven through ctypes by test_host_rows.py.
#include <vector>

#include "objective.cuh"
#include "rows.cuh"

using namespace revisual;

namespace {

struct Row {
    void *logits, *out;
    int V, target, blocks, threads;
    float temperature, softcap;
    const float* bias;
    float c, e;
};

template <int IN_FLIGHT, bool FULL, typename Z, typename G>
void run(const Row& r, float* statistics) {
    const Z* row = static_cast<const Z*>(r.logits);
    G* out = static_cast<G*>(r.out);
    const Span<Z> span(row, r.V);
    const Reader<FULL> read{LOG2E / r.temperature, r.softcap, r.bias};
    const auto* packs = reinterpret_cast<const Pack<Z, VECTOR<Z>>*>(row + span.head);
    const int each = (r.V / VECTOR<Z> + r.blocks - 1) / r.blocks;
    RowSum total = RowSum::none();
    for (int block = 0; block < r.blocks; ++block)
        for (int thread = 0; thread < r.threads; ++thread) {
            RowSum s = RowSum::none();
            const Share share(span.packs, block, each);
            add_packs<IN_FLIGHT>(s, packs + share.first, share.count, span.column(share.first), thread, r.threads,
                                 read);
            if (block == 0 && thread < span.edge()) {
                const int column = span.edge_column(thread);
                const float z[1] = {read(logit_of(row[column]), column)};
                s.add(z, read.scale);
            }
            total.merge(s);
        }
    const RowStatistics s = statistics_of(total, read.scale, read(logit_of(row[r.target]), r.target));
    statistics[0] = s.logp, statistics[1] = s.entropy;
    const RowGradient gradient(s, read.scale, r.c, r.e, r.temperature);
    for (int block = 0; block < r.blocks; ++block)
        for (int thread = 0; thread < r.threads; ++thread) {
            const Share share(span.packs, block, each);
            const int column = span.column(share.first);
            write_packs<IN_FLIGHT>(packs + share.first, share.count, column, out + column, r.target, gradient, read,
                                   thread, r.threads);
            if (block == 0 && thread < span.edge()) {
                const int edge = span.edge_column(thread);
                out[edge] = gradient_of<Z, G>(row[edge], edge, r.target, gradient, read);
            }
        }
}

template <typename Z, typename G>
void choose(const Row& r, float* statistics) {
    const bool full = r.bias != nullptr || r.softcap > 0;
    if (full) return r.blocks > 1 ? run<1, true, Z, G>(r, statistics) : run<4, true, Z, G>(r, statistics);
    return r.blocks > 1 ? run<1, false, Z, G>(r, statistics) : run<4, false, Z, G>(r, statistics);
}

}  // namespace

extern "C" {

// Element types: 0 bf16, 1 fp16, 2 fp32.
void row_pass(int from, int to, void* logits, void* out, int V, int target, int blocks, int threads, float temperature,
              float softcap, const float* bias, float c, float e, float* statistics) {
    const Row r{logits, out, V, target, blocks, threads, temperature, softcap, bias, c, e};
    if (from == 0) return choose<bf16, bf16>(r, statistics);
    if (from == 1) return choose<fp16, fp16>(r, statistics);
    if (to == 0) return choose<float, bf16>(r, statistics);
    if (to == 1) return choose<float, fp16>(r, statistics);
    choose<float, float>(r, statistics);
}

void cluster_plan(int V, int element_bytes, int half, int whole, int* plan) {
    const ClusterPlan p = plan_cluster(V, element_bytes, half, whole);
    plan[0] = p.blocks, plan[1] = p.stages, plan[2] = p.packs;
}

void objective_rows(int n, int surrogate, int kl, int kl_bias, int correction, int has_entropy, const double* x,
                    const double* logp, const double* entropy, const double* advantages, const double* old,
                    const double* ref, const double* rollout, const double* weight, double* loss, double* c,
                    double* e) {
    const Objective<double> o{surrogate, kl,   correction, kl_bias != 0, has_entropy != 0, x[0], x[1], x[2], x[3], x[4],
                              x[5],      x[6], x[7],       x[8]};
    for (int i = 0; i < n; ++i) {
        const Token<double> token{advantages == nullptr ? 1.0 : advantages[i], old == nullptr ? logp[i] : old[i],
                                  ref == nullptr ? 0.0 : ref[i], rollout == nullptr ? 1.0 : rollout[i], weight[i]};
        const RowLoss<double> r = token_objective(o, token, logp[i], entropy[i]);
        loss[i] = r.loss, c[i] = r.c, e[i] = r.e;
    }
}

void widen(int from, int n, const uint16_t* bits, float* out) {
    for (int i = 0; i < n; ++i) out[i] = from == 0 ? to_float(bf16{bits[i]}) : to_float(fp16{bits[i]});
}

void narrow(int to, int n, const float* x, uint16_t* bits) {
    for (int i = 0; i < n; ++i) bits[i] = to == 0 ? from_float<bf16>(x[i]).bits : from_float<fp16>(x[i]).bits;
}
}
