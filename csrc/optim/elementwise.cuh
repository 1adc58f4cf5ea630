// The CUDA skeleton of elementwise optimizers. The build instantiates it for every file in rules/.
//
// A persistent grid walks the chunks of all parameters of a launch. float32 and bfloat16 parameters with
// float32 states have a kernel of their own, which moves 16 bytes per access where the addresses allow; all
// other ways of storing things share one kernel per type of computation, in which a warp works on 256
// consecutive elements, 8 per thread, so that blocks of codes are its own.
#pragma once

#include <type_traits>

#include "common/philox.h"
#include "common/reduce.cuh"
#include "optim/elementwise.h"
#include "optim/master.h"
#include "optim/rule.h"
#include "optim/state_codec.cuh"

namespace narrowgauge {

constexpr int elementwise_threads = 256;

// --- moving elements -----------------------------------------------------------------------------

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

// Eight floats are two accesses of 16 bytes.
template <class T>
__device__ __forceinline__ void load_elements(Global<const float> from, int64_t i, int n, bool whole,
                                              T (&to)[8]) {
    T halves[2][4];
    load_elements<4>(from, i, n, whole, halves[0]);
    load_elements<4>(from, i + 4, n - 4, whole, halves[1]);
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = halves[j / 4][j % 4];
}
template <class T>
__device__ __forceinline__ void store_elements(Global<float> to, int64_t i, int n, bool whole,
                                               const T (&from)[8]) {
    T halves[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) halves[j / 4][j % 4] = from[j];
    store_elements<4>(to, i, n, whole, halves[0]);
    store_elements<4>(to, i + 4, n - 4, whole, halves[1]);
}

template <int N, class T>
__device__ __forceinline__ void load_any(DType type, const void* from, const char* name, int64_t i, int n,
                                         bool whole, T (&to)[N]) {
    if constexpr (std::is_same_v<T, double>) {
        load_elements<N>(global<const double>(from, name), i, n, whole, to);
    } else if (type == DType::float32) {
        if constexpr (N == 8) {
            load_elements(global<const float>(from, name), i, n, whole, to);
        } else {
            load_elements<N>(global<const float>(from, name), i, n, whole, to);
        }
    } else if (type == DType::bfloat16) {
        load_elements<N>(global<const bf16>(from, name), i, n, whole, to);
    } else {
        load_elements<N>(global<const f16>(from, name), i, n, whole, to);
    }
}

template <int N, class T>
__device__ __forceinline__ void store_any(DType type, void* to, const char* name, int64_t i, int n,
                                          bool whole, const T (&from)[N]) {
    if constexpr (std::is_same_v<T, double>) {
        store_elements<N>(global<double>(to, name), i, n, whole, from);
    } else if (type == DType::float32) {
        store_elements(global<float>(to, name), i, n, whole, from);
    } else if (type == DType::bfloat16) {
        store_elements<N>(global<bf16>(to, name), i, n, whole, from);
    } else {
        store_elements<N>(global<f16>(to, name), i, n, whole, from);
    }
}

template <int N>
__device__ __forceinline__ void round_stochastic(float (&values)[N], const Philox& random, uint64_t first) {
    Philox::Words words{};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const uint64_t element = first + j;
        if (j == 0 || element % 4 == 0) words = random.group(element / 4);
        values[j] = to_float(stochastic_bf16(values[j], pick(words, static_cast<int>(element & 3))));
    }
}

// The number of each element's row.
template <int N, class T>
__device__ __forceinline__ void load_rows(const ElementwiseTensor& tensor, int64_t i, int n, T (&to)[N]) {
    if (n <= 0) return;
    const auto rows = global<const T>(tensor.rows, "rows");
    int64_t row = i / tensor.row_length, next = (row + 1) * tensor.row_length;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (i + j >= next) {
            ++row;
            next += tensor.row_length;
        }
        if (j < n) to[j] = rows[row];
    }
}

