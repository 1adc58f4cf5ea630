// CPU kernels of the Peri-LN junction. A row is read from memory once and stays in the first-level cache for
// the passes that follow. X is the type of f and y, S that of the stream.
#include <cmath>
#include <type_traits>

#include "common/floating.h"
#include "common/twin.h"
#include "norm/peri_add_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class X, class S>
void forward_rows(const PeriForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    const A offset = static_cast<A>(args.weight_offset), eps = static_cast<A>(args.eps);
    Scratch<A> out_space(columns), in_space(columns), sum_space(columns);
    const A* weight_out =
        widened<A>(args.weight_out, args.weight_out_type, offset, A(1), columns, out_space.get());
    const A* weight_in =
        widened<A>(args.weight_in, args.weight_in_type, offset, A(1), columns, in_space.get());
    A* s = sum_space.get();  // un-rounded: what is normalized, even where x_new is stored narrower
    for (int64_t row = begin; row < end; ++row) {
        const X* f = row_of<X>(args.f, row, columns);
        const S* x = row_of<S>(args.x, row, columns);
        X* y = row_of<X>(args.y, row, columns);
        S* x_new = row_of<S>(args.x_new, row, columns);
        const A squares = sum_twins<A>(columns, [=](int64_t j, auto as) {
            const auto v = as(f + j);
            return v * v;
        });
        const A rstd_out = A(1) / std::sqrt(squares / static_cast<A>(columns) + eps);
        const A sum_of_squares = sum_twins<A>(columns, [=](int64_t j, auto as) {
            const auto v = as(f + j) * rstd_out * as(weight_out + j) + as(x + j);
            store_pack(s + j, v);
            store_pack(x_new + j, v);
            return v * v;
        });
        const A rstd_in = A(1) / std::sqrt(sum_of_squares / static_cast<A>(columns) + eps);
        for_twins<A>(columns, [=](int64_t j, auto as) {
            __builtin_prefetch(f + columns + j);  // the next row, while this one is computed
            __builtin_prefetch(x + columns + j);
            store_pack(y + j, as(s + j) * rstd_in * as(weight_in + j));
        });
        if (args.rstd_out) static_cast<A*>(args.rstd_out)[row] = rstd_out;
        if (args.rstd_in) static_cast<A*>(args.rstd_in)[row] = rstd_in;
    }
}

template <class X, class S>
void backward_chunks(const PeriBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    const A offset = static_cast<A>(args.weight_offset);
    Scratch<A> out_space(columns), in_space(columns), d_space(columns), unused(columns);
    const A* weight_out =
        widened<A>(args.weight_out, args.weight_out_type, offset, A(1), columns, out_space.get());
    const A* weight_in =
        widened<A>(args.weight_in, args.weight_in_type, offset, A(1), columns, in_space.get());
    A* d = d_space.get();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        // Sums that nobody asked for go nowhere.
        const auto sums = [&](void* partial) {
            return partial ? row_of<A>(partial, chunk, columns) : unused.get();
        };
        A* dweight_out = sums(args.dweight_out_partial);
        A* dweight_in = sums(args.dweight_in_partial);
        for (int64_t j = 0; j < columns; ++j) dweight_out[j] = dweight_in[j] = 0;

        const int64_t last = args.rows * (chunk + 1) / args.chunks;
        for (int64_t row = args.rows * chunk / args.chunks; row < last; ++row) {
            const X* dy = row_of<X>(args.dy, row, columns);
            const S* dx_new = args.dx_new ? row_of<S>(args.dx_new, row, columns) : nullptr;
            const X* f = row_of<X>(args.f, row, columns);
            const S* x_new = row_of<S>(args.x_new, row, columns);
            X* df = row_of<X>(args.df, row, columns);
            S* dx = row_of<S>(args.dx, row, columns);
            const A rstd_out = static_cast<const A*>(args.rstd_out)[row];
            const A rstd_in = static_cast<const A*>(args.rstd_in)[row];

            const A dot_in = sum_twins<A>(
                columns, [=](int64_t j, auto as) { return as(dy + j) * as(weight_in + j) * as(x_new + j); });
            const A mean_in = dot_in * rstd_in / static_cast<A>(columns);
            const auto stream_gradient = [&](auto with_dx_new) {
                return sum_twins<A>(columns, [=](int64_t j, auto as) {
                    const auto g = as(dy + j), x_hat = as(x_new + j) * rstd_in;
                    auto v = (g * as(weight_in + j) - x_hat * mean_in) * rstd_in;
                    if constexpr (with_dx_new) v += as(dx_new + j);
                    store_pack(d + j, v);
                    store_pack(dx + j, v);
                    store_pack(dweight_in + j, as(dweight_in + j) + g * x_hat);
                    return v * as(weight_out + j) * as(f + j);
                });
            };
            const A dot_out = dx_new ? stream_gradient(std::true_type{}) : stream_gradient(std::false_type{});
            const A mean_out = dot_out * rstd_out / static_cast<A>(columns);
            for_twins<A>(columns, [=](int64_t j, auto as) {
                __builtin_prefetch(dy + columns + j);  // the next row, while this one is computed
                __builtin_prefetch(f + columns + j);
                __builtin_prefetch(x_new + columns + j);
                if (dx_new) __builtin_prefetch(dx_new + columns + j);
                const auto k = as(d + j), f_hat = as(f + j) * rstd_out;
                store_pack(df + j, (k * as(weight_out + j) - f_hat * mean_out) * rstd_out);
                store_pack(dweight_out + j, as(dweight_out + j) + k * f_hat);
            });
        }
    }
}

// Calls f(x, s): the types of the branch and of the stream, as values of them.
template <class F>
void with_types(DType f_type, DType x_type, F f) {
    with_floating(f_type, [&](auto x) {
        if constexpr (sizeof(x) < sizeof(float)) {
            if (x_type == DType::float32) return f(x, float{});
        }
        f(x, x);
    });
}

}  // namespace

void peri_forward_rows(const PeriForward& args, int64_t begin, int64_t end) {
    with_types(args.f_type, args.x_type,
               [&](auto x, auto s) { forward_rows<decltype(x), decltype(s)>(args, begin, end); });
}

void peri_backward_chunks(const PeriBackward& args, int64_t begin, int64_t end) {
    with_types(args.f_type, args.x_type,
               [&](auto x, auto s) { backward_chunks<decltype(x), decltype(s)>(args, begin, end); });
}

NG_NAMESPACE_END
