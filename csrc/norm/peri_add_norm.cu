// Launches of the kernels of the Peri-LN junction.
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

template <class X>
void forward_of(const PeriForward& args, Stream stream) {
    if (vectorizable<X>(args.columns,
                        {args.f, args.x, args.weight_out, args.weight_in, args.y, args.x_new})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return forward_of_width<X, 1>(args, stream);
}

// Both the launch and the size of its partial buffers follow from this.
struct BackwardLaunch {
    int width;
    PersistentGrid grid;
};

BackwardLaunch backward_launch(const PeriBackward& args) {
    const int width = static_cast<int>(16 / size_of(args.f_type));
    const bool vector =
        args.columns % width == 0 && aligned({args.dy, args.dx_new, args.f, args.x_new, args.weight_out,
                                              args.weight_in, args.df, args.dx});
    const int used = vector ? width : 1;
    return {used, persistent_grid(plan_for(backward_plans, (args.columns + used - 1) / used), args.rows)};
}

template <class X, int Width>
void backward_of_width(const PeriBackward& args, const PersistentGrid& grid, Stream stream) {
    const LaunchConfig config = grid.config(max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 2, 0>(grid.plan.vectors, [&](auto vectors) {
        launch(config, peri_backward_kernel<X, Width, vectors>, args, grid.plan.threads);
    });
}

template <class X>
void backward_of(const PeriBackward& args, Stream stream) {
    constexpr int width = 16 / sizeof(X);
    const BackwardLaunch how = backward_launch(args);
    if (how.width == width) return backward_of_width<X, width>(args, how.grid, stream);
    return backward_of_width<X, 1>(args, how.grid, stream);
}

}  // namespace

void launch_peri_forward(const PeriForward& args, Stream stream) {
    switch (args.f_type) {
        case DType::float64:
            return forward_of<double>(args, stream);
        case DType::bfloat16:
            return forward_of<bf16>(args, stream);
        case DType::float16:
            return forward_of<f16>(args, stream);
        default:
            return forward_of<float>(args, stream);
    }
}

int64_t peri_backward_chunks_on_device(const PeriBackward& args) { return backward_launch(args).grid.groups; }

void launch_peri_backward(const PeriBackward& args, Stream stream) {
    switch (args.f_type) {
        case DType::float64:
            return backward_of<double>(args, stream);
        case DType::bfloat16:
            return backward_of<bf16>(args, stream);
        case DType::float16:
            return backward_of<f16>(args, stream);
        default:
            return backward_of<float>(args, stream);
    }
}

}  // namespace narrowgauge
