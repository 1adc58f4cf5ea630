// The general row norm: the bindings.
#include "norm/general_norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

#if !NARROWGAUGE_CPU
#include "norm/general_norm_launch.h"
#endif

namespace narrowgauge {
namespace {

DType statistics_of(DType type) { return type == DType::float64 ? DType::float64 : DType::float32; }

DType type_or(const OptionalTensor& tensor, DType otherwise) { return tensor ? dtype(*tensor) : otherwise; }

// A tensor of the shape of x whose type may stand beside that of x.
void check_beside(const OptionalTensor& tensor, const Tensor& x, DType x_type, const char* name) {
    if (!tensor) return;
    check_layout(*tensor, x, name);
    NG_CHECK(same_sizes(*tensor, x), name, " must have the shape of x");
    NG_CHECK(is_companion(dtype(*tensor), x_type), name, " must have the dtype of x or float32");
}

GeneralBranch branch_of(const Tensor& x, int64_t rows, const OptionalTensor& rowscale,
                        const OptionalTensor& mask, const OptionalTensor& mask1, const OptionalTensor& rng,
                        double dropout_p) {
    NG_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be from 0 to 1, got ", dropout_p);
    if (rowscale) {
        check_layout(*rowscale, x, "rowscale");
        NG_CHECK(rowscale->numel() == rows && is_floating(dtype(*rowscale)),
                 "rowscale must hold one floating-point number per row");
    }
    for (const OptionalTensor& given : {mask, mask1}) {
        if (!given) continue;
        check_layout(*given, x, "dropout_mask");
        NG_CHECK(same_sizes(*given, x) && dtype(*given) == DType::boolean,
                 "dropout_mask must be bool, of the shape of x");
    }
    if (rng) {
        check_layout(*rng, x, "rng");
        NG_CHECK(rng->numel() == 2 && dtype(*rng) == DType::int64, "rng must be int64 of two elements");
    }
    GeneralBranch branch{};
    branch.rowscale = data(rowscale);
    branch.mask = data(mask);
    branch.mask1 = data(mask1);
    branch.rng = static_cast<const int64_t*>(data(rng));
    branch.dropout_scale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
    branch.dropout_p = static_cast<float>(dropout_p);
    branch.rowscale_type = type_or(rowscale, DType::float32);
    return branch;
}

Casting casting_of(const std::string& name) {
    NG_CHECK(name == "gemma" || name == "llama" || name == "none",
             "casting must be \"gemma\", \"llama\" or \"none\", got ", name);
    return name == "gemma" ? Casting::gemma : name == "llama" ? Casting::llama : Casting::none;
}

struct Forward {
    Tensor y, residual_out, y1, mean, rstd;
};

Forward forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& x1,
                const OptionalTensor& rowscale, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& mask,
                const OptionalTensor& mask1, const OptionalTensor& rng, double dropout_p, double eps,
                double weight_offset, double output_scale, bool centred, const std::string& casting,
                const OptionalDType& out_dtype, const OptionalDType& residual_dtype, bool keep_sum,
                bool keep_statistics) {
    const auto [rows, columns] = check_rows(x);
    const DType x_type = dtype(x);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);
    check_vector(weight1, "weight1", x, columns);
    check_vector(bias1, "bias1", x, columns);
    check_beside(residual, x, x_type, "residual");
    check_beside(x1, x, x_type, "x1");
    NG_CHECK(type_or(x1, x_type) == x_type, "x1 must have the dtype of x");

    GeneralForward args{};
    args.branch = branch_of(x, rows, rowscale, mask, mask1, rng, dropout_p);
    args.casting = casting_of(casting);
    args.x_type = x_type;
    args.residual_type = type_or(residual, x_type);
    args.sum_type = dtype_or(residual_dtype, args.residual_type);
    args.y_type = dtype_or(out_dtype, x_type);
    NG_CHECK(is_companion(args.y_type, x_type), "out_dtype must be the dtype of x or float32");
    NG_CHECK(is_companion(args.sum_type, x_type), "residual_dtype must be the dtype of x or float32");

