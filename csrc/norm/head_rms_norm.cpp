// RMSNorm of every head, with the rotary embedding behind it: the bindings.
#include "norm/modulated_binding.h"

namespace narrowgauge {
namespace {

void check_table(const OptionalTensor& table, const Tensor& x, const char* name) {
    check_layout(*table, x, name);
    NG_CHECK(is_companion(dtype(*table), dtype(x)), name, " must have the dtype of x or float32");
    const int64_t positions = table->dim() - 1, before = x.dim() - 2 - positions;
    bool fits = positions >= 1 && before >= 0 && table->size(positions) == x.size(x.dim() - 1);
    for (int64_t i = 0; fits && i < positions; ++i) fits = table->size(i) == x.size(before + i);
    NG_CHECK(fits, name, " must have the dimensions of x before the heads, and its last one");
}

template <class Args>
Args arguments(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& cos,
               const OptionalTensor& sin, double eps, double weight_offset, bool interleaved) {
    Args args = modulation<Args>(x, weight, {}, eps, Statistic::rms);
    args.weight_offset = weight_offset;
    if (weight && weight->dim() == 2) {
        check_layout(*weight, x, "weight");
        NG_CHECK(x.dim() >= 2 && weight->size(0) == x.size(x.dim() - 2) && weight->size(1) == args.columns,
                 "weight must have the last one or two dimensions of x");
        NG_CHECK(is_companion(dtype(*weight), dtype(x)), "weight must have the dtype of x or float32");
        args.vectors = weight->size(0);
    } else {
        check_vector(weight, "weight", x, args.columns);
    }
    NG_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
    if (cos) {
        check_table(cos, x, "cos");
        check_table(sin, x, "sin");
        NG_CHECK(dtype(*cos) == dtype(*sin) && same_sizes(*cos, *sin), "cos and sin must be alike");
        NG_CHECK(args.columns % 2 == 0, "a rotated head must have an even size, got ", args.columns);
        args.cos = data(cos);
        args.sin = data(sin);
        args.table_type = dtype(*cos);
        args.interleaved = interleaved;
        args.heads = x.size(x.dim() - 2);
        args.positions = 1;
        for (int64_t i = 0; i + 1 < cos->dim(); ++i) args.positions *= cos->size(i);
    }
    return args;
}

Tensor head_rms_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& cos,
                     const OptionalTensor& sin, double eps, double weight_offset, bool interleaved) {
    auto args = arguments<ModulatedForward>(x, weight, cos, sin, eps, weight_offset, interleaved);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    args.y = data(y);
    if (cos) {
        run_forward<Around::rotation>(args, x);
    } else {
        run_forward<Around::nothing>(args, x);
    }
    return y;
}

std::tuple<Tensor, Tensor> head_rms_norm_backward(const Tensor& dy, const Tensor& x,
                                                  const OptionalTensor& weight, const OptionalTensor& cos,
                                                  const OptionalTensor& sin, double eps, double weight_offset,
                                                  bool interleaved, bool affine_gradients) {
    auto args = arguments<ModulatedBackward>(x, weight, cos, sin, eps, weight_offset, interleaved);
    check_like(dy, x, "dy");
    Tensor dx = empty(sizes_of(x), dtype(x), x), dweight = gradient_of(weight, affine_gradients, x);
    args.dy = data(dy);
    args.dy_type = dtype(dy);
    args.dx = data(dx);
    const OptionalTensor wanted = if_wanted(dweight, weight, affine_gradients);
    if (cos) {
        run_backward<Around::rotation>(args, x, wanted, {});
    } else {
        run_backward<Around::nothing>(args, x, wanted, {});
    }
    return {std::move(dx), std::move(dweight)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("head_rms_norm", NG_BOX(&head_rms_norm));
    m.impl("head_rms_norm_backward", NG_BOX(&head_rms_norm_backward));
}

}  // namespace narrowgauge
