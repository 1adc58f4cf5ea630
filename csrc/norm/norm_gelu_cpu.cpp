// CPU kernels of the normalization of TokenFormer's scores. What a second pass needs again, GELU or its
// slope, is kept in a row of working memory, because it costs more than the memory does.
#include <cmath>

#include "common/floating.h"
#include "common/math_erf.h"
#include "common/row_cpu.h"
#include "norm/norm_gelu.h"

NG_NAMESPACE_BEGIN
namespace {

template <class V>
NG_HOST_DEVICE V normal_distribution(V u) {
    constexpr auto root_half = static_cast<Lane<V>>(0.70710678118654752440);
    return (erf_pack(u * root_half) + 1) * Lane<V>(0.5);
}
template <class V>
NG_HOST_DEVICE V gelu(V u) {
    return u * normal_distribution(u);
}
template <class V>
NG_HOST_DEVICE V normal_density(V u) {
    constexpr auto peak = static_cast<Lane<V>>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return exp_pack(u * u * Lane<V>(-0.5)) * peak;
}

// f(j, get, put) over a row, where `get(pointer)` loads what stands at column j and `put(pointer, pack)`
// stores it. The end of the row is a pack filled up with zeros, so that f is compiled for packs alone.
template <class A, class F>
NG_HOST_DEVICE void for_packs(int64_t columns, F f) {
    using Pack = typename Simd<A>::Pack;
    constexpr int lanes = Simd<A>::lanes;
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) {
        f(
            j, [](const auto* source) { return load_pack(source); },
            [](auto* target, Pack pack) { store_pack(target, pack); });
    }
    const int64_t rest = columns - j;
    if (rest == 0) return;
    f(
        j,
        [=](const auto* source) {
            Pack pack = {};
            for (int64_t k = 0; k < rest; ++k) pack[k] = to_compute(source[k]);
            return pack;
        },
        [=](auto* target, Pack pack) {
            using T = std::remove_reference_t<decltype(*target)>;
            for (int64_t k = 0; k < rest; ++k) target[k] = from_compute<T>(pack[k]);
        });
}

template <class T, bool GeluFirst>
void forward_rows(const NormGelu& args, int64_t begin, int64_t end) {
    using A = compute_t<T>;
    using Pack = typename Simd<A>::Pack;
    const int64_t columns = args.columns;
    const Scratch<A> kept(columns);
    for (int64_t row = begin; row < end; ++row) {
        const T* s = row_of<T>(args.s, row, columns);
        T* a = row_of<T>(args.a, row, columns);
        A* v = kept.get();
        Pack squares = {};
        for_packs<A>(columns, [&](int64_t j, auto get, auto put) {
            Pack x = get(s + j);
            if constexpr (GeluFirst) {
                x = gelu(x);
                put(v + j, x);
            }
            squares += x * x;
        });
        const A mean_square = sum_lanes(squares) * static_cast<A>(args.per_count) + static_cast<A>(args.eps);
        const A rho = mean_square > 0 ? A(1) / std::sqrt(mean_square) : A(0);
        if (args.rho) static_cast<A*>(args.rho)[row] = rho;
        for_packs<A>(columns, [&](int64_t j, auto get, auto put) {
            put(a + j, GeluFirst ? get(v + j) * rho : gelu(get(s + j) * rho));
        });
    }
}

template <class T, bool GeluFirst>
void backward_rows(const NormGeluBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<T>;
    using Pack = typename Simd<A>::Pack;
    const int64_t columns = args.columns;
    const Scratch<A> kept(2 * columns);
    for (int64_t row = begin; row < end; ++row) {
        const T *s = row_of<T>(args.s, row, columns), *da = row_of<T>(args.da, row, columns);
        T* ds = row_of<T>(args.ds, row, columns);
        A *first = kept.get(), *second = first + columns;
        const A rho = static_cast<const A*>(args.rho)[row];
        Pack dots = {};
        if constexpr (GeluFirst) {  // first: a; second: gelu'(s)
            for_packs<A>(columns, [&](int64_t j, auto get, auto put) {
                const Pack x = get(s + j), phi = normal_distribution(x), normed = x * phi * rho;
                put(first + j, normed);
                put(second + j, phi + x * normal_density(x));
                dots += get(da + j) * normed;
            });
        } else {  // first: u; second: da * gelu'(u)
            for_packs<A>(columns, [&](int64_t j, auto get, auto put) {
                const Pack u = get(s + j) * rho;
                const Pack h = get(da + j) * (normal_distribution(u) + u * normal_density(u));
                put(first + j, u);
                put(second + j, h);
                dots += h * u;
            });
        }
        const A mean = sum_lanes(dots) * static_cast<A>(args.per_count);
        for_packs<A>(columns, [&](int64_t j, auto get, auto put) {
            const Pack h = GeluFirst ? get(da + j) : get(second + j);
            const Pack d = (h - get(first + j) * mean) * rho;
            put(ds + j, GeluFirst ? d * get(second + j) : d);
        });
    }
}

}  // namespace

void norm_gelu_rows(const NormGelu& args, int64_t begin, int64_t end) {
    with_floating(args.type, [&](auto s) {
        if (args.gelu_first) return forward_rows<decltype(s), true>(args, begin, end);
        forward_rows<decltype(s), false>(args, begin, end);
    });
}

void norm_gelu_backward_rows(const NormGeluBackward& args, int64_t begin, int64_t end) {
    with_floating(args.type, [&](auto s) {
        if (args.gelu_first) return backward_rows<decltype(s), true>(args, begin, end);
        backward_rows<decltype(s), false>(args, begin, end);
    });
}

NG_NAMESPACE_END
