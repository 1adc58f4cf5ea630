// CPU kernels of the norms in modulated.h.
//
// A row is read from memory once and stays in the first-level cache for the passes that follow; what is
// costly to compute again (the gate, the turned gradient) is kept beside it in scratch rows. Types: X of x, D
// of dy, R of the residual; the arithmetic is in A = float (double for double).
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/twin.h"
#include "common/wide.h"
#include "norm/modulated.h"

NG_NAMESPACE_BEGIN
namespace {

// Some of a row: a whole pack, or the `count` elements that are left of it.
template <class A, bool whole>
struct Some {
    int count;
};
// The pack from p on; lanes beyond the row are zero.
template <class A, bool whole, class T>
NG_HOST_DEVICE WidePack<A> at(Some<A, whole> v, const T* p) {
    if constexpr (whole) {
        return load_vector(p);
    } else {
        return load_part<A>(p, v.count, T{});
    }
}
template <class A, bool whole, class T>
NG_HOST_DEVICE void put(Some<A, whole> v, T* p, WidePack<A> pack) {
    if constexpr (whole) {
        store_vector(p, pack);
    } else {
        store_part<A>(p, v.count, pack);
    }
}

// body(v, j) for a row in packs: at(v, p + j) loads, put(v, p + j, pack) stores.
template <class A, class Body>
NG_HOST_DEVICE void for_lanes(int64_t columns, const Body& body) {
    constexpr int lanes = Wide<A>::lanes;
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) body(Some<A, true>{}, j);
    if (j < columns) body(Some<A, false>{static_cast<int>(columns - j)}, j);
}

// The sums of the N values that term(v, j, values) gives, in two blocks at a time; the values of lanes beyond
// the row must be zero.
template <class A, int N, class Term>
NG_HOST_DEVICE void sum_lanes_of(int64_t columns, A (&totals)[N], const Term& term) {
    constexpr int lanes = Wide<A>::lanes, packs = Wide<A>::packs;
    Block<A> even[N] = {}, odd[N] = {};
    const auto add = [&](auto v, int64_t j, Block<A>(&sums)[N], int p) __attribute__((always_inline)) {
        WidePack<A> values[N];
        term(v, j, values);
        for (int i = 0; i < N; ++i) sums[i].packs[p] += values[i];
    };
    int64_t j = 0;
    for (; j + 2 * packs * lanes <= columns; j += 2 * packs * lanes) {
        for (int p = 0; p < packs; ++p) add(Some<A, true>{}, j + p * lanes, even, p);
        for (int p = 0; p < packs; ++p) add(Some<A, true>{}, j + (packs + p) * lanes, odd, p);
    }
    for (int p = 0; p < 2 * packs && j < columns; ++p, j += lanes) {
        auto& sums = p < packs ? even : odd;
        if (j + lanes <= columns) {
            add(Some<A, true>{}, j, sums, p % packs);
        } else {
            add(Some<A, false>{static_cast<int>(columns - j)}, j, sums, p % packs);
        }
    }
    for (int i = 0; i < N; ++i) {
        for (int p = 0; p < packs; ++p) even[i].packs[p] += odd[i].packs[p];
        totals[i] = fold_lanes(even[i], [](auto a, auto b) { return a + b; });
    }
}

// Vectors of parameters, widened a block at a time where rows ask for them.
template <class A>
class Widened {
  public:
    Widened(const Modulation& args, const void* source, DType type, A offset, A absent, bool one = false)
        : source_(source),
          type_(type),
          offset_(offset),
          columns_(args.columns),
          vectors_(source != nullptr && !one ? args.vectors : 1),
          block_(source != nullptr && !one ? vectors_together(args) : 1),
          values_(block_ * columns_) {
        if (source != nullptr && !one) return;
        A value = absent;
        if (one) widened(source, type, offset, absent, 1, &value);
        std::fill_n(values_.get(), columns_, value);
        first_ = 0;
    }
    const A* of(int64_t vector) {
        if (vectors_ == 1 && first_ == 0) return values_.get();
        if (first_ < 0 || vector < first_ || vector >= first_ + block_) {
            first_ = vector / block_ * block_;
            const int64_t count = std::min(block_, vectors_ - first_) * columns_;
            const char* begin = static_cast<const char*>(source_) + first_ * columns_ * size_of(type_);
            widened(begin, type_, offset_, A(0), count, values_.get());
        }
        return values_.get() + (vector - first_) * columns_;
    }

