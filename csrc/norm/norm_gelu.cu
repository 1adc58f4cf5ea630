// Launches of the normalization of TokenFormer's scores.
#include "common/floating.h"
#include "norm/norm_gelu.cuh"

namespace narrowgauge {
namespace {

template <class T, int Width>
void forward_of_width(const NormGelu& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<T>), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, norm_gelu_kernel<T, Width, vectors>, args, plan.threads);
    });
}

template <class T, int Width>
void backward_of_width(const NormGeluBackward& args, Stream stream) {
    const Plan plan = plan_for(backward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<T>), stream);
    with_vectors<1, 2, 0>(plan.vectors, [&](auto vectors) {
        launch(config, norm_gelu_backward_kernel<T, Width, vectors>, args, plan.threads);
    });
}

}  // namespace

void launch_norm_gelu(const NormGelu& args, Stream stream) {
    with_floating(args.type, [&](auto s) {
        using T = decltype(s);
        if (vectorizable<T>(args.columns, {args.s, args.a})) {
            return forward_of_width<T, 16 / sizeof(T)>(args, stream);
        }
        forward_of_width<T, 1>(args, stream);
    });
}

void launch_norm_gelu_backward(const NormGeluBackward& args, Stream stream) {
    with_floating(args.type, [&](auto s) {
        using T = decltype(s);
        if (vectorizable<T>(args.columns, {args.da, args.s, args.ds})) {
            return backward_of_width<T, 16 / sizeof(T)>(args, stream);
        }
        backward_of_width<T, 1>(args, stream);
    });
}

}  // namespace narrowgauge
