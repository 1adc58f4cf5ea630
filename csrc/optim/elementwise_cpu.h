// The CPU skeleton of elementwise optimizers. The build instantiates it for every file in rules/.
//
// Work goes in blocks of 256 elements: whatever is not already stored as the rule computes it is widened into
// a buffer in the first-level cache, the rule runs over plain arrays, and results are narrowed back.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/philox.h"
#include "common/simd.h"
#include "optim/elementwise.h"
#include "optim/master.h"
#include "optim/rule.h"
#include "optim/state_codec_cpu.h"

// Lets the compiler vectorise a loop whose iterations touch different elements. Not `omp simd`: under that,
// GCC 12 gives up on loops with a small array of their own.
#if defined(__clang__)
#define NG_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define NG_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

NG_NAMESPACE_BEGIN

namespace staging {

template <class From, class T>
void widen(const From* from, int n, T* to) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = to_compute(from[i]);
}

template <class T>
void widen(DType type, const void* from, int64_t begin, int n, T* to) {
    if constexpr (std::is_same_v<T, double>) {
        widen(static_cast<const double*>(from) + begin, n, to);
    } else if (type == DType::float32) {
        widen(static_cast<const float*>(from) + begin, n, to);
    } else if (type == DType::bfloat16) {
        widen(static_cast<const bf16*>(from) + begin, n, to);
    } else {
        widen(static_cast<const f16*>(from) + begin, n, to);
    }
}

template <class To>
void narrow(const float* from, int n, To* to) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = from_float<To>(from[i]);
}

inline void narrow(DType type, const float* from, int n, void* to, int64_t begin) {
    if (type == DType::bfloat16) narrow(from, n, static_cast<bf16*>(to) + begin);
    if (type == DType::float16) narrow(from, n, static_cast<f16*>(to) + begin);
    if (type == DType::float32) narrow(from, n, static_cast<float*>(to) + begin);
}

// Elements `first` onwards of the draw decide the rounding.
inline void narrow_stochastic(const float* from, int n, const Philox& random, uint64_t first, bf16* to) {
    constexpr int groups = state_block / 4 + 1;
    uint32_t words[4][groups], in_order[4 * groups];
    const uint64_t first_group = first / 4;
    NG_INDEPENDENT_ITERATIONS
    for (int i = 0; i < groups; ++i) {
        const Philox::Words group = random.group(first_group + static_cast<uint64_t>(i));
        for (int j = 0; j < 4; ++j) words[j][i] = group.word[j];
    }
#pragma omp simd
    for (int i = 0; i < groups; ++i) {
        for (int j = 0; j < 4; ++j) in_order[4 * i + j] = words[j][i];
    }
    const uint32_t* word = in_order + first % 4;
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = stochastic_bf16(from[i], word[i]);
}

template <class P>
void add_compensated(const float* from, int n, P* param, P* rest) {
    for (int i = 0; i < n; ++i) kahan_add(param[i], rest[i], from[i] - to_float(param[i]));
}

template <class Rest>
void join(const bf16* param, const Rest* rest, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = join_master(param[i], static_cast<int>(rest[i]), sizeof(Rest) * 8);
}

template <class Rest>
void split(const float* from, int n, bf16* param, Rest* rest) {
    for (int i = 0; i < n; ++i) {
        int left = 0;
        split_master(from[i], sizeof(Rest) * 8, param[i], left);
        rest[i] = static_cast<Rest>(left);
    }
}

// A block of the parameter as the type of computation; in place where it is stored so.
inline double* load_param(const ElementwiseArgs&, const ElementwiseTensor& tensor, int64_t i, int, double*) {
    return static_cast<double*>(tensor.param) + i;
}
inline float* load_param(const ElementwiseArgs& args, const ElementwiseTensor& tensor, int64_t i, int n,
                         float* buffer) {
    if (args.param_type == DType::float32) return static_cast<float*>(tensor.param) + i;
    const bf16* param = static_cast<const bf16*>(tensor.param) + i;
    if (args.update == ParamUpdate::split && args.rest_type == DType::int8) {
        join(param, static_cast<const int8_t*>(tensor.rest) + i, n, buffer);
    } else if (args.update == ParamUpdate::split) {
        join(param, static_cast<const int16_t*>(tensor.rest) + i, n, buffer);
    } else {
        widen(args.param_type, tensor.param, i, n, buffer);
    }
    return buffer;
}

