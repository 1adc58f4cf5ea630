// CRMSNorm: the bindings.
#include "norm/crms_norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

DType statistics_of(const Tensor& x) { return dtype(x) == DType::float64 ? DType::float64 : DType::float32; }

Tensor forward(const Tensor& x, double eps, OptionalTensor& rstd, bool keep_rstd) {
    const auto [rows, columns] = check_rows(x);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    const std::vector<int64_t> sizes = sizes_of(x);
    Tensor y = empty(sizes, dtype(x), x);
    if (keep_rstd) rstd = empty(std::vector<int64_t>(sizes.begin(), sizes.end() - 1), statistics_of(x), x);
    const CrmsForward args{
        data(x), data(y), data(rstd), rows, columns, 1.0 / static_cast<double>(columns + 1), eps, dtype(x)};
    if (rows == 0) return y;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(crms_forward_rows);
    parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_crms_forward(args, device.stream());
#endif
    return y;
}

Tensor crms_norm(const Tensor& x, double eps) {
    OptionalTensor rstd;
    return forward(x, eps, rstd, false);
}

std::tuple<Tensor, Tensor> crms_norm_forward(const Tensor& x, double eps) {
    OptionalTensor rstd;
    Tensor y = forward(x, eps, rstd, true);
    return {std::move(y), std::move(*rstd)};
}

Tensor crms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd) {
    const auto [rows, columns] = check_rows(x);
    check_layout(dy, x, "dy");
    check_layout(rstd, x, "rstd");
    NG_CHECK(same_sizes(dy, x) && dtype(dy) == dtype(x), "dy must have the shape and dtype of x");
    NG_CHECK(rstd.numel() == rows && dtype(rstd) == statistics_of(x), "rstd must hold one ",
             name_of(statistics_of(x)), " per row");
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    const CrmsBackward args{
        data(dy), data(x), data(rstd), data(dx), rows, columns, 1.0 / static_cast<double>(columns + 1),
        dtype(x)};
    if (rows == 0) return dx;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(crms_backward_rows);
    parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_crms_backward(args, device.stream());
#endif
    return dx;
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("crms_norm", NG_BOX(&crms_norm));
    m.impl("crms_norm_forward", NG_BOX(&crms_norm_forward));
    m.impl("crms_norm_backward", NG_BOX(&crms_norm_backward));
}

}  // namespace narrowgauge
