// The ops of the library: their schemas and what implements them. Everything is on the LibTorch stable ABI, so that one
// binary serves every torch from 2.11 on and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// rows.cu
void row_statistics(Tensor z, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
                    Tensor logp, Tensor entropy, Tensor top, Tensor total);
void row_gradient(Tensor z, Tensor out, Optional index, Optional bias, Tensor targets, Optional temperature,
                  Optional mask, double softcap, Tensor entropy, Tensor top, Tensor total, Tensor c, Optional e);
void row_loss(Tensor z, Tensor out, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
              Tensor logp, Tensor entropy, Tensor losses, Tensor c, Optional e, Optional advantages, Optional old,
              Optional ref, Optional rollout, Tensor weight, int64_t surrogate, int64_t kl, bool kl_bias,
              int64_t correction, std::vector<double> numbers, int64_t resident);

// packing.cu
void pack_embeddings(Tensor ids, Tensor table, Optional features, Tensor feature_index, Tensor out);
void gather_pair(Tensor key, Tensor value, Tensor index, Tensor key_out, Tensor value_out);
void segment_sums(Tensor order, Tensor indptr, Tensor first, Optional second, Tensor first_out, Optional second_out);
void mrope(Tensor q, Optional k, Tensor positions, Tensor inv_freq, Tensor axis, double scaling, bool inverse,
           Tensor q_out, Optional k_out);

// scaling.cu
void scale_(Tensor x, Tensor by);

// What the build gave code for, in the words of nvcc, joined by +.
#define WORDS(text) #text
#define WORDS_OF(macro) WORDS(macro)
std::string architectures() { return WORDS_OF(REVISUAL_ARCHITECTURES); }

STABLE_TORCH_LIBRARY(revisual_fast_cuda, m) {
    m.def("architectures() -> str");
    m.def(
        "row_statistics(Tensor z, Tensor? bias, Tensor targets, Tensor? temperature, Tensor? mask, float softcap,"
        " Tensor(a!) logp, Tensor(b!) entropy, Tensor(c!) top, Tensor(d!) total) -> ()");
    m.def(
        "row_gradient(Tensor z, Tensor(a!) out, Tensor? index, Tensor? bias, Tensor targets, Tensor? temperature,"
        " Tensor? mask, float softcap, Tensor entropy, Tensor top, Tensor total, Tensor c, Tensor? e) -> ()");
    m.def(
        "row_loss(Tensor z, Tensor(a!) out, Tensor? bias, Tensor targets, Tensor? temperature, Tensor? mask,"
        " float softcap, Tensor(b!) logp, Tensor(c!) entropy, Tensor(d!) losses, Tensor(e!) c, Tensor(f!)? e,"
        " Tensor? advantages, Tensor? old, Tensor? ref, Tensor? rollout, Tensor weight, int surrogate, int kl,"
        " bool kl_bias, int correction, float[] numbers, int resident) -> ()");
    m.def("scale_(Tensor(a!) x, Tensor by) -> ()");
    m.def("pack_embeddings(Tensor ids, Tensor table, Tensor? features, Tensor feature_index, Tensor(a!) out) -> ()");
    m.def("gather_pair(Tensor key, Tensor value, Tensor index, Tensor(a!) key_out, Tensor(b!) value_out) -> ()");
    m.def(
        "segment_sums(Tensor order, Tensor indptr, Tensor first, Tensor? second, Tensor(a!) first_out,"
        " Tensor(b!)? second_out) -> ()");
    m.def(
        "mrope(Tensor q, Tensor? k, Tensor positions, Tensor inv_freq, Tensor axis, float scaling, bool inverse,"
        " Tensor(a!) q_out, Tensor(b!)? k_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(revisual_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("architectures", TORCH_BOX(&architectures));
}

STABLE_TORCH_LIBRARY_IMPL(revisual_fast_cuda, CUDA, m) {
    m.impl("row_statistics", TORCH_BOX(&row_statistics));
    m.impl("row_gradient", TORCH_BOX(&row_gradient));
    m.impl("row_loss", TORCH_BOX(&row_loss));
    m.impl("scale_", TORCH_BOX(&scale_));
    m.impl("pack_embeddings", TORCH_BOX(&pack_embeddings));
    m.impl("gather_pair", TORCH_BOX(&gather_pair));
    m.impl("segment_sums", TORCH_BOX(&segment_sums));
    m.impl("mrope", TORCH_BOX(&mrope));
}
