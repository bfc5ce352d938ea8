// The ops of the library: their schemas and what implements them. Everything is on the LibTorch stable ABI, so that one
// binary serves every torch from 2.11 on and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// rows.cu
void row_statistics(Tensor z, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
                    Tensor logp, Tensor entropy, Tensor top, Tensor total);

// What the build gave code for, in the words of nvcc, joined by +.
#define WORDS(text) #text
#define WORDS_OF(macro) WORDS(macro)
std::string architectures() { return WORDS_OF(REVISUAL_ARCHITECTURES); }

STABLE_TORCH_LIBRARY(revisual_fast_cuda, m) {
    m.def("architectures() -> str");
    m.def("row_statistics(Tensor z, Tensor? bias, Tensor targets, Tensor? temperature, Tensor? mask, float softcap,"
          " Tensor(a!) logp, Tensor(b!) entropy, Tensor(c!) top, Tensor(d!) total) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(revisual_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("architectures", TORCH_BOX(&architectures));
}

STABLE_TORCH_LIBRARY_IMPL(revisual_fast_cuda, CUDA, m) {
    m.impl("row_statistics", TORCH_BOX(&row_statistics));
}
