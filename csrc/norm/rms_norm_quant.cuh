// The CUDA kernel of RMSNorm with a quantized result.
#pragma once

#include "common/row.cuh"
#include "norm/rms_norm_quant.h"
#include "quant/encode.cuh"

namespace narrowgauge {

// The normalized row stays in registers until its scale is
// known; with Vectors = 0 it is computed again for each of the two passes that need it.
template <class X, class Code, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) rms_norm_quant_kernel(RmsNormQuant args, int threads_per_row) {
    SharedArena arena;
    const Shared<float> sums = arena.template take<float>(max_warps);
    const Shared<uint32_t> maxima = arena.template take<uint32_t>(max_warps);

    const NormForward& norm = args.norm;
    const int64_t row = row_of_group(threads_per_row);
    const int64_t columns = norm.columns, base = row * columns;
    const RowSlice<Width> slice(row, norm.rows, columns, threads_per_row);

    const auto x = global<const X>(norm.x, "x");
    const auto codes = global<Code>(args.quantize.codes, "codes");
    const Beside residual{norm.residual, norm.residual_type, "residual"};
    const Beside weight{norm.weight, norm.weight_type, "weight"};
    const Beside bias{norm.bias, norm.bias_type, "bias"};

    const auto load_sum = [&](int64_t j, float (&values)[Width]) {
        load_row<Width>(x, base + j, values);
        if (residual) {
            float added[Width];
            residual.load(base + j, added);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] += added[k];
        }
    };
    RowValues<float, Width, Vectors> held;
    held.load_once(slice, load_sum);

    float sum_of_squares = 0.0f;
    held.visit(slice, load_sum, [&](int64_t j, const float (&values)[Width]) {
        if (norm.residual_out) {
            store_beside<X>(norm.residual_out, norm.residual_type, "residual_out", base + j, values);
        }
#pragma unroll
        for (int k = 0; k < Width; ++k) sum_of_squares += values[k] * values[k];
    });
    sum_of_squares = group_sum(sum_of_squares, threads_per_row, sums);
    const float mean_square = sum_of_squares * static_cast<float>(norm.per_column);
    const float rstd = 1.0f / sqrtf(mean_square + static_cast<float>(norm.eps));

    const auto normalize = [&](int64_t j, float (&values)[Width]) {
        float factor[Width], shift[Width];
        if (weight) weight.load(j, factor);
        if (bias) bias.load(j, shift);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            values[k] *= rstd;
            if (weight) values[k] *= factor[k] + static_cast<float>(norm.weight_offset);
            if (bias) values[k] += shift[k];
        }
    };
    const auto load_normalized = [&](int64_t j, float (&values)[Width]) {
        load_sum(j, values);
        normalize(j, values);
    };
    if constexpr (held.in_registers) held.visit(slice, load_sum, normalize);

    uint32_t largest = 0;
    held.visit(slice, load_normalized, [&](int64_t, const float (&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) largest = max(largest, magnitude_bits(values[k]));
    });
    const float scale = scale_of<Code>(bit_cast<float>(group_max(largest, threads_per_row, maxima)));
    if (slice.active && slice.lane == 0) global<float>(args.quantize.scale, "scale")[row] = scale;
    held.visit(slice, load_normalized, [&](int64_t j, const float (&values)[Width]) {
        Vec<Code, Width> rounded;
#pragma unroll
        for (int k = 0; k < Width; ++k) rounded[k] = round_nearest<Code>(values[k] / scale);
        store<Width>(codes, base + j, rounded);
    });
}

}  // namespace narrowgauge
