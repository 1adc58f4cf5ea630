// Gated RMSNorm: the bindings.
#include <string>

#include "norm/modulated_binding.h"

namespace narrowgauge {
namespace {

template <class Args>
Args arguments(const Tensor& x, const Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
               double eps, int64_t group_size, bool norm_before_gate, const std::string& activation) {
    Args args = modulation<Args>(x, weight, bias, eps, Statistic::rms);
    check_like(z, x, "z");
    check_vector(weight, "weight", x, args.columns);
    check_vector(bias, "bias", x, args.columns);
    const bool fits = group_size > 0 ? args.columns % group_size == 0 : group_size == 0 && args.columns == 0;
    NG_CHECK(fits, "group_size must be a positive divisor of ", args.columns, ", got ", group_size);
    NG_CHECK(activation == "silu" || activation == "sigmoid", "activation must be silu or sigmoid, got ",
             activation);
    args.z = data(z);
    args.norm_first = norm_before_gate;
    args.silu = activation == "silu";
    // Each group is a row, with its part of the weight.
    if (args.columns > 0) {
        args.vectors = args.columns / group_size;
        args.rows *= args.vectors;
        args.columns = group_size;
        args.per_column = 1.0 / static_cast<double>(group_size);
    }
    return args;
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& z, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, int64_t group_size, bool norm_before_gate,
                      const std::string& activation) {
    auto args =
        arguments<ModulatedForward>(x, z, weight, bias, eps, group_size, norm_before_gate, activation);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    args.y = data(y);
    run_forward<Around::gate>(args, x);
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& z, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, int64_t group_size, bool norm_before_gate,
    const std::string& activation, bool affine_gradients) {
    auto args =
        arguments<ModulatedBackward>(x, z, weight, bias, eps, group_size, norm_before_gate, activation);
    check_like(dy, x, "dy");
    Tensor dx = empty(sizes_of(x), dtype(x), x), dz = empty(sizes_of(x), dtype(x), x);
    Tensor dweight = gradient_of(weight, affine_gradients, x), dbias = gradient_of(bias, affine_gradients, x);
    args.dy = data(dy);
    args.dy_type = dtype(dy);
    args.dx = data(dx);
    args.dz = data(dz);
    run_backward<Around::gate>(args, x, if_wanted(dweight, weight, affine_gradients),
                               if_wanted(dbias, bias, affine_gradients));
    return {std::move(dx), std::move(dz), std::move(dweight), std::move(dbias)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("gated_rms_norm", NG_BOX(&gated_rms_norm));
    m.impl("gated_rms_norm_backward", NG_BOX(&gated_rms_norm_backward));
}

}  // namespace narrowgauge
