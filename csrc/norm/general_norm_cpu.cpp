// CPU kernels of the general row norm.
//
// A row is widened into a buffer that stays in the first-level cache, and each option is a loop over it: what
// counts is that memory is read and written once.
#include <cmath>
#include <type_traits>

#include "common/floating.h"
#include "common/philox_cpu.h"
#include "common/twin.h"
#include "norm/general_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A, class T>
void load_typed(const T* source, int64_t count, A* target) {
    for_twins<A>(count, [=](int64_t j, auto as) { store_pack(target + j, as(source + j)); });
}
template <class A, class T>
void store_typed(const A* source, int64_t count, T* target) {
    for_twins<A>(count, [=](int64_t j, auto as) { store_pack(target + j, as(source + j)); });
}

// `count` elements from `first` on, between a tensor of any type and a buffer.
void load_values(const void* base, DType type, int64_t first, int64_t count, float* target) {
    if (type == DType::float32) return load_typed(row_of<float>(base, 1, first), count, target);
    if (type == DType::bfloat16) return load_typed(row_of<bf16>(base, 1, first), count, target);
    load_typed(row_of<f16>(base, 1, first), count, target);
}
void load_values(const void* base, DType, int64_t first, int64_t count, double* target) {
    load_typed(row_of<double>(base, 1, first), count, target);
}
void store_values(const float* source, int64_t count, void* base, DType type, int64_t first) {
    if (type == DType::float32) return store_typed(source, count, row_of<float>(base, 1, first));
    if (type == DType::bfloat16) return store_typed(source, count, row_of<bf16>(base, 1, first));
    store_typed(source, count, row_of<f16>(base, 1, first));
}
void store_values(const double* source, int64_t count, void* base, DType, int64_t first) {
    store_typed(source, count, row_of<double>(base, 1, first));
}

// Values as if they had been stored in `type`. `space` is as long as they are.
template <class A>
void round_values(DType type, int64_t count, A* values, A* space) {
    if (type == DType::float32 || type == DType::float64) return;
    store_values(values, count, space, type, 0);
    load_values(space, type, 0, count, values);
}
template <class A>
A rounded(DType type, A value) {
    A space;
    round_values(type, 1, &value, &space);
    return value;
}

template <class A, class F>
void each(int64_t count, A* values, F f) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = f(values[j], j);
}

template <class A>
A sum_of(int64_t count, const A* a, const A* b) {
    return sum_twins<A>(count, [=](int64_t j, auto as) { return as(a + j) * as(b + j); });
}
template <class A>
A sum_of(int64_t count, const A* a) {
    return sum_twins<A>(count, [=](int64_t j, auto as) { return as(a + j); });
}

// A value as if it had been stored as X: a twin, a pack or a scalar, which `as` loads.
template <class X, class V, class As>
NG_HOST_DEVICE V stored_as(const V& value, As as) {
    if constexpr (sizeof(X) >= sizeof(float)) {
        return value;
    } else {
        X space[Twin<float>::lanes];
        store_pack(space, value);
        return as(static_cast<const X*>(space));
    }
}

// y = (s - mean) * factor * weight + bias, times scale; rounded to X after each step where Early is true.
template <class X, class Y, bool Early, bool Bias, class A>
void write_row(int64_t d, const A* s, A mean, A factor, const A* weight, const A* bias, A scale, Y* y) {
    for_twins<A>(d, [=](int64_t j, auto as) {
        auto v = (as(s + j) - mean) * factor;
        if constexpr (Early) v = stored_as<X>(v, as);
        v = v * as(weight + j);
        if constexpr (Early) v = stored_as<X>(v, as);
        if constexpr (Bias) {
            v = v + as(bias + j);
            if constexpr (Early) v = stored_as<X>(v, as);
        }
        store_pack(y + j, v * scale);
    });
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
    if (branch.rowscale) load_values(branch.rowscale, branch.rowscale_type, row, 1, &factor);
    return factor;
}

