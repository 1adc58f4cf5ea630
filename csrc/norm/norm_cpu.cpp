// CPU kernels of the LayerNorm / RMSNorm family.
//
// A row is read from memory once and stays in the first-level cache for the passes that follow. Types: X of
// x, S of residual and residual_out, Y of y; the arithmetic is in A = float (double for double).
#include <cmath>
#include <type_traits>

#include "common/twin.h"
#include "norm/norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class X, class S, class Y, bool Centred, bool Residual>
void forward_rows(const NormForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    Scratch<A> weight_space(columns), bias_space(args.bias ? columns : 0);
    const A* weight = widened<A>(args.weight, args.weight_type, static_cast<A>(args.weight_offset), A(1),
                                 columns, weight_space.get());
    const A* bias =
        args.bias ? widened<A>(args.bias, args.bias_type, A(0), A(0), columns, bias_space.get()) : nullptr;

    for (int64_t row = begin; row < end; ++row) {
        const X* x = row_of<X>(args.x, row, columns);
        const S* residual = Residual ? row_of<S>(args.residual, row, columns) : nullptr;
        S* residual_out = Residual ? row_of<S>(args.residual_out, row, columns) : nullptr;
        Y* y = args.y ? row_of<Y>(args.y, row, columns) : nullptr;

        // The un-rounded sum: what is normalized, even where residual_out is stored narrower.
        const auto sum = [=](int64_t j, auto as) {
            auto v = as(x + j);
            if constexpr (Residual) v += as(residual + j);
            return v;
        };
        const auto kept_sum = [=](int64_t j, auto as) {
            const auto v = sum(j, as);
            if constexpr (Residual) store_pack(residual_out + j, v);
            return v;
        };

        A mean = 0, sum_of_squares;
        if constexpr (Centred) {
            const Moments<A> moments = twin_moments<A>(columns, kept_sum);
            mean = moments.mean;
            sum_of_squares = moments.sum_of_squares;
        } else {
            sum_of_squares = sum_twins<A>(columns, [=](int64_t j, auto as) {
                const auto v = kept_sum(j, as);
                return v * v;
            });
        }
        const A rstd = A(1) / std::sqrt(sum_of_squares / static_cast<A>(columns) + static_cast<A>(args.eps));
        if (args.mean) static_cast<A*>(args.mean)[row] = mean;
        if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;
        if (y == nullptr) continue;
        const A factor = args.scale ? static_cast<const A*>(args.scale)[row] : rstd;

        const auto write = [=](auto with_bias) {
            for_twins<A>(columns, [=](int64_t j, auto as) {
                __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
                if constexpr (Residual) __builtin_prefetch(residual + columns + j);
                auto v = sum(j, as);
                if constexpr (Centred) v -= mean;
                v = v * factor * as(weight + j);
                if constexpr (with_bias) v += as(bias + j);
                store_pack(y + j, v);
            });
        };
        if (bias) {
            write(std::true_type{});
        } else {
            write(std::false_type{});
        }
    }
}

