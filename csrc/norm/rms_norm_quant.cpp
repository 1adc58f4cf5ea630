// RMSNorm with a quantized result: the bindings, and the CPU kernel, which is made of those of its two
// halves.
#include "norm/rms_norm_quant.h"

#include "norm/guards.h"
#include "quant/guards.h"

#if NARROWGAUGE_CPU
#include "common/scratch.h"
#endif

namespace narrowgauge {
namespace {

#if NARROWGAUGE_CPU
// Normalizes a few rows into float32 working memory that stays in the cache, and quantizes them from there.
void run(const RmsNormQuant& args, const Tensor&) {
    const int64_t columns = args.norm.columns,
                  rows_at_once = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns));
    const auto normalize = NG_CPU_POINTER(norm_forward_rows);
    const auto quantize = NG_CPU_POINTER(quantize_rows);
    parallel_ranges(args.norm.rows, columns, [&](int64_t begin, int64_t end) {
        const Scratch<float> y(rows_at_once * columns);
        for (int64_t row = begin; row < end; row += rows_at_once) {
            const int64_t rows = std::min(rows_at_once, end - row), first = row * columns;
            NormForward norm = args.norm;
            norm.x = static_cast<const char*>(norm.x) + first * size_of(norm.x_type);
            if (norm.residual) {
                norm.residual = static_cast<const char*>(norm.residual) + first * size_of(norm.residual_type);
                norm.residual_out =
                    static_cast<char*>(norm.residual_out) + first * size_of(norm.residual_type);
            }
            norm.y = y.get();
            if (columns > 0) normalize(norm, 0, rows);

            Quantize rest = args.quantize;
            rest.x = y.get();
            rest.codes = static_cast<char*>(rest.codes) + first;
            rest.scale += row;
            quantize(rest, 0, rows);
        }
    });
}
#else
void run(const RmsNormQuant& args, const Tensor& x) {
    if (args.norm.rows == 0) return;
    const OnDevice device(x);
    launch_rms_norm_quant(args, device.stream());
}
#endif

struct Results {
    Tensor codes, scale;
    OptionalTensor residual_out;
};

Results norm_and_quantize(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, double weight_offset,
                          const std::string& format) {
    const int64_t columns = check_rows(x).columns;
    NG_CHECK(dtype(x) != DType::float64, "x must be float32, bfloat16 or float16, got float64");
    check_vector(weight, "weight", x, columns);
    check_vector(bias, "bias", x, columns);
    if (residual) {
        check_layout(*residual, x, "residual");
        NG_CHECK(same_sizes(*residual, x), "residual must have the shape of x");
        NG_CHECK(is_companion(dtype(*residual), dtype(x)), "residual must have the dtype of x or float32");
    }
    const std::vector<int64_t> sizes = sizes_of(x), row_sizes(sizes.begin(), sizes.end() - 1);
    const DType code_type = code_type_of(format);
    Results out{empty(sizes, code_type, x), empty(row_sizes, DType::float32, x), {}};
    if (residual) out.residual_out = empty(sizes, dtype(*residual), x);

    RmsNormQuant args{};
    args.norm.x = data(x);
    args.norm.residual = data(residual);
    args.norm.weight = data(weight);
    args.norm.bias = data(bias);
    args.norm.residual_out = data(out.residual_out);
    args.norm.rows = out.scale.numel();
    args.norm.columns = columns;
    args.norm.per_column = 1.0 / static_cast<double>(columns);
    args.norm.eps = eps;
    args.norm.weight_offset = weight_offset;
    args.norm.x_type = dtype(x);
    args.norm.residual_type = residual ? dtype(*residual) : dtype(x);
    args.norm.weight_type = weight ? dtype(*weight) : dtype(x);
    args.norm.bias_type = bias ? dtype(*bias) : dtype(x);
    args.norm.y_type = DType::float32;
    args.quantize.codes = data(out.codes);
    args.quantize.scale = static_cast<float*>(data(out.scale));
    args.quantize.rows = args.norm.rows;
    args.quantize.columns = columns;
    args.quantize.granularity = Granularity::row;
    args.quantize.x_type = DType::float32;
    args.quantize.code_type = code_type;
    run(args, x);
    return out;
}

std::tuple<Tensor, Tensor> rms_norm_quant(const Tensor& x, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, double weight_offset,
                                          std::string format) {
    Results out = norm_and_quantize(x, {}, weight, bias, eps, weight_offset, format);
    return {out.codes, out.scale};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_quant(const Tensor& x, const Tensor& residual,
                                                      const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps,
                                                      double weight_offset, std::string format) {
    Results out = norm_and_quantize(x, residual, weight, bias, eps, weight_offset, format);
    return {out.codes, out.scale, *out.residual_out};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("rms_norm_quant", NG_BOX(&rms_norm_quant));
    m.impl("add_rms_norm_quant", NG_BOX(&add_rms_norm_quant));
}

}  // namespace narrowgauge
