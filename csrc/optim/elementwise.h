// What the elementwise optimizer skeletons take: plain data, shared by bindings, CPU kernels and CUDA
// kernels.
#pragma once

#include "common/dtype.h"

namespace narrowgauge {

// Work is cut into chunks by shape alone. The CPU's are small, so that threads share short lists evenly.
constexpr int64_t cpu_chunk = 1024, cuda_chunk = 8192;

// 8-bit states carry one scale per block of this many consecutive elements.
constexpr int state_block = 256;

// One parameter. Its gradient and states are stored like itself, element for element.
template <int States>
struct ElementwiseTensor {
    void* param;
    const void* grad;
    void* states[States];
    float* scales[States];  // of 8-bit states
    float* step;
    int64_t numel;
    int64_t first_element;  // where this shard begins in the whole parameter
    uint64_t seed;
    int64_t last_chunk;  // one past the last of its chunks, counted over the whole list
};

// What all parameters of one call have in common.
template <class Options>
struct ElementwiseArgs {
    Options options;
    double lr;
    const void* lr_tensor;  // replaces lr; float32 or float64
    DType lr_type, param_type, grad_type;
    bool quantized, maximize, stochastic;
    const float* grad_scale;  // gradients are divided by it
    const float* found_inf;   // nothing happens when it is not 0
    int64_t count, chunks;
};

// What one CUDA launch takes as its parameters, which hold 32,764 bytes (sm_70 and newer, CUDA 12.1 and
// newer).
template <int States, class Options>
struct ElementwiseLaunch {
    static constexpr int capacity =
        static_cast<int>((32764 - sizeof(ElementwiseArgs<Options>)) / sizeof(ElementwiseTensor<States>));
    ElementwiseArgs<Options> args;
    ElementwiseTensor<States> tensors[capacity];
};

}  // namespace narrowgauge
