// Launches the kernel of scaling.cuh.
#define REVISUAL_TORCH
#include "scaling.cuh"

using namespace revisual;

constexpr int THREADS = 256, BLOCKS = 1024;  // enough for every multiprocessor to have several; few, to leave quickly

void scale_(Tensor x, Tensor by) {
    REVISUAL_CHECK(x.is_cuda() && x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x must have contiguous rows");
    REVISUAL_CHECK(x.size(0) <= 1 || x.stride(0) >= x.size(1), "rows of x must not overlap");
    REVISUAL_CHECK(by.is_cuda() && by.get_device_index() == x.get_device_index() && by.numel() == 1 &&
                       by.scalar_type() == ScalarType::Float,
                   "the factor must be one fp32 number on the device of x");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    with_type(x.scalar_type(), [&](auto element) {
        using T = decltype(element);
        const int64_t rows = x.size(0), columns = x.size(1);
        if (rows == 0 || columns == 0) return;
        const int64_t wanted = columns / (THREADS * VECTOR<T>)+1, across = wanted < BLOCKS ? wanted : BLOCKS;
        const int64_t down = BLOCKS / across < rows ? BLOCKS / across : rows;
        scale_kernel<<<dim3(unsigned(across), unsigned(down)), THREADS, 0, current_stream(x)>>>(
            static_cast<T*>(x.data_ptr()), rows, columns, x.stride(0), static_cast<const float*>(by.data_ptr()));
        REVISUAL_CUDA(cudaGetLastError());
    });
}
