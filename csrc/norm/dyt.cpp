// Dynamic Tanh and Derf: the bindings.
#include "norm/dyt.h"

#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

void check_number(const OptionalTensor& number, const char* name, const Tensor& x) {
    if (!number) return;
    check_layout(*number, x, name);
    NG_CHECK(number->numel() == 1, name, " must have one element");
    NG_CHECK(is_companion(dtype(*number), dtype(x)), name, " must have the dtype of x or float32, got ",
             name_of(dtype(*number)));
}

struct Sizes {
    int64_t rows, columns, channels;
};

Sizes check_channels(const Tensor& x, const Tensor& alpha, const OptionalTensor& shift, const Tensor& weight,
                     const OptionalTensor& bias, bool channels_last) {
    auto [rows, columns] = check_rows(x);
    int64_t channels = columns;
    if (!channels_last) {
        NG_CHECK(x.dim() >= 2, "x must have two dimensions or more when its channels are the second");
        channels = x.size(1);
        rows = x.size(0) * channels;
        columns = 1;
        for (int64_t i = 2; i < x.dim(); ++i) columns *= x.size(i);
    }
    check_number(alpha, "alpha", x);
    check_number(shift, "shift", x);
    check_vector(weight, "weight", x, channels);
    check_vector(bias, "bias", x, channels);
    return {rows, columns, channels};
}

// What the arguments of both kernels share.
template <class Args>
Args arguments(const Sizes& sizes, const Tensor& x, const Tensor& alpha, const OptionalTensor& shift,
               const Tensor& weight, bool channels_last, bool erf) {
    Args args{};
    args.x = data(x);
    args.alpha = data(alpha);
    args.shift = data(shift);
    args.weight = data(weight);
    args.rows = sizes.rows;
    args.columns = sizes.columns;
    args.channels = sizes.channels;
    args.channels_last = channels_last;
    args.erf = erf;
    args.x_type = dtype(x);
    args.alpha_type = dtype(alpha);
    args.shift_type = shift ? dtype(*shift) : args.x_type;
    args.weight_type = dtype(weight);
    return args;
}

Tensor forward(const Tensor& x, const Tensor& alpha, const OptionalTensor& shift, const Tensor& weight,
               const OptionalTensor& bias, bool channels_last, bool erf) {
    const Sizes sizes = check_channels(x, alpha, shift, weight, bias, channels_last);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    auto args = arguments<DytForward>(sizes, x, alpha, shift, weight, channels_last, erf);
    args.bias = data(bias);
    args.y = data(y);
    args.bias_type = bias ? dtype(*bias) : args.x_type;
    if (sizes.rows * sizes.columns == 0) return y;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(dyt_forward_rows);
    parallel_ranges(sizes.rows, sizes.columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_dyt_forward(args, device.stream());
#endif
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x,
                                                            const Tensor& alpha, const OptionalTensor& shift,
                                                            const Tensor& weight, const OptionalTensor& bias,
                                                            bool channels_last, bool erf,
                                                            bool parameter_gradients) {
    const Sizes sizes = check_channels(x, alpha, shift, weight, bias, channels_last);
    check_layout(dy, x, "dy");
    NG_CHECK(same_sizes(dy, x) && dtype(dy) == dtype(x), "dy must have the shape and dtype of x");

    const DType sums = dtype(x) == DType::float64 ? DType::float64 : DType::float32;
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    auto args = arguments<DytBackward>(sizes, x, alpha, shift, weight, channels_last, erf);
    args.dy = data(dy);
    args.dx = data(dx);
#if NARROWGAUGE_CPU
    args.chunks = args.scalar_chunks = std::clamp<int64_t>(sizes.rows / 16, 1, 64);
#else
    const OnDevice device(x);
    plan_dyt_backward(args);
#endif
    OptionalTensor dweight, dbias, dalpha, dshift;  // partial sums of each
    if (parameter_gradients) {
        dalpha = empty({args.scalar_chunks, 1}, sums, x);
        if (shift) dshift = empty({args.scalar_chunks, 1}, sums, x);
        dweight = empty({args.chunks, sizes.channels}, sums, x);
        if (bias) dbias = empty({args.chunks, sizes.channels}, sums, x);
    }
    args.dalpha_partial = data(dalpha);
    args.dshift_partial = data(dshift);
    args.dweight_partial = data(dweight);
    args.dbias_partial = data(dbias);
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(dyt_backward_chunks);
    parallel_ranges(args.chunks, sizes.rows / args.chunks * sizes.columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_dyt_backward(args, device.stream());
#endif
    const auto summed = [&](const OptionalTensor& partial, const OptionalTensor& parameter) {
        if (!partial) return empty({0}, parameter ? dtype(*parameter) : sums, x);
        Tensor result = empty(sizes_of(*parameter), dtype(*parameter), x);
        add_partial_sums(*partial, result);
        return result;
    };
    return {std::move(dx), summed(dalpha, alpha), summed(dshift, shift), summed(dweight, weight),
            summed(dbias, bias)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("dyt", NG_BOX(&forward));
    m.impl("dyt_backward", NG_BOX(&backward));
}

}  // namespace narrowgauge
