// The passes over tokens behind PowerNorm and UnifiedNorm: the bindings.
#include "norm/channels.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

DType statistics_of(const Tensor& x) { return dtype(x) == DType::float64 ? DType::float64 : DType::float32; }

void check_channels(const OptionalTensor& vector, const char* name, const Tensor& x, int64_t columns) {
    if (!vector) return;
    check_layout(*vector, x, name);
    NG_CHECK(vector->dim() == 1 && vector->numel() == columns && dtype(*vector) == statistics_of(x), name,
             " must be ", name_of(statistics_of(x)), " of shape [", columns, "]");
}

void check_beside(const Tensor& tensor, const char* name, const Tensor& x) {
    check_layout(tensor, x, name);
    NG_CHECK(same_sizes(tensor, x) && dtype(tensor) == dtype(x), name, " must have the shape and dtype of x");
}

void check_mask(const OptionalTensor& mask, const Tensor& x, int64_t rows) {
    if (!mask) return;
    check_layout(*mask, x, "pad_mask");
    NG_CHECK(mask->dim() == 1 && mask->numel() == rows && dtype(*mask) == DType::boolean,
             "pad_mask must be bool of shape [", rows, "]");
}

void check_groups(int64_t groups, int64_t columns, double eps) {
    NG_CHECK(groups >= 0 && (groups == 0 || columns % groups == 0), "groups must divide the ", columns,
             " columns of x, got ", groups);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
}

#if NARROWGAUGE_CPU
// As for other sums over rows: enough for many threads, few enough that partial sums stay a small part.
int64_t chunks_of(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 64); }
#endif

