// Sums of exponentials over a row, in the three ways softmax and cross-entropy know.
//
// A `load(whole, j, count)` gives a pack of the row from column j on; of the last one of a row only `count`
// elements exist, and the others must be -inf.
#pragma once

#include <cmath>

#include "common/wide.h"

NG_NAMESPACE_BEGIN

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

template <class A, class T>
NG_HOST_DEVICE auto loader(const T* x) {
    return [x](auto whole, int64_t j, int count) {
        if constexpr (decltype(whole)::value) {
            return load_vector(x + j);
        } else {
            return load_part<A>(x + j, count, from_compute<T>(-infinity<A>));
        }
    };
}

template <class T>
struct LogConstants;
// ln(1 + f) = f - f^2 / 2 + s (f^2 / 2 + r(s^2)) with s = f / (2 + f); the polynomials of FreeBSD's msun.
template <>
struct LogConstants<float> {
    static constexpr int degree = 3;
    static constexpr float r[] = {0x1.555554p-1f, 0x1.999c26p-2f, 0x1.23d3dcp-2f, 0x1.f13c4cp-3f};
    static constexpr float root_half = 0x1.6a09e6p-1f, ln2_high = 0x1.62e3p-1f, ln2_low = 0x1.2fefa2p-17f;
};
template <>
struct LogConstants<double> {
    static constexpr int degree = 6;
    static constexpr double r[] = {0x1.5555555555593p-1, 0x1.999999997fa04p-2, 0x1.2492494229359p-2,
                                   0x1.c71c51d8e78afp-3, 0x1.7466496cb03dep-3, 0x1.39a09d078c69fp-3,
                                   0x1.2f112df3e5244p-3};
    static constexpr double root_half = 0x1.6a09e667f3bcdp-1, ln2_high = 0x1.62e42feep-1,
                            ln2_low = 0x1.a39ef35793c76p-33;
};

// ln(x) within 1 unit in the last place, for normal numbers; NaN for NaN and infinity, something for 0.
template <class V>
NG_HOST_DEVICE V log_pack(V x) {
    using C = LogConstants<Lane<V>>;
    using E = ExpConstants<Lane<V>>;
    using I = Mask<V>;
    const I n = (bit_cast<I>(x) - bit_cast<I>(V{} + C::root_half)) >> E::mantissa_bits;
    const V exponent = bit_cast<V>(n + bit_cast<I>(V{} + E::to_integer)) - E::to_integer;
    const V f = bit_cast<V>(bit_cast<I>(x) - (n << E::mantissa_bits)) - 1;
    const V s = f / (f + 2), square = s * s, half = f * f * Lane<V>(0.5);
    V r = V{} + C::r[C::degree];
#pragma GCC unroll 16
    for (int i = C::degree - 1; i >= 0; --i) r = r * square + C::r[i];
    const V log = exponent * C::ln2_high + (f - (half - (s * (half + r * square) + exponent * C::ln2_low)));
    return log + (x - x);
}

template <class A, class Load>
NG_HOST_DEVICE A max_of(int64_t columns, Load load) {
    Block<A> most = Block<A>::all(-infinity<A>);
    for_wide<A>(columns, [&](auto whole, int64_t j, int p, int count) {
        most.packs[p] = max_pack(load(whole, j, count), most.packs[p]);
    });
    return fold_lanes<A>(most, [](auto a, auto b) { return a > b ? a : b; });
}

// Float sums are taken of this many columns and added in double, so that their error does not grow with the
// row.
constexpr int64_t sum_chunk = 2048;

template <class F>
void for_chunks(int64_t columns, F f) {
    for (int64_t first = 0; first < columns; first += sum_chunk) {
        f(first, columns - first < sum_chunk ? columns - first : sum_chunk);
    }
}

// The same row from a later column on.
template <class Load>
NG_HOST_DEVICE auto from_column(Load load, int64_t first) {
    return [load, first](auto whole, int64_t j, int count) { return load(whole, first + j, count); };
}

// --- extended exponents (arXiv 2001.04438) -------------------------------------------------------
//
// Every e^x is v * 2^n, and so is their sum: rescaling it to a larger n adds exponents, where the online form
// multiplies by another exponential.

