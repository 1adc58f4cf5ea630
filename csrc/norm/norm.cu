// Launches of the LayerNorm / RMSNorm kernels: how many threads share a row, and which instantiation runs.
#include <algorithm>

#include "common/floating.h"
#include "norm/norm_launch.h"
#include "norm/norm_long.cuh"

namespace narrowgauge {
namespace {

// Launches `kernel(args, cluster, kept)` for a long row, `values` numbers kept for each column, where it fits
// on chip.
template <class A, int Width, class Kernel, class Args>
bool launch_long(Kernel kernel, const Args& args, int values, Stream stream) {
    const LongRowPlan plan =
        long_row_plan(args.columns, Width, values * static_cast<int64_t>(sizeof(A)), block_limits());
    if (plan.kept_bytes == 0) return false;
    const int64_t sums = (max_warps + 2) * sizeof(A) + 16;
    const LaunchConfig config{dim3(static_cast<unsigned>(args.rows * plan.cluster)), dim3(long_row_threads),
                              static_cast<size_t>(plan.kept_bytes + sums), plan.cluster, stream};
    launch(config, kernel, args, plan.cluster, static_cast<int>(plan.kept_bytes / (values * sizeof(A))));
    return true;
}

template <class X, int Width, int Vectors>
void forward_planned(const NormForward& args, const Plan& plan, Stream stream) {
    const LaunchConfig config = one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
    if (args.centred) {
        launch(config, norm_forward_kernel<X, Width, Vectors, true>, args, plan.threads);
    } else {
        launch(config, norm_forward_kernel<X, Width, Vectors, false>, args, plan.threads);
    }
}

template <class X, int Width>
void forward_of_width(const NormForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    if (plan.vectors == 0 &&
        launch_long<compute_t<X>, Width>(norm_forward_long_kernel<X, Width>, args, 1, stream)) {
        return;
    }
    with_vectors<1, 4, 0>(plan.vectors,
                          [&](auto vectors) { forward_planned<X, Width, vectors>(args, plan, stream); });
}

template <class X>
void forward_of(const NormForward& args, Stream stream) {
    if (vectorizable<X>(args.columns,
                        {args.x, args.residual, args.weight, args.bias, args.y, args.residual_out})) {
        return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    }
    return forward_of_width<X, 1>(args, stream);
}

// Both the launch and the size of its partial buffers follow from this.
struct BackwardLaunch {
    Plan plan;
    int width;
    int64_t blocks, chunks;
};

BackwardLaunch backward_launch(const NormBackward& args) {
    const int width = static_cast<int>(16 / size_of(args.x_type));
    const bool vector =
        args.columns % width == 0 && aligned({args.dy, args.x, args.weight, args.dresidual, args.dx});
    BackwardLaunch result{};
    result.width = vector ? width : 1;
    result.plan = plan_for(backward_plans, (args.columns + result.width - 1) / result.width);
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

template <class S, int Width, int Vectors>
void backward_planned(const NormBackward& args, const BackwardLaunch& how, Stream stream) {
    using A = compute_t<S>;
    const LaunchConfig rows{dim3(static_cast<unsigned>(how.blocks)),
                            dim3(static_cast<unsigned>(block_threads(how.plan))), max_warps * sizeof(A), 1,
                            stream};
    const LaunchConfig columns{
        dim3(static_cast<unsigned>((args.columns + tile - 1) / tile), static_cast<unsigned>(how.chunks)),
        dim3(tile, tile), tile_sums * sizeof(A), 1, stream};
    const bool sums_apart = Vectors == 0 && (args.dweight_partial || args.dbias_partial);
    const bool rows_done =
        how.blocks == 0 ||
        (Vectors == 0 && launch_long<A, Width>(norm_backward_long_kernel<S, Width>, args, 2, stream));
    if (args.centred) {
        if (!rows_done) launch(rows, norm_backward_kernel<S, Width, Vectors, true>, args, how.plan.threads);
        if (sums_apart) launch(columns, norm_backward_columns_kernel<S, true>, args);
    } else {
        if (!rows_done) launch(rows, norm_backward_kernel<S, Width, Vectors, false>, args, how.plan.threads);
        if (sums_apart) launch(columns, norm_backward_columns_kernel<S, false>, args);
    }
}

template <class S, int Width>
void backward_of_width(const NormBackward& args, const BackwardLaunch& how, Stream stream) {
    with_vectors<1, 2, 0>(how.plan.vectors,
                          [&](auto vectors) { backward_planned<S, Width, vectors>(args, how, stream); });
}

template <class S>
void backward_of(const NormBackward& args, Stream stream) {
    constexpr int width = 16 / sizeof(S);
    const BackwardLaunch how = backward_launch(args);
    if (how.width == width) return backward_of_width<S, width>(args, how, stream);
    return backward_of_width<S, 1>(args, how, stream);
}

}  // namespace

void launch_norm_forward(const NormForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

int64_t norm_backward_chunks_on_device(const NormBackward& args) { return backward_launch(args).chunks; }

void launch_norm_backward(const NormBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
