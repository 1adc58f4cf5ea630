// The CUDA skeleton of elementwise optimizers. A rule's .cu file instantiates `launch_elementwise`.
//
// A persistent grid walks the chunks of all parameters of a launch. Each thread works on `Width` consecutive
// elements at a time, moved 16 bytes per access where the addresses allow; with 8-bit states a warp works on
// one block of 256.
#pragma once

#include <type_traits>

#include "common/device.h"
#include "common/philox.h"
#include "optim/elementwise.h"
#include "optim/state_codec.cuh"

namespace narrowgauge {

constexpr int elementwise_threads = 256;

// Elements [i, i + n) as the type of computation; `whole` when all N are there and aligned.
template <int N, class From, class T>
__device__ __forceinline__ void load_elements(Global<const From> from, int64_t i, int n, bool whole,
                                              T (&to)[N]) {
    if (whole) {
        const Vec<From, N> vector = load<N>(from, i);
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = to_compute(vector[j]);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = j < n ? to_compute(static_cast<From>(from[i + j])) : T(0);
    }
}

template <int N, class To, class T>
__device__ __forceinline__ void store_elements(Global<To> to, int64_t i, int n, bool whole,
                                               const T (&from)[N]) {
    if (whole) {
        Vec<To, N> vector;
#pragma unroll
        for (int j = 0; j < N; ++j) vector[j] = from_compute<To>(from[j]);
        store<N>(to, i, vector);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j < n) to[i + j] = from_compute<To>(from[j]);
        }
    }
}

template <int N>
__device__ __forceinline__ void round_stochastic(float (&values)[N], const Philox& random, uint64_t first) {
    Philox::Words words{};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const uint64_t element = first + j;
        if (j == 0 || element % 4 == 0) words = random.group(element / 4);
        const uint32_t even = element & 2 ? words.word[2] : words.word[0],
                       odd = element & 2 ? words.word[3] : words.word[1];
        values[j] = to_float(stochastic_bf16(values[j], element & 1 ? odd : even));
    }
}

// One 8-bit state of the warp's block of 256 elements, 8 per lane.
template <bool Signed>
__device__ __forceinline__ void decode_states(const SharedMaps<true>& maps, Global<const uint8_t> codes,
                                              float scale, int64_t i, int n, bool whole, float (&values)[8]) {
    const Shared<float> map = Signed ? maps.signed_values : maps.unsigned_values;
    Vec<uint8_t, 8> code{};
    if (whole) {
        code = load<8>(codes, i);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j < n) code[j] = codes[i + j];
        }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = map[code[j]] * scale;
}

// Returns the block's scale: NaN when it holds a value that is not finite.
template <bool Signed>
__device__ __forceinline__ float encode_states(const SharedMaps<true>& maps, Global<uint8_t> codes, int64_t i,
                                               int n, bool whole, const float (&values)[8]) {
    const Shared<uint32_t> lookup = Signed ? maps.signed_lookup : maps.unsigned_lookup;
    int largest = 0;  // magnitudes compare as integers, and NaN is the largest of all
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j < n) largest = max(largest, __float_as_int(values[j]) & 0x7fffffff);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    const bool finite = largest < 0x7f800000;
    const float scale = __int_as_float(finite ? largest : 0x7fc00000);
    const float divisor = scale > 1e-12f ? scale : 1e-12f;
    Vec<uint8_t, 8> code;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        code[j] = static_cast<uint8_t>(finite ? encode<Signed>(lookup, values[j] / divisor) : 0u);
    }
    if (whole) {
        store<8>(codes, i, code);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j < n) codes[i + j] = code[j];
        }
    }
    return scale;
}

// The gradient may be narrower or wider than its parameter.
template <class Param, int N, class T>
__device__ __forceinline__ void load_grad(DType type, const void* grad, int64_t i, int n, bool whole,
                                          T (&to)[N]) {
    if constexpr (std::is_same_v<T, double>) {
        load_elements<N>(global<const double>(grad, "grad"), i, n, whole, to);
    } else if (type == DType::float32) {
        load_elements<N>(global<const float>(grad, "grad"), i, n, whole, to);
    } else if (type == DType::bfloat16) {
        load_elements<N>(global<const bf16>(grad, "grad"), i, n, whole, to);
    } else {
        load_elements<N>(global<const f16>(grad, "grad"), i, n, whole, to);
    }
}

