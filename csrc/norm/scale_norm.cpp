// ScaleNorm and the unit-sphere norm: the bindings.
#include "norm/modulated_binding.h"

namespace narrowgauge {
namespace {

template <class Args>
Args arguments(const Tensor& x, const OptionalTensor& g, double eps) {
    Args args = modulation<Args>(x, g, {}, eps, Statistic::l2);
    check_vector(g, "g", x, 1);
    args.one_weight = g.has_value();
    return args;
}

Tensor scale_norm(const Tensor& x, const OptionalTensor& g, double eps) {
    auto args = arguments<ModulatedForward>(x, g, eps);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    args.y = data(y);
    run_forward<Around::nothing>(args, x);
    return y;
}

std::tuple<Tensor, Tensor> scale_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& g,
                                               double eps, bool g_gradient) {
    auto args = arguments<ModulatedBackward>(x, g, eps);
    check_like(dy, x, "dy");
    Tensor dx = empty(sizes_of(x), dtype(x), x), dg = gradient_of(g, g_gradient, x);
    args.dy = data(dy);
    args.dy_type = dtype(dy);
    args.dx = data(dx);
    run_backward<Around::nothing>(args, x, if_wanted(dg, g, g_gradient), {});
    return {std::move(dx), std::move(dg)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("scale_norm", NG_BOX(&scale_norm));
    m.impl("scale_norm_backward", NG_BOX(&scale_norm_backward));
}

}  // namespace narrowgauge
