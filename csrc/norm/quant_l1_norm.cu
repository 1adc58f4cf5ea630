// The CUDA kernel of L1 LayerNorm in integers. How rows lie on threads: common/row.cuh.
//
// 2 bytes per element (codes in, codes out); a row beyond the registers is read again for each of its sums.
#include "common/row.cuh"
#include "norm/quant_l1_norm.h"

namespace narrowgauge {
namespace {

template <int Width, int Vectors>
__global__ void __launch_bounds__(512, 1) quant_l1_norm_kernel(QuantL1Norm args, int threads_per_row) {
    SharedArena arena;
    const Shared<int> partials = arena.template take<int>(max_warps);
    const int64_t row = row_of_group(threads_per_row), base = row * args.columns;
    const RowSlice<Width> slice(row, args.rows, args.columns, threads_per_row);
    const auto codes = global<const int8_t>(args.codes, "codes");
    const auto result = global<int8_t>(args.result, "result");
    const auto weights = global<const int32_t>(args.weight, "weight");
    const auto biases = global<const int32_t>(args.bias, "bias");

    const auto load_codes = [&](int64_t j, int8_t (&values)[Width]) {
        const auto loaded = load<Width>(codes, base + j);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = loaded[k];
    };
    RowValues<int8_t, Width, Vectors> held;
    held.load_once(slice, load_codes);
    const auto sum_of = [&](auto&& term) {
        int sum = 0;
        held.visit(slice, load_codes, [&](int64_t, const int8_t (&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) sum += term(values[k]);
        });
        return group_sum(sum, threads_per_row, partials);
    };
    const int sum = sum_of([](int code) { return code; });
    const int pivot = static_cast<int>(quant_l1_floor_mean(sum, args.columns));
    const int below = sum_of([&](int code) { return code < pivot ? pivot - code : code - pivot; });
    const int above =
        sum_of([&](int code) { return code < pivot + 1 ? pivot + 1 - code : code - pivot - 1; });
    const QuantL1Row how = quant_l1_row(sum, pivot, below, above, args.columns, args.limit);

    const auto clip = [](int value, int bound) {
        return value < -bound ? -bound : value > bound ? bound : value;
    };
    held.visit(slice, load_codes, [&](int64_t j, const int8_t (&values)[Width]) {
        Vec<int8_t, Width> rounded;
        constexpr int piece = Width < 4 ? Width : 4;  // four 32-bit integers are a 16-byte access
#pragma unroll
        for (int start = 0; start < Width; start += piece) {
            const auto weight = load<piece>(weights, j + start), bias = load<piece>(biases, j + start);
#pragma unroll
            for (int k = 0; k < piece; ++k) {
                const int scaled = clip(values[start + k] - how.centre, how.reach) * (1 << how.shift);
                const int h = clip(quant_l1_product(scaled, how.gain) + how.offset, quant_l1_range);
                rounded[start + k] =
                    static_cast<int8_t>((quant_l1_product(h, weight[k]) + bias[k] + 16) >> 5);
            }
        }
        store<Width>(result, base + j, rounded);
    });
}

template <int Width>
void launch_of_width(const QuantL1Norm& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(int), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, quant_l1_norm_kernel<Width, vectors>, args, plan.threads);
    });
}

}  // namespace

void launch_quant_l1_norm(const QuantL1Norm& args, Stream stream) {
    if (vectorizable<int8_t>(args.columns, {args.codes, args.weight, args.bias, args.result})) {
        return launch_of_width<16>(args, stream);
    }
    launch_of_width<1>(args, stream);
}

}  // namespace narrowgauge