template <class Param, bool Quantized>
constexpr int elementwise_width = std::is_same_v<Param, double>      ? 2
                                  : sizeof(Param) == 4 && !Quantized ? 4
                                                                     : 8;
// Blocks per multiprocessor: what 64 registers a thread allow, fewer where a thread holds more.
template <int States, bool Quantized>
constexpr int elementwise_occupancy = Quantized || States > 2 ? 3 : 4;

template <class Rule, class Param, bool Quantized, class Options>
__global__ void __launch_bounds__(elementwise_threads, elementwise_occupancy<Rule::states, Quantized>)
    elementwise_kernel(const __grid_constant__ ElementwiseLaunch<Rule::states, Options> launch) {
    using T = compute_t<Param>;
    using Scalars = typename Rule::template Scalars<T>;
    constexpr int width = elementwise_width<Param, Quantized>;
    const ElementwiseArgs<Options>& args = launch.args;
    if (args.found_inf && global<const float>(args.found_inf, "found_inf")[0] != 0.0f) return;
    const float grad_scale = args.grad_scale ? global<const float>(args.grad_scale, "grad_scale")[0] : 1.0f;

    SharedArena arena;
    const Shared<Scalars> shared_scalars = arena.take<Scalars>(1);
    [[maybe_unused]] SharedMaps<Quantized> maps(arena);
    if constexpr (Quantized) maps.fill();  // seen by all after the barriers of the first parameter

    int current = -1;
    Scalars scalars{};
    for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
        int first = 0,
            last = static_cast<int>(args.count) - 1;  // narrowed to the first one that ends beyond the chunk
        while (first < last) {
            const int middle = (first + last) / 2;
            if (launch.tensors[middle].last_chunk > chunk) {
                last = middle;
            } else {
                first = middle + 1;
            }
        }
        const ElementwiseTensor<Rule::states>& tensor = launch.tensors[first];
        const auto step =
            static_cast<uint32_t>(static_cast<float>(global<const float>(tensor.step, "step")[0]));
        if (first != current) {
            current = first;
            __syncthreads();  // every thread has read those of the parameter before
            if (threadIdx.x == 0) {
                double lr = args.lr;
                if (args.lr_tensor && args.lr_type == DType::float64)
                    lr = global<const double>(args.lr_tensor, "lr")[0];
                if (args.lr_tensor && args.lr_type == DType::float32)
                    lr = global<const float>(args.lr_tensor, "lr")[0];
                shared_scalars[0] = Rule::template scalars<T>(args.options, lr, step);
            }
            __syncthreads();
            scalars = shared_scalars[0];
        }

        const auto param = global<Param>(tensor.param, "param");
        uintptr_t addresses =
            reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad);
        for (int k = 0; k < Rule::states; ++k) addresses |= reinterpret_cast<uintptr_t>(tensor.states[k]);
        const bool aligned = addresses % (width * sizeof(T)) == 0;
        const int64_t chunks = (tensor.numel + cuda_chunk - 1) / cuda_chunk;
        const int64_t begin = (chunk - (tensor.last_chunk - chunks)) * cuda_chunk;
        const int64_t end = min(tensor.numel, begin + cuda_chunk);

        for (int64_t base = begin; base < end; base += elementwise_threads * width) {
            const int64_t i = base + threadIdx.x * width;
            const int n = static_cast<int>(max(int64_t{0}, min(int64_t{width}, end - i)));
            const bool whole = aligned && n == width;
            T p[width], g[width], states[Rule::states][width];
            load_elements<width>(Global<const Param>(param), i, n, whole, p);
            load_grad<Param, width>(args.grad_type, tensor.grad, i, n, whole, g);
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) {
                if constexpr (Quantized) {
                    const auto codes = global<const uint8_t>(tensor.states[k], "codes");
                    const float scale =
                        n > 0 ? global<const float>(tensor.scales[k], "scale")[i / state_block] : 0.0f;
                    Rule::is_signed(k) ? decode_states<true>(maps, codes, scale, i, n, whole, states[k])
                                       : decode_states<false>(maps, codes, scale, i, n, whole, states[k]);
                } else {
                    load_elements<width>(global<const T>(tensor.states[k], "state"), i, n, whole, states[k]);
                }
            }
            if (args.grad_scale) {
#pragma unroll
                for (int j = 0; j < width; ++j) g[j] = g[j] / static_cast<T>(grad_scale);
            }
