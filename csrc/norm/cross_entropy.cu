// Launches of cross-entropy and of the product with factors.
#include "norm/cross_entropy.cuh"
#include "norm/cross_entropy_launch.h"

namespace narrowgauge {
namespace {

template <class X, int Width>
void loss_of_width(const CrossEntropy& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    with_vectors<4, 0>(plan.vectors == 1 ? 4 : plan.vectors, [&](auto vectors) {
        launch(one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream),
               cross_entropy_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void loss_of(const CrossEntropy& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.logits, args.weight, args.dlogits})) {
        return loss_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return loss_of_width<X, 1>(args, stream);
}

template <class X, int Width>
void scale_of_width(const ScaleRows& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    launch(one_row_per_group(plan, args.rows, 0, stream), scale_rows_kernel<X, Width>, args, plan.threads);
}

template <class X>
void scale_of(const ScaleRows& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.x})) return scale_of_width<X, 16 / sizeof(X)>(args, stream);
    return scale_of_width<X, 1>(args, stream);
}

template <class F>
void with_type(DType type, F f) {
    switch (type) {
        case DType::float64:
            return f(double{});
        case DType::bfloat16:
            return f(bf16{});
        case DType::float16:
            return f(f16{});
        default:
            return f(float{});
    }
}

}  // namespace

void launch_cross_entropy(const CrossEntropy& args, Stream stream) {
    with_type(args.type, [&](auto x) { loss_of<decltype(x)>(args, stream); });
}

void launch_scale_rows(const ScaleRows& args, Stream stream) {
    with_type(args.type, [&](auto x) { scale_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
