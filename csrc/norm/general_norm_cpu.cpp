// CPU kernels of the general row norm.
//
// Two passes over a row, with a buffer in the first-level cache between them: memory is read and written
// once. Every stream has the type X of x or is float beside a narrow x; which of them is asked for every
// twin, as the many options of this family would make too many kernels. Dropout, and the inverse of an
// output, take passes of their own before or after.
#include <cmath>
#include <type_traits>

#include "common/floating.h"
#include "common/philox_cpu.h"
#include "common/twin.h"
#include "norm/general_norm.h"

NG_NAMESPACE_BEGIN
namespace {

// A row to read or to write, in float or in X.
template <class X>
struct Row {
    using A = compute_t<X>;
    void* narrow;
    A* wide;  // or null

    template <class As>
    NG_HOST_DEVICE auto load(int64_t j, As as) const {
        if (!std::is_same_v<X, A> && wide == nullptr) return as(static_cast<const X*>(narrow) + j);
        return as(static_cast<const A*>(wide) + j);
    }
    template <class V>
    NG_HOST_DEVICE void store(int64_t j, V value) const {
        if (!std::is_same_v<X, A> && wide == nullptr) return store_pack(static_cast<X*>(narrow) + j, value);
        store_pack(wide + j, value);
    }
    NG_HOST_DEVICE void prefetch(int64_t j) const {
        if (!std::is_same_v<X, A> && wide == nullptr) return __builtin_prefetch(static_cast<X*>(narrow) + j);
        __builtin_prefetch(wide + j);
    }
    explicit operator bool() const { return narrow != nullptr || wide != nullptr; }
};

// The row that begins at element `first` of a tensor, or none.
template <class X>
Row<X> row_at(const void* base, DType type, int64_t first) {
    if (base == nullptr) return {nullptr, nullptr};
    void* const values = const_cast<void*>(base);
    if (type == DType::float32 || type == DType::float64) {
        return {nullptr, row_of<compute_t<X>>(values, 1, first)};
    }
    return {row_of<X>(values, 1, first), nullptr};
}

// A value as if it had been stored in X; `as` makes it of the size it had.
template <class X, class V, class As>
NG_HOST_DEVICE V rounded(V value, As as) {
    if constexpr (std::is_same_v<X, compute_t<X>>) {
        return value;
    } else {
        X space[sizeof(V) / sizeof(compute_t<X>)];
        store_pack(space, value);
        return as(space);
    }
}
// In registers where there is one for a twin, with the bits of store_pack: through memory it takes twice as
// long.
#if NG_X86_V4
template <class X>
NG_HOST_DEVICE F32x16 rounded(F32x16 value, AsTwin as) {
    if constexpr (std::is_same_v<X, bf16>) {
        const U32x16 bits = bit_cast<U32x16>(value);
        const U32x16 nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
        return bit_cast<F32x16>((value == value ? nearest : bits | 0x400000u) & 0xffff0000u);
    } else {
        return rounded<X, F32x16, AsTwin>(value, as);
    }
}
#endif

template <class A, class F>
void each(int64_t count, A* values, F f) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = f(values[j], j);
}

template <class X>
void copy_row(const Row<X>& from, const Row<X>& to, int64_t count) {
    using A = compute_t<X>;
    for_twins<A>(count, [=](int64_t j, auto as) { to.store(j, from.load(j, as)); });
}

