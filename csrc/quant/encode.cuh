// What the CUDA kernels of quantization share: loading a vector, encoding it, and the largest value of a
// group.
#pragma once

#include "common/reduce.cuh"
#include "quant/codes.h"
#include "quant/quantize.h"

namespace narrowgauge {

// How many elements of T a thread loads at a time.
template <class T>
constexpr int vector_width = 16 / sizeof(T);

// `Width` elements from i on. `aligned` says that one access may load them; it is the same for the whole
// grid.
template <int Width, class T>
__device__ __forceinline__ Vec<T, Width> load_elements(Global<const T> source, int64_t i, bool aligned) {
    if (aligned) return load<Width>(source, i);
    Vec<T, Width> loaded;
#pragma unroll
    for (int k = 0; k < Width; ++k) loaded[k] = source[i + k];
    return loaded;
}

template <class T, int Width>
__device__ __forceinline__ uint32_t largest_of(const Vec<T, Width>& x, uint32_t largest) {
#pragma unroll
    for (int k = 0; k < Width; ++k) largest = max(largest, static_cast<uint32_t>(magnitude_bits(x[k])));
    return largest;
}

// The largest value in each group of `group` consecutive threads (a power of two that divides the block),
// given to all of them. Every thread of the block must call it.
__device__ __forceinline__ uint32_t group_max(uint32_t value, int group, Shared<uint32_t> partials) {
    for (int offset = (group < warp_threads ? group : warp_threads) / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(all_lanes, value, offset));
    }
    if (group <= warp_threads) return value;

    const int warp = threadIdx.x / warp_threads, warps = group / warp_threads, first = warp / warps * warps;
    if (threadIdx.x % warp_threads == 0) partials[warp] = value;
    __syncthreads();
    for (int i = 0; i < warps; ++i) value = max(value, static_cast<uint32_t>(partials[first + i]));
    return value;
}

// Rounds scaled values to codes and stores them: to nearest, or with random bits or noise where there are
// any.
template <class Code>
class Encoder {
  public:
    __device__ __forceinline__ explicit Encoder(const Quantize& args)
        : codes_(global<Code>(args.codes, "codes")),
          noise_(global<const float>(args.noise, "noise")),
          random_(args.rng != nullptr),
          philox_{0, 0} {
        if (random_) {
            const auto rng = global<const int64_t>(args.rng, "rng");
            philox_ = Philox{static_cast<uint64_t>(int64_t(rng[0])), static_cast<uint64_t>(int64_t(rng[1]))};
        }
    }

    // Element i + k has the value x[k] and the scale scale_at(k); i is a multiple of Width.
    template <int Width, class T, class ScaleAt>
    __device__ __forceinline__ void encode(int64_t i, const Vec<T, Width>& x, ScaleAt scale_at) const {
        Vec<Code, Width> codes;
        if (random_) {
            static_assert(Width == 1 || Width % 4 == 0, "a group of four words serves one element or four");
            constexpr int served = Width == 1 ? 1 : 4;
#pragma unroll
            for (int start = 0; start < Width; start += served) {
                const Philox::Words words = philox_.group(static_cast<uint64_t>(i + start) >> 2);
#pragma unroll
                for (int k = start; k < start + served; ++k) {
                    const uint32_t word =
                        Width == 1 ? pick(words, static_cast<int>(i & 3)) : words.word[k & 3];
                    codes[k] =
                        round_stochastic<Code>(to_float(x[k]) / scale_at(k), Draw<Code>::of_word(word));
                }
            }
        } else if (noise_) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const auto draw = Draw<Code>::of_noise(float(noise_[i + k]));
                codes[k] = round_stochastic<Code>(to_float(x[k]) / scale_at(k), draw);
            }
        } else {
#pragma unroll
            for (int k = 0; k < Width; ++k) codes[k] = round_nearest<Code>(to_float(x[k]) / scale_at(k));
        }
        store<Width>(codes_, i, codes);
    }

  private:
    Global<Code> codes_;
    Global<const float> noise_;
    bool random_;
    Philox philox_;
};

}  // namespace narrowgauge
