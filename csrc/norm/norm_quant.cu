// Launches of a norm with a quantized result.
#include "norm/norm_quant.cuh"
#include "norm/norm_quant_launch.h"

namespace narrowgauge {
namespace {

template <class X, class Code, int Width, int Vectors>
void launch_planned(const NormQuant& args, const Plan& plan, Stream stream) {
    const LaunchConfig config =
        one_row_per_group(plan, args.norm.rows, max_warps * (sizeof(float) + sizeof(uint32_t)), stream);
    launch(config, norm_quant_kernel<X, Code, Width, Vectors>, args, plan.threads);
}

template <class X, class Code>
void launch_rows(const NormQuant& args, Stream stream) {
    constexpr int width = 16 / sizeof(X);
    const NormForward& norm = args.norm;
    const bool vector =
        vectorizable<X>(norm.columns, {norm.x, norm.residual, norm.weight, norm.bias, norm.residual_out});
    const Plan plan =
        plan_for(forward_plans, (norm.columns + (vector ? width : 1) - 1) / (vector ? width : 1));
    if (!vector) return launch_planned<X, Code, 1, 0>(args, plan, stream);
    if (plan.vectors == 0) return launch_planned<X, Code, width, 0>(args, plan, stream);
    return launch_planned<X, Code, width, 4>(args, plan, stream);
}

template <class Code>
void launch_transposed(const NormQuant& args, Stream stream) {
    const NormForward& norm = args.norm;
    if (norm.columns == 0) return;
    const int64_t tiles = (norm.rows + transposed::rows - 1) / transposed::rows,
                  column_tiles = (norm.columns + transposed::columns - 1) / transposed::columns;
    const LaunchConfig config{dim3(static_cast<unsigned>(tiles * column_tiles)), dim3(transposed::threads),
                              transposed::shared_bytes, 1, stream};
    const bool vector = norm.columns % transposed::width == 0 &&
                        aligned({norm.x, norm.residual, norm.weight, norm.bias, args.codes});
    const auto transpose = [&](Transposing what) {
        if (tiles > 0) {
            launch(config, norm_quant_transposed_kernel<Code>, args, what, column_tiles, vector);
        }
    };
    if (args.given) return transpose(Transposing::move);
    if (!args.whole_columns) return transpose(Transposing::encode_own);
    transpose(Transposing::find_largest);
    const LaunchConfig scales{dim3(static_cast<unsigned>((norm.columns + tile - 1) / tile)), dim3(tile, tile),
                              tile * tile * sizeof(uint32_t), 1, stream};
    launch(scales, norm_quant_column_scales_kernel<Code>, args, tiles);
    transpose(Transposing::encode_whole);
}

template <class Code>
void launch_with_code(const NormQuant& args, Stream stream) {
    if (args.norm.rows > 0) {
        if (args.norm.x_type == DType::bfloat16) {
            launch_rows<bf16, Code>(args, stream);
        } else if (args.norm.x_type == DType::float16) {
            launch_rows<f16, Code>(args, stream);
        } else {
            launch_rows<float, Code>(args, stream);
        }
    }
    if (args.transposed) launch_transposed<Code>(args, stream);
}

}  // namespace

void launch_norm_quant(const NormQuant& args, Stream stream) {
    if (args.code_type == DType::int8) return launch_with_code<int8_t>(args, stream);
    if (args.code_type == DType::e4m3) return launch_with_code<e4m3>(args, stream);
    return launch_with_code<e5m2>(args, stream);
}

}  // namespace narrowgauge
