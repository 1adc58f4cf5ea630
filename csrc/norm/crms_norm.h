// Arguments of CRMSNorm: RMSNorm of zero-mean rows that are stored without their last entry (arXiv
// 2305.14858).
//
//     y = x * rstd        rstd = 1 / sqrt((sum(x^2) + sum(x)^2) / (columns + 1) + eps)
//     dx = rstd * (dy - c * (y + sum(y)))        c = sum(dy * y) / (columns + 1)
//
// Rows are contiguous. Statistics are float, or double for double inputs.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct CrmsForward {
    const void* x;
    void* y;
    void* rstd;  // or null; [rows]
    int64_t rows, columns;
    double per_entry;  // 1 / (columns + 1)
    double eps;
    DType type;
};

struct CrmsBackward {
    const void* dy;
    const void* x;
    const void* rstd;
    void* dx;
    int64_t rows, columns;
    double per_entry;
    DType type;
};

#if !NARROWGAUGE_CPU
void launch_crms_forward(const CrmsForward& args, Stream stream);
void launch_crms_backward(const CrmsBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, crms_forward_rows, (const CrmsForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, crms_backward_rows, (const CrmsBackward& args, int64_t begin, int64_t end))