inline void store_param(const ElementwiseArgs&, const ElementwiseTensor&, int64_t, int, const double*) {}
inline void store_param(const ElementwiseArgs& args, const ElementwiseTensor& tensor, int64_t i, int n,
                        float* p) {
    if (args.param_type == DType::float32) return;
    bf16* narrow_param = static_cast<bf16*>(tensor.param) + i;
    f16* half_param = static_cast<f16*>(tensor.param) + i;
    const bool half = args.param_type == DType::float16;
    if (args.update == ParamUpdate::kahan && half) {
        add_compensated(p, n, half_param, static_cast<f16*>(tensor.rest) + i);
    } else if (args.update == ParamUpdate::kahan) {
        add_compensated(p, n, narrow_param, static_cast<bf16*>(tensor.rest) + i);
    } else if (args.update == ParamUpdate::split && args.rest_type == DType::int8) {
        split(p, n, narrow_param, static_cast<int8_t*>(tensor.rest) + i);
    } else if (args.update == ParamUpdate::split) {
        split(p, n, narrow_param, static_cast<int16_t*>(tensor.rest) + i);
    } else if (args.update == ParamUpdate::stochastic && !half) {
        const Philox random{tensor.seed, static_cast<uint64_t>(*tensor.step)};
        narrow_stochastic(p, n, random, static_cast<uint64_t>(tensor.first_element + i), narrow_param);
    } else {
        narrow(args.param_type, p, n, tensor.param, i);
    }
}

template <class T>
const T* load_grad(const ElementwiseArgs& args, const ElementwiseTensor& tensor, int64_t i, int n,
                   T* buffer) {
    constexpr DType native = std::is_same_v<T, double> ? DType::float64 : DType::float32;
    if (args.grad_type == native && !args.grad_scale && !args.clip && !args.maximize)
        return static_cast<const T*>(tensor.grad) + i;
    widen(args.grad_type, tensor.grad, i, n, buffer);
    if (args.grad_scale) {
        const T divisor = static_cast<T>(*args.grad_scale);
#pragma omp simd
        for (int j = 0; j < n; ++j) buffer[j] /= divisor;
    }
    if (args.clip || args.maximize) {
        const T factor = (args.clip ? static_cast<T>(*args.clip) : T(1)) * (args.maximize ? T(-1) : T(1));
#pragma omp simd
        for (int j = 0; j < n; ++j) buffer[j] *= factor;
    }
    return buffer;
}

template <class T>
T* load_state(const ElementwiseArgs& args, const ElementwiseTensor& tensor, bool is_signed, int state,
              int64_t i, int n, T* buffer) {
    if constexpr (std::is_same_v<T, float>) {
        if (args.format != StateFormat::fp32) {
            decode_state_block(args.format, is_signed, tensor.states[state], tensor.scales[state], i, n,
                               buffer);
            return buffer;
        }
    }
    return static_cast<T*>(tensor.states[state]) + i;
}

// Coded states only; others were changed in place.
inline void store_state(const ElementwiseArgs& args, const ElementwiseTensor& tensor, bool is_signed,
                        int state, int64_t i, int n, const float* values) {
    if (args.format == StateFormat::bf16 && args.update == ParamUpdate::stochastic) {
        const Philox random{stream_seed(tensor.seed, state), static_cast<uint64_t>(*tensor.step)};
        narrow_stochastic(values, n, random, static_cast<uint64_t>(tensor.first_element + i),
                          static_cast<bf16*>(tensor.states[state]) + i);
    } else {
        encode_state_block(args.format, is_signed, values, i, n, tensor.states[state], tensor.scales[state]);
    }
}

// What is done with the value that the parameter now has.
template <class T>
void follow(const ElementwiseArgs& args, const ElementwiseTensor& tensor, int64_t i, int n,
            const T* computed) {
    alignas(64) T stored[state_block];
    constexpr bool narrow_types = std::is_same_v<T, float>;
    if (narrow_types && args.param_type != DType::float32 && args.update != ParamUpdate::split) {
        widen(args.param_type, tensor.param, i, n, stored);
    } else {
        std::copy_n(computed, n, stored);
    }
    if (tensor.ema) {
        const float weight = static_cast<float>(args.ema_weight);
        float* ema = tensor.ema + i;
#pragma omp simd
        for (int j = 0; j < n; ++j) ema[j] += weight * (static_cast<float>(stored[j]) - ema[j]);
    }
    if constexpr (narrow_types) {
        if (tensor.copy) narrow(args.copy_type, computed, n, tensor.copy, i);
    }
    if (args.zero_grad) {
        const int64_t size = size_of(args.grad_type);
        std::memset(static_cast<char*>(tensor.grad) + i * size, 0, static_cast<size_t>(n * size));
    }
}

// The number of each element's row.
template <class T>
void spread_rows(const ElementwiseTensor& tensor, int64_t begin, int n, T* to) {
    const T* rows = static_cast<const T*>(tensor.rows);
    int64_t row = begin / tensor.row_length, left = (row + 1) * tensor.row_length - begin;
    for (int i = 0; i < n; ++row, left = tensor.row_length) {
        const int until = static_cast<int>(std::min<int64_t>(n, i + left));
        std::fill(to + i, to + until, rows[row]);
        i = until;
    }
}

}  // namespace staging

