// The CPU skeleton of elementwise optimizers. A rule's *_cpu.cpp file instantiates `update_chunks`.
//
// Work goes in blocks of 256 elements: whatever is not already stored as the rule computes it is widened into
// a buffer in the first-level cache, the rule runs over plain arrays, and results are narrowed back.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/philox.h"
#include "common/simd.h"
#include "optim/dynamic_map.h"
#include "optim/elementwise.h"

// Lets the compiler vectorise a loop whose iterations touch different elements. Not `omp simd`: under that,
// GCC 12 gives up on loops with a small array of their own.
#if defined(__clang__)
#define NG_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define NG_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

NG_NAMESPACE_BEGIN

template <bool Signed>
inline constexpr DynamicMap<Signed> dynamic_map = make_dynamic_map<Signed>();

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

// Table look-ups are written out for eight elements: compilers make worse of a loop, and the gather
// instruction is slow.
template <bool Signed>
void decode_block(const uint8_t* codes, float scale, int n, float* values) {
    const float* map = dynamic_map<Signed>.values;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t w;
        memcpy(&w, codes + i, sizeof(w));
        const F32x8 entries{map[w & 255],       map[w >> 8 & 255],  map[w >> 16 & 255], map[w >> 24 & 255],
                            map[w >> 32 & 255], map[w >> 40 & 255], map[w >> 48 & 255], map[w >> 56]};
        store_pack(values + i, entries * scale);
    }
    for (; i < n; ++i) values[i] = map[codes[i]] * scale;
}

// In three passes, because the look-ups between them do not vectorise.
template <bool Signed>
void encode_finite(const float* values, float divisor, int n, uint8_t* codes) {
    using Map = DynamicMap<Signed>;
    using I32x8 = int32_t __attribute__((vector_size(32)));
    const uint32_t* lookup = dynamic_map<Signed>.lookup;
    alignas(32) uint32_t places[state_block + 7];
#pragma omp simd
    for (int i = 0; i < n; ++i) places[i] = Map::place(values[i] / divisor);
    for (int i = n; i % 8 != 0; ++i) places[i] = 0;
    for (int i = 0; i < n; i += 8) {
        uint32_t* p = places + i;
        const auto entry = [&](int k) { return lookup[p[k] >> Map::low_bits]; };
        const U32x8 entries{entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7)};
        U32x8 place;
        memcpy(&place, p, sizeof(place));
        const auto before = bit_cast<I32x8>(place & Map::low_mask) < bit_cast<I32x8>(entries & 0xffffffu);
        const U32x8 code = (entries >> 24) + 1 + bit_cast<U32x8>(before);  // true is -1
        memcpy(p, &code, sizeof(code));
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(places[i]);
}

// Returns the block's scale: NaN when it holds a value that is not finite.
template <bool Signed>
float encode_block(const float* values, int n, uint8_t* codes) {
    int32_t largest = 0;  // magnitudes compare as integers, and NaN is the largest of all
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; ++i) {
        const int32_t magnitude = bit_cast<int32_t>(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000) {
        std::fill(codes, codes + n, uint8_t{0});
        return bit_cast<float>(0x7fc00000u);
    }
    const float scale = bit_cast<float>(largest), divisor = scale > 1e-12f ? scale : 1e-12f;
    encode_finite<Signed>(values, divisor, n, codes);
    return scale;
}

}  // namespace staging

template <class Rule, class T, size_t... State>
void apply_rule(T* p, const T* g, T* const* states, int n, T direction,
                const typename Rule::template Scalars<T>& scalars, std::index_sequence<State...>) {
    const typename Rule::template Scalars<T> k = scalars;
    T* const pointers[] = {states[State]...};
    NG_INDEPENDENT_ITERATIONS
    for (int i = 0; i < n; ++i) {
        T state[] = {pointers[State][i]...};
        Rule::update(p[i], g[i] * direction, state, k);
        ((pointers[State][i] = state[State]), ...);
    }
}

