// Arguments of cross-entropy over rows of logits, and of the product of rows with factors.
//
//     z = logits, or softcap * tanh(logits / softcap)          lse = ln(sum(exp(z)))
//     loss = (1 - s) w_k (lse - z_k) + s / V * sum_j w_j (lse - z_j) + z_loss * lse^2
//     dlogits_j = scale * (p_j ((1 - s) w_k + s / V * sum(w) + 2 z_loss lse) - s / V * w_j - (1 - s) w_k [j =
//     k])
//
// with k the target, s the label smoothing, w the class weights (1 without), p = exp(z - lse), V columns;
// dlogits times 1 - (z / softcap)^2 where there is a cap. Rows whose target is ignore_index: all 0.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

namespace narrowgauge {

struct CrossEntropy {
    const void* logits;
    const int64_t* target;  // [rows]
    const void* weight;     // or null; [columns], the type of logits or float
    const void* scale;      // or null; [1], float (double)
    void* loss;             // [rows], float (double)
    void* lse;              // likewise
    void* dlogits;          // or null; the type of logits, may be logits itself
    int64_t rows, columns, ignore_index;
    double label_smoothing, z_loss, softcap;  // softcap 0: none
    DType type, weight_type;
};

// x *= factor, of its row or of all; nothing is touched where the factor is 1.
struct ScaleRows {
    void* x;
    const void* factor;  // [rows] or [1], float (double)
    int64_t rows, columns;
    bool one_factor;
    DType type;
};

}  // namespace narrowgauge

NG_CPU_KERNEL(void, cross_entropy_rows, (const CrossEntropy& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, scale_rows, (const ScaleRows& args, int64_t begin, int64_t end))
