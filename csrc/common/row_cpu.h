// What CPU kernels over contiguous rows share: rows of a tensor, sums and loops over a row in packs.
#pragma once

#include <limits>

#include "common/scratch.h"
#include "common/simd.h"

NG_NAMESPACE_BEGIN

// weight + offset, or bias, widened once per call instead of once per row.
template <class A, class T>
void widen(const void* source, A offset, int64_t count, A* target) {
    const T* values = static_cast<const T*>(source);
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<A>(to_compute(values[i])) + offset;
}

template <class A>
const A* widened(const void* source, DType type, A offset, A absent, int64_t count, A* target) {
    if (source == nullptr) {
        for (int64_t i = 0; i < count; ++i) target[i] = absent;
    } else if (type == DType::float32) {
        widen<A, float>(source, offset, count, target);
    } else if (type == DType::float64) {
        widen<A, double>(source, offset, count, target);
    } else if (type == DType::bfloat16) {
        widen<A, bf16>(source, offset, count, target);
    } else {
        widen<A, f16>(source, offset, count, target);
    }
    return target;
}

template <class T>
const T* row_of(const void* base, int64_t row, int64_t columns) {
    return static_cast<const T*>(base) + row * columns;
}
template <class T>
T* row_of(void* base, int64_t row, int64_t columns) {
    return static_cast<T*>(base) + row * columns;
}

// Sums f(j) over a row: two packs in flight, then a scalar tail; f is called with a Pack or a scalar tag.
template <class A, class PackTerm, class ScalarTerm>
NG_HOST_DEVICE A sum_row(int64_t columns, PackTerm pack_term, ScalarTerm scalar_term) {
    constexpr int lanes = Simd<A>::lanes;
    typename Simd<A>::Pack even = {}, odd = {};
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) {
        even += pack_term(j);
        odd += pack_term(j + lanes);
    }
    A sum = sum_lanes(even + odd);
    for (; j < columns; ++j) sum += scalar_term(j);
    return sum;
}

template <class A>
struct Moments {
    A mean, sum_of_squares;  // of the deviations from the mean
};

// Mean and centred sum of squares of a row in one pass. Each lane takes eight packs at a time into registers,
// centres them on their own mean, and merges the result into what it has (Chan, Golub and LeVeque, 1979); the
// lanes and the tail are merged alike at the end. As accurate as two passes, for the price of one.
template <class A, class PackTerm, class ScalarTerm>
NG_HOST_DEVICE Moments<A> row_moments(int64_t columns, PackTerm pack_term, ScalarTerm scalar_term) {
    constexpr int lanes = Simd<A>::lanes, depth = 8;
    using Pack = typename Simd<A>::Pack;
    if (columns == 0) return {std::numeric_limits<A>::quiet_NaN(), 0};  // 0 / 0
    Pack mean = {}, squares = {};
    A count = 0;  // of each lane
    int64_t j = 0;
    for (; j + depth * lanes <= columns; j += depth * lanes) {
        Pack values[depth];
        for (int k = 0; k < depth; ++k) values[k] = pack_term(j + k * lanes);
        const Pack sum = ((values[0] + values[1]) + (values[2] + values[3])) +
                         ((values[4] + values[5]) + (values[6] + values[7]));
        const Pack centre = sum * (A(1) / depth);
        Pack even = {}, odd = {};
        for (int k = 0; k < depth; k += 2) {
            even += (values[k] - centre) * (values[k] - centre);
            odd += (values[k + 1] - centre) * (values[k + 1] - centre);
        }
        const A share = depth / (count + depth);
        const Pack delta = centre - mean;
        mean += delta * share;
        squares += even + odd + delta * delta * (count * share);
        count += depth;
    }
    A total = count * lanes;
    Moments<A> row{sum_lanes(mean) / lanes, 0};
    row.sum_of_squares = sum_lanes(squares) + count * sum_lanes((mean - row.mean) * (mean - row.mean));
    for (; j < columns; ++j) {
        const A delta = scalar_term(j) - row.mean;
        total += 1;
        row.mean += delta / total;
        row.sum_of_squares += delta * (delta - delta / total);
    }
    return row;
}

template <class A, class PackBody, class ScalarBody>
NG_HOST_DEVICE void for_row(int64_t columns, PackBody pack_body, ScalarBody scalar_body) {
    constexpr int lanes = Simd<A>::lanes;
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) pack_body(j);
    for (; j < columns; ++j) scalar_body(j);
}

NG_NAMESPACE_END