  private:
    const void* source_;
    DType type_;
    A offset_;
    int64_t columns_, vectors_, block_, first_ = -1;
    Scratch<A> values_;
};

// cos and sin of one position after another, widened.
template <class A>
class Tables {
  public:
    explicit Tables(const Modulation& args) : args_(args), values_(args.cos ? 2 * args.columns : 0) {}
    void select(int64_t row) {
        const int64_t position = row / args_.heads % args_.positions;
        if (position == position_) return;
        position_ = position;
        const int64_t offset = position * args_.columns * size_of(args_.table_type);
        for (int i = 0; i < 2; ++i) {
            const void* table = static_cast<const char*>(i == 0 ? args_.cos : args_.sin) + offset;
            widened(table, args_.table_type, A(0), A(0), args_.columns, values_.get() + i * args_.columns);
        }
    }
    const A* cos() const { return values_.get(); }
    const A* sin() const { return values_.get() + args_.columns; }

  private:
    const Modulation& args_;
    int64_t position_ = -1;
    Scratch<A> values_;
};

// Each element becomes the other one of its pair.
template <class V>
NG_HOST_DEVICE V swap_pairs(V v) {
    constexpr int lanes = sizeof(V) / sizeof(v[0]);
    if constexpr (lanes == 16) {
        return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    } else if constexpr (lanes == 8) {
        return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    } else {
        return __builtin_shufflevector(v, v, 1, 0, 3, 2);
    }
}

// Writes n * cos + rotated(n) * sin for the row that n(v, j) gives; with `back`, n * cos - rotated(n * sin),
// the transpose. All of it is sums: of a difference beside a sum GCC makes a fused operation,
// -ffp-contract=off or not.
template <class A, class Out, class Values>
NG_HOST_DEVICE void rotate(const Modulation& args, const A* cos, const A* sin, bool back, Out* out,
                           const Values& n) {
    const A sign = back ? A(-1) : A(1);
    if (!args.interleaved) {
        const int64_t half = args.columns / 2,
                      other = back ? half : 0;  // where the sine of a pair's first channel is
        for_lanes<A>(half, [&](auto v, int64_t j) {
            const auto a = n(v, j), b = n(v, j + half);
            put(v, out + j, a * at(v, cos + j) + b * at(v, sin + j + other) * -sign);
            put(v, out + j + half, b * at(v, cos + j + half) + a * at(v, sin + j + half - other) * sign);
        });
        return;
    }
    WidePack<A> signs;
    for (int k = 0; k < Wide<A>::lanes; ++k) signs[k] = k % 2 == 0 ? -sign : sign;
    for_lanes<A>(args.columns, [&](auto v, int64_t j) {
        const auto own = n(v, j), sines = at(v, sin + j);
        put(v, out + j,
            own * at(v, cos + j) + signs * (back ? swap_pairs(own * sines) : swap_pairs(own) * sines));
    });
}

template <class A>
A factor_of(const Modulation& args, A squares) {
    const A eps = static_cast<A>(args.eps);
    if (args.statistic == Statistic::none) return A(1);
    if (args.statistic != Statistic::l2) {
        return A(1) / std::sqrt(squares / static_cast<A>(args.columns) + eps);
    }
    const A length = std::sqrt(squares);
    return A(1) / (length < eps ? eps : length);  // NaN stays NaN
}

template <class V>
NG_HOST_DEVICE V act(V z, bool silu) {
    const V sigma = sigmoid_pack(z);
    return silu ? z * sigma : sigma;
}

// Mean (of layer) and sum of squares of a row.
template <class A, class T>
NG_HOST_DEVICE Moments<A> moments_of(const Modulation& args, const T* s) {
    if (args.statistic == Statistic::layer) {
        return twin_moments<A>(args.columns, [&](int64_t j, auto as) { return as(s + j); });
    }
    A squares[1] = {0};
    if (args.statistic != Statistic::none) {
        sum_lanes_of<A>(args.columns, squares, [&](auto v, int64_t j, auto& values) {
            const auto x = at(v, s + j);
            values[0] = x * x;
        });
    }
    return {0, squares[0]};
}

// Keeps the row that s(v, j) gives, and returns its moments.
template <class A, class Values>
NG_HOST_DEVICE Moments<A> keep(const Modulation& args, const Values& s, A* kept) {
    for_lanes<A>(args.columns, [&](auto v, int64_t j) { put(v, kept + j, s(v, j)); });
    return moments_of<A>(args, kept);
}

