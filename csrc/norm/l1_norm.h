// Arguments of L1 LayerNorm.
//
//     p = x - mean(x)      inverse = 1 / (factor * mean(|p|) + eps), 0 if that is 1 / 0
//     y = p * inverse * weight + bias
//
// Rows are contiguous. Statistics are float, or double for double inputs.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct L1NormForward {
    const void* x;
    const void* weight;  // or null
    const void* bias;    // or null
    void* y;
    void* mean;     // or null; [rows]
    void* inverse;  // or null; [rows]
    int64_t rows, columns;
    double per_column;  // 1 / columns
    double eps, factor;
    DType x_type, weight_type, bias_type;
};

//     h = dy * weight      x_hat = p * inverse      q = sign(p), 0 for 0
//     dx = inverse * (h - mean(h) - factor * (q - mean(q)) * mean(h * x_hat))
//     dweight = sum over rows of dy * x_hat,   dbias = sum over rows of dy
//
// The sums over rows are taken in `chunks` groups of rows first (partial_sums.h).
struct L1NormBackward {
    const void* dy;  // in the type of x, as dx
    const void* x;
    const void* mean;
    const void* inverse;
    const void* weight;  // or null
    void* dx;
    void* dweight_partial;  // or null; [chunks, columns], float (double for double)
    void* dbias_partial;    // or null; likewise
    int64_t rows, columns, chunks;
    double per_column;  // 1 / columns
    double factor;
    DType x_type, weight_type;
};

#if !NARROWGAUGE_CPU
void launch_l1_norm_forward(const L1NormForward& args, Stream stream);

// How many rows of partial sums launch_l1_norm_backward will write, on the current device.
int64_t l1_norm_backward_chunks_on_device(const L1NormBackward& args);
void launch_l1_norm_backward(const L1NormBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, l1_norm_forward_rows, (const L1NormForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, l1_norm_backward_chunks, (const L1NormBackward& args, int64_t begin, int64_t end))
