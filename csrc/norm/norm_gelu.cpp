// The normalization of TokenFormer's scores: the bindings.
#include "norm/norm_gelu.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

double reciprocal(double count) {
    NG_CHECK(count >= 0 && std::isfinite(count), "count must be a finite number >= 0, got ", count);
    return 1.0 / count;
}

DType statistics_of(const Tensor& s) { return dtype(s) == DType::float64 ? DType::float64 : DType::float32; }

std::tuple<Tensor, OptionalTensor> forward(const Tensor& s, double count, double eps, bool gelu_first,
                                           bool keep_rho) {
    const auto [rows, columns] = check_rows(s);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    const std::vector<int64_t> sizes = sizes_of(s);
    NormGelu args{};
    args.per_count = reciprocal(count);
    Tensor a = empty(sizes, dtype(s), s);
    OptionalTensor rho;
    if (keep_rho) rho = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), statistics_of(s), s);
    args.s = data(s);
    args.a = data(a);
    args.rho = data(rho);
    args.rows = rows;
    args.columns = columns;
    args.eps = eps;
    args.gelu_first = gelu_first;
    args.type = dtype(s);
    if (rows > 0) {
#if NARROWGAUGE_CPU
        const auto kernel = NG_CPU_POINTER(norm_gelu_rows);
        parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
        const OnDevice device(s);
        launch_norm_gelu(args, device.stream());
#endif
    }
    return {std::move(a), std::move(rho)};
}

Tensor norm_gelu(const Tensor& s, double count, double eps, bool gelu_first) {
    return std::get<0>(forward(s, count, eps, gelu_first, false));
}

std::tuple<Tensor, Tensor> norm_gelu_forward(const Tensor& s, double count, double eps, bool gelu_first) {
    auto [a, rho] = forward(s, count, eps, gelu_first, true);
    return {std::move(a), std::move(*rho)};
}

Tensor norm_gelu_backward(const Tensor& da, const Tensor& s, const Tensor& rho, double count,
                          bool gelu_first) {
    const auto [rows, columns] = check_rows(s);
    check_layout(da, s, "da");
    NG_CHECK(same_sizes(da, s) && dtype(da) == dtype(s), "da must have the shape and dtype of s");
    check_layout(rho, s, "rho");
    NG_CHECK(rho.numel() == rows && dtype(rho) == statistics_of(s), "rho must hold one ",
             name_of(statistics_of(s)), " per row");
    NormGeluBackward args{};
    args.per_count = reciprocal(count);
    Tensor ds = empty(sizes_of(s), dtype(s), s);
    args.da = data(da);
    args.s = data(s);
    args.rho = data(rho);
    args.ds = data(ds);
    args.rows = rows;
    args.columns = columns;
    args.gelu_first = gelu_first;
    args.type = dtype(s);
    if (rows > 0) {
#if NARROWGAUGE_CPU
        const auto kernel = NG_CPU_POINTER(norm_gelu_backward_rows);
        parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
        const OnDevice device(s);
        launch_norm_gelu_backward(args, device.stream());
#endif
    }
    return ds;
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("norm_gelu", NG_BOX(&norm_gelu));
    m.impl("norm_gelu_forward", NG_BOX(&norm_gelu_forward));
    m.impl("norm_gelu_backward", NG_BOX(&norm_gelu_backward));
}

}  // namespace narrowgauge