// Runs the pass; `partial` is where its arguments want the partial sums, which become `sums`.
template <class Arguments, class Kernel>
void run(Arguments& args, void* Arguments::* partial, const OptionalTensor& sums, int64_t terms,
         const Tensor& x, [[maybe_unused]] Kernel kernel) {
    if (args.columns == 0) return;
#if NARROWGAUGE_CPU
    args.chunks = chunks_of(args.rows);
#else
    const OnDevice device(x);
    args.chunks = channel_chunks_on_device(args);
#endif
    OptionalTensor buffer;
    if (sums) buffer = empty({args.chunks, terms * args.columns}, statistics_of(x), x);
    args.*partial = data(buffer);
#if NARROWGAUGE_CPU
    parallel_ranges(args.chunks, args.rows / args.chunks * args.columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_channel_pass(args, device.stream());
#endif
    if (sums) add_partial_sums(*buffer, *sums);
}

#if NARROWGAUGE_CPU
#define NG_KERNEL_OF(name) NG_CPU_POINTER(name)
#else
#define NG_KERNEL_OF(name) nullptr
#endif

ChannelForward forward_arguments(const Tensor& x, int64_t groups, double eps) {
    const auto [rows, columns] = check_rows(x);
    check_groups(groups, columns, eps);
    ChannelForward args{};
    args.x = data(x);
    args.rows = rows;
    args.columns = columns;
    args.groups = groups;
    args.eps = eps;
    args.x_type = dtype(x);
    return args;
}

void set_affine(ChannelForward& args, const Tensor& x, const Tensor& scale, const Tensor& bias) {
    check_channels(scale, "scale", x, args.columns);
    check_channels(bias, "bias", x, args.columns);
    args.scale = data(scale);
    args.bias = data(bias);
}

void set_condition(ChannelForward& args, const Tensor& x, const Tensor& y, const Tensor& steady,
                   bool wanted) {
    check_beside(y, "y", x);
    check_layout(steady, x, "steady");
    NG_CHECK(steady.numel() == 1 && dtype(steady) == DType::boolean, "steady must be one bool");
    args.y = data(y);
    args.condition = data(steady);
    args.wanted = wanted;
}

void run_forward(ChannelForward& args, const Tensor& x, const OptionalTensor& squares) {
    run(args, &ChannelForward::squares_partial, squares, 1, x, NG_KERNEL_OF(channel_forward_chunks));
}

Tensor channel_affine(const Tensor& x, const Tensor& scale, const Tensor& bias, int64_t groups, double eps) {
    ChannelForward args = forward_arguments(x, groups, eps);
    set_affine(args, x, scale, bias);
    Tensor y = empty(sizes_of(x), dtype(x), x);
    args.y = data(y);
    if (args.rows > 0) run_forward(args, x, {});
    return y;
}

Tensor channel_squares(const Tensor& x, const OptionalTensor& pad_mask) {
    ChannelForward args = forward_arguments(x, 0, 0.0);
    check_mask(pad_mask, x, args.rows);
    args.pad_mask = data(pad_mask);
    Tensor squares = empty({args.columns}, statistics_of(x), x);
    run_forward(args, x, squares);
    return squares;
}

Tensor power_norm_forward_(const Tensor& y, const Tensor& x, const OptionalTensor& pad_mask,
                           const Tensor& scale, const Tensor& bias, const Tensor& steady, int64_t groups,
                           double eps) {
    ChannelForward args = forward_arguments(x, groups, eps);
    NG_CHECK(groups > 0, "groups must be at least 1");
    check_mask(pad_mask, x, args.rows);
    set_affine(args, x, scale, bias);
    set_condition(args, x, y, steady, true);
    args.pad_mask = data(pad_mask);
    Tensor squares = empty({args.columns}, statistics_of(x), x);
    run_forward(args, x, squares);
    return squares;
}

void power_norm_warm_up_(const Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& bias,
                         const Tensor& steady, int64_t groups, double eps) {
    ChannelForward args = forward_arguments(x, groups, eps);
    NG_CHECK(groups > 0, "groups must be at least 1");
    set_affine(args, x, scale, bias);
    set_condition(args, x, y, steady, false);
    if (args.rows > 0) run_forward(args, x, {});
}

ChannelBackward backward_arguments(const Tensor& dy, const Tensor& x, int64_t groups, double eps) {
    const auto [rows, columns] = check_rows(x);
    check_beside(dy, "dy", x);
    check_groups(groups, columns, eps);
    ChannelBackward args{};
    args.dy = data(dy);
    args.x = data(x);
    args.rows = rows;
    args.columns = columns;
    args.groups = groups;
    args.eps = eps;
    args.x_type = dtype(x);
    return args;
}

void run_backward(ChannelBackward& args, const Tensor& x, const OptionalTensor& sums) {
    run(args, &ChannelBackward::sums_partial, sums, channel_terms(args.groups), x,
        NG_KERNEL_OF(channel_backward_chunks));
}

Tensor channel_products(const Tensor& dy, const Tensor& x) {
    ChannelBackward args = backward_arguments(dy, x, 0, 0.0);
    Tensor sums = empty({channel_terms(0), args.columns}, statistics_of(x), x);
    run_backward(args, x, sums);
    return sums;
}

std::tuple<Tensor, Tensor> channel_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& pad_mask,
                                            const Tensor& scale, const OptionalTensor& projection,
                                            int64_t groups, double eps, bool with_sums) {
    ChannelBackward args = backward_arguments(dy, x, groups, eps);
    check_mask(pad_mask, x, args.rows);
    check_channels(scale, "scale", x, args.columns);
    check_channels(projection, "projection", x, args.columns);
    Tensor dx = empty(sizes_of(x), dtype(x), x);
    Tensor sums = empty({with_sums ? channel_terms(groups) : 0, args.columns}, statistics_of(x), x);
    args.pad_mask = data(pad_mask);
    args.scale = data(scale);
    args.projection = data(projection);
    args.dx = data(dx);
    if (with_sums) {
        run_backward(args, x, sums);
    } else if (args.rows > 0) {
        run_backward(args, x, {});
    }
    return {std::move(dx), std::move(sums)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("channel_affine", NG_BOX(&channel_affine));
    m.impl("channel_squares", NG_BOX(&channel_squares));
    m.impl("channel_products", NG_BOX(&channel_products));
    m.impl("channel_backward", NG_BOX(&channel_backward));
    m.impl("power_norm_forward_", NG_BOX(&power_norm_forward_));
    m.impl("power_norm_warm_up_", NG_BOX(&power_norm_warm_up_));
}

}  // namespace narrowgauge
