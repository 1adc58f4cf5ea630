// The binding of AdamW.
#include "optim/adamw.h"

#include "optim/elementwise_binding.h"

namespace narrowgauge {
namespace {

template <int States>
void run(const ElementwiseLists& lists, const AdamWOptions& options) {
#if NARROWGAUGE_CPU
    run_elementwise<States>(lists, options, NG_CPU_POINTER(adamw_chunks));
#else
    run_elementwise<States>(lists, options,
                            [](const auto& launch, Stream stream) { launch_adamw(launch, stream); });
#endif
}

void adamw_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& states, const std::vector<Tensor>& scales,
            const std::vector<Tensor>& steps, const std::optional<Tensor>& lr_tensor, double lr, double beta1,
            double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, bool stochastic,
            int64_t seed, const std::vector<int64_t>& indices, const std::vector<int64_t>& first_elements,
            const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    const ElementwiseLists lists{params,     grads,    states,     scales, steps,   lr_tensor,
                                 lr,         maximize, stochastic, seed,   indices, first_elements,
                                 grad_scale, found_inf};
    const AdamWOptions options{beta1, beta2, weight_decay, eps, amsgrad};
    amsgrad ? run<3>(lists, options) : run<2>(lists, options);
}

}  // namespace

NG_OPERATORS(m) { m.impl("adamw_", NG_BOX(&adamw_)); }

}  // namespace narrowgauge