template <class T>
__device__ __forceinline__ T load_grad_factor(const ElementwiseArgs& args, T& divisor) {
    divisor = args.grad_scale
                  ? static_cast<T>(static_cast<float>(global<const float>(args.grad_scale, "grad_scale")[0]))
                  : T(1);
    const T clip =
        args.clip ? static_cast<T>(static_cast<float>(global<const float>(args.clip, "clip")[0])) : T(1);
    return args.maximize ? -clip : clip;
}

// The index of the parameter that chunk (or piece) `chunk` of the list belongs to.
template <class Launch>
__device__ __forceinline__ int find_tensor(const Launch& launch, int64_t chunk) {
    int first = 0, last = static_cast<int>(launch.args.count) - 1;
    while (first < last) {  // narrowed to the first one that ends beyond the chunk
        const int middle = (first + last) / 2;
        if (launch.tensors[middle].last_chunk > chunk) {
            last = middle;
        } else {
            first = middle + 1;
        }
    }
    return first;
}

template <class Rule, class T>
__device__ __forceinline__ typename Rule::template Scalars<T> load_scalars(const ElementwiseArgs& args,
                                                                           const ElementwiseTensor& tensor,
                                                                           uint32_t step) {
    double lr = args.lr;
    if (args.lr_tensor && args.lr_type == DType::float64) lr = global<const double>(args.lr_tensor, "lr")[0];
    if (args.lr_tensor && args.lr_type == DType::float32) lr = global<const float>(args.lr_tensor, "lr")[0];
    double given[max_given] = {};
    if (Rule::given > 0 && tensor.given) {
        const auto from = global<const double>(tensor.given, "given");
        for (int k = 0; k < Rule::given; ++k) given[k] = from[k];
    }
    return Rule::template scalars<T>(args.options, lr, step, given);
}

__device__ __forceinline__ uint32_t load_step(const ElementwiseTensor& tensor) {
    return static_cast<uint32_t>(static_cast<float>(global<const float>(tensor.step, "step")[0]));
}

template <class Rule, int N, class T>
__device__ __forceinline__ void apply_rule(T (&p)[N], const T (&g)[N], T (&states)[Rule::states + 1][N],
                                           const T (&rows)[N], const typename Rule::template Scalars<T>& k) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
        T state[Rule::states + 1];
#pragma unroll
        for (int s = 0; s < Rule::states; ++s) state[s] = states[s][j];
        if constexpr (Rule::rows) {
            Rule::update(p[j], g[j], state, k, rows[j]);
        } else {
            Rule::update(p[j], g[j], state, k);
        }
#pragma unroll
        for (int s = 0; s < Rule::states; ++s) states[s][j] = state[s];
    }
}

// --- the step ------------------------------------------------------------------------------------

// Blocks per multiprocessor: what 64 registers a thread allow, fewer where a thread holds more.
template <class Rule, bool General>
constexpr int elementwise_occupancy =
    General ? 2
            : 4 - (Rule::states > 2 ? 1 : 0) - (Rule::heavy && Rule::states < 4 ? 1 : 0) -
                  (Rule::states > 3 ? 1 : 0);

