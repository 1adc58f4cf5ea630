// Arguments of the junction of a Peri-LN transformer.
//
//     s = x + f rstd_out (weight_out + offset),    rstd_out = 1 / sqrt(mean(f^2) + eps)         x_new = s
//     y = s rstd_in (weight_in + offset),          rstd_in = 1 / sqrt(mean(s^2) + eps)
//
// Rows are contiguous. y has the type of f; x_new has that of x, which is that of f or float32.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct PeriForward {
    const void* f;
    const void* x;
    const void* weight_out;  // or null, as is weight_in
    const void* weight_in;
    void* y;
    void* x_new;
    void* rstd_out;  // [rows], or null, as is rstd_in; float (double for double)
    void* rstd_in;
    int64_t rows, columns;
    double per_column;  // 1 / columns
    double eps, weight_offset;
    DType f_type, x_type, weight_out_type, weight_in_type;
};

//     h = dy (weight_in + offset)     x_hat = x_new rstd_in
//     d = rstd_in (h - x_hat mean(h x_hat)) + dx_new                                     dx = d
//     k = d (weight_out + offset)     f_hat = f rstd_out
//     df = rstd_out (k - f_hat mean(k f_hat))
//     dweight_in = sum over rows of dy x_hat,   dweight_out = of d f_hat
struct PeriBackward {
    const void* dy;
    const void* dx_new;  // or null
    const void* f;
    const void* x_new;
    const void* rstd_out;
    const void* rstd_in;
    const void* weight_out;
    const void* weight_in;
    void* df;
    void* dx;
    void* dweight_out_partial;  // or null; [chunks, columns], float (double for double)
    void* dweight_in_partial;
    int64_t rows, columns, chunks;
    double per_column;
    double weight_offset;
    DType f_type, x_type, weight_out_type, weight_in_type;
};

#if !NARROWGAUGE_CPU
void launch_peri_forward(const PeriForward& args, Stream stream);

// How many rows of partial sums launch_peri_backward will write, on the current device.
int64_t peri_backward_chunks_on_device(const PeriBackward& args);
void launch_peri_backward(const PeriBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, peri_forward_rows, (const PeriForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, peri_backward_chunks, (const PeriBackward& args, int64_t begin, int64_t end))
