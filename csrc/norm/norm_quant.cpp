// A norm with a quantized result: the binding.
#include "norm/norm_quant.h"

#include <cmath>

#include "norm/guards.h"
#include "quant/guards.h"

#if NARROWGAUGE_CPU
#include "common/scratch.h"
#else
#include "norm/norm_quant_launch.h"
#endif

namespace narrowgauge {
namespace {

#if NARROWGAUGE_CPU
void run(NormQuant& args, const Tensor&) {
    const int64_t rows = args.norm.rows, columns = args.norm.columns;
    if (!args.transposed) {
        const auto kernel = NG_CPU_POINTER(norm_quant_rows);
        return parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    }
    const int64_t tiles = (rows + kNormQuantTile - 1) / kNormQuantTile, work = kNormQuantTile * columns;
    const Scratch<uint32_t> largest(args.whole_columns ? tiles * columns : 0);
    args.largest_t = largest.get();
    const auto first = NG_CPU_POINTER(norm_quant_tiles);
    parallel_ranges(tiles, work, [&](int64_t begin, int64_t end) { first(args, begin, end); });
    if (!args.whole_columns) return;
    const auto scales = NG_CPU_POINTER(norm_quant_column_scales);
    parallel_ranges(columns, tiles, [&](int64_t begin, int64_t end) { scales(args, begin, end); });
    const auto second = NG_CPU_POINTER(norm_quant_transposed_tiles);
    parallel_ranges(tiles, work, [&](int64_t begin, int64_t end) { second(args, begin, end); });
}
#else
void run(NormQuant& args, const Tensor& x) {
    const OnDevice device(x);
    const int64_t tiles = (args.norm.rows + kNormQuantTile - 1) / kNormQuantTile;
    const Tensor largest = empty({args.whole_columns ? tiles * args.norm.columns : 0}, DType::int32, x);
    args.largest_t = static_cast<uint32_t*>(data(largest));
    launch_norm_quant(args, device.stream());
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_quant(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, double weight_offset, bool centred, std::string format, std::string granularity,
    const OptionalTensor& scale, double scale_upper_bound, bool transposed) {
    const auto [rows, columns] = check_rows(x);
    const DType x_type = dtype(x), code_type = code_type_of(format);
    NG_CHECK(x_type != DType::float64, "x must be float32, bfloat16 or float16, got float64");
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    NG_CHECK(scale_upper_bound > 0, "scale_upper_bound must be > 0, got ", scale_upper_bound);
    NG_CHECK(granularity == "tensor" || granularity == "row" || granularity == "block",
             "granularity must be tensor, row or block, got ", granularity);
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);
    check_residual(residual, x);
    NG_CHECK((granularity == "tensor") == scale.has_value(), "scale goes with granularity tensor");
    if (scale) {
        check_layout(*scale, x, "scale");
        NG_CHECK(dtype(*scale) == DType::float32 && scale->numel() == 1, "scale must be one float32 number");
    }

    const bool blocks = granularity == "block";
    NormQuant args{};
    args.segment = blocks ? kNormQuantTile : columns;
    args.segments = blocks ? (columns + kNormQuantTile - 1) / kNormQuantTile : 1;
    args.segments_t = blocks ? (rows + kNormQuantTile - 1) / kNormQuantTile : 1;
    args.transposed = transposed;
    args.whole_columns = transposed && granularity == "row";
    args.upper_bound = static_cast<float>(scale_upper_bound);
    args.code_type = code_type;

    const std::vector<int64_t> sizes = sizes_of(x), row_sizes(sizes.begin(), sizes.end() - 1), none{0};
    std::vector<int64_t> scale_sizes = row_sizes, scale_t_sizes = {columns};
    if (blocks) {
        scale_sizes.push_back(args.segments);
        scale_t_sizes.push_back(args.segments_t);
    }
    Tensor codes = empty(sizes, code_type, x);
    Tensor scale_out = empty(scale ? none : scale_sizes, DType::float32, x);
    Tensor codes_t = empty(transposed ? std::vector<int64_t>{columns, rows} : none, code_type, x);
    Tensor scale_t = empty(transposed && !scale ? scale_t_sizes : none, DType::float32, x);
    Tensor residual_out = residual ? empty(sizes, dtype(*residual), x) : empty(none, x_type, x);
    Tensor mean = empty(centred ? row_sizes : none, DType::float32, x);
    Tensor rstd = empty(row_sizes, DType::float32, x);

    args.norm.x = data(x);
    args.norm.residual = data(residual);
    args.norm.weight = data(weight);
    args.norm.bias = data(bias);
    args.norm.residual_out = residual ? data(residual_out) : nullptr;
    args.norm.mean = centred ? data(mean) : nullptr;
    args.norm.rstd = data(rstd);
    args.norm.rows = rows;
    args.norm.columns = columns;
    args.norm.per_column = 1.0 / static_cast<double>(columns);
    args.norm.eps = eps;
    args.norm.weight_offset = weight_offset;
    args.norm.centred = centred;
    args.norm.x_type = x_type;
    args.norm.residual_type = residual ? dtype(*residual) : x_type;
    args.norm.weight_type = weight ? dtype(*weight) : x_type;
    args.norm.bias_type = bias ? dtype(*bias) : x_type;
    args.norm.y_type = DType::float32;
    args.given = static_cast<const float*>(data(scale));
    args.codes = data(codes);
    args.scale = static_cast<float*>(data(scale_out));
    args.codes_t = data(codes_t);
    args.scale_t = static_cast<float*>(data(scale_t));
    run(args, x);
    return {codes, scale_out, codes_t, scale_t, residual_out, mean, rstd};
}

}  // namespace

NG_OPERATORS(m) { m.impl("norm_quant", NG_BOX(&norm_quant)); }

}  // namespace narrowgauge
