// CUDA kernels of the passes over tokens behind PowerNorm and UnifiedNorm.
//
// A block works on one piece of the channels: with groups a group, whose mean of squares its threads share;
// without a tile of 32 vectors, with nothing to share. The groups of threads of all blocks for a piece walk
// over the tokens, and keep sums over them in registers until the end; a piece too long for that (Vectors =
// 0) adds to its own row of the partial buffer in memory. Bytes per element of x, which has b: forward b read
// + b written (b read for sums alone), backward 2 b read + b written (2 b read for sums alone).
#pragma once

#include "common/row.cuh"
#include "norm/channels.h"

namespace narrowgauge {

// How the channels are cut, and which piece and which tokens are this thread's.
struct Pieces {
    int64_t length, count;
    int threads;
};

struct PieceOfBlock {
    int64_t start, length, chunk;
    int group;

    __device__ __forceinline__ PieceOfBlock(const Pieces& pieces, int64_t columns)
        : start(blockIdx.x % pieces.count * pieces.length),
          length(start + pieces.length < columns ? pieces.length : columns - start),
          chunk(blockIdx.x / pieces.count * (blockDim.x / pieces.threads) + threadIdx.x / pieces.threads),
          group(threadIdx.x / pieces.threads) {}
};

// Sums of `Terms` quantities for each channel of this thread's part of a piece.
template <class A, int Width, int Vectors, int Terms>
struct ChannelSums {
    static constexpr bool in_registers = Vectors > 0;
    A held[Terms][in_registers ? Vectors : 1][Width] = {};
    Global<A> partial;
    Global<const A> partial_so_far;
    int64_t columns,
        first;  // of this chunk's row of the partial buffer: term t of column j is at first + t * columns + j

    __device__ __forceinline__ ChannelSums(void* raw, const PieceOfBlock& piece, int64_t columns_)
        : partial(global<A>(raw, "partial sums")),
          partial_so_far(global<const A>(raw, "partial sums")),
          columns(columns_),
          first(piece.chunk * Terms * columns_ + piece.start) {}

    __device__ __forceinline__ void add(int term, int64_t j, int v, const A (&values)[Width]) {
        if constexpr (in_registers) {
#pragma unroll
            for (int k = 0; k < Width; ++k) held[term][v][k] += values[k];
        } else {
            A sums[Width];
            load_row<Width>(partial_so_far, first + term * columns + j, sums);
#pragma unroll
            for (int k = 0; k < Width; ++k) sums[k] += values[k];
            store_row<Width>(partial, first + term * columns + j, sums);
        }
    }

    // Before the first token with Vectors = 0, after the last otherwise.
    __device__ __forceinline__ void store(const RowSlice<Width>& slice) {
#pragma unroll
        for (int term = 0; term < Terms; ++term) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                store_row<Width>(partial, first + term * columns + j, held[term][v]);
            });
        }
    }
};

template <class X, int Width, int Vectors, bool Grouped, bool Sums>
__global__ void __launch_bounds__(512, 1) channel_forward_kernel(ChannelForward args, Pieces pieces) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> shared = arena.template take<A>(max_warps);
    constexpr bool in_registers = Vectors > 0;

    const auto condition = global<const uint8_t>(args.condition, "condition");
    const bool write = args.y && (!condition || (condition[0] != 0) == args.wanted);
    if (!Sums && !write) return;

    const PieceOfBlock piece(pieces, args.columns);
    const RowSlice<Width> whole(0, 1, piece.length, pieces.threads);
    const auto x = global<const X>(args.x, "x");
    const auto pad_mask = global<const uint8_t>(args.pad_mask, "pad_mask");
    const auto scales = global<const A>(args.scale, "scale");
    const auto biases = global<const A>(args.bias, "bias");
    const auto y = global<X>(args.y, "y");
    const A per_channel = A(1) / static_cast<A>(piece.length);
    ChannelSums<A, Width, Vectors, 1> sums(args.squares_partial, piece, args.columns);
    if constexpr (Sums && !in_registers) sums.store(whole);

    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first_row = piece.chunk - piece.group; first_row < args.rows; first_row += args.chunks) {
        const int64_t row = first_row + piece.group, base = row * args.columns + piece.start;
        const RowSlice<Width> slice(row, args.rows, piece.length, pieces.threads);
        A kept[in_registers ? Vectors : 1][Width];
        if constexpr (in_registers) {
            slice.template visit<Vectors>([&](int64_t j, int v) { load_row<Width>(x, base + j, kept[v]); });
        }
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_row<Width>(x, base + j, kept[v]);
                function(j, v);
            });
        };

        A rstd = 1;
        if constexpr (Grouped) {
            A squares = 0;
            visit([&](int64_t, int v) {
#pragma unroll
                for (int k = 0; k < Width; ++k) squares += kept[v][k] * kept[v][k];
            });
            squares = group_sum(squares, pieces.threads, shared);
            rstd = A(1) / sqrt(squares * per_channel + static_cast<A>(args.eps));
        }
        const bool counted = Sums && slice.active && !(pad_mask && pad_mask[row] != 0);
        visit([&](int64_t j, int v) {
            A u[Width], out[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) u[k] = kept[v][k] * rstd;
            if (write) {
                A scale[Width], bias[Width];
                load_row<Width>(scales, piece.start + j, scale);
                load_row<Width>(biases, piece.start + j, bias);
#pragma unroll
                for (int k = 0; k < Width; ++k) out[k] = u[k] * scale[k] + bias[k];
                store_row<Width>(y, base + j, out);
            }
            if (counted) {
#pragma unroll
                for (int k = 0; k < Width; ++k) out[k] = u[k] * u[k];
                sums.add(0, j, v, out);
            }
        });
    }
    if constexpr (Sums && in_registers) sums.store(whole);
}

