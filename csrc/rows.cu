#define REVISUAL_TORCH
#include "common.cuh"
using namespace revisual;
__global__ void placeholder(float* x) { x[0] = 1; }
void row_statistics(Tensor z, Optional bias, Tensor targets, Optional temperature, Optional mask, double softcap,
                    Tensor logp, Tensor entropy, Tensor top, Tensor total) {
    placeholder<<<1, 1, 0, current_stream(z)>>>(static_cast<float*>(logp.data_ptr()));
    REVISUAL_CUDA(cudaGetLastError());
}