template <class X>
void forward_rows(const GeneralForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t d = args.columns;
    const DType x_type = args.x_type;
    const bool early = args.casting != Casting::gemma;
    const A offset = static_cast<A>(args.weight_offset), scale = static_cast<A>(args.output_scale);
    Scratch<A> space(7 * d);
    A *s = space.get(), *t = s + d, *rounding = t + d, *affine[4];
    const void* given[4] = {args.weight, args.bias, args.weight1, args.bias1};
    const DType types[4] = {args.weight_type, args.bias_type, args.weight1_type, args.bias1_type};
    for (int i = 0; i < 4; ++i) {
        affine[i] = rounding + (i + 1) * d;
        widened<A>(given[i], types[i], i % 2 == 0 ? offset : A(0), i % 2 == 0 ? A(1) : A(0), d, affine[i]);
        if (early) round_values(x_type, d, affine[i], rounding);
    }

    const auto write = [&](int pair, void* base, int64_t first, A mean, A factor) {
        const A *weight = affine[2 * pair], *bias = affine[2 * pair + 1];
        const auto to = [&](auto* y) {
            using Y = std::remove_pointer_t<decltype(y)>;
            if (early) {
                if (given[2 * pair + 1])
                    return write_row<X, Y, true, true>(d, s, mean, factor, weight, bias, scale, y + first);
                return write_row<X, Y, true, false>(d, s, mean, factor, weight, bias, scale, y + first);
            }
            if (given[2 * pair + 1])
                return write_row<X, Y, false, true>(d, s, mean, factor, weight, bias, scale, y + first);
            write_row<X, Y, false, false>(d, s, mean, factor, weight, bias, scale, y + first);
        };
        if constexpr (sizeof(X) < sizeof(float)) {
            if (args.y_type == DType::float32) return to(static_cast<float*>(base));
        }
        to(static_cast<X*>(base));
    };
    const auto add = [&](const A* added) {
        each(d, s, [=](A value, int64_t j) { return value + added[j]; });
    };

    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * d;
        load_typed(row_of<X>(args.x, row, d), d, s);
        if (args.branch.rowscale) {
            const A factor = rowscale_of<A>(args.branch, row);
            each(d, s, [=](A value, int64_t) { return value * factor; });
        }
        drop(args.branch, 0, first, d, s);
        if (args.x1) {
            load_typed(row_of<X>(args.x1, row, d), d, t);
            drop(args.branch, 1, first, d, t);
            add(t);
        }
        if (args.residual) {
            load_values(args.residual, args.residual_type, first, d, t);
            add(t);
        }
        if (args.residual_out) store_values(s, d, args.residual_out, args.sum_type, first);

        A mean = 0, sum_of_squares;
        if (args.centred) {
            const auto moments = twin_moments<A>(d, [=](int64_t j, auto as) { return as(s + j); });
            mean = moments.mean;
            sum_of_squares = moments.sum_of_squares;
        } else {
            sum_of_squares = sum_of(d, s, s);
        }
        const A eps = static_cast<A>(args.eps), count = static_cast<A>(d);
        const A rstd = A(1) / std::sqrt(sum_of_squares / count + eps);
        if (args.mean) static_cast<A*>(args.mean)[row] = mean;
        if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;

        A factor = rstd;
        if (args.casting == Casting::none) {
            each(d, t, [=](A, int64_t j) { return (s[j] - mean) * (s[j] - mean); });
            round_values(x_type, d, t, rounding);
            const A variance = rounded(x_type, sum_of(d, t) / count);
            factor = rounded(x_type, A(1) / std::sqrt(rounded(x_type, variance + eps)));
        }
        write(0, args.y, first, mean, factor);
        if (args.y1) write(1, args.y1, first, mean, factor);
    }
}

template <class A>
void backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    const int64_t d = args.columns;
    const A offset = static_cast<A>(args.weight_offset), scale = static_cast<A>(args.output_scale);
    Scratch<A> space(9 * d);
    A *x_hat = space.get(), *g = x_hat + d, *h = g + d, *t = h + d, *unused = t + 5 * d;
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
            sums[i] = partials[i] ? row_of<A>(partials[i], chunk, d) : unused;
            each(d, sums[i], [](A, int64_t) { return A(0); });
        }
        // Of one result: what g adds to h, and to the sums of its weight and bias.
        const auto take = [&](int pair, const A* weights, bool adds) {
            A *dweight = sums[2 * pair], *dbias = sums[2 * pair + 1];
            const bool summed = partials[2 * pair] || partials[2 * pair + 1];
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                const A value = g[j] * scale;
                h[j] = adds ? h[j] + value * weights[j] : value * weights[j];
                if (summed) {
                    dweight[j] += value * x_hat[j];
                    dbias[j] += value;
                }
            }
        };

        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const int64_t first = row * d;
            const A rstd = static_cast<const A*>(args.rstd)[row];
            const A mean = args.mean ? static_cast<const A*>(args.mean)[row] : A(0);
            load_values(args.s, args.s_type, first, d, x_hat);
            if (args.from_output) {
                each(d, x_hat, [=](A y, int64_t j) { return (y / scale - bias[j]) / divisor[j]; });
            } else {
                each(d, x_hat, [=](A s, int64_t) { return (s - mean) * rstd; });
            }
            load_values(args.dy, args.dy_type, first, d, g);
            take(0, weight, false);
            if (args.dy1) {
                load_values(args.dy1, args.dy_type, first, d, g);
                take(1, weight1, true);
            }

            const A mean_dot = sum_of(d, h, x_hat) / static_cast<A>(d);
            const A mean_sum = args.centred ? sum_of(d, h) / static_cast<A>(d) : A(0);
            each(d, h, [=](A value, int64_t j) { return (value - x_hat[j] * mean_dot - mean_sum) * rstd; });
            if (args.dresidual) {
                load_values(args.dresidual, args.dresidual_type, first, d, t);
                each(d, h, [=](A value, int64_t j) { return value + t[j]; });
            }
            if (args.dresidual_in) store_values(h, d, args.dresidual_in, args.residual_type, first);
            if (args.dx1) {
                each(d, t, [=](A, int64_t j) { return h[j]; });
                drop(args.branch, 1, first, d, t);
                store_values(t, d, args.dx1, args.x_type, first);
            }
            drop(args.branch, 0, first, d, h);
            if (args.branch.rowscale) {
                const A factor = rowscale_of<A>(args.branch, row);
                each(d, h, [=](A value, int64_t) { return value * factor; });
            }
            store_values(h, d, args.dx, args.x_type, first);
        }
    }
}

}  // namespace

void general_norm_forward_rows(const GeneralForward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { forward_rows<decltype(x)>(args, begin, end); });
}

void general_norm_backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    if (args.x_type == DType::float64) return backward_chunks<double>(args, begin, end);
    backward_chunks<float>(args, begin, end);
}

NG_NAMESPACE_END