template <class X, class R, Around around>
void forward_rows(const ModulatedForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    constexpr bool kept_apart = around == Around::gate || around == Around::residual;
    const int64_t columns = args.columns;
    Widened<A> weights(args, args.weight, args.weight_type, static_cast<A>(args.weight_offset), A(1),
                       args.one_weight);
    Widened<A> biases(args, args.bias, args.bias_type, A(0), A(0));
    Widened<A> gates(args, args.gate, args.gate_type, A(0), A(1));
    Tables<A> tables(args);
    Scratch<A> scratch(kept_apart ? columns : 0);
    A* kept = scratch.get();

    for (int64_t row = begin; row < end; ++row) {
        const int64_t vector = row / args.run % args.vectors;
        const X* x = row_of<X>(args.x, row, columns);
        X* y = args.y ? row_of<X>(args.y, row, columns) : nullptr;
        const X* z = around == Around::gate ? row_of<X>(args.z, row, columns) : nullptr;
        const A* weight = weights.of(vector);
        const A* bias = biases.of(vector);
        const auto write = [&](const auto* s, Moments<A> moments) {
            const A factor = factor_of(args, moments.sum_of_squares), mean = moments.mean;
            const auto n = [&](auto v, int64_t j) {
                return (at(v, s + j) - mean) * factor * at(v, weight + j) + at(v, bias + j);
            };
            if constexpr (around == Around::rotation) {
                tables.select(row);
                rotate(args, tables.cos(), tables.sin(), false, y, n);
            } else if (around == Around::gate && args.norm_first) {
                for_lanes<A>(columns, [&](auto v, int64_t j) {
                    __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
                    __builtin_prefetch(z + columns + j);
                    put(v, y + j, n(v, j) * act(at(v, z + j), args.silu));
                });
            } else {
                for_lanes<A>(columns, [&](auto v, int64_t j) {
                    __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
                    put(v, y + j, n(v, j));
                });
            }
        };
        if constexpr (around == Around::residual) {
            const R* residual = row_of<R>(args.residual, row, columns);
            R* residual_out = row_of<R>(args.residual_out, row, columns);
            const A* gate = gates.of(vector);
            const auto s = [&](auto v, int64_t j) {
                const auto sum = at(v, residual + j) + at(v, gate + j) * at(v, x + j);
                put(v, residual_out + j, sum);
                return sum;
            };
            if (y == nullptr) {
                for_lanes<A>(columns, [&](auto v, int64_t j) { s(v, j); });
            } else {
                write(kept, keep(args, s, kept));
            }
        } else if (around == Around::gate && !args.norm_first) {
            const auto s = [&](auto v, int64_t j) {
                __builtin_prefetch(z + columns + j);
                return at(v, x + j) * act(at(v, z + j), args.silu);
            };
            write(kept, keep(args, s, kept));
        } else {
            write(x, moments_of<A>(args, x));
        }
    }
}

template <class A>
void write_sums(void* target, DType type, int64_t offset, const A* sums, int64_t count) {
    const auto write = [&](auto* to) {
        for_lanes<A>(count, [&](auto v, int64_t j) { put(v, to + offset + j, at(v, sums + j)); });
    };
    if constexpr (std::is_same_v<A, double>) {
        write(static_cast<double*>(target));
    } else if (type == DType::bfloat16) {
        write(static_cast<bf16*>(target));
    } else if (type == DType::float16) {
        write(static_cast<f16*>(target));
    } else {
        write(static_cast<float*>(target));
    }
}

