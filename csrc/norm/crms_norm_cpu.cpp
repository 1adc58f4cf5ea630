// CPU kernels of CRMSNorm. A row is read from memory once and stays in the first-level cache for the second
// pass.
#include <cmath>

#include "common/twin.h"
#include "norm/crms_norm.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A>
struct Sums {
    A first, second;
};

// Two sums over a row in one pass: add(j, as, first, second) adds the terms at j to a twin each, or to a
// scalar each at the tail.
template <class A, class Add>
NG_HOST_DEVICE Sums<A> sum_row_twice(int64_t columns, Add add) {
    constexpr int lanes = Twin<A>::lanes;
    typename Twin<A>::type first[2] = {}, second[2] = {};
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) {
        add(j, AsTwin{}, first[0], second[0]);
        add(j + lanes, AsTwin{}, first[1], second[1]);
    }
    for (; j + lanes <= columns; j += lanes) add(j, AsTwin{}, first[0], second[0]);
    Sums<A> sums{sum_lanes(first[0] + first[1]), sum_lanes(second[0] + second[1])};
    for (; j < columns; ++j) add(j, AsScalar{}, sums.first, sums.second);
    return sums;
}

template <class X>
void forward_rows(const CrmsForward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    for (int64_t row = begin; row < end; ++row) {
        const X* x = row_of<X>(args.x, row, columns);
        X* y = row_of<X>(args.y, row, columns);
        const auto [sum, squares] =
            sum_row_twice<A>(columns, [=](int64_t j, auto as, auto& sums, auto& sums_of_squares) {
                const auto v = as(x + j);
                sums += v;
                sums_of_squares += v * v;
            });
        const A rstd = A(1) / std::sqrt((squares + sum * sum) * static_cast<A>(args.per_entry) +
                                        static_cast<A>(args.eps));
        if (args.rstd) static_cast<A*>(args.rstd)[row] = rstd;
        for_twins<A>(columns, [=](int64_t j, auto as) {
            __builtin_prefetch(x + columns + j);  // the next row, while this one is computed
            store_pack(y + j, as(x + j) * rstd);
        });
    }
}

template <class X>
void backward_rows(const CrmsBackward& args, int64_t begin, int64_t end) {
    using A = compute_t<X>;
    const int64_t columns = args.columns;
    for (int64_t row = begin; row < end; ++row) {
        const X* dy = row_of<X>(args.dy, row, columns);
        const X* x = row_of<X>(args.x, row, columns);
        X* dx = row_of<X>(args.dx, row, columns);
        const A rstd = static_cast<const A*>(args.rstd)[row];
        const auto [sum, dot] = sum_row_twice<A>(columns, [=](int64_t j, auto as, auto& sums, auto& dots) {
            const auto v = as(x + j);
            sums += v;
            dots += v * as(dy + j);
        });
        const A y_sum = sum * rstd, c = dot * rstd * static_cast<A>(args.per_entry);
        for_twins<A>(columns, [=](int64_t j, auto as) {
            __builtin_prefetch(x + columns + j);
            __builtin_prefetch(dy + columns + j);
            store_pack(dx + j, (as(dy + j) - (as(x + j) * rstd + y_sum) * c) * rstd);
        });
    }
}

}  // namespace

void crms_forward_rows(const CrmsForward& args, int64_t begin, int64_t end) {
    switch (args.type) {
        case DType::float64:
            return forward_rows<double>(args, begin, end);
        case DType::bfloat16:
            return forward_rows<bf16>(args, begin, end);
        case DType::float16:
            return forward_rows<f16>(args, begin, end);
        default:
            return forward_rows<float>(args, begin, end);
    }
}

void crms_backward_rows(const CrmsBackward& args, int64_t begin, int64_t end) {
    switch (args.type) {
        case DType::float64:
            return backward_rows<double>(args, begin, end);
        case DType::bfloat16:
            return backward_rows<bf16>(args, begin, end);
        case DType::float16:
            return backward_rows<f16>(args, begin, end);
        default:
            return backward_rows<float>(args, begin, end);
    }
}

NG_NAMESPACE_END
