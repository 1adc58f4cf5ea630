// L1 LayerNorm: the bindings.
#include "norm/l1_norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

DType statistics_of(const Tensor& x) { return dtype(x) == DType::float64 ? DType::float64 : DType::float32; }

std::tuple<Tensor, OptionalTensor, OptionalTensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, double eps,
                                                           double factor, bool keep_statistics) {
    const auto [rows, columns] = check_rows(x);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);

    const std::vector<int64_t> sizes = sizes_of(x);
    Tensor y = empty(sizes, dtype(x), x);
    OptionalTensor mean, inverse;
    if (keep_statistics) {
        const std::vector<int64_t> row_sizes(sizes.begin(), sizes.end() - 1);
        mean = empty(row_sizes, statistics_of(x), x);
        inverse = empty(row_sizes, statistics_of(x), x);
    }
    L1NormForward args{};
    args.x = data(x);
    args.weight = data(weight);
    args.bias = data(bias);
    args.y = data(y);
    args.mean = data(mean);
    args.inverse = data(inverse);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.factor = factor;
    args.x_type = dtype(x);
    args.weight_type = weight ? dtype(*weight) : args.x_type;
    args.bias_type = bias ? dtype(*bias) : args.x_type;
    if (rows > 0) {
#if NARROWGAUGE_CPU
        const auto kernel = NG_CPU_POINTER(l1_norm_forward_rows);
        parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
        const OnDevice device(x);
        launch_l1_norm_forward(args, device.stream());
#endif
    }
    return {std::move(y), std::move(mean), std::move(inverse)};
}

Tensor l1_layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                     double factor) {
    return std::get<0>(forward(x, weight, bias, eps, factor, false));
}

std::tuple<Tensor, Tensor, Tensor> l1_layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, double eps,
                                                         double factor) {
    auto [y, mean, inverse] = forward(x, weight, bias, eps, factor, true);
    return {std::move(y), std::move(*mean), std::move(*inverse)};
}

std::tuple<Tensor, Tensor, Tensor> l1_layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                          const Tensor& mean, const Tensor& inverse,
                                                          const OptionalTensor& weight,
                                                          const OptionalTensor& bias, double factor,
                                                          bool affine_gradients) {
    const auto [rows, columns] = check_rows(x);
    check_layout(dy, x, "dy");
    NG_CHECK(same_sizes(dy, x) && dtype(dy) == dtype(x), "dy must have the shape and dtype of x");
    for (const Tensor& statistic : {mean, inverse}) {
        check_layout(statistic, x, "mean and inverse");
        NG_CHECK(statistic.numel() == rows && dtype(statistic) == statistics_of(x),
                 "mean and inverse must hold one ", name_of(statistics_of(x)), " per row");
    }
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);

    const bool dweight = affine_gradients && weight, dbias = affine_gradients && bias;
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    Tensor dweight_result = empty({dweight ? columns : 0}, weight ? dtype(*weight) : statistics_of(x), x);
    Tensor dbias_result = empty({dbias ? columns : 0}, bias ? dtype(*bias) : statistics_of(x), x);

    L1NormBackward args{};
    args.dy = data(dy);
    args.x = data(x);
    args.mean = data(mean);
    args.inverse = data(inverse);
    args.weight = data(weight);
    args.dx = data(dx);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.factor = factor;
    args.x_type = dtype(x);
    args.weight_type = weight ? dtype(*weight) : args.x_type;
#if NARROWGAUGE_CPU
    args.chunks = std::clamp<int64_t>(rows / 16, 1, 64);
#else
    const OnDevice device(x);
    args.chunks = l1_norm_backward_chunks_on_device(args);
#endif
    OptionalTensor dweight_partial, dbias_partial;
    if (dweight) dweight_partial = empty({args.chunks, columns}, statistics_of(x), x);
    if (dbias) dbias_partial = empty({args.chunks, columns}, statistics_of(x), x);
    args.dweight_partial = data(dweight_partial);
    args.dbias_partial = data(dbias_partial);

#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(l1_norm_backward_chunks);
    parallel_ranges(args.chunks, rows / args.chunks * columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_l1_norm_backward(args, device.stream());
#endif
    if (dweight) add_partial_sums(*dweight_partial, dweight_result);
    if (dbias) add_partial_sums(*dbias_partial, dbias_result);
    return {std::move(dx), std::move(dweight_result), std::move(dbias_result)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("l1_layer_norm", NG_BOX(&l1_layer_norm));
    m.impl("l1_layer_norm_forward", NG_BOX(&l1_layer_norm_forward));
    m.impl("l1_layer_norm_backward", NG_BOX(&l1_layer_norm_backward));
}

}  // namespace narrowgauge