// One chunk where the parameter is Param and its states are stored as they are computed.
template <class Rule, class Param, class T>
__device__ __forceinline__ void update_plain(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
                                             const typename Rule::template Scalars<T>& scalars, uint32_t step,
                                             int64_t begin, int64_t end) {
    constexpr int width = 16 / sizeof(Param);
    T divisor;
    const T factor = load_grad_factor(args, divisor);
    const auto param = global<Param>(tensor.param, "param");
    uintptr_t addresses =
        reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad);
    for (int k = 0; k < Rule::states; ++k) addresses |= reinterpret_cast<uintptr_t>(tensor.states[k]);
    const bool aligned = addresses % 16 == 0;

    for (int64_t base = begin; base < end; base += elementwise_threads * width) {
        const int64_t i = base + threadIdx.x * width;
        const int n = static_cast<int>(max(int64_t{0}, min(int64_t{width}, end - i)));
        const bool whole = aligned && n == width;
        T p[width], g[width], rows[width], states[Rule::states + 1][width];
        load_elements<width>(Global<const Param>(param), i, n, whole, p);
        load_any<width>(args.grad_type, tensor.grad, "grad", i, n, whole, g);
#pragma unroll
        for (int k = 0; k < Rule::states; ++k)
            load_any<width>(DType::float32, tensor.states[k], "state", i, n, whole, states[k]);
        if constexpr (Rule::rows) load_rows(tensor, i, n, rows);
#pragma unroll
        for (int j = 0; j < width; ++j) {
            if (args.grad_scale) g[j] = g[j] / divisor;
            g[j] = g[j] * factor;
        }

        apply_rule<Rule>(p, g, states, rows, scalars);

#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            if constexpr (width == 8) {
                store_elements(global<float>(tensor.states[k], "state"), i, n, whole, states[k]);
            } else {
                store_elements<width>(global<T>(tensor.states[k], "state"), i, n, whole, states[k]);
            }
        }
        if constexpr (std::is_same_v<Param, bf16>) {
            if (args.update == ParamUpdate::stochastic)
                round_stochastic(p, Philox{tensor.seed, step},
                                 static_cast<uint64_t>(tensor.first_element + i));
        }
        store_elements<width>(param, i, n, whole, p);
    }
}

// What the parameter becomes, kept in one of the ways of ParamUpdate; p becomes what was stored.
template <int N>
__device__ __forceinline__ void store_param(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
                                            uint32_t step, int64_t i, int n, bool whole, float (&p)[N]) {
    const bool half = args.param_type == DType::float16;
    if (args.update == ParamUpdate::kahan && args.param_type != DType::float32) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j >= n) continue;
            if (half) {
                const auto param = global<f16>(tensor.param, "param"),
                           rest = global<f16>(tensor.rest, "rest");
                f16 value = param[i + j], left = rest[i + j];
                kahan_add(value, left, p[j] - to_float(value));
                param[i + j] = value;
                rest[i + j] = left;
                p[j] = to_float(value);
            } else {
                const auto param = global<bf16>(tensor.param, "param"),
                           rest = global<bf16>(tensor.rest, "rest");
                bf16 value = param[i + j], left = rest[i + j];
                kahan_add(value, left, p[j] - to_float(value));
                param[i + j] = value;
                rest[i + j] = left;
                p[j] = to_float(value);
            }
        }
        return;
    }
    if (args.update == ParamUpdate::split) {
        const int bits = args.rest_type == DType::int8 ? 8 : 16;
        const auto param = global<bf16>(tensor.param, "param");
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j >= n) continue;
            bf16 narrow;
            int left = 0;
            split_master(p[j], bits, narrow, left);
            param[i + j] = narrow;
            if (bits == 8) {
                global<int8_t>(tensor.rest, "rest")[i + j] = static_cast<int8_t>(left);
            } else {
                global<int16_t>(tensor.rest, "rest")[i + j] = static_cast<int16_t>(left);
            }
        }
        return;
    }
    if (args.update == ParamUpdate::stochastic && args.param_type == DType::bfloat16)
        round_stochastic(p, Philox{tensor.seed, step}, static_cast<uint64_t>(tensor.first_element + i));
    store_any<N>(args.param_type, tensor.param, "param", i, n, whole, p);
    if (args.param_type == DType::float32) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
        p[j] = half ? to_float(from_float<f16>(p[j])) : to_float(from_float<bf16>(p[j]));
}

// Stores the parameter, and what is kept beside it.
template <int N, class T>
__device__ __forceinline__ void follow_param(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
                                             uint32_t step, int64_t i, int n, bool whole, T (&p)[N]) {
    if constexpr (std::is_same_v<T, float>) {
        if (tensor.copy) store_any<N>(args.copy_type, tensor.copy, "copy", i, n, whole, p);
        store_param(args, tensor, step, i, n, whole, p);
    } else {
        store_any<N>(DType::float64, tensor.param, "param", i, n, whole, p);
    }
    if (tensor.ema) {
        const auto ema = global<float>(tensor.ema, "ema");
        const float weight = static_cast<float>(args.ema_weight);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j < n) ema[i + j] = ema[i + j] + weight * (static_cast<float>(p[j]) - ema[i + j]);
        }
    }
    if (args.zero_grad) {
        const T zero[N] = {};
        store_any<N>(args.grad_type, tensor.grad, "grad", i, n, whole, zero);
    }
}

