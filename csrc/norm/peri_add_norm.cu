// Launches of the kernels of the Peri-LN junction.
#include "common/floating.h"
#include "common/row_backward.h"
#include "norm/peri_add_norm.cuh"

namespace narrowgauge {
namespace {

template <class X, int Width>
void forward_of_width(const PeriForward& args, Stream stream) {
    // Two rows are held, so a row is spread over as many threads as in a backward.
    const Plan plan = plan_for(backward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 2, 0>(plan.vectors, [&](auto vectors) {
        launch(config, peri_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

BackwardLaunch how(const PeriBackward& args) {
    return backward_launch(
        args.f_type, args.rows, args.columns,
        {args.dy, args.dx_new, args.f, args.x_new, args.weight_out, args.weight_in, args.df, args.dx});
}

}  // namespace

void launch_peri_forward(const PeriForward& args, Stream stream) {
    with_floating(args.f_type, [&](auto f) {
        using X = decltype(f);
        if (vectorizable<X>(args.columns,
                            {args.f, args.x, args.weight_out, args.weight_in, args.y, args.x_new})) {
            return forward_of_width<X, 16 / sizeof(X)>(args, stream);
        }
        forward_of_width<X, 1>(args, stream);
    });
}

int64_t peri_backward_chunks_on_device(const PeriBackward& args) { return how(args).grid.groups; }

void launch_peri_backward(const PeriBackward& args, Stream stream) {
    with_floating(args.f_type, [&](auto f) {
        using X = decltype(f);
        const BackwardLaunch launched = how(args);
        const LaunchConfig config = launched.grid.config(max_warps * sizeof(compute_t<X>), stream);
        with_backward_shape<X>(launched, [&](auto width, auto vectors) {
            launch(config, peri_backward_kernel<X, width, vectors>, args, launched.grid.plan.threads);
        });
    });
}

}  // namespace narrowgauge