// Dropout of x (draw 0) or x1 (draw 1), for the elements of a row, which begin at `first` of the tensor.
template <class A>
void drop(const GeneralBranch& branch, int draw, int64_t first, int64_t count, A* values) {
    const A scale = static_cast<A>(branch.dropout_scale);
    if (branch.has_mask(draw)) {
        const uint8_t* keep = row_of<uint8_t>(draw == 0 ? branch.mask : branch.mask1, 1, first);
        each(count, values, [=](A value, int64_t j) { return keep[j] ? value * scale : A(0); });
    } else if (branch.rng) {
        const Philox philox{static_cast<uint64_t>(branch.rng[0]),
                            static_cast<uint64_t>(branch.rng[1]) + static_cast<uint64_t>(draw)};
        const float p = branch.dropout_p;
        constexpr int64_t block = 256;
        uint32_t space[block + philox_slack];
        for (int64_t begin = 0; begin < count; begin += block) {
            const int64_t length = count - begin < block ? count - begin : block;
            const uint32_t* words = fill_words(philox, first + begin, length, space);
            each(length, values + begin,
                 [=](A value, int64_t j) { return uniform(words[j]) >= p ? value * scale : A(0); });
        }
    }
}

template <class A>
A rowscale_of(const GeneralBranch& branch, int64_t row) {
    A factor = 1;
    if (branch.rowscale) {
        with_floating(branch.rowscale_type, [&](auto type) {
            factor = static_cast<A>(to_compute(row_of<decltype(type)>(branch.rowscale, row, 1)[0]));
        });
    }
    return factor;
}

// One output: what x_hat is multiplied by and what is added to it.
template <class X>
struct Affine {
    using A = compute_t<X>;
    const A *weight, *bias;  // bias may be null
    A scale;
    bool rounds;  // the last time; false where storing y does the same

    template <bool Early, class V, class As>
    NG_HOST_DEVICE V apply(V x_hat, int64_t j, As as) const {
        V y = x_hat * as(weight + j);
        if (bias) {
            if constexpr (Early) y = rounded<X>(y, as);
            y += as(bias + j);
        }
        if constexpr (Early) {
            if (rounds) y = rounded<X>(y, as);
        }
        return y * scale;
    }
};

template <class X>
void forward_rows(const GeneralForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t d = args.columns;
    const GeneralBranch& branch = args.branch;
    const bool early = args.casting != Casting::gemma;
    const A offset = static_cast<A>(args.weight_offset);
    Scratch<A> space(7 * d);
    A *s = space.get(), *dropped = s + d, *dropped1 = dropped + d, *affine[4];
    const void* given[4] = {args.weight, args.bias, args.weight1, args.bias1};
    const DType types[4] = {args.weight_type, args.bias_type, args.weight1_type, args.bias1_type};
    for (int i = 0; i < 4; ++i) {
        A* const values = affine[i] = dropped1 + (i + 1) * d;
        widened<A>(given[i], types[i], i % 2 == 0 ? offset : A(0), i % 2 == 0 ? A(1) : A(0), d, values);
        if (early) {
            for_twins<A>(d,
                         [=](int64_t j, auto as) { store_pack(values + j, rounded<X>(as(values + j), as)); });
        }
    }
    const A scale = static_cast<A>(args.output_scale);
    const bool rounds = scale != 1 || args.y_type != args.x_type;
    const Affine<X> first_output{affine[0], args.bias ? affine[1] : nullptr, scale, rounds};
    const Affine<X> second_output{affine[2], args.bias1 ? affine[3] : nullptr, scale, rounds};

    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * d;
        Row<X> x = row_at<X>(args.x, args.x_type, first), x1 = row_at<X>(args.x1, args.x_type, first);
        const Row<X> x_given = x, x1_given = x1;
        const Row<X> residual = row_at<X>(args.residual, args.residual_type, first);
        const Row<X> residual_out = row_at<X>(args.residual_out, args.sum_type, first);
        A factor = rowscale_of<A>(branch, row);
        if (branch.drops(0)) {
            for_twins<A>(d,
                         [=](int64_t j, auto as) { store_pack(dropped + j, x_given.load(j, as) * factor); });
            drop(branch, 0, first, d, dropped);
            x = {nullptr, dropped};
            factor = 1;
        }
        if (x1 && branch.drops(1)) {
            copy_row<X>(x1, {nullptr, dropped1}, d);
            drop(branch, 1, first, d, dropped1);
            x1 = {nullptr, dropped1};
        }

        // The un-rounded sum: what is normalized, even where residual_out is stored narrower.
        const auto sum = [=](int64_t j, auto as) __attribute__((always_inline)) {
            auto v = x.load(j, as) * factor;
            if (x1) v += x1.load(j, as);
            if (residual) v += residual.load(j, as);
            if (residual_out) residual_out.store(j, v);
            store_pack(s + j, v);
            return v;
        };
        A mean = 0, sum_of_squares;
        if (args.centred) {
            const Moments<A> moments = twin_moments<A>(d, sum);
            mean = moments.mean;
            sum_of_squares = moments.sum_of_squares;
        } else {
            sum_of_squares = sum_twins<A>(d, [=](int64_t j, auto as) __attribute__((always_inline)) {
                const auto v = sum(j, as);
                return v * v;
            });
        }
        const A eps = static_cast<A>(args.eps), count = static_cast<A>(d);
        A rstd = A(1) / std::sqrt(sum_of_squares / count + eps);
        if (args.mean) static_cast<A*>(args.mean)[row] = mean;
        if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;
        if (args.casting == Casting::none) {
            const A squares = sum_twins<A>(d, [=](int64_t j, auto as) {
                const auto apart = as(s + j) - mean;
                return rounded<X>(apart * apart, as);
            });
            const AsScalar as{};
            const A variance = rounded<X>(squares / count, as);
            rstd = rounded<X>(A(1) / std::sqrt(rounded<X>(variance + eps, as)), as);
        }

        const Row<X> y = row_at<X>(args.y, args.y_type, first), y1 = row_at<X>(args.y1, args.y_type, first);
        const auto write = [=](auto with_early) {
            constexpr bool Early = with_early;
            for_twins<A>(d, [=](int64_t j, auto as) __attribute__((always_inline)) {
                x_given.prefetch(d + j);  // the next row, while this one is computed
                if (x1) x1_given.prefetch(d + j);
                if (residual) residual.prefetch(d + j);
                auto x_hat = (as(s + j) - mean) * rstd;
                if constexpr (Early) x_hat = rounded<X>(x_hat, as);
                y.store(j, first_output.template apply<Early>(x_hat, j, as));
                if (y1) y1.store(j, second_output.template apply<Early>(x_hat, j, as));
            });
        };
        if (early) {
            write(std::true_type{});
        } else {
            write(std::false_type{});
        }
    }
}