    const std::vector<int64_t> sizes = sizes_of(x), none{0};
    const std::vector<int64_t> row_sizes(sizes.begin(), sizes.end() - 1);
    const DType statistics = statistics_of(x_type);
    const bool second = weight1 || bias1;
    Forward out{empty(sizes, args.y_type, x), empty(keep_sum ? sizes : none, args.sum_type, x),
                empty(second ? sizes : none, args.y_type, x),
                empty(keep_statistics && centred ? row_sizes : none, statistics, x),
                empty(keep_statistics ? row_sizes : none, statistics, x)};
    args.x = data(x);
    args.x1 = data(x1);
    args.residual = data(residual);
    args.weight = data(weight);
    args.bias = data(bias);
    args.weight1 = data(weight1);
    args.bias1 = data(bias1);
    args.y = data(out.y);
    args.y1 = second ? data(out.y1) : nullptr;
    args.residual_out = keep_sum ? data(out.residual_out) : nullptr;
    args.mean = keep_statistics && centred ? data(out.mean) : nullptr;
    args.rstd = keep_statistics ? data(out.rstd) : nullptr;
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.weight_offset = weight_offset;
    args.output_scale = output_scale;
    args.centred = centred;
    args.weight_type = type_or(weight, x_type);
    args.bias_type = type_or(bias, x_type);
    args.weight1_type = type_or(weight1, x_type);
    args.bias1_type = type_or(bias1, x_type);
    if (rows == 0) return out;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(general_norm_forward_rows);
    parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_general_norm_forward(args, device.stream());
#endif
    return out;
}