// One chunk however things are stored.
template <class Rule, class T>
__device__ __forceinline__ void update_general(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
                                               const typename Rule::template Scalars<T>& scalars,
                                               uint32_t step, [[maybe_unused]] const SharedMaps<true>& maps,
                                               int64_t begin, int64_t end) {
    constexpr bool narrow = std::is_same_v<T, float>;
    constexpr int width = narrow ? 8 : 2;
    T divisor;
    const T factor = load_grad_factor(args, divisor);
    uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) |
                          reinterpret_cast<uintptr_t>(tensor.grad) | reinterpret_cast<uintptr_t>(tensor.ema) |
                          reinterpret_cast<uintptr_t>(tensor.copy);
    for (int k = 0; k < Rule::states; ++k) addresses |= reinterpret_cast<uintptr_t>(tensor.states[k]);
    const bool aligned = addresses % 16 == 0;

    for (int64_t base = begin; base < end; base += elementwise_threads * width) {
        const int64_t i = base + threadIdx.x * width;
        const int n = static_cast<int>(max(int64_t{0}, min(int64_t{width}, end - i)));
        const bool whole = aligned && n == width;
        T p[width], g[width], rows[width], states[Rule::states + 1][width];
        load_any<width>(args.param_type, tensor.param, "param", i, n, whole, p);
        if constexpr (narrow) {
            if (args.update == ParamUpdate::split) {
#pragma unroll
                for (int j = 0; j < width; ++j) {
                    if (j >= n) continue;
                    const bool byte = args.rest_type == DType::int8;
                    const int left =
                        byte ? static_cast<int>(
                                   static_cast<int8_t>(global<const int8_t>(tensor.rest, "rest")[i + j]))
                             : static_cast<int>(
                                   static_cast<int16_t>(global<const int16_t>(tensor.rest, "rest")[i + j]));
                    p[j] = join_master(bf16{static_cast<uint16_t>(bit_cast<uint32_t>(p[j]) >> 16)}, left,
                                       byte ? 8 : 16);
                }
            }
        }
        load_any<width>(args.grad_type, tensor.grad, "grad", i, n, whole, g);
        const bool coded = narrow && args.format != StateFormat::fp32;
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            if constexpr (narrow) {
                if (coded) {
                    decode_state(args.format, Rule::is_signed(k), tensor.states[k], tensor.scales[k], i, n,
                                 whole, maps, states[k]);
                    continue;
                }
            }
            load_any<width>(DType::float32, tensor.states[k], "state", i, n, whole, states[k]);
        }
        if constexpr (Rule::rows) load_rows(tensor, i, n, rows);
#pragma unroll
        for (int j = 0; j < width; ++j) {
            if (args.grad_scale) g[j] = g[j] / divisor;
            g[j] = g[j] * factor;
        }

        apply_rule<Rule>(p, g, states, rows, scalars);

#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            if constexpr (narrow) {
                if (coded && args.format == StateFormat::bf16 && args.update == ParamUpdate::stochastic) {
                    const Philox random{stream_seed(tensor.seed, static_cast<uint64_t>(k)), step};
                    round_stochastic(states[k], random, static_cast<uint64_t>(tensor.first_element + i));
                }
                if (coded) {
                    encode_state(args.format, Rule::is_signed(k), tensor.states[k], tensor.scales[k], i, n,
                                 whole, maps, states[k]);
                    continue;
                }
            }
            store_any<width>(DType::float32, tensor.states[k], "state", i, n, whole, states[k]);
        }
        follow_param(args, tensor, step, i, n, whole, p);
    }
}

