// Arguments of the LayerNorm / RMSNorm family: one kernel serves both, with or without a residual.
//
//     s = x (+ residual)                                  residual_out = s
//     x_hat = (s - mean) * rstd   or   s * rstd           rstd = 1 / sqrt(mean((s - mean)^2) + eps)
//     y = x_hat * (weight + weight_offset) + bias
//
// With a given `scale` for each row, that takes the place of rstd in x_hat, and rstd is a result only.
//
// Rows are contiguous. Statistics are float, or double for double inputs.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

namespace narrowgauge {

struct NormForward {
    const void* x;
    const void* residual;  // or null
    const void* weight;    // or null
    const void* bias;      // or null
    const void* scale;     // or null; [rows]
    void* y;               // or null: mean and rstd alone
    void* residual_out;    // when there is a residual, in its type
    void* mean;            // or null; [rows]
    void* rstd;            // or null; [rows]
    int64_t rows, columns;
    double per_column;  // 1 / columns
    double eps, weight_offset;
    bool centred;  // LayerNorm: subtract the mean
    DType x_type, residual_type, weight_type, bias_type, y_type;
};

//     h = dy * (weight + weight_offset)
//     dx = rstd * (h - mean(h) - x_hat * mean(h * x_hat)) (+ dresidual)     without mean(h) for RMSNorm, and
//                                                                           without the last for a given
//                                                                           scale
//     dweight = sum over rows of dy * x_hat,   dbias = sum over rows of dy
//
// Each of `chunks` groups of consecutive rows (CPU) or blocks (CUDA) sums its rows into one row of the
// partial buffers; a second step adds these in order. The cut depends on the shape alone, so results do not
// depend on the thread count.
struct NormBackward {
    const void* dy;
    const void* x;  // the normalized sum s: `residual_out` of the forward when there was a residual
    const void* mean;
    const void* rstd;
    const void* weight;     // or null
    const void* dresidual;  // or null; gradient that arrived at residual_out, in the type of x
    void* dx;               // in the type of x
    void* dweight_partial;  // or null; [chunks, columns], float (double for double)
    void* dbias_partial;    // or null; likewise
    int64_t rows, columns, chunks;
    double per_column;  // 1 / columns
    double weight_offset;
    bool centred;
    bool given_scale;  // `rstd` holds a scale that does not depend on x
    DType x_type, dy_type, weight_type;
};

}  // namespace narrowgauge

NG_CPU_KERNEL(void, norm_forward_rows, (const NormForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, norm_backward_chunks, (const NormBackward& args, int64_t begin, int64_t end))
