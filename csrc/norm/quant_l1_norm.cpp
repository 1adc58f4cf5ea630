// L1 LayerNorm in integers: the binding.
#include "norm/quant_l1_norm.h"

#include "norm/guards.h"

namespace narrowgauge {
namespace {

Tensor quant_l1_norm(const Tensor& codes, const Tensor& weight, const Tensor& bias, int64_t limit) {
    NG_CHECK(dtype(codes) == DType::int8, "codes must be int8, got ", name_of(dtype(codes)));
    NG_CHECK(codes.dim() >= 1, "codes must have at least one dimension");
    check_layout(codes, codes, "codes");
    const std::vector<int64_t> sizes = sizes_of(codes);
    const int64_t columns = sizes.back();
    NG_CHECK(columns <= quant_l1_max_columns, "rows must have at most 262144 elements, got ", columns);
    NG_CHECK(limit > 0 && limit < (1 << 20), "limit must be between 1 and 2^20 - 1, got ", limit);
    for (const Tensor& vector : {weight, bias}) {
        check_layout(vector, codes, "weight and bias");
        NG_CHECK(dtype(vector) == DType::int32 && vector.dim() == 1 && vector.numel() == columns,
                 "weight and bias must be int32 of shape [", columns, "]");
    }
    Tensor result = empty(sizes, DType::int8, codes);
    if (result.numel() == 0) return result;
    QuantL1Norm args{};
    args.codes = static_cast<const int8_t*>(data(codes));
    args.weight = static_cast<const int32_t*>(data(weight));
    args.bias = static_cast<const int32_t*>(data(bias));
    args.result = static_cast<int8_t*>(data(result));
    args.rows = result.numel() / columns;
    args.columns = columns;
    args.limit = limit;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(quant_l1_norm_rows);
    parallel_ranges(args.rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(codes);
    launch_quant_l1_norm(args, device.stream());
#endif
    return result;
}

}  // namespace

NG_OPERATORS(m) { m.impl("quant_l1_norm", NG_BOX(&quant_l1_norm)); }

}  // namespace narrowgauge
