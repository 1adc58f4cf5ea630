// CUDA kernels of the norms in modulated.h. How rows lie on threads: common/row.cuh.
//
// Bytes for each element of x, in units of its size: forward 1 read and 1 written, one more read for a gate,
// one more of each for a residual; backward 2 read and 1 written, one more of each for a gate.
#pragma once

#include <algorithm>

#include "common/row.cuh"
#include "norm/modulated.h"

namespace narrowgauge {

// A division of 64 bits is many instructions, and rows are few enough for 32 bits nearly always.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
    if ((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 == 0) {
        return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    }
    return a / b;
}
__device__ __forceinline__ int64_t remainder_of(int64_t a, int64_t b) { return a - quotient(a, b) * b; }

// Stores to a tensor whose type is known at run time only: the counterpart of Beside.
template <int Width>
__device__ __forceinline__ void store_as(void* raw, DType, const char* name, int64_t i,
                                         const double (&values)[Width]) {
    store_row<Width>(global<double>(raw, name), i, values);
}
template <int Width>
__device__ __forceinline__ void store_as(void* raw, DType type, const char* name, int64_t i,
                                         const float (&values)[Width]) {
    if (type == DType::float32) {
        store_row<Width>(global<float>(raw, name), i, values);
    } else if (type == DType::bfloat16) {
        store_row<Width>(global<bf16>(raw, name), i, values);
    } else {
        store_row<Width>(global<f16>(raw, name), i, values);
    }
}

template <class A>
struct Gate {
    A value, slope;
};
// act(z) and its derivative, from e^-|z| so that nothing overflows.
template <class A>
__device__ __forceinline__ Gate<A> gate_of(A z, bool silu) {
    const A e = exp(z < 0 ? z : -z), sigma = (z < 0 ? e : A(1)) / (1 + e), slope = sigma * (1 - sigma);
    return silu ? Gate<A>{z * sigma, sigma + z * slope} : Gate<A>{sigma, slope};
}

// The vectors and tables of one row.
template <class A, int Width>
struct RowParameters {
    Beside weight, bias, cos, sin;
    int64_t vector, table;  // where they begin
    int64_t columns;
    A weight_offset;
    bool one_weight, interleaved;

    __device__ __forceinline__ RowParameters(const Modulation& args, int64_t row)
        : weight{args.weight, args.weight_type, "weight"},
          bias{args.bias, args.bias_type, "bias"},
          cos{args.cos, args.table_type, "cos"},
          sin{args.sin, args.table_type, "sin"},
          vector(args.vectors == 1 ? 0 : remainder_of(quotient(row, args.run), args.vectors) * args.columns),
          table(args.cos ? remainder_of(quotient(row, args.heads), args.positions) * args.columns : 0),
          columns(args.columns),
          weight_offset(static_cast<A>(args.weight_offset)),
          one_weight(args.one_weight),
          interleaved(args.interleaved) {}

    __device__ __forceinline__ void load_weight(int64_t j, A (&values)[Width]) const {
        if (!weight) {
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] = A(1);
            return;
        }
        if (one_weight) {
            A one[1];
            weight.load(0, one);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] = one[0];
        } else {
            weight.load(vector + j, values);
        }
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] += weight_offset;
    }

    // For the channels from j on: first_of_pair says which sign the other channel of each pair has.
    __device__ __forceinline__ bool first_of_pair(int64_t j, int k) const {
        return interleaved ? (j + k) % 2 == 0 : j + k < columns / 2;
    }
    // others[k] is the value of the other channel of the pair of channel j + k, where load(j, values) gives
    // those of consecutive channels and `own` is what it gave for j. A vector never straddles the middle of
    // the row.
    template <class Load>
    __device__ __forceinline__ void load_others(int64_t j, const A (&own)[Width], A (&others)[Width],
                                                Load&& load) const {
        if (interleaved && Width > 1) {
#pragma unroll
            for (int k = 0; k < Width; ++k) others[k] = own[Width > 1 ? k ^ 1 : k];
        } else if (interleaved) {
            load(j ^ 1, others);
        } else {
            load(j < columns / 2 ? j + columns / 2 : j - columns / 2, others);
        }
    }
};

