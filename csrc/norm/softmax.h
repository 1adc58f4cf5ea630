// Arguments of softmax, log-softmax and log-sum-exp over rows: one kernel family.
//
//     z = x (+ mask; or -inf where a boolean mask is false)
//     y = exp(z) / sum(exp(z))   or   z - ln(sum(exp(z)))
//
// The sum is held either as shift and sum, sum(exp(z)) = sum * e^shift, or extended, sum * 2^shift.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

namespace narrowgauge {

enum class SoftmaxAlgorithm : int32_t { automatic, two_pass, online, three_pass };

// Which row of a smaller tensor goes with a row of x: the leading dimensions of x, and the rows a step in
// each moves in the smaller one (0 where it is broadcast).
struct RowMap {
    static constexpr int max_dimensions = 8;
    int dimensions;
    int64_t sizes[max_dimensions], strides[max_dimensions];
};

struct SoftmaxForward {
    const void* x;
    const void* mask;  // or null; bool, the type of x, or float
    void* y;           // or null; the type of x, or float beside a narrow x
    void* lse;         // or null; [rows], the type of x: ln of the sum
    void* mantissa;   // or null; [rows], float (double): the sum as mantissa * 2^exponent, mantissa in [1, 2)
    void* exponent;   // with mantissa
    double* partial;  // CPU: [rows, segments, 2], where rows are cut over threads
    double* stats;    // CPU: [rows, 3], likewise
    int64_t rows, columns, segments;
    RowMap mask_rows;
    bool log, zero_masked;  // zero_masked: rows that are -inf throughout give 0, not NaN
    SoftmaxAlgorithm algorithm;
    int32_t phase;  // CPU, three_pass: 0 finds the maximum, 1 sums
    DType x_type, y_type, mask_type;
};

//     softmax        dx = y (dy - sum(y dy))
//     log-softmax    dx = dy - exp(y) sum(dy), and 0 where a boolean mask is false
struct SoftmaxBackward {
    const void* dy;    // the type of y
    const void* y;     // the type of x, or float beside a narrow x
    const void* mask;  // or null; bool
    void* dx;
    double* partial;  // CPU: [rows, segments], where rows are cut over threads
    int64_t rows, columns, segments;
    RowMap mask_rows;
    bool log;
    DType x_type, y_type;
};

// A row is cut into segments of this many columns, whoever works on them.
constexpr int64_t softmax_segment = 65536;
inline int64_t softmax_segments(int64_t columns) {
    return columns <= softmax_segment ? 1 : (columns + softmax_segment - 1) / softmax_segment;
}

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN
NG_HOST_DEVICE int64_t mapped_row(const RowMap& map, int64_t row) {
    int64_t result = 0;
    for (int i = map.dimensions - 1; i >= 0; --i) {
        result += row % map.sizes[i] * map.strides[i];
        row /= map.sizes[i];
    }
    return result;
}
NG_NAMESPACE_END

// Over rows; over segments of all rows (reduce, then merge over rows, then write).
NG_CPU_KERNEL(void, softmax_rows, (const SoftmaxForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_reduce, (const SoftmaxForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_merge, (const SoftmaxForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_write, (const SoftmaxForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_backward_rows, (const SoftmaxBackward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_backward_reduce, (const SoftmaxBackward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, softmax_backward_write, (const SoftmaxBackward& args, int64_t begin, int64_t end))
