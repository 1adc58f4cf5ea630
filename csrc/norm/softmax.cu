// Launches of softmax and its gradient.
#include "common/floating.h"
#include "norm/softmax.cuh"
#include "norm/softmax_launch.h"

namespace narrowgauge {
namespace {

template <class X, int Width>
void forward_of_width(const SoftmaxForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream),
               softmax_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void forward_of(const SoftmaxForward& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.x, args.mask, args.y})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return forward_of_width<X, 1>(args, stream);
}

// Two values an element are held: the plans of a backward.
template <class X, int Width>
void backward_of_width(const SoftmaxBackward& args, Stream stream) {
    const Plan plan = plan_for(backward_plans, (args.columns + Width - 1) / Width);
    with_vectors<1, 2, 0>(plan.vectors, [&](auto vectors) {
        launch(one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream),
               softmax_backward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void backward_of(const SoftmaxBackward& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.dy, args.y, args.mask, args.dx})) {
        return backward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return backward_of_width<X, 1>(args, stream);
}

}  // namespace

void launch_softmax_forward(const SoftmaxForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

void launch_softmax_backward(const SoftmaxBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