std::tuple<Tensor, Tensor, Tensor> general_norm(const Tensor& x, const OptionalTensor& residual,
                                                const OptionalTensor& x1, const OptionalTensor& rowscale,
                                                const OptionalTensor& weight, const OptionalTensor& bias,
                                                const OptionalTensor& weight1, const OptionalTensor& bias1,
                                                const OptionalTensor& mask, const OptionalTensor& mask1,
                                                const OptionalTensor& rng, double dropout_p, double eps,
                                                double weight_offset, double output_scale, bool centred,
                                                const std::string& casting, const OptionalDType& out_dtype,
                                                const OptionalDType& residual_dtype, bool keep_sum) {
    Forward out =
        forward(x, residual, x1, rowscale, weight, bias, weight1, bias1, mask, mask1, rng, dropout_p, eps,
                weight_offset, output_scale, centred, casting, out_dtype, residual_dtype, keep_sum, false);
    return {std::move(out.y), std::move(out.residual_out), std::move(out.y1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> general_norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& x1, const OptionalTensor& rowscale,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& mask, const OptionalTensor& mask1,
    const OptionalTensor& rng, double dropout_p, double eps, double weight_offset, double output_scale,
    bool centred, const std::string& casting, const OptionalDType& out_dtype,
    const OptionalDType& residual_dtype, bool keep_sum) {
    keep_sum = keep_sum || residual || x1 || rowscale || mask || rng;
    Forward out =
        forward(x, residual, x1, rowscale, weight, bias, weight1, bias1, mask, mask1, rng, dropout_p, eps,
                weight_offset, output_scale, centred, casting, out_dtype, residual_dtype, keep_sum, true);
    return {std::move(out.y), std::move(out.residual_out), std::move(out.y1), std::move(out.mean),
            std::move(out.rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> general_norm_backward(
    const Tensor& dy, const OptionalTensor& dy1, const Tensor& s, const OptionalTensor& mean,
    const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& dresidual,
    const OptionalTensor& rowscale, const OptionalTensor& mask, const OptionalTensor& mask1,
    const OptionalTensor& rng, double dropout_p, double weight_offset, double output_scale, bool centred,
    bool from_output, double min_weight, const OptionalDType& x_dtype, const OptionalDType& residual_dtype,
    bool for_residual, bool for_x1, bool affine_gradients) {
    const auto [rows, columns] = check_rows(s);
    const DType x_type = dtype_or(x_dtype, dtype(s)), statistics = statistics_of(x_type);
    const DType residual_type = dtype_or(residual_dtype, x_type);
    NG_CHECK(is_floating(x_type) && is_companion(dtype(s), x_type), "s must have the dtype of x or float32");
    NG_CHECK(is_companion(residual_type, x_type), "residual_dtype must be the dtype of x or float32");
    check_beside(dy, s, x_type, "dy");
    check_beside(dy1, s, x_type, "dy1");
    check_beside(dresidual, s, x_type, "dresidual");
    NG_CHECK(!dy1 || dtype(*dy1) == dtype(dy), "dy1 must have the dtype of dy");
    NG_CHECK(from_output || !centred || mean, "mean is missing");
    for (const OptionalTensor& statistic : {mean, OptionalTensor(rstd)}) {
        if (!statistic) continue;
        check_layout(*statistic, s, "mean and rstd");
        NG_CHECK(statistic->numel() == rows && dtype(*statistic) == statistics,
                 "mean and rstd must hold one ", name_of(statistics), " per row");
    }
    const OptionalTensor* const vectors[4] = {&weight, &bias, &weight1, &bias1};
    for (const OptionalTensor* vector : vectors) {
        if (!*vector) continue;
        check_layout(**vector, s, "weight and bias");
        NG_CHECK(
            (*vector)->dim() == 1 && (*vector)->numel() == columns && is_companion(dtype(**vector), x_type),
            "weight and bias must be of shape [", columns, "], in the dtype of x or float32");
    }

    GeneralBackward args{};
    args.branch = branch_of(s, rows, rowscale, mask, mask1, rng, dropout_p);
    const bool x_scaled = rowscale || args.branch.drops(0);
    const bool residual_apart = for_residual && (x_scaled || x_type != residual_type);
    const bool x1_apart = for_x1 && (x_scaled || args.branch.drops(1));
    const std::vector<int64_t> sizes = sizes_of(s), none{0};
    Tensor dx = empty(sizes, x_type, s);
    Tensor dresidual_in = empty(residual_apart ? sizes : none, residual_type, s);
    Tensor dx1 = empty(x1_apart ? sizes : none, x_type, s);
    args.dy = data(dy);
    args.dy1 = data(dy1);
    args.s = data(s);
    args.mean = data(mean);
    args.rstd = data(rstd);
    args.weight = data(weight);
    args.bias = data(bias);
    args.weight1 = data(weight1);
    args.dresidual = data(dresidual);
    args.dx = data(dx);
    args.dresidual_in = residual_apart ? data(dresidual_in) : nullptr;
    args.dx1 = x1_apart ? data(dx1) : nullptr;
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.weight_offset = weight_offset;
    args.output_scale = output_scale;
    args.min_weight = min_weight;
    args.centred = centred;
    args.from_output = from_output;
    args.x_type = x_type;
    args.s_type = dtype(s);
    args.dy_type = dtype(dy);
    args.residual_type = residual_type;
    args.dresidual_type = type_or(dresidual, x_type);
    args.weight_type = type_or(weight, statistics);
    args.bias_type = type_or(bias, statistics);
    args.weight1_type = type_or(weight1, statistics);
#if NARROWGAUGE_CPU
    args.chunks = std::clamp<int64_t>(rows / 16, 1, 64);  // as in norm.cpp
#else
    const OnDevice device(s);
    args.chunks = general_norm_backward_chunks_on_device(args);
#endif
    Tensor results[4] = {dx, dx, dx, dx};
    OptionalTensor partials[4];
    void** const targets[4] = {&args.dweight_partial, &args.dbias_partial, &args.dweight1_partial,
                               &args.dbias1_partial};
    for (int i = 0; i < 4; ++i) {
        const bool wanted = affine_gradients && *vectors[i] && (i < 2 || dy1);
        results[i] = empty({wanted ? columns : 0}, type_or(*vectors[i], statistics), s);
        if (wanted) partials[i] = empty({args.chunks, columns}, statistics, s);
        *targets[i] = data(partials[i]);
    }
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(general_norm_backward_chunks);
    parallel_ranges(args.chunks, rows / args.chunks * columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_general_norm_backward(args, device.stream());
#endif
    for (int i = 0; i < 4; ++i) {
        if (partials[i]) add_partial_sums(*partials[i], results[i]);
    }
    return {std::move(dx),         std::move(dresidual_in), std::move(dx1),       std::move(results[0]),
            std::move(results[1]), std::move(results[2]),   std::move(results[3])};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("general_norm", NG_BOX(&general_norm));
    m.impl("general_norm_forward", NG_BOX(&general_norm_forward));
    m.impl("general_norm_backward", NG_BOX(&general_norm_backward));
}

}  // namespace narrowgauge
