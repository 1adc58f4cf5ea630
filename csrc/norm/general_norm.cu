// Launches of the kernels of the general row norm.
#include <algorithm>

#include "common/floating.h"
#include "norm/general_norm.cuh"
#include "norm/general_norm_launch.h"

namespace narrowgauge {
namespace {

// With a second output a thread holds twice the sums, so one vector of the row.
constexpr Plan second_plans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},  {64, 64, 1},
                                 {128, 128, 1}, {256, 256, 1}, {512, 512, 1}};

template <class X, int Width>
void forward_of_width(const GeneralForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, general_norm_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void forward_of(const GeneralForward& args, Stream stream) {
    if (vectorizable<X>(args.columns,
                        {args.x, args.x1, args.residual, args.weight, args.bias, args.weight1, args.bias1,
                         args.y, args.y1, args.residual_out, args.branch.mask, args.branch.mask1})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    forward_of_width<X, 1>(args, stream);
}

// Both the launch and the size of its partial buffers follow from this.
struct BackwardLaunch {
    Plan plan;
    int width;
    int64_t blocks, chunks;
};

BackwardLaunch backward_launch(const GeneralBackward& args) {
    const int width = static_cast<int>(16 / size_of(args.x_type));
    const bool vector =
        args.columns % width == 0 &&
        aligned({args.dy, args.dy1, args.s, args.weight, args.bias, args.weight1, args.dresidual, args.dx,
                 args.dresidual_in, args.dx1, args.branch.mask, args.branch.mask1});
    BackwardLaunch result{};
    result.width = vector ? width : 1;
    const int64_t vectors = (args.columns + result.width - 1) / result.width;
    result.plan = args.dy1 ? plan_for(second_plans, vectors) : plan_for(backward_plans, vectors);
    if (result.plan.vectors == 0) {
        result.blocks = args.rows;
        result.chunks = std::clamp<int64_t>(args.rows / 64, 1, 64);
    } else {
        const PersistentGrid grid = persistent_grid(result.plan, args.rows);
        result.blocks = grid.blocks;
        result.chunks = grid.groups;
    }
    return result;
}

template <class X, int Width>
void backward_of_width(const GeneralBackward& args, const BackwardLaunch& how, Stream stream) {
    using A = compute_t<X>;
    const LaunchConfig rows{dim3(static_cast<unsigned>(how.blocks)),
                            dim3(static_cast<unsigned>(block_threads(how.plan))), max_warps * sizeof(A), 1,
                            stream};
    with_vectors<1, 2, 0>(how.plan.vectors, [&](auto vectors) {
        if (how.blocks > 0) {
            launch(rows, general_norm_backward_kernel<X, Width, vectors, vectors != 2>, args,
                   how.plan.threads);
        }
    });
    const bool sums =
        args.dweight_partial || args.dbias_partial || args.dweight1_partial || args.dbias1_partial;
    if (how.plan.vectors == 0 && sums) {
        const LaunchConfig columns{
            dim3(static_cast<unsigned>((args.columns + tile - 1) / tile), static_cast<unsigned>(how.chunks)),
            dim3(tile, tile), tile_sums * sizeof(A), 1, stream};
        launch(columns, general_norm_columns_kernel<X>, args);
    }
}

template <class X>
void backward_of(const GeneralBackward& args, Stream stream) {
    constexpr int width = 16 / sizeof(X);
    const BackwardLaunch how = backward_launch(args);
    if (how.width == width) return backward_of_width<X, width>(args, how, stream);
    backward_of_width<X, 1>(args, how, stream);
}

}  // namespace

void launch_general_norm_forward(const GeneralForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

int64_t general_norm_backward_chunks_on_device(const GeneralBackward& args) {
    return backward_launch(args).chunks;
}

void launch_general_norm_backward(const GeneralBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
