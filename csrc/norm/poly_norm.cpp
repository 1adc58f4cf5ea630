// PolyNorm: the bindings.
#include "norm/poly_norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

Shape check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
    const Shape shape = check_rows(x);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    check_vector(weight, "weight", x, 3);
    check_vector(bias, "bias", x, 1);
    return shape;
}

Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps) {
    const auto [rows, columns] = check(x, weight, bias, eps);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    if (rows * columns == 0) return y;
    PolyNormForward args{};
    args.x = data(x);
    args.weight = data(weight);
    args.bias = data(bias);
    args.y = data(y);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.x_type = dtype(x);
    args.weight_type = dtype(weight);
    args.bias_type = bias ? dtype(*bias) : args.x_type;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(poly_norm_forward_rows);
    parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_poly_norm_forward(args, device.stream());
#endif
    return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, double eps,
                                            bool parameter_gradients) {
    auto [rows, columns] = check(x, weight, bias, eps);
    check_layout(dy, x, "dy");
    NG_CHECK(same_sizes(dy, x) && dtype(dy) == dtype(x), "dy must have the shape and dtype of x");
    if (columns == 0) rows = 0;  // whose sums are zero, where 0 * (1 / sqrt(0 / 0)) is not

    const DType sums = dtype(x) == DType::float64 ? DType::float64 : DType::float32;
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    Tensor dweight = empty({parameter_gradients ? 3 : 0}, dtype(weight), x);
    const bool with_bias = parameter_gradients && bias;
    Tensor dbias = empty({with_bias ? 1 : 0}, bias ? dtype(*bias) : sums, x);
    PolyNormBackward args{};
    args.dy = data(dy);
    args.x = data(x);
    args.weight = data(weight);
    args.dx = data(dx);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.x_type = dtype(x);
    args.weight_type = dtype(weight);
#if NARROWGAUGE_CPU
    args.chunks = std::clamp<int64_t>(rows / 16, 1, 64);
#else
    const OnDevice device(x);
    args.chunks = poly_norm_backward_chunks_on_device(args);
#endif
    OptionalTensor dweight_partial, dbias_partial;
    if (parameter_gradients) dweight_partial = empty({args.chunks, 3}, sums, x);
    if (with_bias) dbias_partial = empty({args.chunks, 1}, sums, x);
    args.dweight_partial = data(dweight_partial);
    args.dbias_partial = data(dbias_partial);
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(poly_norm_backward_chunks);
    parallel_ranges(args.chunks, rows / args.chunks * columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_poly_norm_backward(args, device.stream());
#endif
    if (dweight_partial) add_partial_sums(*dweight_partial, dweight);
    if (dbias_partial) add_partial_sums(*dbias_partial, dbias);
    return {std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("poly_norm", NG_BOX(&forward));
    m.impl("poly_norm_backward", NG_BOX(&backward));
}

}  // namespace narrowgauge
