// LayerNorm and RMSNorm, plain and with a fused residual add: the bindings.
#include "norm/norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

#if !NARROWGAUGE_CPU
#include "norm/norm_launch.h"
#endif

namespace narrowgauge {
namespace {

void run(const NormForward& args, [[maybe_unused]] const Tensor& x) {
    if (args.rows == 0) return;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(norm_forward_rows);
    parallel_ranges(args.rows, args.columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_norm_forward(args, device.stream());
#endif
}

struct Forward {
    Tensor y;
    OptionalTensor residual_out, mean, rstd;
};

Forward forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                const OptionalTensor& bias, double eps, double weight_offset, const OptionalDType& out_dtype,
                bool centred, bool keep_statistics, const OptionalTensor& scale = {},
                bool statistics_alone = false) {
    const auto [rows, columns] = check_rows(x);
    const DType x_type = dtype(x);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);
    check_residual(residual, x);
    const DType statistics = x_type == DType::float64 ? DType::float64 : DType::float32;
    if (scale) {
        check_layout(*scale, x, "scale");
        NG_CHECK(scale->numel() == rows && dtype(*scale) == statistics, "scale must hold one ",
                 name_of(statistics), " per row");
    }
    const DType y_type = dtype_or(out_dtype, x_type);
    NG_CHECK(is_companion(y_type, x_type), "out_dtype must be the dtype of x or float32");

