// Launches of the Dynamic Tanh and Derf kernels.
#include <algorithm>

#include "common/floating.h"
#include "norm/dyt.cuh"

namespace narrowgauge {
namespace {

// Blocks of `threads` threads that keep to a vector of columns and share the rows.
constexpr int threads = 128;

struct Strips {
    int threads_per_row;
    int64_t across, down;  // blocks

    LaunchConfig config(size_t shared_bytes, Stream stream) const {
        return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(threads), shared_bytes,
                1, stream};
    }
    int64_t groups() const { return down * (threads / threads_per_row); }
};

// A warp on 512 bytes of a row, fewer threads on short rows; about 1024 threads on each multiprocessor, or a
// thread for each vector where there are not that many.
Strips strips(int64_t rows, int64_t vectors) {
    Strips result{warp_threads, 0, 0};
    while (result.threads_per_row / 2 >= vectors && result.threads_per_row > 1) result.threads_per_row /= 2;
    const int64_t groups = threads / result.threads_per_row;
    result.across = (vectors + result.threads_per_row - 1) / result.threads_per_row;
    const int64_t filling = static_cast<int64_t>(multiprocessor_count()) * (1024 / threads),
                  wanted = (rows + groups - 1) / groups;
    result.across = std::max<int64_t>(result.across, 1);
    result.down = std::clamp<int64_t>(filling / result.across, 1, std::max<int64_t>(wanted, 1));
    return result;
}

template <class X, int Width>
void forward_of_width(const DytForward& args, Stream stream) {
    const Strips how = strips(args.rows, (args.columns + Width - 1) / Width);
    const LaunchConfig config = how.config(0, stream);
    if (args.erf) {
        launch(config, dyt_forward_kernel<X, Width, Erf>, args, how.threads_per_row);
    } else {
        launch(config, dyt_forward_kernel<X, Width, Tanh>, args, how.threads_per_row);
    }
}

template <class X>
void forward_of(const DytForward& args, Stream stream) {
    const bool vector = args.channels_last
                            ? vectorizable<X>(args.columns, {args.x, args.y, args.weight, args.bias})
                            : vectorizable<X>(args.columns, {args.x, args.y});
    if (vector) return forward_of_width<X, 16 / sizeof(X)>(args, stream);
    return forward_of_width<X, 1>(args, stream);
}

// Both the launch and the size of its partial buffers follow from this.
struct BackwardLaunch {
    int width;
    Strips strips;        // with the channels last
    PersistentGrid rows;  // with the channels second
};

BackwardLaunch backward_launch(const DytBackward& args) {
    const int width = static_cast<int>(16 / size_of(args.x_type));
    const bool vector = args.columns % width == 0 && aligned({args.dy, args.x, args.dx}) &&
                        (!args.channels_last || aligned({args.weight}));
    BackwardLaunch result{};
    result.width = vector ? width : 1;
    const int64_t vectors = (args.columns + result.width - 1) / result.width;
    if (args.channels_last) {
        result.strips = strips(args.rows, vectors);
    } else {
        Plan plan = plan_for(forward_plans, vectors);
        plan.threads = std::min(plan.threads, 256);  // the launch bound; threads loop over their row
        result.rows = persistent_grid(plan, args.rows);
    }
    return result;
}

template <class X, int Width, class F>
void backward_with_function(const DytBackward& args, const BackwardLaunch& how, Stream stream) {
    constexpr size_t shared_bytes = max_warps * sizeof(compute_t<X>);
    if (args.channels_last) {
        launch(how.strips.config(shared_bytes, stream), dyt_backward_kernel<X, Width, F>, args,
               how.strips.threads_per_row);
    } else {
        launch(how.rows.config(shared_bytes, stream), dyt_backward_rows_kernel<X, Width, F>, args,
               how.rows.plan.threads);
    }
}

template <class X>
void backward_of(const DytBackward& args, Stream stream) {
    constexpr int width = 16 / sizeof(X);
    const BackwardLaunch how = backward_launch(args);
    if (how.width == width) {
        if (args.erf) return backward_with_function<X, width, Erf>(args, how, stream);
        return backward_with_function<X, width, Tanh>(args, how, stream);
    }
    if (args.erf) return backward_with_function<X, 1, Erf>(args, how, stream);
    return backward_with_function<X, 1, Tanh>(args, how, stream);
}

}  // namespace

void launch_dyt_forward(const DytForward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { forward_of<decltype(x)>(args, stream); });
}

void plan_dyt_backward(DytBackward& args) {
    const BackwardLaunch how = backward_launch(args);
    if (args.channels_last) {
        args.chunks = how.strips.groups();
        args.scalar_chunks = how.strips.across * how.strips.down;
    } else {
        args.chunks = args.channels > 0 ? args.rows / args.channels : 0;
        args.scalar_chunks = how.rows.blocks;
    }
}

void launch_dyt_backward(const DytBackward& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { backward_of<decltype(x)>(args, stream); });
}

}  // namespace narrowgauge
