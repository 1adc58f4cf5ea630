// Arguments of the general row norm: LayerNorm or RMSNorm of a sum of branches, with every option of the
// family. norm.h has the lean form.
//
//     s = dropout(x * rowscale) (+ dropout(x1)) (+ residual)                residual_out = s
//     y = (x_hat * (weight + weight_offset) + bias) * output_scale          y1 likewise
//
// Dropout keeps an element where its mask is true, or where its random number (philox.h; element i of draw 0
// for x and 1 for x1, at offset + draw) is at least dropout_p, and multiplies it by dropout_scale.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

namespace narrowgauge {

// Where a narrow input is rounded before the result is.
enum class Casting : int {
    gemma,  // nowhere
    llama,  // the normalized value, the weight, their product, its sum with the bias
    none    // and the factor that normalizes
};

// What the forward and the backward share.
struct GeneralBranch {
    const void* rowscale;  // or null; [rows]
    const void* mask;      // or null; bool, of the shape of x
    const void* mask1;     // or null; of x1
    const int64_t* rng;    // or null; [seed, offset]
    double dropout_scale;
    float dropout_p;
    DType rowscale_type;

    NG_HOST_DEVICE bool has_mask(int draw) const { return (draw == 0 ? mask : mask1) != nullptr; }
    NG_HOST_DEVICE bool drops(int draw) const { return rng != nullptr || has_mask(draw); }
};

struct GeneralForward {
    GeneralBranch branch;
    const void* x;
    const void* x1;        // or null; in the type of x
    const void* residual;  // or null
    const void* weight;    // or null, like the three below
    const void* bias;
    const void* weight1;
    const void* bias1;
    void* y;
    void* y1;            // or null
    void* residual_out;  // or null
    void* mean;          // or null; [rows]
    void* rstd;          // or null; [rows]
    int64_t rows, columns;
    double per_column;  // 1 / columns
    double eps, weight_offset, output_scale;
    bool centred;
    Casting casting;
    DType x_type, residual_type, sum_type, y_type, weight_type, bias_type, weight1_type, bias1_type;
};

//     h = dy * (weight + weight_offset) (+ dy1 * (weight1 + weight_offset))
//     ds = rstd * (h - mean(h) - x_hat * mean(h * x_hat)) (+ dresidual)
//     dresidual_in = ds     dx = dropout(ds) * rowscale     dx1 = dropout(ds)
//
// Sums over rows as in norm.h. With `from_output`, s is y, and x_hat is recovered from it.
struct GeneralBackward {
    GeneralBranch branch;
    const void* dy;
    const void* dy1;  // or null
    const void* s;
    const void* mean;  // or null
    const void* rstd;
    const void* weight;
    const void* bias;
    const void* weight1;
    const void* dresidual;  // or null
    void* dx;
    void* dresidual_in;     // or null
    void* dx1;              // or null
    void* dweight_partial;  // or null; [chunks, columns], like the three below
    void* dbias_partial;
    void* dweight1_partial;
    void* dbias1_partial;
    int64_t rows, columns, chunks;
    double per_column;
    double weight_offset, output_scale, min_weight;
    bool centred, from_output;
    DType x_type, s_type, dy_type, residual_type, dresidual_type, weight_type, bias_type, weight1_type;
};

}  // namespace narrowgauge

NG_CPU_KERNEL(void, general_norm_forward_rows, (const GeneralForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, general_norm_backward_chunks, (const GeneralBackward& args, int64_t begin, int64_t end))