// 1 / the root mean square, the standard deviation or the length, from the sum of squares. NaN stays NaN.
template <class A>
__device__ __forceinline__ A factor_of(const Modulation& args, A squares) {
    const A eps = static_cast<A>(args.eps);
    if (args.statistic == Statistic::none) return A(1);
    if (args.statistic != Statistic::l2) return A(1) / sqrt(squares * static_cast<A>(args.per_column) + eps);
    const A length = sqrt(squares);
    return A(1) / (length < eps ? eps : length);
}

// --- forward -------------------------------------------------------------------------------------

template <class X, int Width, int Vectors, Around around>
__global__ void __launch_bounds__(512, 1)
    modulated_forward_kernel(ModulatedForward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);

    const int64_t row = row_of_group(threads_per_row), columns = args.columns, base = row * columns;
    const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
    const RowParameters<A, Width> parameters(args, row);
    const auto x = global<const X>(args.x, "x");
    const auto z = global<const X>(args.z, "z");
    const Beside residual{args.residual, args.residual_type, "residual"};
    const Beside gate{args.gate, args.gate_type, "gate"};

    const auto multiply_by_gate = [&](int64_t j, A(&values)[Width]) {
        A gates[Width];
        load_row<Width>(z, base + j, gates);
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] *= gate_of(gates[k], args.silu).value;
    };
    const auto load_s = [&](int64_t j, A(&values)[Width]) {
        load_row<Width>(x, base + j, values);
        if constexpr (around == Around::gate) {
            if (!args.norm_first) multiply_by_gate(j, values);
        }
        if constexpr (around == Around::residual) {
            A added[Width], gates[Width];
            residual.load(base + j, added);
            gate.load(parameters.vector + j, gates);
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] = added[k] + gates[k] * values[k];
        }
    };
    RowValues<A, Width, Vectors> held;
    held.load_once(slice, load_s);
    const auto visit = [&](auto&& function) { held.visit(slice, load_s, function); };

    A mean = 0, squares = 0;
    if (args.statistic == Statistic::layer) {
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) mean += values[k];
        });
        mean = group_sum(mean, threads_per_row, partials) * static_cast<A>(args.per_column);
    }
    if (args.statistic != Statistic::none) {
        visit([&](int64_t, const A(&values)[Width]) {
#pragma unroll
            for (int k = 0; k < Width; ++k) squares += (values[k] - mean) * (values[k] - mean);
        });
        squares = group_sum(squares, threads_per_row, partials);
    }
    const A factor = factor_of(args, squares);

    const auto affine = [&](int64_t j, const A(&values)[Width], A(&y)[Width]) {
        A weights[Width], biases[Width] = {};
        parameters.load_weight(j, weights);
        if (parameters.bias) parameters.bias.load(parameters.vector + j, biases);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            y[k] = (values[k] - mean) * factor * weights[k];
            if (parameters.bias) y[k] += biases[k];
        }
    };
    visit([&](int64_t j, const A(&values)[Width]) {
        if constexpr (around == Around::residual) {
            store_beside<X>(args.residual_out, args.residual_type, "residual_out", base + j, values);
            if (!args.y) return;
        }
        A y[Width];
        affine(j, values, y);
        if constexpr (around == Around::gate) {
            if (args.norm_first) multiply_by_gate(j, y);
        }
        if constexpr (around == Around::rotation) {
            A others[Width], cos[Width], sin[Width];
            parameters.load_others(j, y, others, [&](int64_t other, A(&result)[Width]) {
                A raw[Width];
                load_row<Width>(x, base + other, raw);  // just read by a neighbour: from the cache
                affine(other, raw, result);
            });
            parameters.cos.load(parameters.table + j, cos);
            parameters.sin.load(parameters.table + j, sin);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                y[k] = y[k] * cos[k] + (parameters.first_of_pair(j, k) ? -others[k] : others[k]) * sin[k];
            }
        }
        store_row<Width>(global<X>(args.y, "y"), base + j, y);
    });
}

// --- backward ------------------------------------------------------------------------------------

// What a thread holds of a vector's worth of one row; gate and slope belong to the gate, and cost nothing
// without one.
template <class A, int Width>
struct Terms {
    A x[Width], g[Width], gate[Width], slope[Width];
};

