// Arguments of the normalization of TokenFormer's scores (python/narrowgauge/norm/tokenformer.py).
//
//     a = gelu(s * rho)      rho = 1 / sqrt(sum(s^2) / count + eps), 0 if that is 1 / 0
//     a = gelu(s) * rho      the same of gelu(s), with gelu_first
//
// Rows are contiguous. rho is float, or double for double inputs.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct NormGelu {
    const void* s;
    void* a;
    void* rho;  // or null; [rows]
    int64_t rows, columns;
    double per_count, eps;  // 1 / count
    bool gelu_first;
    DType type;
};

//     u = s * rho, h = da * gelu'(u):    ds = rho * (h - u * sum(h * u) / count)
//     with gelu_first, a = gelu(s) * rho:    ds = rho * (da - a * sum(da * a) / count) * gelu'(s)
struct NormGeluBackward {
    const void* da;
    const void* s;
    const void* rho;
    void* ds;
    int64_t rows, columns;
    double per_count;
    bool gelu_first;
    DType type;
};

#if !NARROWGAUGE_CPU
void launch_norm_gelu(const NormGelu& args, Stream stream);
void launch_norm_gelu_backward(const NormGeluBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, norm_gelu_rows, (const NormGelu& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, norm_gelu_backward_rows, (const NormGeluBackward& args, int64_t begin, int64_t end))
