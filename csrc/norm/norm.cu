// Launches of the LayerNorm / RMSNorm kernels: how many threads share a row, and which instantiation runs.
#include <algorithm>

#include "norm/norm.cuh"
#include "norm/norm_launch.h"
#include "norm/row_plan.h"

namespace narrowgauge {
namespace {

// The backward also holds dy and the sums for dweight and dbias, so it spreads a row over more threads.
constexpr Plan backward_plans[] = {{8, 8, 1},    {16, 16, 1},   {32, 32, 1},   {64, 32, 2},
                                   {128, 64, 2}, {256, 128, 2}, {512, 256, 2}, {1024, 512, 2}};

template <class X, int Width, int Vectors>
void forward_planned(const NormForward& args, const Plan& plan, Stream stream) {
    const int rows = rows_per_block(plan);
    const LaunchConfig config{dim3(static_cast<unsigned>((args.rows + rows - 1) / rows)),
                              dim3(static_cast<unsigned>(block_threads(plan))),
                              max_warps * sizeof(compute_t<X>), 1, stream};
    if (args.centred) {
        launch(config, norm_forward_kernel<X, Width, Vectors, true>, args, plan.threads);
    } else {
        launch(config, norm_forward_kernel<X, Width, Vectors, false>, args, plan.threads);
    }
}

template <class X, int Width>
void forward_of_width(const NormForward& args, Stream stream) {
    const Plan plan = plan_for(forward_plans, (args.columns + Width - 1) / Width);
    if (plan.vectors == 1) return forward_planned<X, Width, 1>(args, plan, stream);
    if (plan.vectors == 4) return forward_planned<X, Width, 4>(args, plan, stream);
    return forward_planned<X, Width, 0>(args, plan, stream);
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
    const int rows = rows_per_block(result.plan);
    const int64_t wanted = (args.rows + rows - 1) / rows;
    if (result.plan.vectors == 0) {
        result.blocks = wanted;
        result.chunks = std::clamp<int64_t>(args.rows / 64, 1, 64);
    } else {
        // A persistent grid: blocks for about 1024 threads on each multiprocessor, less work than that for
        // few rows.
        const int64_t filling =
            static_cast<int64_t>(multiprocessor_count()) * (1024 / block_threads(result.plan));
        result.blocks = std::clamp<int64_t>(wanted, 1, filling);
        result.chunks = result.blocks * rows;
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
        dim3(tile, tile), tile * (tile + 1) * sizeof(A), 1, stream};
    const bool sums_apart = Vectors == 0 && (args.dweight_partial || args.dbias_partial);
    if (args.centred) {
        if (how.blocks > 0)
            launch(rows, norm_backward_kernel<S, Width, Vectors, true>, args, how.plan.threads);
        if (sums_apart) launch(columns, norm_backward_columns_kernel<S, true>, args);
    } else {
        if (how.blocks > 0)
            launch(rows, norm_backward_kernel<S, Width, Vectors, false>, args, how.plan.threads);
        if (sums_apart) launch(columns, norm_backward_columns_kernel<S, false>, args);
    }
}

template <class S, int Width>
void backward_of_width(const NormBackward& args, const BackwardLaunch& how, Stream stream) {
    if (how.plan.vectors == 1) return backward_planned<S, Width, 1>(args, how, stream);
    if (how.plan.vectors == 2) return backward_planned<S, Width, 2>(args, how, stream);
    return backward_planned<S, Width, 0>(args, how, stream);
}

template <class S>
void backward_of(const NormBackward& args, Stream stream) {
    constexpr int width = 16 / sizeof(S);
    const BackwardLaunch how = backward_launch(args);
    if (how.width == width) return backward_of_width<S, width>(args, how, stream);
    return backward_of_width<S, 1>(args, how, stream);
}

template <class A, class T>
void reduce_of(const NormReduce& args, Stream stream) {
    const LaunchConfig config{dim3(static_cast<unsigned>((args.columns + tile - 1) / tile)), dim3(tile, tile),
                              tile * (tile + 1) * sizeof(A), 1, stream};
    launch(config, norm_reduce_kernel<A, T>, args);
}

}  // namespace

void launch_norm_forward(const NormForward& args, Stream stream) {
    switch (args.x_type) {
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

int64_t norm_backward_chunks_on_device(const NormBackward& args) { return backward_launch(args).chunks; }

void launch_norm_backward(const NormBackward& args, Stream stream) {
    switch (args.x_type) {
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

void launch_norm_reduce(const NormReduce& args, Stream stream) {
    switch (args.result_type) {
        case DType::float64:
            return reduce_of<double, double>(args, stream);
        case DType::bfloat16:
            return reduce_of<float, bf16>(args, stream);
        case DType::float16:
            return reduce_of<float, f16>(args, stream);
        default:
            return reduce_of<float, float>(args, stream);
    }
}

}  // namespace narrowgauge
