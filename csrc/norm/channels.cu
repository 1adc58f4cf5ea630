// Launches of the passes over tokens: how channels are cut into pieces and tokens into chunks.
#include "common/floating.h"
#include "norm/channels.cuh"

namespace narrowgauge {
namespace {

struct HowToRun {
    Plan plan;
    int width;
    Pieces pieces;
    int64_t blocks, chunks;
};

// Of 16-byte vectors of 16-bit elements, two with their three sums do not fit into a thread's registers.
constexpr int narrow_width = 8;
constexpr Plan narrow_backward_plans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},  {64, 64, 1},
                                          {128, 128, 1}, {256, 256, 1}, {512, 512, 1}};

// Without groups, a tile of 32 vectors for each warp.
constexpr Plan tile_plan{32, 32, 1};

template <class PlanFor>
HowToRun how_to_run(int64_t rows, int64_t columns, int64_t groups, DType type,
                    std::initializer_list<const void*> pointers, PlanFor plan_for_group) {
    const int full_width = static_cast<int>(16 / size_of(type));
    const int64_t group = groups > 0 ? columns / groups : columns;
    HowToRun how{};
    how.width = group % full_width == 0 && aligned(pointers) ? full_width : 1;
    how.plan = groups > 0 ? plan_for_group(group / how.width, how.width) : tile_plan;
    const int64_t length = groups > 0 ? group : int64_t{tile_plan.threads} * how.width;
    how.pieces = {length, (columns + length - 1) / length, how.plan.threads};
    const PersistentGrid grid = persistent_grid(how.plan, rows * how.pieces.count);
    const int64_t blocks_per_piece = (grid.blocks + how.pieces.count - 1) / how.pieces.count;
    how.blocks = blocks_per_piece * how.pieces.count;
    how.chunks = blocks_per_piece * rows_per_block(how.plan);
    return how;
}

HowToRun how_to_run(const ChannelForward& args) {
    return how_to_run(args.rows, args.columns, args.groups, args.x_type,
                      {args.x, args.scale, args.bias, args.y},
                      [](int64_t vectors, int) { return plan_for(forward_plans, vectors); });
}

HowToRun how_to_run(const ChannelBackward& args) {
    return how_to_run(args.rows, args.columns, args.groups, args.x_type,
                      {args.dy, args.x, args.scale, args.projection, args.dx},
                      [](int64_t vectors, int width) {
                          return width == narrow_width ? plan_for(narrow_backward_plans, vectors)
                                                       : plan_for(backward_plans, vectors);
                      });
}

template <class A>
LaunchConfig config_of(const HowToRun& how, Stream stream) {
    return {dim3(static_cast<unsigned>(how.blocks)), dim3(static_cast<unsigned>(block_threads(how.plan))),
            max_warps * sizeof(A), 1, stream};
}

template <class X, int Width>
void run(const ChannelForward& args, const HowToRun& how, Stream stream) {
    const LaunchConfig config = config_of<compute_t<X>>(how, stream);
    const bool sums = args.squares_partial != nullptr;
    if (args.groups == 0) {
        if (sums) return launch(config, channel_forward_kernel<X, Width, 1, false, true>, args, how.pieces);
        return launch(config, channel_forward_kernel<X, Width, 1, false, false>, args, how.pieces);
    }
    with_vectors<1, 4, 0>(how.plan.vectors, [&](auto vectors) {
        if (sums) {
            launch(config, channel_forward_kernel<X, Width, vectors, true, true>, args, how.pieces);
        } else {
            launch(config, channel_forward_kernel<X, Width, vectors, true, false>, args, how.pieces);
        }
    });
}

template <class X, int Width>
void run(const ChannelBackward& args, const HowToRun& how, Stream stream) {
    const LaunchConfig config = config_of<compute_t<X>>(how, stream);
    const bool sums = args.sums_partial != nullptr;
    if (args.groups == 0) {
        if (sums) return launch(config, channel_backward_kernel<X, Width, 1, false, true>, args, how.pieces);
        return launch(config, channel_backward_kernel<X, Width, 1, false, false>, args, how.pieces);
    }
    const auto run_with = [&](auto vectors) {
        if (sums) {
            launch(config, channel_backward_kernel<X, Width, vectors, true, true>, args, how.pieces);
        } else {
            launch(config, channel_backward_kernel<X, Width, vectors, true, false>, args, how.pieces);
        }
    };
    if constexpr (Width == narrow_width) {
        with_vectors<1, 0>(how.plan.vectors, run_with);
    } else {
        with_vectors<1, 2, 0>(how.plan.vectors, run_with);
    }
}

template <class X, class Arguments>
void run_with_type(const Arguments& args, Stream stream) {
    const HowToRun how = how_to_run(args);
    if (how.width > 1) return run<X, 16 / sizeof(X)>(args, how, stream);
    run<X, 1>(args, how, stream);
}

template <class Arguments>
void run_any_type(const Arguments& args, Stream stream) {
    with_floating(args.x_type, [&](auto x) { run_with_type<decltype(x)>(args, stream); });
}

}  // namespace

int64_t channel_chunks_on_device(const ChannelForward& args) { return how_to_run(args).chunks; }
int64_t channel_chunks_on_device(const ChannelBackward& args) { return how_to_run(args).chunks; }

void launch_channel_pass(const ChannelForward& args, Stream stream) { run_any_type(args, stream); }
void launch_channel_pass(const ChannelBackward& args, Stream stream) { run_any_type(args, stream); }

}  // namespace narrowgauge
