// Modulated norms (AdaLN) and the gated residual: the bindings.
#include <type_traits>

#include "norm/modulated_binding.h"

namespace narrowgauge {
namespace {

// In the backward x may be a wide residual stream, and the parameters narrower than it.
void check_modulation(const OptionalTensor& parameter, const Tensor& x, const char* name, bool backward) {
    if (!parameter) return;
    check_leading(*parameter, x, name);
    const DType type = dtype(*parameter);
    NG_CHECK(is_companion(type, dtype(x)) || (backward && is_companion(dtype(x), type)), name,
             " must have the dtype of x or float32");
}

template <class Args>
Args arguments(const Tensor& x, const Tensor& scale, const OptionalTensor& shift, double eps, bool centred) {
    Args args =
        modulation<Args>(x, OptionalTensor(scale), shift, eps, centred ? Statistic::layer : Statistic::rms);
    constexpr bool backward = std::is_same_v<Args, ModulatedBackward>;
    check_modulation(scale, x, "scale", backward);
    check_modulation(shift, x, "shift", backward);
    NG_CHECK(!shift || same_sizes(*shift, scale), "shift must have the shape of scale");
    args.weight_offset = 1;
    set_leading(args, scale);
    return args;
}

void set_residual(ModulatedForward& args, const Tensor& x, const Tensor& residual, const Tensor& gate) {
    check_layout(residual, x, "residual");
    NG_CHECK(same_sizes(residual, x), "residual must have the shape of x");
    NG_CHECK(is_companion(dtype(residual), dtype(x)), "residual must have the dtype of x or float32");
    check_modulation(gate, x, "gate", false);
    args.residual = data(residual);
    args.residual_type = dtype(residual);
    args.gate = data(gate);
    args.gate_type = dtype(gate);
}

Tensor ada_norm(const Tensor& x, const Tensor& scale, const OptionalTensor& shift, double eps, bool centred) {
    auto args = arguments<ModulatedForward>(x, scale, shift, eps, centred);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    args.y = data(y);
    run_forward<Around::nothing>(args, x);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> ada_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& scale,
                                                     const OptionalTensor& shift,
                                                     const OptionalTensor& dresidual, double eps,
                                                     bool centred, bool modulation_gradients) {
    auto args = arguments<ModulatedBackward>(x, scale, shift, eps, centred);
    check_gradient(dy, x);
    if (dresidual) check_like(*dresidual, x, "dresidual");
    const OptionalTensor weight(scale);
    Tensor dx = empty(sizes_of(x), dtype(x), x), dscale = gradient_of(weight, modulation_gradients, x),
           dshift = gradient_of(shift, modulation_gradients, x);
    args.dy = data(dy);
    args.dy_type = dtype(dy);
    args.dresidual = data(dresidual);
    args.dx = data(dx);
    run_backward<Around::nothing>(args, x, if_wanted(dscale, weight, modulation_gradients),
                                  if_wanted(dshift, shift, modulation_gradients));
    return {std::move(dx), std::move(dscale), std::move(dshift)};
}

Tensor gated_residual(const Tensor& x, const Tensor& residual, const Tensor& gate) {
    auto args = modulation<ModulatedForward>(x, {}, {}, 0, Statistic::none);
    set_residual(args, x, residual, gate);
    set_leading(args, gate);
    Tensor out = empty(sizes_of(x), dtype(residual), x);
    args.residual_out = data(out);
    run_forward<Around::residual>(args, x);
    return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                                   bool gate_gradient) {
    const OptionalTensor weight(gate);
    auto args = modulation<ModulatedBackward>(x, weight, {}, 0, Statistic::none);
    check_modulation(gate, x, "gate", true);
    check_gradient(dy, x);
    set_leading(args, gate);
    Tensor dx = empty(sizes_of(x), dtype(x), x), dgate = gradient_of(weight, gate_gradient, x);
    args.dy = data(dy);
    args.dy_type = dtype(dy);
    args.dx = data(dx);
    run_backward<Around::nothing>(args, x, if_wanted(dgate, weight, gate_gradient), {});
    return {std::move(dx), std::move(dgate)};
}

std::tuple<Tensor, Tensor> add_ada_norm(const Tensor& x, const Tensor& residual, const Tensor& gate,
                                        const Tensor& scale, const OptionalTensor& shift, double eps,
                                        bool centred) {
    auto args = arguments<ModulatedForward>(x, scale, shift, eps, centred);
    set_residual(args, x, residual, gate);
    NG_CHECK(same_sizes(gate, scale), "gate must have the shape of scale");
    Tensor y = empty(sizes_of(x), dtype(x), x), out = empty(sizes_of(x), dtype(residual), x);
    args.y = data(y);
    args.residual_out = data(out);
    run_forward<Around::residual>(args, x);
    return {std::move(y), std::move(out)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("ada_norm", NG_BOX(&ada_norm));
    m.impl("ada_norm_backward", NG_BOX(&ada_norm_backward));
    m.impl("gated_residual", NG_BOX(&gated_residual));
    m.impl("gated_residual_backward", NG_BOX(&gated_residual_backward));
    m.impl("add_ada_norm", NG_BOX(&add_ada_norm));
}

}  // namespace narrowgauge
