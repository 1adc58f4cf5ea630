// Launches of RMSNorm with a quantized result.
#include "norm/rms_norm_quant.cuh"

namespace narrowgauge {
namespace {

template <class X, class Code, int Width, int Vectors>
void launch_planned(const RmsNormQuant& args, const Plan& plan, Stream stream) {
    const LaunchConfig config =
        one_row_per_group(plan, args.norm.rows, max_warps * (sizeof(float) + sizeof(uint32_t)), stream);
    launch(config, rms_norm_quant_kernel<X, Code, Width, Vectors>, args, plan.threads);
}

template <class X, class Code>
void launch_with_types(const RmsNormQuant& args, Stream stream) {
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

template <class X>
void launch_with_input(const RmsNormQuant& args, Stream stream) {
    if (args.quantize.code_type == DType::int8) return launch_with_types<X, int8_t>(args, stream);
    if (args.quantize.code_type == DType::e4m3) return launch_with_types<X, e4m3>(args, stream);
    return launch_with_types<X, e5m2>(args, stream);
}

}  // namespace

void launch_rms_norm_quant(const RmsNormQuant& args, Stream stream) {
    if (args.norm.x_type == DType::bfloat16) return launch_with_input<bf16>(args, stream);
    if (args.norm.x_type == DType::float16) return launch_with_input<f16>(args, stream);
    return launch_with_input<float>(args, stream);
}

}  // namespace narrowgauge