// sum(e^x) = sum * 2^exponent.
template <class A>
struct ExtendedSum {
    A sum, exponent;
};

// What exp_parts reduces without loss. Elements below are 0 in a row within the limits; a row whose largest
// element is beyond, or that has +inf or NaN, is not `in_range` and takes the other form.
template <class A>
struct ExtendedRange;
template <>
struct ExtendedRange<float> {
    static constexpr float limit = 16384, lowest_exponent = -16640, lowest = -11533.969f;
};
template <>
struct ExtendedRange<double> {
    static constexpr double limit = 524288, lowest_exponent = -526336, lowest = -364828.31442719937;
};

template <class A>
bool in_range(const ExtendedSum<double>& s) {
    return s.sum > 0 && s.sum < infinity<double> && std::abs(s.exponent) <= ExtendedRange<A>::limit;
}

template <class V>
NG_HOST_DEVICE ExpParts<V> extended_parts(V x) {
    const V low = V{} + ExtendedRange<Lane<V>>::lowest;
    return exp_parts(max_pack(low, x));
}

template <class A, class Load>
NG_HOST_DEVICE ExtendedSum<A> extended_chunk(int64_t columns, Load load) {
    constexpr int depth = 4, lanes = Wide<A>::lanes, packs = Wide<A>::packs, block = Wide<A>::block;
    using Pack = WidePack<A>;
    Block<A> sum = Block<A>::all(0), exponent = Block<A>::all(ExtendedRange<A>::lowest_exponent);
    int64_t j = 0;
    for (; j + depth * block <= columns; j += depth * block) {
        for (int p = 0; p < packs; ++p) {
            ExpParts<Pack> parts[depth];
            Pack top = exponent.packs[p];
            for (int d = 0; d < depth; ++d) {
                parts[d] = extended_parts(load(std::true_type{}, j + d * block + p * lanes, lanes));
                top = max_pack(parts[d].exponent, top);
            }
            Pack terms[depth];
            for (int d = 0; d < depth; ++d) {
                terms[d] = (parts[d].fraction + 1) * power_of_two(parts[d].exponent - top);
            }
            sum.packs[p] = sum.packs[p] * power_of_two(exponent.packs[p] - top) +
                           ((terms[0] + terms[1]) + (terms[2] + terms[3]));
            exponent.packs[p] = top;
        }
    }
    for_wide<A>(columns - j, [&](auto whole, int64_t i, int p, int count) {
        const auto parts = extended_parts(load(whole, j + i, count));
        const Pack top = max_pack(parts.exponent, exponent.packs[p]);
        sum.packs[p] = sum.packs[p] * power_of_two(exponent.packs[p] - top) +
                       (parts.fraction + 1) * power_of_two(parts.exponent - top);
        exponent.packs[p] = top;
    });
    const A top = fold_lanes<A>(exponent, [](auto a, auto b) { return a > b ? a : b; });
    for (int p = 0; p < packs; ++p) sum.packs[p] *= power_of_two(exponent.packs[p] - top);
    return {fold_lanes<A>(sum, [](auto a, auto b) { return a + b; }), top};
}

inline ExtendedSum<double> merge(const ExtendedSum<double>& a, const ExtendedSum<double>& b) {
    const double top = a.exponent > b.exponent ? a.exponent : b.exponent;
    const auto scaled = [top](const ExtendedSum<double>& s) {
        const double steps = s.exponent - top;
        return std::ldexp(s.sum, steps > -2000 ? static_cast<int>(steps) : -2000);
    };
    return {scaled(a) + scaled(b), top};
}

template <class A, class Load>
ExtendedSum<double> extended_sum(int64_t columns, Load load) {
    ExtendedSum<double> total{0, ExtendedRange<A>::lowest_exponent};
    for_chunks(columns, [&](int64_t first, int64_t count) {
        const ExtendedSum<A> chunk = extended_chunk<A>(count, from_column(load, first));
        total = merge(total, {chunk.sum, chunk.exponent});
    });
    return total;
}

// --- against the maximum -------------------------------------------------------------------------

