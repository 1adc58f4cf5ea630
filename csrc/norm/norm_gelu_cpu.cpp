// CPU kernels of the normalization of TokenFormer's scores. What a second pass needs again, GELU or its
// slope, is kept in a row of working memory, because it costs more than the memory does.
#include <cmath>

#include "common/floating.h"
#include "common/math_erf.h"
#include "common/row_cpu.h"
#include "common/wide.h"
#include "norm/norm_gelu.h"

NG_NAMESPACE_BEGIN
namespace {

template <class V>
NG_HOST_DEVICE V gelu(V u) {
    return u * normal_cdf_pack(u);
}

// f(j, get, put, sum) over a row, in packs: `get(pointer)` loads what stands at column j, `put(pointer,
// pack)` stores it, and what is added to `sum` is added up and returned. The last pack is filled up with
// zeros.
template <class A, class F>
NG_HOST_DEVICE A for_packs(int64_t columns, F f) {
    auto sums = Block<A>::all(0);
    for_wide<A>(columns, [&](auto whole, int64_t j, int p, int count) {
        const auto get = [=](const auto* source) -> WidePack<A> {
            if constexpr (whole) return load_vector(source);
            return load_part<A>(source, count,
                                std::remove_cv_t<std::remove_reference_t<decltype(*source)>>{});
        };
        const auto put = [=](auto* target, WidePack<A> pack) {
            if constexpr (whole) return store_vector(target, pack);
            store_part<A>(target, count, pack);
        };
        f(j, get, put, sums.packs[p]);
    });
    return fold_lanes<A>(sums, [](auto a, auto b) { return a + b; });
}

template <class T, bool GeluFirst>
void forward_rows(const NormGelu& args, int64_t begin, int64_t end) {
    using A = compute_t<T>;
    using Pack = WidePack<A>;
    const int64_t columns = args.columns;
    const Scratch<A> kept(columns);
    for (int64_t row = begin; row < end; ++row) {
        const T* s = row_of<T>(args.s, row, columns);
        T* a = row_of<T>(args.a, row, columns);
        A* v = kept.get();
        const A squares = for_packs<A>(columns, [&](int64_t j, auto get, auto put, Pack& sum) {
            Pack x = get(s + j);
            if constexpr (GeluFirst) {
                x = gelu(x);
                put(v + j, x);
            }
            sum += x * x;
        });
        const A mean_square = squares * static_cast<A>(args.per_count) + static_cast<A>(args.eps);
        const A rho = mean_square > 0 ? A(1) / std::sqrt(mean_square) : A(0);
        if (args.rho) static_cast<A*>(args.rho)[row] = rho;
        for_packs<A>(columns, [&](int64_t j, auto get, auto put, Pack&) {
            __builtin_prefetch(s + columns + j);  // the next row, while this one is computed
            if constexpr (GeluFirst) {
                put(a + j, get(v + j) * rho);
            } else {
                put(a + j, gelu(get(s + j) * rho));
            }
        });
    }
}

template <class T, bool GeluFirst>
void backward_rows(const NormGeluBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<T>;
    using Pack = WidePack<A>;
    const int64_t columns = args.columns;
    const Scratch<A> kept(2 * columns);
    for (int64_t row = begin; row < end; ++row) {
        const T *s = row_of<T>(args.s, row, columns), *da = row_of<T>(args.da, row, columns);
        T* ds = row_of<T>(args.ds, row, columns);
        A *first = kept.get(), *second = first + columns;
        const A rho = static_cast<const A*>(args.rho)[row];
        const A dots = for_packs<A>(columns, [&](int64_t j, auto get, auto put, Pack& sum) {
            const Pack x = get(s + j);
            if constexpr (GeluFirst) {  // first: a; second: gelu'(s)
                const Pack normed = gelu(x) * rho;
                put(first + j, normed);
                put(second + j, gelu_slope_pack(x));
                sum += get(da + j) * normed;
            } else {  // first: u; second: da * gelu'(u)
                const Pack u = x * rho, h = get(da + j) * gelu_slope_pack(u);
                put(first + j, u);
                put(second + j, h);
                sum += h * u;
            }
        });
        const A mean = dots * static_cast<A>(args.per_count);
        for_packs<A>(columns, [&](int64_t j, auto get, auto put, Pack&) {
            __builtin_prefetch(s + columns + j);
            __builtin_prefetch(da + columns + j);
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