// Group c walks over piece c / vectors of the rows of vector c % vectors, and writes row c of the sums. With
// Vectors = 0 it adds to that row as it goes, each thread to its own columns.
template <class X, int Width, int Vectors, Around around>
__global__ void __launch_bounds__(512, 1)
    modulated_backward_kernel(ModulatedBackward args, int threads_per_row) {
    using A = compute_t<X>;
    SharedArena arena;
    const Shared<A> partials = arena.template take<A>(max_warps);
    constexpr bool in_registers = Vectors > 0;
    constexpr int held = in_registers ? Vectors : 1;

    const int64_t columns = args.columns, of_vector = args.rows / args.vectors;
    const int64_t group = row_of_group(threads_per_row), groups = args.vectors * args.chunks;
    const int64_t piece = quotient(group, args.vectors), vector = group - piece * args.vectors;
    const bool gate_first = around == Around::gate && !args.norm_first;
    const bool norm_first = around == Around::gate && args.norm_first;
    const A per_column = static_cast<A>(args.per_column);
    const bool add_in_place = !in_registers && of_vector != 1;

    const auto x = global<const X>(args.x, "x");
    const auto z = global<const X>(args.z, "z");
    const auto dresidual = global<const X>(args.dresidual, "dresidual");
    const Beside dy{args.dy, args.dy_type, "dy"};

    // One row of sums. The groups beyond the last one have none.
    const RowSlice<Width> sums(group, groups, columns, threads_per_row);
    const auto add = [&](void* raw, const char* name, int64_t j, const A(&values)[Width]) {
        const auto target = global<A>(raw, name);
        A total[Width];
        load_row<Width>(global<const A>(raw, name), group * columns + j, total);
#pragma unroll
        for (int k = 0; k < Width; ++k) total[k] += values[k];
        store_row<Width>(target, group * columns + j, total);
    };
    A dweight[held][Width] = {}, dbias[held][Width] = {};
    const auto store_sums = [&](int64_t j, int v) {
        const int64_t i = group * columns + j;
        if (args.dweight) store_as<Width>(args.dweight, args.dweight_type, "dweight", i, dweight[v]);
        if (args.dbias) store_as<Width>(args.dbias, args.dbias_type, "dbias", i, dbias[v]);
    };
    if (add_in_place) sums.template visit<Vectors>(store_sums);  // zeros, to begin with

    Terms<A, Width> terms[held];
    // All groups of a block make the same number of rounds, so that they meet at the barriers.
    for (int64_t first = 0; first < of_vector; first += args.chunks) {
        const int64_t number = first + piece;  // among the rows of the vector
        const int64_t round = args.run == 1 ? number : quotient(number, args.run);
        int64_t row = (round * args.vectors + vector) * args.run + (number - round * args.run);
        if (number >= of_vector || group >= groups) row = args.rows;
        const int64_t base = row * columns;
        const RowSlice<Width> slice(row, args.rows, columns, threads_per_row);
        const RowParameters<A, Width> parameters(args, row);

        const auto load_terms = [&](int64_t j, Terms<A, Width>& t) {
            load_row<Width>(x, base + j, t.x);
            dy.load(base + j, t.g);
            if constexpr (around == Around::gate) {
                load_row<Width>(z, base + j, t.gate);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    const Gate<A> gate = gate_of(t.gate[k], args.silu);
                    t.gate[k] = gate.value;
                    t.slope[k] = gate.slope;
                }
            }
            if constexpr (around == Around::rotation) {
                // Turned back: the transpose of the forward's rotation.
                A turned[Width], others[Width], cos[Width];
                const auto times_sin = [&](int64_t i, A(&result)[Width]) {
                    A sin[Width];
                    dy.load(base + i, result);
                    parameters.sin.load(parameters.table + i, sin);
#pragma unroll
                    for (int k = 0; k < Width; ++k) result[k] *= sin[k];
                };
                times_sin(j, turned);
                parameters.load_others(j, turned, others, times_sin);
                parameters.cos.load(parameters.table + j, cos);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    t.g[k] = t.g[k] * cos[k] + (parameters.first_of_pair(j, k) ? others[k] : -others[k]);
                }
            }
        };
        const auto s_of = [&](const Terms<A, Width>& t, int k) {
            return gate_first ? t.x[k] * t.gate[k] : t.x[k];
        };
        const auto dn_of = [&](const Terms<A, Width>& t, int k) {
            return norm_first ? t.g[k] * t.gate[k] : t.g[k];
        };

        if constexpr (in_registers) {
            slice.template visit<Vectors>([&](int64_t j, int v) { load_terms(j, terms[v]); });
        }
        const auto visit = [&](auto&& function) {
            slice.template visit<Vectors>([&](int64_t j, int v) {
                if constexpr (!in_registers) load_terms(j, terms[v]);
                function(j, v);
            });
        };

        A mean = 0, squares = 0, dot = 0, sum = 0;
        const bool centred = args.statistic == Statistic::layer;
        if (centred) {
            visit([&](int64_t, int v) {
#pragma unroll
                for (int k = 0; k < Width; ++k) mean += s_of(terms[v], k);
            });
            mean = group_sum(mean, threads_per_row, partials) * per_column;
        }
        A factor = 1, mean_dot = 0, mean_sum = 0;
        if (args.statistic != Statistic::none) {
            visit([&](int64_t j, int v) {
                A weights[Width];
                parameters.load_weight(j, weights);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    const A deviation = s_of(terms[v], k) - mean, h = dn_of(terms[v], k) * weights[k];
                    squares += deviation * deviation;
                    dot += h * deviation;
                    sum += h;
                }
            });
            squares = group_sum(squares, threads_per_row, partials);
            dot = group_sum(dot, threads_per_row, partials);
            if (centred) mean_sum = group_sum(sum, threads_per_row, partials) * per_column;
            factor = factor_of(args, squares);
            mean_dot = dot * factor;
            if (args.statistic != Statistic::l2) {
                mean_dot *= per_column;
            } else if (sqrt(squares) < static_cast<A>(args.eps)) {
                mean_dot = 0;  // the divisor is the constant eps
            }
        }

        visit([&](int64_t j, int v) {
            const Terms<A, Width>& t = terms[v];
            A weights[Width], biases[Width] = {}, d[Width], dz[Width];
            parameters.load_weight(j, weights);
            if (norm_first && parameters.bias) parameters.bias.load(parameters.vector + j, biases);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A dn = dn_of(t, k), x_hat = (s_of(t, k) - mean) * factor;
                d[k] = dn * weights[k];
                if (args.statistic != Statistic::none) d[k] = (d[k] - x_hat * mean_dot - mean_sum) * factor;
                if (norm_first) {
                    const A n = x_hat * weights[k] + biases[k];
                    dz[k] = t.g[k] * n * t.slope[k];
                }
                if (gate_first) {
                    dz[k] = d[k] * t.x[k] * t.slope[k];
                    d[k] *= t.gate[k];
                }
                dweight[v][k] = (in_registers ? dweight[v][k] : A(0)) + dn * x_hat;
                dbias[v][k] = (in_registers ? dbias[v][k] : A(0)) + dn;
            }
            if (dresidual) {
                A added[Width];
                load_row<Width>(dresidual, base + j, added);
#pragma unroll
                for (int k = 0; k < Width; ++k) d[k] += added[k];
            }
            store_row<Width>(global<X>(args.dx, "dx"), base + j, d);
            if constexpr (around == Around::gate) store_row<Width>(global<X>(args.dz, "dz"), base + j, dz);
            if constexpr (!in_registers) {
                if (add_in_place) {
                    if (args.dweight) add(args.dweight, "dweight", j, dweight[v]);
                    if (args.dbias) add(args.dbias, "dbias", j, dbias[v]);
                } else {  // the only row of its vector
                    store_sums(j, v);
                }
            }
        });
    }
    if constexpr (in_registers) sums.template visit<Vectors>(store_sums);
}