template <class X, int Width, int Vectors, bool Grouped, bool Sums>
__global__ void __launch_bounds__(512, 1) channel_backward_kernel(ChannelBackward args, Pieces pieces) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> shared = arena.template take<A>(max_warps);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1;

    const PieceOfBlock piece(pieces, args.columns);
    const RowSlice<Width> whole(0, 1, piece.length, pieces.threads);
    const auto x = global<const X>(args.x, "x");
    const auto dy = global<const X>(args.dy, "dy");
    const auto pad_mask = global<const uint8_t>(args.pad_mask, "pad_mask");
    const auto scales = global<const A>(args.scale, "scale");
    const auto projections = global<const A>(args.projection, "projection");
    const auto dx = global<X>(args.dx, "dx");
    const A per_channel = A(1) / static_cast<A>(piece.length);
    ChannelSums<A, Width, Vectors, Grouped ? 3 : 2> sums(args.sums_partial, piece, args.columns);
    if constexpr (Sums && !in_registers) sums.store(whole);

    for (int64_t first_row = piece.chunk - piece.group; first_row < args.rows; first_row += args.chunks) {
        const int64_t row = first_row + piece.group, base = row * args.columns + piece.start;
        const RowSlice<Width> slice(row, args.rows, piece.length, pieces.threads);
        const bool left_out = slice.active && pad_mask && pad_mask[row] != 0;
        A rstd = 1, u[held][Width], g[held][Width];
        const auto load_terms = [&](int64_t j, int v) {
            load_row<Width>(x, base + j, u[v]);
            load_row<Width>(dy, base + j, g[v]);
#pragma unroll
            for (int k = 0; k < Width; ++k) u[v][k] *= rstd;
        };
        if constexpr (in_registers) slice.template visit<Vectors>(load_terms);
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_terms(j, v);
                function(j, v);
            });
        };
        const auto gradient_of_u = [&](int64_t j, int v, A(&du)[Width]) {
            A factor[Width];
            load_row<Width>(scales, piece.start + j, factor);
#pragma unroll
            for (int k = 0; k < Width; ++k) du[k] = g[v][k] * factor[k];
            if (!projections) return;
            load_row<Width>(projections, piece.start + j, factor);
#pragma unroll
            for (int k = 0; k < Width; ++k) du[k] -= u[v][k] * factor[k];
        };

        A mean_dot = 0;
        if constexpr (Grouped) {
            A squares = 0;
            visit([&](int64_t, int v) {
#pragma unroll
                for (int k = 0; k < Width; ++k) squares += u[v][k] * u[v][k];
            });
            squares = group_sum(squares, pieces.threads, shared);
            rstd = A(1) / sqrt(squares * per_channel + static_cast<A>(args.eps));
            if constexpr (in_registers) {
#pragma unroll
                for (int v = 0; v < held; ++v) {
#pragma unroll
                    for (int k = 0; k < Width; ++k) u[v][k] *= rstd;
                }
            }
            A dot = 0;
            visit([&](int64_t j, int v) {
                A du[Width];
                gradient_of_u(j, v, du);
#pragma unroll
                for (int k = 0; k < Width; ++k) dot += du[k] * u[v][k];
            });
            mean_dot = group_sum(dot, pieces.threads, shared) * per_channel;
        }
        visit([&](int64_t j, int v) {
            A out[Width];
            if (dx) {
                gradient_of_u(j, v, out);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    if constexpr (Grouped) out[k] = (out[k] - u[v][k] * mean_dot) * rstd;
                    if (left_out) out[k] = 0;
                }
                store_row<Width>(dx, base + j, out);
            }
            if (left_out) return;
            if constexpr (Sums) {
#pragma unroll
                for (int k = 0; k < Width; ++k) out[k] = g[v][k] * u[v][k];
                sums.add(0, j, v, out);
                sums.add(1, j, v, g[v]);
                if constexpr (Grouped) {
#pragma unroll
                    for (int k = 0; k < Width; ++k) out[k] = u[v][k] * u[v][k];
                    sums.add(2, j, v, out);
                }
            }
        });
    }
    if constexpr (Sums && in_registers) sums.store(whole);
}

}  // namespace narrowgauge