template <class X, class D, Around around>
void backward_pieces(const ModulatedBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns, block = vectors_together(args);
    const int64_t blocks = (args.vectors + block - 1) / block, of_vector = args.rows / args.vectors;
    const bool norm_first = args.norm_first, centred = args.statistic == Statistic::layer;
    Widened<A> weights(args, args.weight, args.weight_type, static_cast<A>(args.weight_offset), A(1),
                       args.one_weight);
    Widened<A> biases(args, args.bias, args.bias_type, A(0), A(0));
    Tables<A> tables(args);
    constexpr int scratch_rows = around == Around::gate ? 4 : around == Around::rotation ? 1 : 0;
    Scratch<A> scratch(scratch_rows * columns), sums(2 * block * columns);
    const int64_t next = around == Around::gate ? columns : 0;
    A *const dn_row = scratch.get(), *const s_row = dn_row + next;
    A *const first_factor = s_row + next, *const second_factor = first_factor + next;  // of dx and dz

    for (int64_t item = begin; item < end; ++item) {
        const int64_t piece = item / blocks, first_vector = item % blocks * block;
        const int64_t count = std::min(block, args.vectors - first_vector);
        std::fill_n(sums.get(), 2 * block * columns, A(0));
        const int64_t last = of_vector * (piece + 1) / args.chunks;
        for (int64_t number = of_vector * piece / args.chunks; number < last; ++number) {
            for (int64_t i = 0; i < count; ++i) {
                const int64_t vector = first_vector + i, round = number / args.run;
                const int64_t row = (round * args.vectors + vector) * args.run + number % args.run;
                const X* x = row_of<X>(args.x, row, columns);
                const D* dy = row_of<D>(args.dy, row, columns);
                const A* weight = weights.of(vector);
                const A* bias = biases.of(vector);
                if constexpr (around == Around::gate) {
                    const X* z = row_of<X>(args.z, row, columns);
                    for_lanes<A>(columns, [&](auto v, int64_t j) {
                        const auto s = at(v, x + j), g = at(v, dy + j), wide_z = at(v, z + j);
                        const auto sigma = sigmoid_pack(wide_z), slope = sigma * (1 - sigma);
                        const auto gate = args.silu ? wide_z * sigma : sigma;
                        const auto gate_slope = args.silu ? sigma + wide_z * slope : slope;
                        put(v, dn_row + j, norm_first ? g * gate : g);
                        put(v, s_row + j, norm_first ? s : s * gate);
                        put(v, first_factor + j, norm_first ? g * gate_slope : gate);
                        put(v, second_factor + j, s * gate_slope);
                    });
                }
                if constexpr (around == Around::rotation) {
                    tables.select(row);
                    rotate(args, tables.cos(), tables.sin(), true, dn_row,
                           [&](auto v, int64_t j) { return at(v, dy + j); });
                }
                const auto s_of = [&] {
                    if constexpr (around == Around::gate) {
                        return static_cast<const A*>(s_row);
                    } else {
                        return x;
                    }
                }();
                const auto dn_of = [&] {
                    if constexpr (around == Around::nothing) {
                        return dy;
                    } else {
                        return static_cast<const A*>(dn_row);
                    }
                }();

                A mean = 0, factor = 1, mean_dot = 0, mean_sum = 0;
                if (args.statistic != Statistic::none) {
                    A squares = 0, dot, sum = 0;
                    if (centred) {
                        const Moments<A> moments = moments_of<A>(args, s_of);
                        mean = moments.mean;
                        squares = moments.sum_of_squares;
                        A totals[2];
                        sum_lanes_of<A>(columns, totals, [&](auto v, int64_t j, auto& values) {
                            values[1] = at(v, dn_of + j) * at(v, weight + j);
                            values[0] = values[1] * (at(v, s_of + j) - mean);
                        });
                        dot = totals[0];
                        sum = totals[1];
                    } else {
                        A totals[2];
                        sum_lanes_of<A>(columns, totals, [&](auto v, int64_t j, auto& values) {
                            const auto s = at(v, s_of + j);
                            values[0] = at(v, dn_of + j) * at(v, weight + j) * s;
                            values[1] = s * s;
                        });
                        dot = totals[0];
                        squares = totals[1];
                    }
                    factor = factor_of(args, squares);
                    mean_dot = dot * factor;
                    mean_sum = sum / static_cast<A>(columns);
                    if (args.statistic != Statistic::l2) {
                        mean_dot /= static_cast<A>(columns);
                    } else if (std::sqrt(squares) < static_cast<A>(args.eps)) {
                        mean_dot = 0;  // the divisor is the constant eps
                    }
                }

                X* dx = row_of<X>(args.dx, row, columns);
                A* dweight = sums.get() + 2 * i * columns;
                A* dbias = dweight + columns;
                const X* dresidual = args.dresidual ? row_of<X>(args.dresidual, row, columns) : nullptr;
                const auto write = [&](auto with_residual, auto with_sums) {
                    for_lanes<A>(columns, [&](auto v, int64_t j) {
                        const auto dn = at(v, dn_of + j), x_hat = (at(v, s_of + j) - mean) * factor,
                                   w = at(v, weight + j);
                        auto d = dn * w;
                        if (args.statistic != Statistic::none) d = (d - x_hat * mean_dot - mean_sum) * factor;
                        if constexpr (around == Around::gate) {
                            const auto first = at(v, first_factor + j);
                            const auto dz = norm_first ? first * (x_hat * w + at(v, bias + j))
                                                       : d * at(v, second_factor + j);
                            put(v, row_of<X>(args.dz, row, columns) + j, dz);
                            d = norm_first ? d : d * first;
                        }
                        if constexpr (with_residual) d += at(v, dresidual + j);
                        put(v, dx + j, d);
                        if constexpr (with_sums > 0) put(v, dweight + j, at(v, dweight + j) + dn * x_hat);
                        if constexpr (with_sums > 1) put(v, dbias + j, at(v, dbias + j) + dn);
                    });
                };
                const auto choose_sums = [&](auto with_residual) {
                    if (args.dbias) {
                        write(with_residual, std::integral_constant<int, 2>{});
                    } else if (args.dweight) {
                        write(with_residual, std::integral_constant<int, 1>{});
                    } else {
                        write(with_residual, std::integral_constant<int, 0>{});
                    }
                };
                if (around == Around::nothing && dresidual) {
                    choose_sums(std::bool_constant<around == Around::nothing>{});
                } else {
                    choose_sums(std::false_type{});
                }
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t offset = (piece * args.vectors + first_vector + i) * columns;
            const A* dweight = sums.get() + 2 * i * columns;
            if (args.dweight) write_sums(args.dweight, args.dweight_type, offset, dweight, columns);
            if (args.dbias) write_sums(args.dbias, args.dbias_type, offset, dweight + columns, columns);
        }
    }
}

template <class X, class R>
void forward_around(const ModulatedForward& args, Around around, int64_t begin, int64_t end) {
    if (around == Around::residual) return forward_rows<X, R, Around::residual>(args, begin, end);
    if constexpr (std::is_same_v<X, R>) {
        if (around == Around::gate) return forward_rows<X, X, Around::gate>(args, begin, end);
        if (around == Around::rotation) return forward_rows<X, X, Around::rotation>(args, begin, end);
        return forward_rows<X, X, Around::nothing>(args, begin, end);
    }
}

template <class X, class D>
void backward_around(const ModulatedBackward& args, Around around, int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<X, D>) {
        if (around == Around::gate) return backward_pieces<X, X, Around::gate>(args, begin, end);
        if (around == Around::rotation) return backward_pieces<X, X, Around::rotation>(args, begin, end);
    }
    return backward_pieces<X, D, Around::nothing>(args, begin, end);
}

}  // namespace