    const std::vector<int64_t> sizes = sizes_of(x);
    Forward out{empty(statistics_alone ? std::vector<int64_t>{0} : sizes, y_type, x), {}, {}, {}};
    if (residual) out.residual_out = empty(sizes, dtype(*residual), x);
    if (keep_statistics) {
        const std::vector<int64_t> row_sizes(sizes.begin(), sizes.end() - 1);
        if (centred) out.mean = empty(row_sizes, statistics, x);
        out.rstd = empty(row_sizes, statistics, x);
    }
    NormForward args{};
    args.x = data(x);
    args.residual = data(residual);
    args.weight = data(weight);
    args.bias = data(bias);
    args.scale = data(scale);
    args.y = statistics_alone ? nullptr : data(out.y);
    args.residual_out = data(out.residual_out);
    args.mean = data(out.mean);
    args.rstd = data(out.rstd);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.weight_offset = weight_offset;
    args.centred = centred;
    args.x_type = x_type;
    args.residual_type = residual ? dtype(*residual) : x_type;
    args.weight_type = weight ? dtype(*weight) : x_type;
    args.bias_type = bias ? dtype(*bias) : x_type;
    args.y_type = y_type;
    run(args, x);
    return out;
}

Tensor layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  double weight_offset, const OptionalDType& out_dtype) {
    return forward(x, {}, weight, bias, eps, weight_offset, out_dtype, true, false).y;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                double weight_offset, const OptionalDType& out_dtype) {
    return forward(x, {}, weight, bias, eps, weight_offset, out_dtype, false, false).y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps,
                                                      double weight_offset, const OptionalDType& out_dtype) {
    Forward out = forward(x, {}, weight, bias, eps, weight_offset, out_dtype, true, true);
    return {std::move(out.y), std::move(*out.mean), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                            const OptionalTensor& bias, double eps, double weight_offset,
                                            const OptionalDType& out_dtype) {
    Forward out = forward(x, {}, weight, bias, eps, weight_offset, out_dtype, false, true);
    return {std::move(out.y), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor, Tensor> scaled_layer_norm(const Tensor& x, const Tensor& scale,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     double eps) {
    Forward out = forward(x, {}, weight, bias, eps, 0.0, {}, true, true, scale);
    return {std::move(out.y), std::move(*out.mean), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor> row_statistics(const Tensor& x, double eps) {
    Forward out = forward(x, {}, {}, {}, eps, 0.0, {}, true, true, {}, true);
    return {std::move(*out.mean), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          double eps, double weight_offset, const OptionalDType& out_dtype) {
    Forward out = forward(x, residual, weight, bias, eps, weight_offset, out_dtype, true, false);
    return {std::move(out.y), std::move(*out.residual_out)};
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                        const OptionalTensor& bias, double eps, double weight_offset,
                                        const OptionalDType& out_dtype) {
    Forward out = forward(x, residual, weight, bias, eps, weight_offset, out_dtype, false, false);
    return {std::move(out.y), std::move(*out.residual_out)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, double eps,
                                                                  double weight_offset,
                                                                  const OptionalDType& out_dtype) {
    Forward out = forward(x, residual, weight, bias, eps, weight_offset, out_dtype, true, true);
    return {std::move(out.y), std::move(*out.residual_out), std::move(*out.mean), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(const Tensor& x, const Tensor& residual,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps,
                                                        double weight_offset,
                                                        const OptionalDType& out_dtype) {
    Forward out = forward(x, residual, weight, bias, eps, weight_offset, out_dtype, false, true);
    return {std::move(out.y), std::move(*out.residual_out), std::move(*out.rstd)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const OptionalTensor& mean,
                                            const Tensor& rstd, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& dresidual,
                                            double weight_offset, bool affine_gradients,
                                            bool given_scale = false) {
    const auto [rows, columns] = check_rows(x);
    check_layout(dy, x, "dy");
    NG_CHECK(same_sizes(dy, x), "dy must have the shape of x");
    NG_CHECK(is_companion(dtype(dy), dtype(x)) || (dtype(x) == DType::float32 && dtype(dy) != DType::float64),
             "dy must have the dtype of x, or one of the two must be float32");
    const DType statistics = dtype(x) == DType::float64 ? DType::float64 : DType::float32;
    for (const OptionalTensor& statistic : {mean, OptionalTensor(rstd)}) {
        if (!statistic) continue;
        check_layout(*statistic, x, "mean and rstd");
        NG_CHECK(statistic->numel() == rows && dtype(*statistic) == statistics,
                 "mean and rstd must hold one ", name_of(statistics), " per row");
    }
    for (const OptionalTensor& vector : {weight, bias}) {
        if (!vector) continue;
        check_layout(*vector, x, "weight and bias");
        NG_CHECK(vector->dim() == 1 && vector->numel() == columns && is_floating(dtype(*vector)),
                 "weight and bias must be floating-point of shape [", columns, "]");
    }
    if (dresidual) {
        check_layout(*dresidual, x, "dresidual");
        NG_CHECK(same_sizes(*dresidual, x) && dtype(*dresidual) == dtype(x),
                 "dresidual must have the shape and dtype of x");
    }

    const bool dweight = affine_gradients && weight, dbias = affine_gradients && bias;
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    Tensor dweight_result = empty({dweight ? columns : 0}, weight ? dtype(*weight) : statistics, x);
    Tensor dbias_result = empty({dbias ? columns : 0}, bias ? dtype(*bias) : statistics, x);

    NormBackward args{};
    args.dy = data(dy);
    args.x = data(x);
    args.mean = data(mean);
    args.rstd = data(rstd);
    args.weight = data(weight);
    args.dresidual = data(dresidual);
    args.dx = data(dx);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.weight_offset = weight_offset;
    args.centred = mean.has_value();
    args.given_scale = given_scale;
    args.x_type = dtype(x);
    args.dy_type = dtype(dy);
    args.weight_type = weight ? dtype(*weight) : statistics;
#if NARROWGAUGE_CPU
    // Enough chunks for many threads, but few enough that the partial sums stay a small part of the traffic.
    args.chunks = std::clamp<int64_t>(rows / 16, 1, 64);
#else
    const OnDevice device(x);
    args.chunks = norm_backward_chunks_on_device(args);
#endif
    OptionalTensor dweight_partial, dbias_partial;
    if (dweight) dweight_partial = empty({args.chunks, columns}, statistics, x);
    if (dbias) dbias_partial = empty({args.chunks, columns}, statistics, x);
    args.dweight_partial = data(dweight_partial);
    args.dbias_partial = data(dbias_partial);

#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(norm_backward_chunks);
    parallel_ranges(args.chunks, rows / args.chunks * columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_norm_backward(args, device.stream());
#endif
    if (dweight) add_partial_sums(*dweight_partial, dweight_result);
    if (dbias) add_partial_sums(*dbias_partial, dbias_result);
    return {std::move(dx), std::move(dweight_result), std::move(dbias_result)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& dresidual, double weight_offset,
                                                       bool affine_gradients) {
    return backward(dy, x, mean, rstd, weight, bias, dresidual, weight_offset, affine_gradients);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     const OptionalTensor& dresidual, double weight_offset,
                                                     bool affine_gradients) {
    return backward(dy, x, {}, rstd, weight, bias, dresidual, weight_offset, affine_gradients);
}

std::tuple<Tensor, Tensor, Tensor> scaled_layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                              const Tensor& mean, const Tensor& scale,
                                                              const OptionalTensor& weight,
                                                              const OptionalTensor& bias,
                                                              bool affine_gradients) {
    return backward(dy, x, mean, scale, weight, bias, {}, 0.0, affine_gradients, true);
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("layer_norm", NG_BOX(&layer_norm));
    m.impl("layer_norm_forward", NG_BOX(&layer_norm_forward));
    m.impl("layer_norm_backward", NG_BOX(&layer_norm_backward));
    m.impl("add_layer_norm", NG_BOX(&add_layer_norm));
    m.impl("add_layer_norm_forward", NG_BOX(&add_layer_norm_forward));
    m.impl("rms_norm", NG_BOX(&rms_norm));
    m.impl("rms_norm_forward", NG_BOX(&rms_norm_forward));
    m.impl("rms_norm_backward", NG_BOX(&rms_norm_backward));
    m.impl("add_rms_norm", NG_BOX(&add_rms_norm));
    m.impl("add_rms_norm_forward", NG_BOX(&add_rms_norm_forward));
    m.impl("scaled_layer_norm", NG_BOX(&scaled_layer_norm));
    m.impl("scaled_layer_norm_backward", NG_BOX(&scaled_layer_norm_backward));
    m.impl("row_statistics", NG_BOX(&row_statistics));
}

}  // namespace narrowgauge