// sum(e^x) = sum * e^shift.
template <class A>
struct ShiftedSum {
    A sum, shift;
};

// What is subtracted for a maximum: 0 for that of a row which is -inf throughout, as -inf - -inf would be
// NaN.
template <class A>
NG_HOST_DEVICE A shift_for(A most) {
    return most == -infinity<A> ? A(0) : most;
}

// Sum of e^(x - shift_for(most)); the terms are also stored in `kept`, where that is given.
template <class A, class Load>
double sum_below(int64_t columns, Load load, A most, A* kept) {
    const A shift = shift_for(most);
    double total = 0;
    for_chunks(columns, [&](int64_t first, int64_t chunk) {
        Block<A> sum = Block<A>::all(0);
        const auto run = [&](auto keep) {
            for_wide<A>(chunk, [&](auto whole, int64_t j, int p, int count) {
                const WidePack<A> term = exp_below(load(whole, first + j, count) - shift);
                if constexpr (decltype(keep)::value) store_vector(kept + first + j, term);
                sum.packs[p] += term;
            });
        };
        kept ? run(std::true_type{}) : run(std::false_type{});
        total += fold_lanes<A>(sum, [](auto a, auto b) { return a + b; });
    });
    return total;
}

// Maximum and sum in one pass: each lane rescales its sum when four elements bring a new maximum.
template <class A, class Load>
NG_HOST_DEVICE ShiftedSum<A> online_chunk(int64_t columns, Load load) {
    constexpr int depth = 4, lanes = Wide<A>::lanes, packs = Wide<A>::packs, block = Wide<A>::block;
    using Pack = WidePack<A>;
    Block<A> sum = Block<A>::all(0), most = Block<A>::all(-infinity<A>);
    // Where all is -inf so far, 0 takes the place of the maximum: -inf - -inf would be NaN.
    const auto base = [](Pack m) { return m == Pack{} - infinity<A> ? Pack{} : m; };
    int64_t j = 0;
    for (; j + depth * block <= columns; j += depth * block) {
        for (int p = 0; p < packs; ++p) {
            Pack values[depth], top = most.packs[p];
            for (int d = 0; d < depth; ++d) {
                values[d] = load(std::true_type{}, j + d * block + p * lanes, lanes);
                top = max_pack(values[d], top);
            }
            const Pack shift = base(top);
            for (int d = 0; d < depth; ++d) values[d] = exp_below(values[d] - shift);
            sum.packs[p] = sum.packs[p] * exp_below(most.packs[p] - shift) +
                           ((values[0] + values[1]) + (values[2] + values[3]));
            most.packs[p] = top;
        }
    }
    for_wide<A>(columns - j, [&](auto whole, int64_t i, int p, int count) {
        const Pack x = load(whole, j + i, count), top = max_pack(x, most.packs[p]), shift = base(top);
        sum.packs[p] = sum.packs[p] * exp_below(most.packs[p] - shift) + exp_below(x - shift);
        most.packs[p] = top;
    });
    const A top = fold_lanes<A>(most, [](auto a, auto b) { return a > b ? a : b; });
    const Pack shift = base(Pack{} + top);
    for (int p = 0; p < packs; ++p) sum.packs[p] *= exp_below(most.packs[p] - shift);
    return {fold_lanes<A>(sum, [](auto a, auto b) { return a + b; }), top};
}

inline ShiftedSum<double> merge(const ShiftedSum<double>& a, const ShiftedSum<double>& b) {
    const double top = a.shift > b.shift ? a.shift : b.shift;
    if (top == -infinity<double>) return {a.sum + b.sum, top};
    return {a.sum * exp(a.shift - top) + b.sum * exp(b.shift - top), top};
}

template <class A, class Load>
ShiftedSum<double> online_sum(int64_t columns, Load load) {
    ShiftedSum<double> total{0, -infinity<double>};
    for_chunks(columns, [&](int64_t first, int64_t count) {
        const ShiftedSum<A> chunk = online_chunk<A>(count, from_column(load, first));
        total = merge(total, {chunk.sum, chunk.shift});
    });
    return total;
}

NG_NAMESPACE_END
