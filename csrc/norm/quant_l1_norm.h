// Arguments of L1 LayerNorm in integers: int8 codes in, int8 codes out, no floating point in between
// (python/narrowgauge/norm/quant_l1_norm.py).
//
//     S = sum(X), A = sum(|d X - S|), x_hat = (d X - S) d / (factor A)
//     y = (h W / 2^15 + B) / 2^5     with h = x_hat / range * 2^12, clipped to the range
//
// All scalars of a row are 64-bit integers, so that all backends give the same bits.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

constexpr int64_t quant_l1_max_columns = int64_t{1} << 18;  // beyond it a row's scalars leave 64 bits

struct QuantL1Norm {
    const int8_t* codes;
    const int32_t* weight;  // W, of 16 bits
    const int32_t* bias;    // B, of 16 bits
    int8_t* result;
    int64_t rows, columns;
    int64_t limit;  // factor * range * 2^16
};

#if !NARROWGAUGE_CPU
void launch_quant_l1_norm(const QuantL1Norm& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_NAMESPACE_BEGIN

// What turns the codes of one row into h: clip((clip(X - centre, +-reach) << shift) * gain / 2^15 + offset).
struct QuantL1Row {
    int centre, reach, shift, gain, offset;
};

constexpr int quant_l1_range = 4096;  // h at the end of the range

// floor(S / d), the first pivot of the distances below.
NG_HOST_DEVICE int64_t quant_l1_floor_mean(int64_t sum, int64_t columns) {
    const int64_t quotient = sum / columns;
    return sum < quotient * columns ? quotient - 1 : quotient;
}

// `below` and `above` are the sums of |X - pivot| and |X - (pivot + 1)|. The mean lies between the two
// pivots, and no code does, so the sum of |X - mean| lies on the line between the two sums: A is exact.
NG_HOST_DEVICE QuantL1Row quant_l1_row(int64_t sum, int64_t pivot, int64_t below, int64_t above,
                                       int64_t columns, int64_t limit) {
    const int64_t rest = sum - columns * pivot;  // of the mean above the pivot, times d
    const int64_t distances = (columns - rest) * below + rest * above;
    const int64_t centre = pivot + (2 * rest > columns ? 1 : 0);
    if (distances == 0) return {static_cast<int>(centre), 1, 0, 0, 0};
    // The range in units of a code, with 32 bits after the point: factor * range * A / d^2.
    const int64_t reach = ((limit * ((distances << 14) / columns)) << 2) / columns;
    const int64_t whole = ((reach + (int64_t{1} << 31)) >> 32) + 1;  // at this distance h is clipped
    const int clipped = whole < 255 ? static_cast<int>(whole) : 255;
    int shift = 14;
    while ((clipped << shift) > 32767) --shift;
    const int64_t gain = ((int64_t{1} << (59 - shift)) + reach / 2) / reach;
    const int64_t numerator = centre * columns - sum, denominator = columns * reach;
    const int64_t size = (((numerator < 0 ? -numerator : numerator) << 44) + denominator / 2) / denominator;
    const int offset = size < quant_l1_range ? static_cast<int>(size) : quant_l1_range;
    return {static_cast<int>(centre), clipped, shift, gain < 32767 ? static_cast<int>(gain) : 32767,
            numerator < 0 ? -offset : offset};
}

// a * b / 2^15 of 16-bit numbers, halves up.
NG_HOST_DEVICE int quant_l1_product(int a, int b) { return ((a * b >> 14) + 1) >> 1; }

NG_NAMESPACE_END

NG_CPU_KERNEL(void, quant_l1_norm_rows, (const QuantL1Norm& args, int64_t begin, int64_t end))
