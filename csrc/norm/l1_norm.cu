// Launches of the L1 LayerNorm kernels.
#include <algorithm>

#include "common/floating.h"
#include "norm/l1_norm.cuh"
#include "norm/norm.cuh"  // the column sums of rows beyond the registers are those of LayerNorm

namespace narrowgauge {
namespace {

template <class X, int Width>
void forward_of_width(const L1NormForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) {
        launch(config, l1_norm_forward_kernel<X, Width, vectors>, args, plan.threads);
    });
}

template <class X>
void forward_of(const L1NormForward& args, Stream stream) {
    if (vectorizable<X>(args.columns, {args.x, args.weight, args.bias, args.y})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return forward_of_width<X, 1>(args, stream);
}

// Both the launch and the size of its partial buffers follow from this.
struct BackwardLaunch {
    PersistentGrid grid;
    int width;
};

BackwardLaunch backward_launch(const L1NormBackward& args) {
    const int vector = static_cast<int>(16 / size_of(args.x_type));
    const int width =
        args.columns % vector == 0 && aligned({args.dy, args.x, args.weight, args.dx}) ? vector : 1;
    const Plan plan = plan_for(backward_plans, (args.columns + width - 1) / width);
    if (plan.vectors > 0) return {persistent_grid(plan, args.rows), width};
    return {{plan, args.rows, std::clamp<int64_t>(args.rows / 64, 1, 64)}, width};
}

template <class X>
void sum_columns(const L1NormBackward& args, Stream stream) {
    NormBackward sums{};
    sums.dy = args.dy;
    sums.x = args.x;
    sums.mean = args.mean;
    sums.rstd = args.inverse;
    sums.dweight_partial = args.dweight_partial;
    sums.dbias_partial = args.dbias_partial;
    sums.rows = args.rows;
    sums.columns = args.columns;
    sums.chunks = args.chunks;
    sums.dy_type = args.x_type;
    const LaunchConfig config{
        dim3(static_cast<unsigned>((args.columns + tile - 1) / tile), static_cast<unsigned>(args.chunks)),
        dim3(tile, tile), tile_sums * sizeof(compute_t<X>), 1, stream};
    launch(config, norm_backward_columns_kernel<X, true>, sums);
}

template <class X, int Width>
void backward_of_width(const L1NormBackward& args, const PersistentGrid& grid, Stream stream) {
    const LaunchConfig config = grid.config(max_warps * sizeof(compute_t<X>), stream);
    with_vectors<1, 2, 0>(grid.plan.vectors, [&](auto vectors) {
        if (grid.blocks > 0) {
            launch(config, l1_norm_backward_kernel<X, Width, vectors>, args, grid.plan.threads);
        }
    });
    const bool sums_apart = grid.plan.vectors == 0 && (args.dweight_partial || args.dbias_partial);
    if (sums_apart) sum_columns<X>(args, stream);
}

template <class X>
void backward_of(const L1NormBackward& args, Stream stream) {
    const BackwardLaunch how = backward_launch(args);
    if (how.width > 1) return backward_of_width<X, 16 / sizeof(X)>(args, how.grid, stream);
    return backward_of_width<X, 1>(args, how.grid, stream);
}

}  // namespace

void launch_l1_norm_forward(const L1NormForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

int64_t l1_norm_backward_chunks_on_device(const L1NormBackward& args) {
    return backward_launch(args).grid.groups;
}

void launch_l1_norm_backward(const L1NormBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
