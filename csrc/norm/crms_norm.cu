// Launches of the CRMSNorm kernels.
#include "common/floating.h"
#include "norm/crms_norm.cuh"

namespace narrowgauge {
namespace {

template <class X, int Width>
void forward_of_width(const CrmsForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, crms_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void forward_of(const CrmsForward& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.x, args.y})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return forward_of_width<X, 1>(args, stream);
}

template <class X, int Width>
void backward_of_width(const CrmsBackward& args, Stream stream) {
    const Plan plan = plan_for(backward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 2, 0>(plan.vectors, [&](auto vectors) {
        launch(config, crms_backward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void backward_of(const CrmsBackward& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.dy, args.x, args.dx})) {
        return backward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return backward_of_width<X, 1>(args, stream);
}

}  // namespace

void launch_crms_forward(const CrmsForward& args, Stream stream) {
    with_floating(args.type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

void launch_crms_backward(const CrmsBackward& args, Stream stream) {
    with_floating(args.type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
