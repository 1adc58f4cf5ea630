// What the elementwise optimizer skeletons take: plain data, shared by bindings, CPU kernels and CUDA
// kernels.
#pragma once

#include "common/dtype.h"
#include "optim/state_format.h"

namespace narrowgauge {

// Work is cut into chunks by shape alone. The CPU's are small, so that threads share short lists evenly.
constexpr int64_t cpu_chunk = 1024, cuda_chunk = 8192;

// Codes are written block by block; every format's own block divides this many consecutive elements.
constexpr int state_block = state_chunk;

// What a reduction adds up in one go: at most this many consecutive elements of a row.
constexpr int64_t sum_piece = 2048;

// The most that a rule may have: states per element, options, sums, numbers it is given.
constexpr int max_states = 4, max_options = 12, max_sums = 4, max_given = 8;

// What a rule is given before there are sums.
constexpr double nothing_given[max_given] = {};

// How the new value of a narrow parameter is kept.
enum class ParamUpdate : int32_t { nearest, stochastic, kahan, split };

// One parameter. Everything with its shape is stored like itself, element for element.
struct ElementwiseTensor {
    void* param;
    void* grad;
    void* states[max_states];
    void* scales[max_states];  // of coded states
    float* step;
    void* rest;           // Kahan's compensation, or what `split` leaves over
    float* ema;           // moving average of the parameter
    void* copy;           // a narrow copy of the parameter
    const double* given;  // what the rule was given for this parameter
    const void* rows;     // one number per row, of the type of computation
    int64_t row_length;
    int64_t first_row;  // counted over the list
    int64_t numel;
    int64_t first_element;  // where this shard begins in the whole parameter
    uint64_t seed;
    int64_t last_chunk;  // one past the last of its chunks (pieces, in a reduction), counted over the list
};

// What all parameters of one call have in common.
struct ElementwiseArgs {
    double options[max_options];
    double lr;
    const void* lr_tensor;  // replaces lr; float32 or float64
    DType lr_type, param_type, grad_type, rest_type, copy_type;
    StateFormat format;
    ParamUpdate update;
    bool maximize, zero_grad;
    double ema_weight;        // of the new value
    const float* grad_scale;  // gradients are divided by it
    const float* clip;        // and multiplied by it
    const float* found_inf;   // nothing happens when it is not 0
    void* partial;            // [pieces, sums] of a reduction, of the type of computation
    void* sums;               // [rows, sums], likewise
    int64_t count, chunks;
};

// A parameter's rows; without rows of its own it is one.
inline int64_t rows_of(const ElementwiseTensor& tensor) {
    return tensor.row_length > 0 ? tensor.numel / tensor.row_length : 1;
}
inline int64_t pieces_of(const ElementwiseTensor& tensor) {
    if (tensor.numel == 0) return 0;
    return rows_of(tensor) * ((tensor.row_length + sum_piece - 1) / sum_piece);
}

// splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): streams of neighbouring parameters, and of
// neighbouring states, have nothing in common.
NG_HOST_DEVICE uint64_t stream_seed(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// What one CUDA launch takes as its parameters, which hold 32,764 bytes (sm_70 and newer, CUDA 12.1 and
// newer). Nothing has to be copied to the device, and a CUDA graph keeps its own table.
struct ElementwiseLaunch {
    static constexpr int capacity =
        static_cast<int>((32764 - sizeof(ElementwiseArgs)) / sizeof(ElementwiseTensor));
    ElementwiseArgs args;
    ElementwiseTensor tensors[capacity];
};

}  // namespace narrowgauge
