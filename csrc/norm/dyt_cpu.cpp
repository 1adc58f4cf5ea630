// CPU kernels of Dynamic Tanh and Derf.
#include "common/floating.h"
#include "common/math_erf.h"
#include "common/row_cpu.h"
#include "common/wide.h"
#include "norm/dyt.h"

NG_NAMESPACE_BEGIN
namespace {

struct Tanh {
    template <class V>
    static NG_HOST_DEVICE V value(V u) {
        return tanh_pack(u);
    }
    template <class V>
    static NG_HOST_DEVICE V derivative(V, V f) {
        return 1 - f * f;
    }
};

struct Erf {
    template <class V>
    static NG_HOST_DEVICE V value(V u) {
        return erf_pack(u);
    }
    template <class V>
    static NG_HOST_DEVICE V derivative(V u, V) {
        constexpr auto two_over_root_pi = static_cast<Lane<V>>(1.12837916709551257);
        return two_over_root_pi * exp_pack(-(u * u));
    }
};

template <class A>
A scalar_of(const void* source, DType type) {
    A value;
    return *widened<A>(source, type, A(0), A(0), 1, &value);
}

// `count` elements from p on, a whole pack where `whole` says so; the lanes beyond are zero.
template <class A, class T, class Whole>
NG_HOST_DEVICE WidePack<A> load(Whole whole, const T* p, int count) {
    if constexpr (whole) {
        return load_vector(p);
    } else {
        return load_part<A>(p, count, T{});
    }
}
template <class A, class T, class Whole>
NG_HOST_DEVICE void store(Whole whole, T* p, int count, WidePack<A> pack) {
    if constexpr (whole) {
        store_vector(p, pack);
    } else {
        store_part<A>(p, count, pack);
    }
}

// What a channel's weight or bias is at column j of a row: a vector of the row, or one number.
template <class A>
struct AlongColumns {
    const A* values;
    template <class Whole>
    NG_HOST_DEVICE auto at(Whole whole, int64_t j, int count) const {
        return load<A>(whole, values + j, count);
    }
};
template <class A>
struct OfRow {
    A value;
    template <class Whole>
    NG_HOST_DEVICE auto at(Whole, int64_t, int) const {
        return WidePack<A>{} + value;
    }
};

template <class X, class F, class Weight, class Bias>
NG_HOST_DEVICE void forward_row(const X* x, X* y, int64_t columns, compute_t<X> alpha, compute_t<X> shift,
                                Weight weight, Bias bias) {
    using A = compute_t<X>;
    for_wide<A>(columns, [&](auto whole, int64_t j, int, int count) __attribute__((always_inline)) {
        const auto f = F::value(load<A>(whole, x + j, count) * alpha + shift);
        store<A>(whole, y + j, count, weight.at(whole, j, count) * f + bias.at(whole, j, count));
    });
}

template <class X, class F>
void forward_rows(const DytForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const A alpha = scalar_of<A>(args.alpha, args.alpha_type);
    // Minus zero changes nothing; zero would turn a result of -0 into +0.
    const A shift = args.shift ? scalar_of<A>(args.shift, args.shift_type) : A(-0.0);
    Scratch<A> weight_space(args.channels), bias_space(args.channels);
    const A* weight =
        widened<A>(args.weight, args.weight_type, A(0), A(1), args.channels, weight_space.get());
    const A* bias = widened<A>(args.bias, args.bias_type, A(0), A(-0.0), args.channels, bias_space.get());
    for (int64_t row = begin; row < end; ++row) {
        const X* x = row_of<X>(args.x, row, args.columns);
        X* y = row_of<X>(args.y, row, args.columns);
        if (args.channels_last) {
            forward_row<X, F>(x, y, args.columns, alpha, shift, AlongColumns<A>{weight},
                              AlongColumns<A>{bias});
        } else {
            const int64_t channel = row % args.channels;
            forward_row<X, F>(x, y, args.columns, alpha, shift, OfRow<A>{weight[channel]},
                              OfRow<A>{bias[channel]});
        }
    }
}

// The sums of one row, or of many with the channels last, where those of the channels are apart.
template <class A>
struct Sums {
    A dalpha = 0, dshift = 0, dweight = 0, dbias = 0;
};

// Adds the row's terms of dweight and dbias to vectors (PerColumn) or to the sums.
template <class X, class F, bool PerColumn, class Weight>
NG_HOST_DEVICE void backward_row(const X* dy, const X* x, X* dx, int64_t columns, compute_t<X> alpha,
                                 compute_t<X> shift, Weight weight, compute_t<X>* dweight,
                                 compute_t<X>* dbias, Sums<compute_t<X>>& sums) {
    using A = compute_t<X>;
    Block<A> dalpha = {}, dshift = {}, dweights = {}, dbiases = {};
    for_wide<A>(columns, [&](auto whole, int64_t j, int p, int count) __attribute__((always_inline)) {
        const auto s = load<A>(whole, x + j, count), g = load<A>(whole, dy + j, count);
        const auto u = s * alpha + shift, f = F::value(u), gf = g * f;
        const auto du = g * weight.at(whole, j, count) * F::derivative(u, f);
        store<A>(whole, dx + j, count, du * alpha);
        dalpha.packs[p] += du * s;
        dshift.packs[p] += du;
        if constexpr (PerColumn) {
            store<A>(whole, dweight + j, count, load<A>(whole, dweight + j, count) + gf);
            store<A>(whole, dbias + j, count, load<A>(whole, dbias + j, count) + g);
        } else {
            dweights.packs[p] += gf;
            dbiases.packs[p] += g;
        }
    });
    const auto add = [](auto a, auto b) { return a + b; };
    sums.dalpha += fold_lanes(dalpha, add);
    sums.dshift += fold_lanes(dshift, add);
    if constexpr (!PerColumn) {
        sums.dweight += fold_lanes(dweights, add);
        sums.dbias += fold_lanes(dbiases, add);
    }
}

template <class X, class F>
void backward_chunks(const DytBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const A alpha = scalar_of<A>(args.alpha, args.alpha_type);
    const A shift = args.shift ? scalar_of<A>(args.shift, args.shift_type) : A(-0.0);
    Scratch<A> weight_space(args.channels), dweight_space(args.channels), dbias_space(args.channels);
    const A* weight =
        widened<A>(args.weight, args.weight_type, A(0), A(1), args.channels, weight_space.get());
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        // Sums that nobody asked for go nowhere.
        A* dweight = args.dweight_partial ? row_of<A>(args.dweight_partial, chunk, args.channels)
                                          : dweight_space.get();
        A* dbias =
            args.dbias_partial ? row_of<A>(args.dbias_partial, chunk, args.channels) : dbias_space.get();
        for (int64_t j = 0; j < args.channels; ++j) dweight[j] = dbias[j] = 0;
        Sums<A> sums;
        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const X* dy = row_of<X>(args.dy, row, args.columns);
            const X* x = row_of<X>(args.x, row, args.columns);
            X* dx = row_of<X>(args.dx, row, args.columns);
            if (args.channels_last) {
                backward_row<X, F, true>(dy, x, dx, args.columns, alpha, shift, AlongColumns<A>{weight},
                                         dweight, dbias, sums);
            } else {
                const int64_t channel = row % args.channels;
                Sums<A> of_row;
                backward_row<X, F, false>(dy, x, dx, args.columns, alpha, shift, OfRow<A>{weight[channel]},
                                          nullptr, nullptr, of_row);
                dweight[channel] += of_row.dweight;
                dbias[channel] += of_row.dbias;
                sums.dalpha += of_row.dalpha;
                sums.dshift += of_row.dshift;
            }
        }
        if (args.dalpha_partial) static_cast<A*>(args.dalpha_partial)[chunk] = sums.dalpha;
        if (args.dshift_partial) static_cast<A*>(args.dshift_partial)[chunk] = sums.dshift;
    }
}

// Calls f(x, function): the type and the function as values of their type.
template <class F>
void with_types(DType x_type, bool erf, F f) {
    with_floating(x_type, [&](auto x) { erf ? f(x, Erf{}) : f(x, Tanh{}); });
}

}  // namespace

void dyt_forward_rows(const DytForward& args, int64_t begin, int64_t end) {
    with_types(args.x_type, args.erf,
               [&](auto x, auto f) { forward_rows<decltype(x), decltype(f)>(args, begin, end); });
}

void dyt_backward_chunks(const DytBackward& args, int64_t begin, int64_t end) {
    with_types(args.x_type, args.erf,
               [&](auto x, auto f) { backward_chunks<decltype(x), decltype(f)>(args, begin, end); });
}

NG_NAMESPACE_END