void modulated_forward_rows(const ModulatedForward& args, Around around, int64_t begin, int64_t end) {
    const bool wide = around == Around::residual && args.residual_type == DType::float32;
    switch (args.x_type) {
        case DType::float64:
            return forward_around<double, double>(args, around, begin, end);
        case DType::bfloat16:
            return wide ? forward_around<bf16, float>(args, around, begin, end)
                        : forward_around<bf16, bf16>(args, around, begin, end);
        case DType::float16:
            return wide ? forward_around<f16, float>(args, around, begin, end)
                        : forward_around<f16, f16>(args, around, begin, end);
        default:
            return forward_around<float, float>(args, around, begin, end);
    }
}

void modulated_backward_pieces(const ModulatedBackward& args, Around around, int64_t begin, int64_t end) {
    const bool wide = args.dy_type == DType::float32;
    switch (args.x_type) {
        case DType::float64:
            return backward_around<double, double>(args, around, begin, end);
        case DType::bfloat16:
            return wide ? backward_around<bf16, float>(args, around, begin, end)
                        : backward_around<bf16, bf16>(args, around, begin, end);
        case DType::float16:
            return wide ? backward_around<f16, float>(args, around, begin, end)
                        : backward_around<f16, f16>(args, around, begin, end);
        default:
            if (args.dy_type == DType::bfloat16)
                return backward_around<float, bf16>(args, around, begin, end);
            if (args.dy_type == DType::float16) return backward_around<float, f16>(args, around, begin, end);
            return backward_around<float, float>(args, around, begin, end);
    }
}

NG_NAMESPACE_END