// Elements [begin, end) of one parameter; begin is a multiple of 256.
template <class Rule, class T, class Options>
void update_range(const ElementwiseArgs<Options>& args, const ElementwiseTensor<Rule::states>& tensor,
                  const typename Rule::template Scalars<T>& scalars, int64_t begin, int64_t end) {
    constexpr DType native = std::is_same_v<T, double> ? DType::float64 : DType::float32;
    constexpr bool may_quantize = native == DType::float32;
    alignas(64) T param_buffer[state_block], grad_buffer[state_block],
        state_buffers[Rule::states][state_block];

    for (int64_t i = begin; i < end; i += state_block) {
        const int n = static_cast<int>(std::min<int64_t>(state_block, end - i));
        const int64_t block = i / state_block;

        T* p = static_cast<T*>(tensor.param) + i;
        if (args.param_type != native) staging::widen(args.param_type, tensor.param, i, n, p = param_buffer);
        const T* g = static_cast<const T*>(tensor.grad) + i;
        if (args.grad_type != native || args.grad_scale) {
            staging::widen(args.grad_type, tensor.grad, i, n, grad_buffer);
            g = grad_buffer;
        }
        if (args.grad_scale) {
            const T divisor = static_cast<T>(*args.grad_scale);
#pragma omp simd
            for (int j = 0; j < n; ++j) grad_buffer[j] /= divisor;
        }
        T* states[Rule::states];
        for (int state = 0; state < Rule::states; ++state) {
            states[state] = static_cast<T*>(tensor.states[state]) + i;
            if constexpr (may_quantize) {
                if (!args.quantized) continue;
                const uint8_t* codes = static_cast<const uint8_t*>(tensor.states[state]) + i;
                const float scale = tensor.scales[state][block];
                states[state] = state_buffers[state];
                if (Rule::is_signed(state)) {
                    staging::decode_block<true>(codes, scale, n, states[state]);
                } else {
                    staging::decode_block<false>(codes, scale, n, states[state]);
                }
            }
        }

        apply_rule<Rule>(p, g, states, n, args.maximize ? T(-1) : T(1), scalars,
                         std::make_index_sequence<Rule::states>());

        if constexpr (may_quantize) {
            for (int state = 0; args.quantized && state < Rule::states; ++state) {
                uint8_t* codes = static_cast<uint8_t*>(tensor.states[state]) + i;
                tensor.scales[state][block] = Rule::is_signed(state)
                                                  ? staging::encode_block<true>(states[state], n, codes)
                                                  : staging::encode_block<false>(states[state], n, codes);
            }
            if (args.param_type == DType::float16) {
                staging::narrow(p, n, static_cast<f16*>(tensor.param) + i);
            } else if (args.param_type == DType::bfloat16 && args.stochastic) {
                const Philox random{tensor.seed, static_cast<uint64_t>(*tensor.step)};
                staging::narrow_stochastic(p, n, random, static_cast<uint64_t>(tensor.first_element + i),
                                           static_cast<bf16*>(tensor.param) + i);
            } else if (args.param_type == DType::bfloat16) {
                staging::narrow(p, n, static_cast<bf16*>(tensor.param) + i);
            }
        }
    }
}

// Chunks [begin, end) of the list of parameters, whose steps are already counted up.
template <class Rule, class T, class Options>
void update_chunks(const ElementwiseArgs<Options>& args, const ElementwiseTensor<Rule::states>* tensors,
                   int64_t begin, int64_t end) {
    double lr = args.lr;
    if (args.lr_tensor) {
        lr = args.lr_type == DType::float64 ? *static_cast<const double*>(args.lr_tensor)
                                            : *static_cast<const float*>(args.lr_tensor);
    }
    const auto* tensor =
        std::upper_bound(tensors, tensors + args.count, begin,
                         [](int64_t chunk, const auto& candidate) { return chunk < candidate.last_chunk; });
    float step = -1.0f;
    typename Rule::template Scalars<T> scalars{};
    for (int64_t chunk = begin; chunk < end; ++tensor) {
        const int64_t first_chunk = tensor->last_chunk - (tensor->numel + cpu_chunk - 1) / cpu_chunk;
        const int64_t last_chunk = std::min(end, tensor->last_chunk);
        if (chunk == last_chunk) continue;  // an empty parameter
        if (*tensor->step != step) {
            step = *tensor->step;
            scalars = Rule::template scalars<T>(args.options, lr, static_cast<uint32_t>(step));
        }
        update_range<Rule>(args, *tensor, scalars, (chunk - first_chunk) * cpu_chunk,
                           std::min(tensor->numel, (last_chunk - first_chunk) * cpu_chunk));
        chunk = last_chunk;
    }
}

NG_NAMESPACE_END