template <class S, class D, bool Centred>
void backward_chunks(const NormBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<S>;
    const int64_t columns = args.columns;
    Scratch<A> weight_space(columns);
    const A* weight = widened<A>(args.weight, args.weight_type, static_cast<A>(args.weight_offset), A(1),
                                 columns, weight_space.get());

    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A* dweight = args.dweight_partial ? row_of<A>(args.dweight_partial, chunk, columns) : nullptr;
        A* dbias = args.dbias_partial ? row_of<A>(args.dbias_partial, chunk, columns) : nullptr;
        for (int64_t j = 0; dweight && j < columns; ++j) dweight[j] = 0;
        for (int64_t j = 0; dbias && j < columns; ++j) dbias[j] = 0;

        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const D* dy = row_of<D>(args.dy, row, columns);
            const S* x = row_of<S>(args.x, row, columns);
            const S* dresidual = args.dresidual ? row_of<S>(args.dresidual, row, columns) : nullptr;
            S* dx = row_of<S>(args.dx, row, columns);
            const A rstd = static_cast<const A*>(args.rstd)[row];
            const A mean = Centred ? static_cast<const A*>(args.mean)[row] : A(0);

            // mean(h * x_hat), and mean(h) when centred.
            constexpr int lanes = Twin<A>::lanes;
            typename Twin<A>::type dots = {}, sums = {};
            int64_t j = 0;
            for (; j + lanes <= columns; j += lanes) {
                const auto h = load_twin(dy + j) * load_twin(weight + j);
                dots += h * (load_twin(x + j) - mean);
                if constexpr (Centred) sums += h;
            }
            A dot = sum_lanes(dots), sum = sum_lanes(sums);
            for (; j < columns; ++j) {
                const A h = static_cast<A>(to_compute(dy[j])) * weight[j];
                dot += h * (to_compute(x[j]) - mean);
                sum += h;
            }
            const A mean_dot = args.given_scale ? A(0) : dot * rstd / static_cast<A>(columns);
            const A mean_sum = Centred ? sum / static_cast<A>(columns) : A(0);

            const auto write = [=](auto with_dresidual, auto with_dweight, auto with_dbias) {
                for_twins<A>(columns, [=](int64_t j, auto as) {
                    const auto g = as(dy + j);
                    const auto x_hat = (as(x + j) - mean) * rstd;
                    auto d = g * as(weight + j) - x_hat * mean_dot;
                    if constexpr (Centred) d -= mean_sum;
                    d *= rstd;
                    if constexpr (with_dresidual) d += as(dresidual + j);
                    store_pack(dx + j, d);
                    if constexpr (with_dweight) store_pack(dweight + j, as(dweight + j) + g * x_hat);
                    if constexpr (with_dbias) store_pack(dbias + j, as(dbias + j) + g);
                });
            };
            const auto choose_affine = [&](auto with_dresidual) {
                constexpr std::true_type yes{};
                constexpr std::false_type no{};
                if (dweight && dbias) {
                    write(with_dresidual, yes, yes);
                } else if (dweight) {
                    write(with_dresidual, yes, no);
                } else if (dbias) {
                    write(with_dresidual, no, yes);
                } else {
                    write(with_dresidual, no, no);
                }
            };
            if (dresidual) {
                choose_affine(std::true_type{});
            } else {
                choose_affine(std::false_type{});
            }
        }
    }
}

// Turns the run-time types into template arguments: each stream has the type of x, or is float beside a
// narrow x.
template <class X, class S, class Y>
void forward_with_types(const NormForward& args, int64_t begin, int64_t end) {
    if (args.centred) {
        if (args.residual) return forward_rows<X, S, Y, true, true>(args, begin, end);
        return forward_rows<X, S, Y, true, false>(args, begin, end);
    }
    if (args.residual) return forward_rows<X, S, Y, false, true>(args, begin, end);
    return forward_rows<X, S, Y, false, false>(args, begin, end);
}

template <class X>
void forward_narrow(const NormForward& args, int64_t begin, int64_t end) {
    const bool wide_residual = args.residual && args.residual_type == DType::float32;
    const bool wide_y = args.y_type == DType::float32;
    if (wide_residual && wide_y) return forward_with_types<X, float, float>(args, begin, end);
    if (wide_residual) return forward_with_types<X, float, X>(args, begin, end);
    if (wide_y) return forward_with_types<X, X, float>(args, begin, end);
    return forward_with_types<X, X, X>(args, begin, end);
}

template <class S, class D>
void backward_with_types(const NormBackward& args, int64_t begin, int64_t end) {
    if (args.centred) return backward_chunks<S, D, true>(args, begin, end);
    return backward_chunks<S, D, false>(args, begin, end);
}

}  // namespace

void norm_forward_rows(const NormForward& args, int64_t begin, int64_t end) {
    switch (args.x_type) {
        case DType::float64:
            return forward_with_types<double, double, double>(args, begin, end);
        case DType::bfloat16:
            return forward_narrow<bf16>(args, begin, end);
        case DType::float16:
            return forward_narrow<f16>(args, begin, end);
        default:
            return forward_with_types<float, float, float>(args, begin, end);
    }
}

void norm_backward_chunks(const NormBackward& args, int64_t begin, int64_t end) {
    const bool wide_dy = args.dy_type == DType::float32;
    switch (args.x_type) {
        case DType::float64:
            return backward_with_types<double, double>(args, begin, end);
        case DType::bfloat16:
            return wide_dy ? backward_with_types<bf16, float>(args, begin, end)
                           : backward_with_types<bf16, bf16>(args, begin, end);
        case DType::float16:
            return wide_dy ? backward_with_types<f16, float>(args, begin, end)
                           : backward_with_types<f16, f16>(args, begin, end);
        default:
            if (args.dy_type == DType::bfloat16) return backward_with_types<float, bf16>(args, begin, end);
            if (args.dy_type == DType::float16) return backward_with_types<float, f16>(args, begin, end);
            return backward_with_types<float, float>(args, begin, end);
    }
}

NG_NAMESPACE_END