// --- launches ------------------------------------------------------------------------------------

namespace modulated {

// The backward of a gate holds four numbers for each of x besides the sums: eight elements a thread fill its
// registers.
constexpr Plan gate_plans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},  {64, 64, 1},
                               {128, 128, 1}, {256, 256, 1}, {512, 512, 1}};

constexpr bool is_crowded(Around around, int64_t size_of_x) {
    return around == Around::gate && size_of_x == 2;
}

// Rows are held in registers where that is worth a kernel: of doubles none are, of heads (which are short)
// and in the crowded backward only those of one vector for each thread.
template <class X, int Width, Around around, int Most, class F>
void with_held(const Plan& plan, F&& f) {
    if constexpr (sizeof(X) == 8) {
        f(std::integral_constant<int, 0>{});
    } else if constexpr (Width == 1) {
        with_vectors<Most, 0>(plan.vectors > 0 ? Most : 0, f);
    } else if constexpr (Most == 1 || around == Around::rotation) {
        with_vectors<1, 0>(plan.vectors, f);
    } else {
        with_vectors<1, Most, 0>(plan.vectors, f);
    }
}

// Elements in a vector: 16 bytes of X, or one. Rotated halves must not share a vector.
inline int width_of(const Modulation& args, Around around, std::initializer_list<const void*> pointers) {
    const int width = static_cast<int>(16 / size_of(args.x_type));
    const int64_t whole = around == Around::rotation && !args.interleaved ? 2 * width : width;
    const bool vector = args.columns % whole == 0 && aligned(pointers) &&
                        aligned({args.x, args.z, args.bias, args.cos, args.sin}) &&
                        (args.one_weight || aligned({args.weight}));
    return vector ? width : 1;
}