template <class Rule, class Param, bool General>
__global__ void __launch_bounds__(elementwise_threads, elementwise_occupancy<Rule, General>)
    elementwise_kernel(const __grid_constant__ ElementwiseLaunch launch) {
    using T = compute_t<Param>;
    using Scalars = typename Rule::template Scalars<T>;
    const ElementwiseArgs& args = launch.args;
    if (args.found_inf && global<const float>(args.found_inf, "found_inf")[0] != 0.0f) return;

    SharedArena arena;
    const Shared<Scalars> shared_scalars = arena.take<Scalars>(1);
    int current = -1;
    Scalars scalars{};
    const auto each_chunk = [&](const auto& update) {
        for (int64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
            const int first = find_tensor(launch, chunk);
            const ElementwiseTensor& tensor = launch.tensors[first];
            const uint32_t step = load_step(tensor);
            if (first != current) {
                current = first;
                __syncthreads();  // every thread has read those of the parameter before
                if (threadIdx.x == 0) shared_scalars[0] = load_scalars<Rule, T>(args, tensor, step);
                __syncthreads();
                scalars = shared_scalars[0];
            }
            const int64_t chunks = (tensor.numel + cuda_chunk - 1) / cuda_chunk;
            const int64_t begin = (chunk - (tensor.last_chunk - chunks)) * cuda_chunk;
            update(tensor, step, begin, min(tensor.numel, begin + cuda_chunk));
        }
    };
    if constexpr (General) {
        SharedMaps<true> maps(arena);
        if (has_codes(args.format)) maps.fill();  // seen by all after the barriers of the first parameter
        each_chunk([&](const ElementwiseTensor& tensor, uint32_t step, int64_t begin, int64_t end) {
            update_general<Rule, T>(args, tensor, scalars, step, maps, begin, end);
        });
    } else {
        each_chunk([&](const ElementwiseTensor& tensor, uint32_t step, int64_t begin, int64_t end) {
            update_plain<Rule, Param, T>(args, tensor, scalars, step, begin, end);
        });
    }
}

// A launch of its own, because every block of the update reads the counters.
template <class Launch>
__global__ void count_steps_kernel(const __grid_constant__ Launch launch) {
    const float* found_inf = launch.args.found_inf;
    if (found_inf && global<const float>(found_inf, "found_inf")[0] != 0.0f) return;
    for (int i = threadIdx.x; i < launch.args.count; i += blockDim.x) {
        const auto step = global<float>(launch.tensors[i].step, "step");
        step[0] = step[0] + 1.0f;
    }
}

template <class Rule, class Param, bool General>
void launch_update(const ElementwiseLaunch& table, Stream stream) {
    using Scalars = typename Rule::template Scalars<compute_t<Param>>;
    const int64_t resident = int64_t{multiprocessor_count()} * elementwise_occupancy<Rule, General>;
    LaunchConfig config{};
    config.grid = dim3(static_cast<unsigned>(table.args.chunks < resident ? table.args.chunks : resident));
    config.block = dim3(elementwise_threads);
    config.shared_bytes = taken<Scalars>(1) + (General ? SharedMaps<true>::bytes : 0);
    config.stream = stream;
    launch(config, elementwise_kernel<Rule, Param, General>, table);
}

template <class Rule>
void launch_step(const ElementwiseLaunch& table, Stream stream) {
    LaunchConfig config{};
    config.grid = dim3(1);
    config.block = dim3(elementwise_threads);
    config.stream = stream;
    launch(config, count_steps_kernel<ElementwiseLaunch>, table);
    if (table.args.chunks == 0) return;

    const ElementwiseArgs& args = table.args;
    bool plain = args.format == StateFormat::fp32 && !args.zero_grad &&
                 (args.update == ParamUpdate::nearest || args.update == ParamUpdate::stochastic);
    for (int64_t i = 0; i < args.count; ++i) plain = plain && !table.tensors[i].ema && !table.tensors[i].copy;
    if (args.param_type == DType::float64) return launch_update<Rule, double, true>(table, stream);
    if (plain && args.param_type == DType::float32) return launch_update<Rule, float, false>(table, stream);
    if (plain && args.param_type == DType::bfloat16) return launch_update<Rule, bf16, false>(table, stream);
    launch_update<Rule, float, true>(table, stream);
}

