// CUDA kernels that encode and decode one optimizer state.
#include <algorithm>

#include "common/floating.h"
#include "optim/state_codec.cuh"
#include "optim/state_codec_launch.h"

namespace narrowgauge {
namespace {

constexpr int kThreads = 256;

template <class X>
__global__ void __launch_bounds__(kThreads) state_encode_kernel(StateEncode args, bool aligned) {
    SharedArena arena;
    SharedMaps<true> maps(arena);
    maps.fill();
    __syncthreads();
    constexpr int part = 16 / static_cast<int>(sizeof(X)) < 8 ? 16 / static_cast<int>(sizeof(X)) : 8;
    const auto x = global<const X>(args.x, "x");
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 8;
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * 8; base < args.numel; base += stride) {
        const int64_t i = base + threadIdx.x * 8;
        const int n = static_cast<int>(max(int64_t{0}, min(int64_t{8}, args.numel - i)));
        const bool whole = aligned && n == 8;
        float values[8];
        if (whole) {
#pragma unroll
            for (int j = 0; j < 8; j += part) {
                const Vec<X, part> vector = load<part>(x, i + j);
#pragma unroll
                for (int k = 0; k < part; ++k) values[j + k] = to_float(vector[k]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = j < n ? to_float(static_cast<X>(x[i + j])) : 0.0f;
        }
        encode_state(args.format, args.is_signed, args.codes, args.scales, i, n, whole, maps, values);
    }
}

__global__ void __launch_bounds__(kThreads) state_decode_kernel(StateDecode args, bool aligned) {
    SharedArena arena;
    SharedMaps<true> maps(arena);
    maps.fill();
    __syncthreads();
    const auto to = global<float>(args.values, "values");
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 8;
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * 8; base < args.numel; base += stride) {
        const int64_t i = base + threadIdx.x * 8;
        const int n = static_cast<int>(max(int64_t{0}, min(int64_t{8}, args.numel - i)));
        if (!aligned) {
#pragma unroll 1
            for (int j = 0; j < n; ++j) {
                to[i + j] = decode_element(args.format, args.is_signed, args.codes, args.scales, i + j, maps);
            }
            continue;
        }
        float values[8];
        decode_state(args.format, args.is_signed, args.codes, args.scales, i, n, n == 8, maps, values);
        if (n == 8) {
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                store<4>(to, i + j, Vec<float, 4>{{values[j], values[j + 1], values[j + 2], values[j + 3]}});
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (j < n) to[i + j] = values[j];
            }
        }
    }
}

LaunchConfig config_for(int64_t numel, Stream stream) {
    const int64_t blocks = (numel + kThreads * 8 - 1) / (kThreads * 8);
    const int64_t resident = int64_t{multiprocessor_count()} * 4;
    return {dim3(static_cast<unsigned>(std::min(blocks, resident))), dim3(kThreads), SharedMaps<true>::bytes,
            1, stream};
}

bool all_aligned(const void* a, const void* b) {
    return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

}  // namespace

void launch_state_encode(const StateEncode& args, Stream stream) {
    if (args.numel == 0) return;
    with_floating(args.x_type, [&](auto x) {
        launch(config_for(args.numel, stream), state_encode_kernel<decltype(x)>, args,
               all_aligned(args.x, args.codes));
    });
}

void launch_state_decode(const StateDecode& args, Stream stream) {
    if (args.numel == 0) return;
    launch(config_for(args.numel, stream), state_decode_kernel, args, all_aligned(args.codes, args.values));
}

}  // namespace narrowgauge
