// CPU kernels of L1 LayerNorm. A row is read from memory once and stays in the first-level cache.
#include "common/floating.h"
#include "common/row_cpu.h"
#include "norm/l1_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class V>
NG_HOST_DEVICE V magnitude(V x) {
    return x < V{} ? -x : x;
}
template <class V>
NG_HOST_DEVICE V sign(V x) {
    return (x > V{} ? V{} + 1 : V{}) - (x < V{} ? V{} + 1 : V{});
}

template <class X>
void forward_rows(const L1NormForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    Scratch<A> weight_space(columns), bias_space(columns);
    const A* weight = widened<A>(args.weight, args.weight_type, A(0), A(1), columns, weight_space.get());
    const A* bias = widened<A>(args.bias, args.bias_type, A(0), A(0), columns, bias_space.get());

    for (int64_t row = begin; row < end; ++row) {
        const X* x = row_of<X>(args.x, row, columns);
        X* y = row_of<X>(args.y, row, columns);
        // The mean of blocks: exact for a constant row. The squares are not used, and not computed.
        const A mean = row_moments<A>(
                           columns, [=](int64_t j) { return load_pack(x + j); },
                           [=](int64_t j) { return to_compute(x[j]); })
                           .mean;
        const A sum = sum_row<A>(
            columns, [=](int64_t j) { return magnitude(load_pack(x + j) - mean); },
            [=](int64_t j) { return magnitude(to_compute(x[j]) - mean); });
        const A deviation =
            sum / static_cast<A>(columns) * static_cast<A>(args.factor) + static_cast<A>(args.eps);
        const A inverse = deviation > 0 ? A(1) / deviation : A(0);
        if (args.mean) static_cast<A*>(args.mean)[row] = mean;
        if (args.inverse) static_cast<A*>(args.inverse)[row] = inverse;
        for_row<A>(
            columns,
            [=](int64_t j) {
                __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
                store_pack(y + j,
                           (load_pack(x + j) - mean) * inverse * load_pack(weight + j) + load_pack(bias + j));
            },
            [=](int64_t j) {
                y[j] = from_compute<X>((to_compute(x[j]) - mean) * inverse * weight[j] + bias[j]);
            });
    }
}

template <class X>
void backward_chunks(const L1NormBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    using Pack = typename Simd<A>::Pack;
    constexpr int lanes = Simd<A>::lanes;
    const int64_t columns = args.columns;
    const A per_column = static_cast<A>(args.per_column), factor = static_cast<A>(args.factor);
    // Without partial sums to write, they go into working memory that nobody reads.
    Scratch<A> weight_space(columns), unread(2 * columns);
    const A* weight = widened<A>(args.weight, args.weight_type, A(0), A(1), columns, weight_space.get());

    for (int64_t chunk = begin; chunk < end; ++chunk) {
        A* dweight = args.dweight_partial ? row_of<A>(args.dweight_partial, chunk, columns) : unread.get();
        A* dbias =
            args.dbias_partial ? row_of<A>(args.dbias_partial, chunk, columns) : unread.get() + columns;
        for (int64_t j = 0; j < columns; ++j) dweight[j] = dbias[j] = 0;

        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const X* dy = row_of<X>(args.dy, row, columns);
            const X* x = row_of<X>(args.x, row, columns);
            X* dx = row_of<X>(args.dx, row, columns);
            const A mean = static_cast<const A*>(args.mean)[row];
            const A inverse = static_cast<const A*>(args.inverse)[row];

            Pack dots = {}, sums = {}, signs = {};
            int64_t j = 0;
            for (; j + lanes <= columns; j += lanes) {
                const Pack h = load_pack(dy + j) * load_pack(weight + j), p = load_pack(x + j) - mean;
                dots += h * p;
                sums += h;
                signs += sign(p);
            }
            A dot = sum_lanes(dots), sum = sum_lanes(sums), sign_sum = sum_lanes(signs);
            for (; j < columns; ++j) {
                const A h = to_compute(dy[j]) * weight[j], p = to_compute(x[j]) - mean;
                dot += h * p;
                sum += h;
                sign_sum += sign(p);
            }
            const A pull = factor * (dot * inverse * per_column), mean_sign = sign_sum * per_column;
            const A mean_sum = sum * per_column;
            for_row<A>(
                columns,
                [=](int64_t j) {
                    const Pack g = load_pack(dy + j), p = load_pack(x + j) - mean;
                    const Pack h = g * load_pack(weight + j);
                    store_pack(dx + j, (h - mean_sum - (sign(p) - mean_sign) * pull) * inverse);
                    store_pack(dweight + j, load_pack(dweight + j) + g * (p * inverse));
                    store_pack(dbias + j, load_pack(dbias + j) + g);
                },
                [=](int64_t j) {
                    const A g = to_compute(dy[j]), p = to_compute(x[j]) - mean, h = g * weight[j];
                    dx[j] = from_compute<X>((h - mean_sum - (sign(p) - mean_sign) * pull) * inverse);
                    dweight[j] += g * (p * inverse);
                    dbias[j] += g;
                });
        }
    }
}

}  // namespace

void l1_norm_forward_rows(const L1NormForward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { forward_rows<decltype(x)>(args, begin, end); });
}

void l1_norm_backward_chunks(const L1NormBackward& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto x) { backward_chunks<decltype(x)>(args, begin, end); });
}

NG_NAMESPACE_END
