// CPU kernels of the LayerNorm / RMSNorm family.
//
// A row is read from memory once and stays in the first-level cache for the passes that follow. Types: X of
// x, S of residual and residual_out, Y of y; the arithmetic is in A = float (double for double).
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/scratch.h"
#include "common/simd.h"
#include "norm/norm.h"

NG_NAMESPACE_BEGIN
namespace {

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
        Y* y = row_of<Y>(args.y, row, columns);

        // The un-rounded sum: what is normalized, even where residual_out is stored narrower.
        const auto pack = [=](int64_t j) {
            auto v = load_pack(x + j);
            if constexpr (Residual) v += load_pack(residual + j);
            return v;
        };
        const auto scalar = [=](int64_t j) {
            A v = to_compute(x[j]);
            if constexpr (Residual) v += static_cast<A>(to_compute(residual[j]));
            return v;
        };
        const auto kept_pack = [=](int64_t j) {
            const auto v = pack(j);
            if constexpr (Residual) store_pack(residual_out + j, v);
            return v;
        };
        const auto kept_scalar = [=](int64_t j) {
            const A v = scalar(j);
            if constexpr (Residual) residual_out[j] = from_compute<S>(v);
            return v;
        };

        A mean = 0, sum_of_squares;
        if constexpr (Centred) {
            const Moments<A> moments = row_moments<A>(columns, kept_pack, kept_scalar);
            mean = moments.mean;
            sum_of_squares = moments.sum_of_squares;
        } else {
            sum_of_squares = sum_row<A>(
                columns,
                [=](int64_t j) {
                    const auto v = kept_pack(j);
                    return v * v;
                },
                [=](int64_t j) {
                    const A v = kept_scalar(j);
                    return v * v;
                });
        }
        const A rstd = A(1) / std::sqrt(sum_of_squares / static_cast<A>(columns) + static_cast<A>(args.eps));
        if (args.mean) static_cast<A*>(args.mean)[row] = mean;
        if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;

        const auto write = [=](auto with_bias) {
            for_row<A>(
                columns,
                [=](int64_t j) {
                    __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
                    if constexpr (Residual) __builtin_prefetch(residual + columns + j);
                    auto v = pack(j);
                    if constexpr (Centred) v -= mean;
                    v = v * rstd * load_pack(weight + j);
                    if constexpr (with_bias) v += load_pack(bias + j);
                    store_pack(y + j, v);
                },
                [=](int64_t j) {
                    A v = scalar(j);
                    if constexpr (Centred) v -= mean;
                    v = v * rstd * weight[j];
                    if constexpr (with_bias) v += bias[j];
                    y[j] = from_compute<Y>(v);
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
            constexpr int lanes = Simd<A>::lanes;
            typename Simd<A>::Pack dot_even = {}, dot_odd = {}, sum_even = {}, sum_odd = {};
            int64_t j = 0;
            for (; j + 2 * lanes <= columns; j += 2 * lanes) {
                const auto h_even = load_pack(dy + j) * load_pack(weight + j);
                const auto h_odd = load_pack(dy + j + lanes) * load_pack(weight + j + lanes);
                dot_even += h_even * (load_pack(x + j) - mean);
                dot_odd += h_odd * (load_pack(x + j + lanes) - mean);
                if constexpr (Centred) {
                    sum_even += h_even;
                    sum_odd += h_odd;
                }
            }
            A dot = sum_lanes(dot_even + dot_odd), sum = sum_lanes(sum_even + sum_odd);
            for (; j < columns; ++j) {
                const A h = static_cast<A>(to_compute(dy[j])) * weight[j];
                dot += h * (to_compute(x[j]) - mean);
                sum += h;
            }
            const A mean_dot = dot * rstd / static_cast<A>(columns);
            const A mean_sum = Centred ? sum / static_cast<A>(columns) : A(0);

            const auto write = [=](auto with_dresidual, auto with_dweight, auto with_dbias) {
                for_row<A>(
                    columns,
                    [=](int64_t j) {
                        const auto g = load_pack(dy + j);
                        const auto x_hat = (load_pack(x + j) - mean) * rstd;
                        auto d = g * load_pack(weight + j) - x_hat * mean_dot;
                        if constexpr (Centred) d -= mean_sum;
                        d *= rstd;
                        if constexpr (with_dresidual) d += load_pack(dresidual + j);
                        store_pack(dx + j, d);
                        if constexpr (with_dweight)
                            store_pack(dweight + j, load_pack(dweight + j) + g * x_hat);
                        if constexpr (with_dbias) store_pack(dbias + j, load_pack(dbias + j) + g);
                    },
                    [=](int64_t j) {
                        const A g = static_cast<A>(to_compute(dy[j]));
                        const A x_hat = (to_compute(x[j]) - mean) * rstd;
                        A d = g * weight[j] - x_hat * mean_dot;
                        if constexpr (Centred) d -= mean_sum;
                        d *= rstd;
                        if constexpr (with_dresidual) d += to_compute(dresidual[j]);
                        dx[j] = from_compute<S>(d);
                        if constexpr (with_dweight) dweight[j] += g * x_hat;
                        if constexpr (with_dbias) dbias[j] += g;
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

template <class A>
void reduce_columns(const NormReduce& args, int64_t begin, int64_t end) {
    Scratch<A> sums(end - begin);
    for (int64_t j = begin; j < end; ++j) sums.get()[j - begin] = 0;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
        const A* partial = row_of<A>(args.partial, chunk, args.columns) + begin;
        for (int64_t j = 0; j < end - begin; ++j) sums.get()[j] += partial[j];
    }
    for (int64_t j = begin; j < end; ++j) {
        const A sum = sums.get()[j - begin];
        switch (args.result_type) {
            case DType::float64:
                static_cast<double*>(args.result)[j] = sum;
                break;
            case DType::bfloat16:
                static_cast<bf16*>(args.result)[j] = from_float<bf16>(static_cast<float>(sum));
                break;
            case DType::float16:
                static_cast<f16*>(args.result)[j] = from_float<f16>(static_cast<float>(sum));
                break;
            default:
                static_cast<float*>(args.result)[j] = static_cast<float>(sum);
        }
    }
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

void norm_reduce_columns(const NormReduce& args, int64_t begin, int64_t end) {
    if (args.result_type == DType::float64) return reduce_columns<double>(args, begin, end);
    return reduce_columns<float>(args, begin, end);
}

NG_NAMESPACE_END