template <class X>
void backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t d = args.columns;
    const GeneralBranch& branch = args.branch;
    const A offset = static_cast<A>(args.weight_offset), scale = static_cast<A>(args.output_scale);
    Scratch<A> space(7 * d);
    A *x_hat = space.get(), *h = x_hat + d, *t = h + d;
    const A* weight = widened<A>(args.weight, args.weight_type, offset, A(1), d, t + d);
    const A* weight1 = widened<A>(args.weight1, args.weight1_type, offset, A(1), d, t + 2 * d);
    const A* bias = widened<A>(args.bias, args.bias_type, A(0), A(0), d, t + 3 * d);
    A* divisor = t + 4 * d;  // the weight, away from zero
    const A min_weight = static_cast<A>(args.min_weight);
    for (int64_t j = 0; args.from_output && j < d; ++j) {
        divisor[j] = std::fabs(weight[j]) < min_weight ? std::copysign(min_weight, weight[j]) : weight[j];
    }

    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A* sums[4];
        void* const partials[4] = {args.dweight_partial, args.dbias_partial, args.dweight1_partial,
                                   args.dbias1_partial};
        for (int i = 0; i < 4; ++i) {
            sums[i] = partials[i] ? row_of<A>(partials[i], chunk, d) : nullptr;
            if (sums[i]) each(d, sums[i], [](A, int64_t) { return A(0); });
        }
        A *const dweight = sums[0], *const dbias = sums[1], *const dweight1 = sums[2],
                 *const dbias1 = sums[3];

        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const int64_t first = row * d;
            A rstd = static_cast<const A*>(args.rstd)[row];
            A mean = args.mean ? static_cast<const A*>(args.mean)[row] : A(0);
            const A outer = rstd;
            Row<X> s = row_at<X>(args.s, args.s_type, first);
            if (args.from_output) {
                copy_row<X>(s, {nullptr, x_hat}, d);
                each(d, x_hat, [=](A y, int64_t j) { return (y / scale - bias[j]) / divisor[j]; });
                s = {nullptr, x_hat};
                mean = 0;
                rstd = 1;
            }

            // h and x_hat into their buffers, and what they add to sums over the row and over rows.
            const Row<X> dy = row_at<X>(args.dy, args.dy_type, first);
            const Row<X> dy1 = row_at<X>(args.dy1, args.dy_type, first);
            typename Twin<A>::type dots = {}, totals = {};
            A dot = 0, total = 0;
            const auto gather = [=](int64_t j, auto as, auto& dots, auto& totals)
                                    __attribute__((always_inline)) {
                                        const auto u = (s.load(j, as) - mean) * rstd;
                                        const auto g = dy.load(j, as) * scale;
                                        auto v = g * as(weight + j);
                                        if (dweight) store_pack(dweight + j, as(dweight + j) + g * u);
                                        if (dbias) store_pack(dbias + j, as(dbias + j) + g);
                                        if (dy1) {
                                            const auto g1 = dy1.load(j, as) * scale;
                                            v += g1 * as(weight1 + j);
                                            if (dweight1) store_pack(dweight1 + j, as(dweight1 + j) + g1 * u);
                                            if (dbias1) store_pack(dbias1 + j, as(dbias1 + j) + g1);
                                        }
                                        store_pack(x_hat + j, u);
                                        store_pack(h + j, v);
                                        dots += v * u;
                                        totals += v;
                                    };
            constexpr int lanes = Twin<A>::lanes;
            int64_t j = 0;
            for (; j + lanes <= d; j += lanes) gather(j, AsTwin{}, dots, totals);
            dot = sum_lanes(dots);
            total = sum_lanes(totals);
            for (; j < d; ++j) gather(j, AsScalar{}, dot, total);

            const A mean_dot = dot / static_cast<A>(d);
            const A mean_sum = args.centred ? total / static_cast<A>(d) : A(0);
            const Row<X> dresidual = row_at<X>(args.dresidual, args.dresidual_type, first);
            const Row<X> dresidual_in = row_at<X>(args.dresidual_in, args.residual_type, first);
            const Row<X> dx1 = row_at<X>(args.dx1, args.x_type, first);
            const Row<X> dx = row_at<X>(args.dx, args.x_type, first);
            const bool drops = branch.drops(0), drops1 = args.dx1 && branch.drops(1);
            const A factor = rowscale_of<A>(branch, row);
            for_twins<A>(d, [=](int64_t j, auto as) __attribute__((always_inline)) {
                s.prefetch(d + j);  // the next row, while this one is computed
                dy.prefetch(d + j);
                auto v = (as(h + j) - as(x_hat + j) * mean_dot - mean_sum) * outer;
                if (dresidual) v += dresidual.load(j, as);
                if (dresidual_in) dresidual_in.store(j, v);
                if (drops1) {
                    store_pack(t + j, v);
                } else if (dx1) {
                    dx1.store(j, v);
                }
                if (drops) {
                    store_pack(h + j, v);
                } else {
                    dx.store(j, v * factor);
                }
            });
            if (drops1) {
                drop(branch, 1, first, d, t);
                copy_row<X>({nullptr, t}, dx1, d);
            }
            if (drops) {
                drop(branch, 0, first, d, h);
                for_twins<A>(d, [=](int64_t j, auto as) { dx.store(j, as(h + j) * factor); });
            }
        }
    }
}

}  // namespace

void general_norm_forward_rows(const GeneralForward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { forward_rows<decltype(x)>(args, begin, end); });
}

void general_norm_backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { backward_chunks<decltype(x)>(args, begin, end); });
}

NG_NAMESPACE_END