#pragma unroll
            for (int j = 0; j < width; ++j) {
                T state[Rule::states];
#pragma unroll
                for (int k = 0; k < Rule::states; ++k) state[k] = states[k][j];
                Rule::update(p[j], args.maximize ? -g[j] : g[j], state, scalars);
#pragma unroll
                for (int k = 0; k < Rule::states; ++k) states[k][j] = state[k];
            }
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) {
                if constexpr (Quantized) {
                    const auto codes = global<uint8_t>(tensor.states[k], "codes");
                    const float scale = Rule::is_signed(k)
                                            ? encode_states<true>(maps, codes, i, n, whole, states[k])
                                            : encode_states<false>(maps, codes, i, n, whole, states[k]);
                    if (threadIdx.x % 32 == 0 && n > 0)
                        global<float>(tensor.scales[k], "scale")[i / state_block] = scale;
                } else {
                    store_elements<width>(global<T>(tensor.states[k], "state"), i, n, whole, states[k]);
                }
            }
            if constexpr (std::is_same_v<Param, bf16>) {
                if (args.stochastic)
                    round_stochastic(p, Philox{tensor.seed, step},
                                     static_cast<uint64_t>(tensor.first_element + i));
            }
            store_elements<width>(param, i, n, whole, p);
        }
    }
}

// A launch of its own, because every block of the update reads the counters.
template <int States, class Options>
__global__ void count_steps_kernel(const __grid_constant__ ElementwiseLaunch<States, Options> launch) {
    const float* found_inf = launch.args.found_inf;
    if (found_inf && global<const float>(found_inf, "found_inf")[0] != 0.0f) return;
    for (int i = threadIdx.x; i < launch.args.count; i += blockDim.x) {
        const auto step = global<float>(launch.tensors[i].step, "step");
        step[0] = step[0] + 1.0f;
    }
}

template <class Rule, class Param, bool Quantized, class Options>
void launch_update(const ElementwiseLaunch<Rule::states, Options>& launch_args, Stream stream) {
    using Scalars = typename Rule::template Scalars<compute_t<Param>>;
    const int64_t resident = int64_t{multiprocessor_count()} * elementwise_occupancy<Rule::states, Quantized>;
    LaunchConfig config{};
    config.grid =
        dim3(static_cast<unsigned>(launch_args.args.chunks < resident ? launch_args.args.chunks : resident));
    config.block = dim3(elementwise_threads);
    config.shared_bytes = taken<Scalars>(1) + SharedMaps<Quantized>::bytes;
    config.stream = stream;
    launch(config, elementwise_kernel<Rule, Param, Quantized, Options>, launch_args);
}

template <class Rule, class Options>
void launch_elementwise(const ElementwiseLaunch<Rule::states, Options>& launch_args, Stream stream) {
    LaunchConfig config{};
    config.grid = dim3(1);
    config.block = dim3(elementwise_threads);
    config.stream = stream;
    launch(config, count_steps_kernel<Rule::states, Options>, launch_args);
    if (launch_args.args.chunks == 0) return;

    const bool quantized = launch_args.args.quantized;
    switch (launch_args.args.param_type) {
        case DType::float64:
            return launch_update<Rule, double, false>(launch_args, stream);
        case DType::bfloat16:
            return quantized ? launch_update<Rule, bf16, true>(launch_args, stream)
                             : launch_update<Rule, bf16, false>(launch_args, stream);
        case DType::float16:
            return quantized ? launch_update<Rule, f16, true>(launch_args, stream)
                             : launch_update<Rule, f16, false>(launch_args, stream);
        default:
            return quantized ? launch_update<Rule, float, true>(launch_args, stream)
                             : launch_update<Rule, float, false>(launch_args, stream);
    }
}

}  // namespace narrowgauge
