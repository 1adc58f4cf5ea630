// CPU kernels of the general row norm.
//
// A row is widened into a buffer that stays in the first-level cache, and each option is a loop over it: what
// counts is that memory is read and written once.
#include <cmath>

#include "common/philox_cpu.h"
#include "common/row_cpu.h"
#include "norm/general_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A, class T>
void load_typed(const T* source, int64_t count, A* target) {
    for_row<A>(
        count, [=](int64_t j) { store_pack(target + j, load_pack(source + j)); },
        [=](int64_t j) { target[j] = to_compute(source[j]); });
}
template <class A, class T>
void store_typed(const A* source, int64_t count, T* target) {
    for_row<A>(
        count, [=](int64_t j) { store_pack(target + j, load_pack(source + j)); },
        [=](int64_t j) { target[j] = from_compute<T>(source[j]); });
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
    return sum_row<A>(
        count, [=](int64_t j) { return load_pack(a + j) * load_pack(b + j); },
        [=](int64_t j) { return a[j] * b[j]; });
}
template <class A>
A sum_of(int64_t count, const A* a) {
    return sum_row<A>(count, [=](int64_t j) { return load_pack(a + j); }, [=](int64_t j) { return a[j]; });
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

template <class A>
void forward_rows(const GeneralForward& args, int64_t begin, int64_t end) {
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

    // y from x_hat, which is in s.
    const auto write = [&](int pair, void* y, int64_t first) {
        const A *weight = affine[2 * pair], *bias = affine[2 * pair + 1];
        const bool with_weight = given[2 * pair], with_bias = given[2 * pair + 1];
        if (early) {
            each(d, t, [=](A, int64_t j) { return with_weight ? s[j] * weight[j] : s[j]; });
            if (with_weight) round_values(x_type, d, t, rounding);
            if (with_bias) {
                each(d, t, [=](A value, int64_t j) { return value + bias[j]; });
                round_values(x_type, d, t, rounding);
            }
            each(d, t, [=](A value, int64_t) { return value * scale; });
        } else if (with_bias) {
            each(d, t, [=](A, int64_t j) { return (s[j] * weight[j] + bias[j]) * scale; });
        } else {
            each(d, t, [=](A, int64_t j) { return s[j] * weight[j] * scale; });
        }
        store_values(t, d, y, args.y_type, first);
    };

    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * d;
        load_values(args.x, x_type, first, d, s);
        if (args.branch.rowscale) {
            const A factor = rowscale_of<A>(args.branch, row);
            each(d, s, [=](A value, int64_t) { return value * factor; });
        }
        drop(args.branch, 0, first, d, s);
        if (args.x1) {
            load_values(args.x1, x_type, first, d, t);
            drop(args.branch, 1, first, d, t);
            each(d, s, [=](A value, int64_t j) { return value + t[j]; });
        }
        if (args.residual) {
            load_values(args.residual, args.residual_type, first, d, t);
            each(d, s, [=](A value, int64_t j) { return value + t[j]; });
        }
        if (args.residual_out) store_values(s, d, args.residual_out, args.sum_type, first);

        A mean = 0, sum_of_squares;
        if (args.centred) {
            const auto moments = row_moments<A>(
                d, [=](int64_t j) { return load_pack(s + j); }, [=](int64_t j) { return s[j]; });
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
        each(d, s, [=](A value, int64_t) { return (value - mean) * factor; });
        if (early) round_values(x_type, d, s, rounding);
        write(0, args.y, first);
        if (args.y1) write(1, args.y1, first);
    }
}

template <class A>
void backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    const int64_t d = args.columns;
    const A offset = static_cast<A>(args.weight_offset), scale = static_cast<A>(args.output_scale);
    Scratch<A> space(8 * d);
    A *x_hat = space.get(), *g = x_hat + d, *h = g + d, *t = h + d;
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
        const auto add_to_sums = [&](int pair) {  // of the gradient in g
            if (sums[2 * pair])
                each(d, sums[2 * pair], [=](A sum, int64_t j) { return sum + g[j] * x_hat[j]; });
            if (sums[2 * pair + 1]) each(d, sums[2 * pair + 1], [=](A sum, int64_t j) { return sum + g[j]; });
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
            each(d, g, [=](A value, int64_t) { return value * scale; });
            each(d, h, [=](A, int64_t j) { return g[j] * weight[j]; });
            add_to_sums(0);
            if (args.dy1) {
                load_values(args.dy1, args.dy_type, first, d, g);
                each(d, g, [=](A value, int64_t) { return value * scale; });
                each(d, h, [=](A value, int64_t j) { return value + g[j] * weight1[j]; });
                add_to_sums(1);
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
    if (args.x_type == DType::float64) return forward_rows<double>(args, begin, end);
    forward_rows<float>(args, begin, end);
}

void general_norm_backward_chunks(const GeneralBackward& args, int64_t begin, int64_t end) {
    if (args.x_type == DType::float64) return backward_chunks<double>(args, begin, end);
    backward_chunks<float>(args, begin, end);
}

NG_NAMESPACE_END