// --- sums ----------------------------------------------------------------------------------------

// A warp adds up one piece of a row.
template <class Rule, class T>
__global__ void __launch_bounds__(elementwise_threads, sizeof(T) == 8 ? 2 : 4)
    sum_pieces_kernel(const __grid_constant__ ElementwiseLaunch launch) {
    const ElementwiseArgs& args = launch.args;
    SharedArena arena;
    [[maybe_unused]] SharedMaps<true> maps(arena);
    if (has_codes(args.format)) maps.fill();
    __syncthreads();

    T divisor;
    const T factor = load_grad_factor(args, divisor);
    const int lane = threadIdx.x % warp_threads;
    int current = -1;
    typename Rule::template Scalars<T> scalars{};
    const int64_t warps = int64_t{gridDim.x} * (elementwise_threads / warp_threads);
    for (int64_t piece = (int64_t{blockIdx.x} * elementwise_threads + threadIdx.x) / warp_threads;
         piece < args.chunks; piece += warps) {
        const int index = find_tensor(launch, piece);
        const ElementwiseTensor& tensor = launch.tensors[index];
        if (index != current) {
            current = index;
            scalars = load_scalars<Rule, T>(args, tensor, load_step(tensor) + 1);
        }
        const int64_t per_row = (tensor.row_length + sum_piece - 1) / sum_piece;
        const int64_t rows = tensor.numel / tensor.row_length;
        const int64_t own = piece - (tensor.last_chunk - rows * per_row), row = own / per_row;
        const int64_t start = own % per_row * sum_piece;
        const int64_t begin = row * tensor.row_length + start;
        const int64_t end = row * tensor.row_length + min(tensor.row_length, start + sum_piece);
        T sums[Rule::sums] = {};
        for (int64_t i = begin + lane; i < end; i += warp_threads) {
            T p[1] = {}, g[1] = {}, state[Rule::states + 1] = {}, term[Rule::sums];
            if constexpr (Rule::sum_reads & param_bit) {
                load_any<1>(args.param_type, tensor.param, "param", i, 1, false, p);
                if constexpr (std::is_same_v<T, float>) {
                    if (args.update == ParamUpdate::split) {
                        const bool byte = args.rest_type == DType::int8;
                        const int left =
                            byte ? static_cast<int>(
                                       static_cast<int8_t>(global<const int8_t>(tensor.rest, "rest")[i]))
                                 : static_cast<int>(
                                       static_cast<int16_t>(global<const int16_t>(tensor.rest, "rest")[i]));
                        p[0] = join_master(bf16{static_cast<uint16_t>(bit_cast<uint32_t>(p[0]) >> 16)}, left,
                                           byte ? 8 : 16);
                    }
                }
            }
            if constexpr (Rule::sum_reads & grad_bit) {
                load_any<1>(args.grad_type, tensor.grad, "grad", i, 1, false, g);
                if (args.grad_scale) g[0] = g[0] / divisor;
                g[0] = g[0] * factor;
            }
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) {
                if (!(Rule::sum_reads & state_bit(k))) continue;
                if constexpr (std::is_same_v<T, float>) {
                    if (args.format != StateFormat::fp32) {
                        state[k] = decode_element(args.format, Rule::is_signed(k), tensor.states[k],
                                                  tensor.scales[k], i, maps);
                        continue;
                    }
                }
                state[k] = global<const T>(tensor.states[k], "state")[i];
            }
            Rule::terms(p[0], g[0], state, scalars, term);
#pragma unroll
            for (int s = 0; s < Rule::sums; ++s) sums[s] += term[s];
        }
#pragma unroll
        for (int s = 0; s < Rule::sums; ++s) {
            for (int offset = warp_threads / 2; offset > 0; offset /= 2)
                sums[s] += __shfl_xor_sync(all_lanes, sums[s], offset);
            if (lane == 0) global<T>(args.partial, "partial")[piece * Rule::sums + s] = sums[s];
        }
    }
}