// Calls f(X{}, width) with the type of x and the width as an integral constant.
template <class F>
void with_type_and_width(DType type, int width, F&& f) {
    const auto with_type = [&](auto x) {
        if (width > 1) {
            f(x, std::integral_constant<int, 16 / sizeof(x)>{});
        } else {
            f(x, std::integral_constant<int, 1>{});
        }
    };
    switch (type) {
        case DType::float64:
            return with_type(double{});
        case DType::bfloat16:
            return with_type(bf16{});
        case DType::float16:
            return with_type(f16{});
        default:
            return with_type(float{});
    }
}

struct Backward {
    Plan plan;
    int width;
    int64_t chunks;
};

inline Backward backward_of(const ModulatedBackward& args, Around around) {
    Backward how{};
    how.width = width_of(args, around, {args.dy, args.dresidual, args.dx, args.dz});
    const int64_t vectors = (args.columns + how.width - 1) / how.width;
    how.plan = is_crowded(around, size_of(args.x_type)) ? plan_for(gate_plans, vectors)
                                                        : plan_for(backward_plans, vectors);
    const int64_t of_vector = args.rows / args.vectors;
    how.chunks = std::clamp<int64_t>(persistent_grid(how.plan, args.rows).groups / args.vectors, 1,
                                     std::max<int64_t>(of_vector, 1));
    return how;
}

}  // namespace modulated

template <Around around>
void launch_modulated_forward(const ModulatedForward& args, Stream stream) {
    const int width =
        modulated::width_of(args, around, {args.residual, args.gate, args.y, args.residual_out});
    const Plan plan = plan_for(forward_plans, (args.columns + width - 1) / width);
    modulated::with_type_and_width(args.x_type, width, [&](auto x, auto wide) {
        using X = decltype(x);
        const LaunchConfig config =
            one_row_per_group(plan, args.rows, max_warps * sizeof(compute_t<X>), stream);
        modulated::with_held<X, wide, around, 4>(plan, [&](auto vectors) {
            launch(config, modulated_forward_kernel<X, wide, vectors, around>, args, plan.threads);
        });
    });
}

template <Around around>
void launch_modulated_backward(const ModulatedBackward& args, Stream stream) {
    const modulated::Backward how = modulated::backward_of(args, around);
    modulated::with_type_and_width(args.x_type, how.width, [&](auto x, auto wide) {
        using X = decltype(x);
        const LaunchConfig config =
            one_row_per_group(how.plan, args.vectors * args.chunks, max_warps * sizeof(compute_t<X>), stream);
        constexpr int most = modulated::is_crowded(around, sizeof(X)) ? 1 : 2;
        modulated::with_held<X, wide, around, most>(how.plan, [&](auto vectors) {
            launch(config, modulated_backward_kernel<X, wide, vectors, around>, args, how.plan.threads);
        });
    });
}

}  // namespace narrowgauge
