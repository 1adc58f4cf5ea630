// Norms whose rows are scaled by one of several vectors, with what stands around them in one pass: gated
// RMSNorm (a vector for each group of channels), per-head RMSNorm with its rotation, AdaLN with its gated
// residual (a vector for each sample), ScaleNorm. One family of kernels.
//
//     s = x,   x * act(z) where the gate comes first,   or residual + gate * x
//     x_hat = (s - mean) * factor
//     n = x_hat * (weight + weight_offset) + bias
//     y = n,   n * act(z) where the norm comes first,   or n * cos + rotated(n) * sin
//
// The backward computes the statistics again from what it has to read anyway, so that nothing is saved for
// it.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

//     none    mean = 0, factor = 1             layer   factor = 1 / sqrt(mean((s - mean)^2) + eps)
//     rms     factor = 1 / sqrt(mean(s^2) + eps)         l2   factor = 1 / max(sqrt(sum(s^2)), eps)
enum class Statistic : int { none, rms, layer, l2 };

// What stands around the norm: chosen when a kernel is compiled.
enum class Around : int { nothing, gate, rotation, residual };

struct Modulation {
    const void* x;
    const void* z;             // the gate's input, in the type of x
    const void* weight;        // or null; [vectors, columns], or one element
    const void* bias;          // or null; [vectors, columns]
    const void *cos, *sin;     // [positions, columns]
    int64_t rows, columns;     // x is [rows, columns]
    int64_t vectors, run;      // row r has vector r / run % vectors,
    int64_t heads, positions;  // and row r / heads % positions of the tables
    double per_column;         // 1 / columns
    double eps, weight_offset;
    Statistic statistic;
    bool one_weight;   // weight has one element
    bool norm_first;   // the gate multiplies the result of the norm
    bool silu;         // act(z) = z * sigmoid(z); or sigmoid(z)
    bool interleaved;  // channels 2 i and 2 i + 1 are rotated together; or i and i + columns / 2
    DType x_type, weight_type, bias_type, table_type;
};

struct ModulatedForward : Modulation {
    const void* residual;  // or null
    const void* gate;      // of the residual; [vectors, columns]
    void* y;               // in the type of x; or null
    void* residual_out;    // s, where there is a residual
    DType residual_type, gate_type;
};

//     h = dn * (weight + weight_offset)              dn: the gradient of n, from dy through what follows the
//     norm ds = factor * (h - mean(h) - x_hat * mean(h * x_hat)) + dresidual            the sum for l2
//     instead of the mean dweight = sum of dn * x_hat,    dbias = sum of dn           over the rows of each
//     vector
//
// The rows of a vector are cut into `chunks` pieces; row (piece, vector) of the buffers below receives its
// sums. Where every vector has one row there is one piece, and the buffers are the results.
struct ModulatedBackward : Modulation {
    const void* dy;
    const void* dresidual;  // or null; in the type of x
    void *dx, *dz;          // in the type of x
    void *dweight, *dbias;  // or null; [chunks, vectors, columns]; dweight [chunks, columns] if one_weight
    int64_t chunks;
    DType dy_type, dweight_type, dbias_type;
};

// Consecutive vectors that the CPU kernels treat together, so that neighbouring rows are read one after the
// other.
inline int64_t vectors_together(const Modulation& args) {
    const int64_t wanted = args.run > 1 || args.columns == 0 ? 1 : 4096 / args.columns;
    return wanted < 1 ? 1 : wanted < args.vectors ? wanted : args.vectors;
}

#if !NARROWGAUGE_CPU
template <Around around>
void launch_modulated_forward(const ModulatedForward& args, Stream stream);

int64_t modulated_chunks_on_device(const ModulatedBackward& args, Around around);
template <Around around>
void launch_modulated_backward(const ModulatedBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, modulated_forward_rows,
              (const ModulatedForward& args, Around around, int64_t begin, int64_t end))
// Work item u: piece u / blocks of the rows of the vectors in block u % blocks.
NG_CPU_KERNEL(void, modulated_backward_pieces,
              (const ModulatedBackward& args, Around around, int64_t begin, int64_t end))
