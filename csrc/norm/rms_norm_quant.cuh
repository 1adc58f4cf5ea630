// The CUDA kernel of RMSNorm with a quantized result.
#pragma once

#include "norm/norm.cuh"
#include "norm/rms_norm_quant.h"
#include "quant/encode.cuh"

namespace narrowgauge {

// Threads and vectors as in norm_forward_kernel. The normalized row stays in registers until its scale is
// known; with Vectors = 0 it is computed again for each of the two passes that need it.
template <class X, class Code, int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) rms_norm_quant_kernel(RmsNormQuant args, int threads_per_row) {
    SharedArena arena;
    const Shared<float> sums = arena.template take<float>(max_warps);
    const Shared<uint32_t> maxima = arena.template take<uint32_t>(max_warps);

    const NormForward& norm = args.norm;
    const int lane = threadIdx.x % threads_per_row;
    const int64_t row =
        static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads_per_row) + threadIdx.x / threads_per_row;
    const int64_t columns = norm.columns, base = row * columns;
    const bool active = row < norm.rows;  // idle groups still take part in the barriers
    const int64_t stride = static_cast<int64_t>(threads_per_row) * Width,
                  first = active ? lane * Width : columns;

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
    constexpr bool in_registers = Vectors > 0;
    float kept[in_registers ? Vectors : 1][Width];
    // visit(prepare, f): prepares each vector of this thread unless the registers already hold it so, then
    // f(j, values).
    const auto visit = [&](auto&& prepare, auto&& function) {
        if constexpr (in_registers) {
#pragma unroll
            for (int v = 0; v < Vectors; ++v) {
                if (first + v * stride < columns) function(first + v * stride, kept[v]);
            }
        } else {
            for (int64_t j = first; j < columns; j += stride) {
                prepare(j, kept[0]);
                function(j, kept[0]);
            }
        }
    };
    if constexpr (in_registers) {
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
            if (first + v * stride < columns) load_sum(first + v * stride, kept[v]);
        }
    }

    float sum_of_squares = 0.0f;
    visit(load_sum, [&](int64_t j, const float (&values)[Width]) {
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
    if constexpr (in_registers) visit(load_sum, normalize);

    uint32_t largest = 0;
    visit(load_normalized, [&](int64_t, const float (&values)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) largest = max(largest, magnitude_bits(values[k]));
    });
    const float scale = scale_of<Code>(bit_cast<float>(group_max(largest, threads_per_row, maxima)));
    if (active && lane == 0) global<float>(args.quantize.scale, "scale")[row] = scale;
    visit(load_normalized, [&](int64_t j, const float (&values)[Width]) {
        Vec<Code, Width> rounded;
#pragma unroll
        for (int k = 0; k < Width; ++k) rounded[k] = round_nearest<Code>(values[k] / scale);
        store<Width>(codes, base + j, rounded);
    });
}

}  // namespace narrowgauge
