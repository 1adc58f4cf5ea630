// Launches of the PolyNorm kernels.
#include "common/floating.h"
#include "common/row_backward.h"
#include "norm/poly_norm.cuh"

namespace narrowgauge {
namespace {

template <class X, int Width>
void forward_of_width(const PolyNormForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, poly_norm_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

BackwardLaunch how(const PolyNormBackward& args) {
    return backward_launch(args.x_type, args.rows, args.columns, {args.dy, args.x, args.dx});
}

}  // namespace

void launch_poly_norm_forward(const PolyNormForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) {
        using X = decltype(x);
        if (vectorizable<X>(args.columns, {args.x, args.y})) {
            return forward_of_width<X, 16 / sizeof(X)>(args, stream);
        }
        forward_of_width<X, 1>(args, stream);
    });
}

int64_t poly_norm_backward_chunks_on_device(const PolyNormBackward& args) { return how(args).grid.groups; }

void launch_poly_norm_backward(const PolyNormBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) {
        using X = decltype(x);
        const BackwardLaunch launched = how(args);
        const LaunchConfig config = launched.grid.config(max_warps * sizeof(compute_t<X>), stream);
        with_backward_shape<X>(launched, [&](auto width, auto vectors) {
            launch(config, poly_norm_backward_kernel<X, width, vectors>, args, launched.grid.plan.threads);
        });
    });
}

}  // namespace narrowgauge
