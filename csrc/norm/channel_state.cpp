// The steps that PowerNorm and UnifiedNorm make between their passes over tokens: the bindings.
#include "norm/channel_state.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

void check_state(const Tensor& tensor, const char* name, const Tensor& state, int64_t count) {
    check_layout(tensor, state, name);
    NG_CHECK(tensor.numel() == count && dtype(tensor) == dtype(state), name, " must hold ", count, " ",
             name_of(dtype(state)));
}

void check_counter(const Tensor& tensor, const char* name, const Tensor& state) {
    check_layout(tensor, state, name);
    NG_CHECK(tensor.numel() == 1 && dtype(tensor) == DType::int64, name, " must be one int64");
}

int64_t check_first(const Tensor& state, const char* name, double weight, double eps) {
    check_layout(state, state, name);
    NG_CHECK(state.dim() == 1 && (dtype(state) == DType::float32 || dtype(state) == DType::float64), name,
             " must be float32 or float64 of one dimension");
    NG_CHECK(weight >= 0 && weight <= 1, "the weight of a running mean must be from 0 to 1, got ", weight);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    return state.size(0);
}

Tensor power_norm_update_(const Tensor& running_phi, const Tensor& squares, const Tensor& count,
                          const Tensor& step, int64_t warmup, double alpha, double eps) {
    const int64_t channels = check_first(running_phi, "running_phi", alpha, eps);
    check_state(squares, "squares", running_phi, channels);
    check_state(count, "count", running_phi, 1);
    check_counter(step, "step", running_phi);
    Tensor factors = empty({2, channels}, dtype(running_phi), running_phi);
    PowerNormUpdate args{};
    args.squares = data(squares);
    args.count = data(count);
    args.step = static_cast<const int64_t*>(data(step));
    args.phi = data(running_phi);
    args.factors = data(factors);
    args.channels = channels;
    args.warmup = warmup;
    args.alpha = alpha;
    args.eps = eps;
    args.type = dtype(running_phi);
    if (channels == 0) return factors;
#if NARROWGAUGE_CPU
    NG_CPU_POINTER(power_norm_update_channels)(args);
#else
    const OnDevice device(running_phi);
    launch_channel_update(args, device.stream());
#endif
    return factors;
}

std::tuple<Tensor, Tensor> unified_norm_update_(const Tensor& running_var, const Tensor& buffer_x2,
                                                const Tensor& skip_counter, const Tensor& squares,
                                                const Tensor& count, const Tensor& step,
                                                int64_t backward_window, int64_t warmup, int64_t first_ratio,
                                                bool filtration, double momentum, double eps) {
    const int64_t channels = check_first(running_var, "running_var", momentum, eps);
    check_layout(buffer_x2, running_var, "buffer_x2");
    NG_CHECK(buffer_x2.dim() == 2 && buffer_x2.size(0) >= 1,
             "buffer_x2 must have a row for each step of the window");
    const int64_t window = buffer_x2.size(0);
    check_state(buffer_x2, "buffer_x2", running_var, window * channels);
    NG_CHECK(backward_window >= 1, "backward_window must be at least 1, got ", backward_window);
    check_state(squares, "squares", running_var, channels);
    check_state(count, "count", running_var, 1);
    check_counter(step, "step", running_var);
    check_counter(skip_counter, "skip_counter", running_var);
    Tensor factors = empty({2, channels}, dtype(running_var), running_var);
    Tensor decisions = empty({3}, DType::int64, running_var);
    UnifiedNormUpdate args{};
    args.squares = data(squares);
    args.count = data(count);
    args.step = static_cast<const int64_t*>(data(step));
    args.variance = data(running_var);
    args.window = data(buffer_x2);
    args.skips = static_cast<int64_t*>(data(skip_counter));
    args.factors = data(factors);
    args.decisions = static_cast<int64_t*>(data(decisions));
    args.channels = channels;
    args.window_size = window;
    args.backward_window = backward_window;
    args.warmup = warmup;
    args.first_ratio = first_ratio;
    args.momentum = momentum;
    args.eps = eps;
    args.filtration = filtration;
    args.type = dtype(running_var);
#if NARROWGAUGE_CPU
    NG_CPU_POINTER(unified_norm_update_channels)(args);
#else
    const OnDevice device(running_var);
    launch_channel_update(args, device.stream());
#endif
    return {std::move(factors), std::move(decisions)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("power_norm_update_", NG_BOX(&power_norm_update_));
    m.impl("unified_norm_update_", NG_BOX(&unified_norm_update_));
}

}  // namespace narrowgauge