// A warp adds up the pieces of one row.
template <class T>
__global__ void __launch_bounds__(elementwise_threads)
    add_pieces_kernel(const __grid_constant__ ElementwiseLaunch launch, int sums) {
    const ElementwiseTensor& tensor = launch.tensors[blockIdx.x];
    const int lane = threadIdx.x % warp_threads, warp = threadIdx.x / warp_threads;
    const int64_t rows = tensor.row_length > 0 ? tensor.numel / tensor.row_length : 1;
    const int64_t per_row = (tensor.row_length + sum_piece - 1) / sum_piece;
    const auto partial = global<const T>(launch.args.partial, "partial");
    const auto result = global<T>(launch.args.sums, "sums");
    for (int64_t row = int64_t{blockIdx.y} * (elementwise_threads / warp_threads) + warp; row < rows;
         row += int64_t{gridDim.y} * (elementwise_threads / warp_threads)) {
        const int64_t first = tensor.last_chunk - rows * per_row + row * per_row;
        for (int s = 0; s < sums; ++s) {
            double sum = 0.0;
            for (int64_t piece = lane; piece < per_row; piece += warp_threads)
                sum += static_cast<double>(static_cast<T>(partial[(first + piece) * sums + s]));
            for (int offset = warp_threads / 2; offset > 0; offset /= 2)
                sum += __shfl_xor_sync(all_lanes, sum, offset);
            if (lane == 0) result[(tensor.first_row + row) * sums + s] = static_cast<T>(sum);
        }
    }
}

template <class Rule, class T>
void launch_sums_of(const ElementwiseLaunch& table, Stream stream) {
    LaunchConfig config{};
    config.block = dim3(elementwise_threads);
    config.stream = stream;
    if (table.args.chunks > 0) {
        const int64_t needed =
            (table.args.chunks * warp_threads + elementwise_threads - 1) / elementwise_threads;
        const int64_t resident = int64_t{multiprocessor_count()} * 4;
        config.grid = dim3(static_cast<unsigned>(needed < resident ? needed : resident));
        config.shared_bytes = SharedMaps<true>::bytes;
        launch(config, sum_pieces_kernel<Rule, T>, table);
    }
    int64_t rows = 1;
    for (int64_t i = 0; i < table.args.count; ++i)
        rows = rows_of(table.tensors[i]) > rows ? rows_of(table.tensors[i]) : rows;
    const int64_t blocks = (rows * warp_threads + elementwise_threads - 1) / elementwise_threads;
    config.grid =
        dim3(static_cast<unsigned>(table.args.count), static_cast<unsigned>(blocks < 64 ? blocks : 64));
    config.shared_bytes = 0;
    launch(config, add_pieces_kernel<T>, table, Rule::sums);
}

template <class Rule>
void launch_sums(const ElementwiseLaunch& table, Stream stream) {
    if constexpr (Rule::sums > 0) {
        table.args.param_type == DType::float64 ? launch_sums_of<Rule, double>(table, stream)
                                                : launch_sums_of<Rule, float>(table, stream);
    }
}

// --- one function per rule ------------------------------------------------------------------------

template <template <int> class Rule, int Variants, int Variant = 0, class F>
void with_variant(int variant, const F& function) {
    if constexpr (Variant < Variants) {
        if (variant == Variant) return function(Rule<Variant>());
        with_variant<Rule, Variants, Variant + 1>(variant, function);
    }
}

}  // namespace narrowgauge

// The launches of a rule; the build writes one line of this for every file in rules/.
#define NG_RULE_CUDA(rule)                                                                  \
    namespace narrowgauge {                                                                 \
    void launch_##rule(int variant, const ElementwiseLaunch& table, Stream stream) {        \
        with_variant<rule::Rule, rule::variants>(                                           \
            variant, [&](auto chosen) { launch_step<decltype(chosen)>(table, stream); });   \
    }                                                                                       \
    void launch_##rule##_sums(int variant, const ElementwiseLaunch& table, Stream stream) { \
        with_variant<rule::Rule, rule::variants>(                                           \
            variant, [&](auto chosen) { launch_sums<decltype(chosen)>(table, stream); });   \
    }                                                                                       \
    }