inline double learning_rate(const ElementwiseArgs& args) {
    if (!args.lr_tensor) return args.lr;
    return args.lr_type == DType::float64 ? *static_cast<const double*>(args.lr_tensor)
                                          : *static_cast<const float*>(args.lr_tensor);
}

// --- the step ------------------------------------------------------------------------------------

template <class Rule, class T, size_t... State>
void apply_rule(T* p, const T* g, T* const* states, const T* rows, int n,
                const typename Rule::template Scalars<T>& scalars, std::index_sequence<State...>) {
    const typename Rule::template Scalars<T> k = scalars;
    T* const pointers[] = {states[State]..., nullptr};
    NG_INDEPENDENT_ITERATIONS
    for (int i = 0; i < n; ++i) {
        T state[] = {pointers[State][i]..., T(0)};
        if constexpr (Rule::rows) {
            Rule::update(p[i], g[i], state, k, rows[i]);
        } else {
            Rule::update(p[i], g[i], state, k);
        }
        ((pointers[State][i] = state[State]), ...);
    }
}

// Elements [begin, end) of one parameter; begin is a multiple of 256.
template <class Rule, class T>
void update_range(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
                  const typename Rule::template Scalars<T>& scalars, int64_t begin, int64_t end) {
    constexpr bool may_code = std::is_same_v<T, float>;
    alignas(64) T param_buffer[state_block], grad_buffer[state_block], row_buffer[state_block],
        state_buffers[Rule::states + 1][state_block];
    const bool followed = tensor.ema || tensor.copy || args.zero_grad;

    for (int64_t i = begin; i < end; i += state_block) {
        const int n = static_cast<int>(std::min<int64_t>(state_block, end - i));
        T* p = staging::load_param(args, tensor, i, n, param_buffer);
        const T* g = staging::load_grad(args, tensor, i, n, grad_buffer);
        T* states[Rule::states + 1] = {};
        for (int k = 0; k < Rule::states; ++k)
            states[k] = staging::load_state(args, tensor, Rule::is_signed(k), k, i, n, state_buffers[k]);
        if constexpr (Rule::rows) staging::spread_rows(tensor, i, n, row_buffer);

        apply_rule<Rule>(p, g, states, row_buffer, n, scalars, std::make_index_sequence<Rule::states>());

        if constexpr (may_code) {
            for (int k = 0; args.format != StateFormat::fp32 && k < Rule::states; ++k)
                staging::store_state(args, tensor, Rule::is_signed(k), k, i, n, states[k]);
        }
        staging::store_param(args, tensor, i, n, p);
        if (followed) staging::follow(args, tensor, i, n, p);
    }
}

// Calls `function(tensor, scalars, first, last)` for the parts [first, last) of the parameters that make up
// [begin, end) of the list; `parts(tensor)` says how many a parameter has.
template <class Rule, class T, class Parts, class F>
void for_parts(const ElementwiseArgs& args, const ElementwiseTensor* tensors, int64_t begin, int64_t end,
               float steps_ahead, const Parts& parts, const F& function) {
    const double lr = learning_rate(args);
    const auto* tensor =
        std::upper_bound(tensors, tensors + args.count, begin,
                         [](int64_t part, const auto& candidate) { return part < candidate.last_chunk; });
    float step = -1.0f;
    const double* given = nullptr;
    typename Rule::template Scalars<T> scalars{};
    for (int64_t part = begin; part < end; ++tensor) {
        const int64_t first = tensor->last_chunk - parts(*tensor), last = std::min(end, tensor->last_chunk);
        if (part == last) continue;  // an empty parameter
        if (*tensor->step + steps_ahead != step || tensor->given != given) {
            step = *tensor->step + steps_ahead;
            given = tensor->given;
            scalars = Rule::template scalars<T>(args.options, lr, static_cast<uint32_t>(step),
                                                given ? given : nothing_given);
        }
        function(*tensor, scalars, part - first, last - first);
        part = last;
    }
}

// Chunks [begin, end) of the list of parameters, whose steps are already counted up.
template <class Rule, class T>
void update_chunks(const ElementwiseArgs& args, const ElementwiseTensor* tensors, int64_t begin,
                   int64_t end) {
    for_parts<Rule, T>(
        args, tensors, begin, end, 0.0f,
        [](const ElementwiseTensor& tensor) { return (tensor.numel + cpu_chunk - 1) / cpu_chunk; },
        [&](const ElementwiseTensor& tensor, const auto& scalars, int64_t first, int64_t last) {
            update_range<Rule, T>(args, tensor, scalars, first * cpu_chunk,
                                  std::min(tensor.numel, last * cpu_chunk));
        });
}

// --- sums ----------------------------------------------------------------------------------------

