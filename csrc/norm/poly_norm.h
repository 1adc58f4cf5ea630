// Arguments of PolyNorm.
//
//     y = w0 N(s^3) + w1 N(s^2) + w2 N(s) + bias,    N(u) = u r_u,  r_u = 1 / sqrt(mean(u^2) + eps)
//     dw_u = sum of g N(u),   dbias = sum of g
//     dx = sum over u of w_u r_u u' (g - N(u) mean(g N(u))),    u' = 3 s^2, 2 s, 1
//
// Rows are contiguous. Nothing is saved for the backward: its sums need s and dy anyway, and the mean squares
// come with them.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct PolyNormForward {
    const void* x;
    const void* weight;  // three elements
    const void* bias;    // one element, or null
    void* y;
    int64_t rows, columns;
    double per_column;  // 1 / columns
    double eps;
    DType x_type, weight_type, bias_type;
};

struct PolyNormBackward {
    const void* dy;
    const void* x;
    const void* weight;
    void* dx;
    // Partial sums of each of `chunks` groups of rows, float (double for double), or null.
    void* dweight_partial;  // [chunks, 3]
    void* dbias_partial;    // [chunks, 1]
    int64_t rows, columns, chunks;
    double per_column;
    double eps;
    DType x_type, weight_type;
};

#if !NARROWGAUGE_CPU
void launch_poly_norm_forward(const PolyNormForward& args, Stream stream);

// How many rows of partial sums launch_poly_norm_backward will write, on the current device.
int64_t poly_norm_backward_chunks_on_device(const PolyNormBackward& args);
void launch_poly_norm_backward(const PolyNormBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, poly_norm_forward_rows, (const PolyNormForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, poly_norm_backward_chunks, (const PolyNormBackward& args, int64_t begin, int64_t end))
