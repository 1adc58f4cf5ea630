// What the CPU kernels of quantization share.
#pragma once

#include "quant/codes.h"

NG_NAMESPACE_BEGIN

template <class T>
uint32_t largest_magnitude(const T* x, int64_t count) {
    using Bits = decltype(magnitude_bits(x[0]));
    Bits largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
        const Bits bits = magnitude_bits(x[i]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

NG_NAMESPACE_END