template <class T>
double sum_of(const T* values, int n) {
    constexpr int lanes = Simd<T>::lanes;
    typename Simd<T>::Pack even{}, odd{};
    int i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
        even += load_pack(values + i);
        odd += load_pack(values + i + lanes);
    }
    T rest = 0;
    for (; i < n; ++i) rest += values[i];
    return static_cast<double>(sum_lanes(even + odd) + rest);
}

// What elements [begin, end) of one parameter add up to.
template <class Rule, class T>
void sum_range(const ElementwiseArgs& args, const ElementwiseTensor& tensor,
               const typename Rule::template Scalars<T>& scalars, int64_t begin, int64_t end, T* result) {
    alignas(64) T param_buffer[state_block], grad_buffer[state_block], terms[Rule::sums][state_block],
        state_buffers[Rule::states + 1][state_block];
    const typename Rule::template Scalars<T> scalar = scalars;
    double sums[Rule::sums] = {};
    for (int64_t block = begin / state_block * state_block; block < end; block += state_block) {
        const int first = static_cast<int>(std::max<int64_t>(0, begin - block));
        const int n = static_cast<int>(std::min<int64_t>(state_block, end - block));
        const T *p = grad_buffer, *g = grad_buffer;
        T* states[Rule::states + 1] = {};
        if constexpr (Rule::sum_reads & param_bit)
            p = staging::load_param(args, tensor, block, n, param_buffer);
        if constexpr (Rule::sum_reads & grad_bit) g = staging::load_grad(args, tensor, block, n, grad_buffer);
        for (int k = 0; k < Rule::states; ++k) {
            states[k] = state_buffers[k];
            if (Rule::sum_reads & state_bit(k))
                states[k] =
                    staging::load_state(args, tensor, Rule::is_signed(k), k, block, n, state_buffers[k]);
        }
        NG_INDEPENDENT_ITERATIONS
        for (int i = first; i < n; ++i) {
            T state[Rule::states + 1], term[Rule::sums];
            for (int k = 0; k < Rule::states; ++k) state[k] = states[k][i];
            Rule::terms(p[i], g[i], state, scalar, term);
            for (int s = 0; s < Rule::sums; ++s) terms[s][i] = term[s];
        }
        for (int s = 0; s < Rule::sums; ++s) sums[s] += sum_of(terms[s] + first, n - first);
    }
    for (int s = 0; s < Rule::sums; ++s) result[s] = static_cast<T>(sums[s]);
}

// Pieces [begin, end) of the rows of all parameters.
template <class Rule, class T>
void sum_pieces(const ElementwiseArgs& args, const ElementwiseTensor* tensors, int64_t begin, int64_t end) {
    if constexpr (Rule::sums > 0) {
        T* result = static_cast<T*>(args.partial) + begin * Rule::sums;
        for_parts<Rule, T>(
            args, tensors, begin, end, 1.0f,
            [](const ElementwiseTensor& tensor) { return pieces_of(tensor); },
            [&](const ElementwiseTensor& tensor, const auto& scalars, int64_t first, int64_t last) {
                const int64_t per_row = pieces_of(tensor) / rows_of(tensor);
                for (int64_t piece = first; piece < last; ++piece, result += Rule::sums) {
                    const int64_t row = piece / per_row, start = piece % per_row * sum_piece;
                    const int64_t row_begin = row * tensor.row_length;
                    sum_range<Rule, T>(args, tensor, scalars, row_begin + start,
                                       row_begin + std::min(tensor.row_length, start + sum_piece), result);
                }
            });
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

// The two kernels of a rule; the build writes one line of this for every file in rules/.
#define NG_RULE_CPU(rule)                                                                          \
    NG_NAMESPACE_BEGIN                                                                             \
    void rule##_chunks(int variant, const ElementwiseArgs& args, const ElementwiseTensor* tensors, \
                       int64_t begin, int64_t end) {                                               \
        with_variant<rule::Rule, rule::variants>(variant, [&](auto chosen) {                       \
            args.param_type == DType::float64                                                      \
                ? update_chunks<decltype(chosen), double>(args, tensors, begin, end)               \
                : update_chunks<decltype(chosen), float>(args, tensors, begin, end);               \
        });                                                                                        \
    }                                                                                              \
    void rule##_pieces(int variant, const ElementwiseArgs& args, const ElementwiseTensor* tensors, \
                       int64_t begin, int64_t end) {                                               \
        with_variant<rule::Rule, rule::variants>(variant, [&](auto chosen) {                       \
            args.param_type == DType::float64                                                      \
                ? sum_pieces<decltype(chosen), double>(args, tensors, begin, end)                  \
                : sum_pieces<decltype(chosen), float>(args, tensors, begin, end);                  \
        });                                                                                        \
    }                                                                                              \
    NG_NAMESPACE_END

NG_NAMESPACE_END
