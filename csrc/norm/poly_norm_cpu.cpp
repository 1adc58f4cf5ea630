// CPU kernels of PolyNorm. A row is read from memory once and stays in the first-level cache for the second
// pass.
#include <cmath>

#include "common/floating.h"
#include "common/twin.h"
#include "norm/poly_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A>
struct Parameters {
    A weight[3], bias[1];

    Parameters(const void* weights, DType weight_type, const void* bias_value, DType bias_type) {
        widened<A>(weights, weight_type, A(0), A(0), 3, weight);
        widened<A>(bias_value, bias_type, A(0), A(0), 1, bias);
    }
};

// Sums of N terms over a row, which add(j, as, sums) adds to twins, then to scalars.
template <class A, int N>
struct RowSums {
    A total[N];

    template <class Add>
    NG_HOST_DEVICE RowSums(int64_t columns, Add add) {
        constexpr int lanes = Twin<A>::lanes;
        typename Twin<A>::type twins[N] = {};
        A rest[N] = {};
        int64_t j = 0;
        for (; j + lanes <= columns; j += lanes) add(j, AsTwin{}, twins);
        for (; j < columns; ++j) add(j, AsScalar{}, rest);
        for (int i = 0; i < N; ++i) total[i] = sum_lanes(twins[i]) + rest[i];
    }
};

template <class V, int N>
NG_HOST_DEVICE void add_squares(V s, V (&sums)[N]) {
    const V square = s * s, cube = square * s;
    sums[0] += cube * cube;
    sums[1] += square * square;
    sums[2] += square;
}

template <class A>
A rstd(A sum_of_squares, int64_t columns, double eps) {
    return A(1) / std::sqrt(sum_of_squares / static_cast<A>(columns) + static_cast<A>(eps));
}

template <class X>
void forward_rows(const PolyNormForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const Parameters<A> parameters(args.weight, args.weight_type, args.bias, args.bias_type);
    const A bias = parameters.bias[0];
    for (int64_t row = begin; row < end; ++row) {
        const X* x = row_of<X>(args.x, row, args.columns);
        X* y = row_of<X>(args.y, row, args.columns);
        const RowSums<A, 3> squares(args.columns,
                                    [=](int64_t j, auto as, auto& sums) { add_squares(as(x + j), sums); });
        A factor[3];
        for (int i = 0; i < 3; ++i) {
            factor[i] = rstd(squares.total[i], args.columns, args.eps) * parameters.weight[i];
        }
        const A a = factor[0], b = factor[1], c = factor[2];
        const auto value = [=](auto s) { return ((s * a + b) * s + c) * s + bias; };
        for_twins<A>(args.columns, [=](int64_t j, auto as) {
            __builtin_prefetch(x + args.columns + j);  // the next row, while this one is computed
            store_pack(y + j, value(as(x + j)));
        });
    }
}

template <class V>
NG_HOST_DEVICE void add_all(V s, V g, V (&sums)[7]) {
    add_squares(s, sums);
    V dot = g * s;
    sums[5] += dot;
    dot *= s;
    sums[4] += dot;
    sums[3] += dot * s;
    sums[6] += g;
}

template <class X>
void backward_chunks(const PolyNormBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const Parameters<A> parameters(args.weight, args.weight_type, nullptr, args.weight_type);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A dweight[3] = {}, dbias = 0;
        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const X* dy = row_of<X>(args.dy, row, args.columns);
            const X* x = row_of<X>(args.x, row, args.columns);
            X* dx = row_of<X>(args.dx, row, args.columns);
            const RowSums<A, 7> row_sums(
                args.columns, [=](int64_t j, auto as, auto& sums) { add_all(as(x + j), as(dy + j), sums); });
            // dx = u' factor g - u' u factor r mean(g N(u)), summed over u = s^3, s^2, s
            A factor[3], back[3];
            for (int i = 0; i < 3; ++i) {
                const A r = rstd(row_sums.total[i], args.columns, args.eps), dot = row_sums.total[3 + i] * r;
                factor[i] = r * parameters.weight[i];
                back[i] = factor[i] * r * (dot / static_cast<A>(args.columns));
                dweight[i] += dot;
            }
            dbias += row_sums.total[6];
            const A a = 3 * factor[0], b = 2 * factor[1], c = factor[2];
            const A p = 3 * back[0], q = 2 * back[1], t = back[2];
            const auto value = [=](auto s, auto g) {
                const auto square = s * s;
                return ((s * a + b) * s + c) * g - ((square * p + q) * square + t) * s;
            };
            for_twins<A>(args.columns, [=](int64_t j, auto as) {
                __builtin_prefetch(x + args.columns + j);
                __builtin_prefetch(dy + args.columns + j);
                store_pack(dx + j, value(as(x + j), as(dy + j)));
            });
        }
        if (args.dweight_partial) {
            for (int i = 0; i < 3; ++i) row_of<A>(args.dweight_partial, chunk, 3)[i] = dweight[i];
        }
        if (args.dbias_partial) static_cast<A*>(args.dbias_partial)[chunk] = dbias;
    }
}

}  // namespace

void poly_norm_forward_rows(const PolyNormForward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { forward_rows<decltype(x)>(args, begin, end); });
}

void poly_norm_backward_chunks(const PolyNormBackward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { backward_chunks<decltype(x)>(args, begin, end); });
}

NG_NAMESPACE_END
