// Softmax, log-softmax, log-sum-exp and the sum of exponentials in extended form: the bindings.
#include "norm/softmax.h"

#include <utility>

#include "norm/guards.h"

#if !NARROWGAUGE_CPU
#include "norm/softmax_launch.h"
#endif

namespace narrowgauge {
namespace {

#if NARROWGAUGE_CPU
// Fewer rows than this are cut over threads by their segments; the bits are the same either way.
constexpr int64_t few_rows = 8;

// A row of one segment costs one exponential an element with three passes, as those are kept, and two with
// two. Where rows come from memory that is the price of a pass that only waits for it: two passes then win,
// for rows of several segments, and in float32 for tensors this large.
constexpr int64_t bytes_out_of_cache = int64_t{32} << 20;

SoftmaxAlgorithm chosen(const SoftmaxForward& args) {
    if (args.algorithm != SoftmaxAlgorithm::automatic) return args.algorithm;
    const bool large = !args.log && args.x_type == DType::float32 && args.columns >= 2048 &&
                       args.rows * args.columns * size_of(args.x_type) >= bytes_out_of_cache;
    return large || args.columns > softmax_segment ? SoftmaxAlgorithm::two_pass
                                                   : SoftmaxAlgorithm::three_pass;
}

void run(SoftmaxForward& args, const Tensor&) {
    args.algorithm = chosen(args);
    args.segments = softmax_segments(args.columns);
    if (args.segments == 1 || args.rows >= few_rows) {
        const auto rows = NG_CPU_POINTER(softmax_rows);
        // An exponential is the work of several elements of a norm.
        parallel_ranges(args.rows, 4 * args.columns,
                        [&](int64_t begin, int64_t end) { rows(args, begin, end); });
        return;
    }
    const auto reduce = NG_CPU_POINTER(softmax_reduce), merge = NG_CPU_POINTER(softmax_merge),
               write = NG_CPU_POINTER(softmax_write);
    const int64_t units = args.rows * args.segments;
    std::vector<double> partial(2 * units), stats(3 * args.rows);
    args.partial = partial.data();
    args.stats = stats.data();
    for (args.phase = 0; args.phase < (args.algorithm == SoftmaxAlgorithm::three_pass ? 2 : 1);
         ++args.phase) {
        parallel_ranges(units, softmax_segment,
                        [&](int64_t begin, int64_t end) { reduce(args, begin, end); });
    }
    merge(args, 0, args.rows);
    if (args.y == nullptr) return;
    parallel_ranges(units, softmax_segment, [&](int64_t begin, int64_t end) { write(args, begin, end); });
}

void run(SoftmaxBackward& args, const Tensor&) {
    args.segments = softmax_segments(args.columns);
    if (args.segments == 1 || args.rows >= few_rows) {
        const auto rows = NG_CPU_POINTER(softmax_backward_rows);
        parallel_ranges(args.rows, args.columns, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
        return;
    }
    const auto reduce = NG_CPU_POINTER(softmax_backward_reduce),
               write = NG_CPU_POINTER(softmax_backward_write);
    const int64_t units = args.rows * args.segments;
    std::vector<double> partial(units);
    args.partial = partial.data();
    parallel_ranges(units, softmax_segment, [&](int64_t begin, int64_t end) { reduce(args, begin, end); });
    parallel_ranges(units, softmax_segment, [&](int64_t begin, int64_t end) { write(args, begin, end); });
}
#else
void run(SoftmaxForward& args, const Tensor& x) {
    if (args.rows == 0) return;
    const OnDevice device(x);
    launch_softmax_forward(args, device.stream());
}
void run(SoftmaxBackward& args, const Tensor& x) {
    if (args.rows == 0) return;
    const OnDevice device(x);
    launch_softmax_backward(args, device.stream());
}
#endif

SoftmaxAlgorithm algorithm_of(const std::string& name) {
    if (name == "auto") return SoftmaxAlgorithm::automatic;
    if (name == "two_pass") return SoftmaxAlgorithm::two_pass;
    if (name == "online") return SoftmaxAlgorithm::online;
    NG_CHECK(name == "three_pass", "algorithm must be auto, two_pass, online or three_pass, got ", name);
    return SoftmaxAlgorithm::three_pass;
}

// How rows of x find theirs in a mask of fewer or smaller leading dimensions.
RowMap check_mask(const Tensor& mask, const Tensor& x) {
    check_layout(mask, x, "mask");
    NG_CHECK(x.dim() <= RowMap::max_dimensions + 1, "x has more than nine dimensions beside a mask");
    const int64_t extra = x.dim() - mask.dim(), last = x.dim() - 1;
    NG_CHECK(mask.dim() >= 1 && extra >= 0 && mask.size(mask.dim() - 1) == x.size(last),
             "mask must broadcast to x and have its last dimension");
    RowMap map{static_cast<int>(last), {}, {}};
    int64_t stride = 1;
    for (int64_t i = last - 1; i >= 0; --i) {
        const int64_t size = i >= extra ? mask.size(i - extra) : 1;
        NG_CHECK(size == 1 || size == x.size(i), "mask must broadcast to x");
        map.sizes[i] = x.size(i);
        map.strides[i] = size == 1 ? 0 : stride;
        stride *= size;
    }
    return map;
}

SoftmaxForward forward_arguments(const Tensor& x) {
    const auto [rows, columns] = check_rows(x);
    SoftmaxForward args{};
    args.x = data(x);
    args.rows = rows;
    args.columns = columns;
    args.x_type = args.y_type = dtype(x);
    return args;
}

Tensor softmax(const Tensor& x, const OptionalTensor& mask, bool log, bool zero_masked, std::string algorithm,
               const OptionalDType& out_dtype) {
    SoftmaxForward args = forward_arguments(x);
    args.algorithm = algorithm_of(algorithm);
    if (mask) {
        args.mask_rows = check_mask(*mask, x);
        args.mask = data(*mask);
        args.mask_type = dtype(*mask);
        NG_CHECK(args.mask_type == DType::boolean || is_companion(args.mask_type, args.x_type),
                 "mask must be bool, have the dtype of x, or be float32");
    }
    args.y_type = dtype_or(out_dtype, args.x_type);
    NG_CHECK(is_companion(args.y_type, args.x_type), "out_dtype must be the dtype of x or float32");
    Tensor y = empty(sizes_of(x), args.y_type, x);
    args.y = data(y);
    args.log = log;
    args.zero_masked = zero_masked;
    if (args.columns > 0) run(args, x);
    return y;
}

Tensor softmax_backward(const Tensor& dy, const Tensor& y, const OptionalTensor& mask, bool log,
                        const OptionalDType& x_dtype) {
    const auto [rows, columns] = check_rows(y);
    check_layout(dy, y, "dy");
    NG_CHECK(same_sizes(dy, y) && dtype(dy) == dtype(y), "dy must have the shape and dtype of y");
    SoftmaxBackward args{};
    args.y_type = dtype(y);
    args.x_type = dtype_or(x_dtype, args.y_type);
    NG_CHECK(is_floating(args.x_type) && is_companion(args.y_type, args.x_type),
             "y must have the dtype of x or float32");
    if (mask) {
        args.mask_rows = check_mask(*mask, y);
        args.mask = data(*mask);
        NG_CHECK(dtype(*mask) == DType::boolean, "mask must be bool");
    }
    Tensor dx = empty(sizes_of(y), args.x_type, y);
    args.dy = data(dy);
    args.y = data(y);
    args.dx = data(dx);
    args.rows = rows;
    args.columns = columns;
    args.log = log;
    if (columns > 0) run(args, y);
    return dx;
}

std::vector<int64_t> row_sizes(const Tensor& x) {
    std::vector<int64_t> sizes = sizes_of(x);
    sizes.pop_back();
    return sizes;
}

Tensor logsumexp(const Tensor& x) {
    SoftmaxForward args = forward_arguments(x);
    Tensor lse = empty(row_sizes(x), args.x_type, x);
    args.lse = data(lse);
    args.algorithm = SoftmaxAlgorithm::two_pass;
    run(args, x);
    return lse;
}

std::tuple<Tensor, Tensor> sum_exp_extended(const Tensor& x) {
    SoftmaxForward args = forward_arguments(x);
    const DType type = args.x_type == DType::float64 ? DType::float64 : DType::float32;
    Tensor mantissa = empty(row_sizes(x), type, x), exponent = empty(row_sizes(x), type, x);
    args.mantissa = data(mantissa);
    args.exponent = data(exponent);
    args.algorithm = SoftmaxAlgorithm::two_pass;
    run(args, x);
    return {std::move(mantissa), std::move(exponent)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("softmax", NG_BOX(&softmax));
    m.impl("softmax_backward", NG_BOX(&softmax_backward));
    m.impl("logsumexp", NG_BOX(&logsumexp));
    m.impl("sum_exp_extended", NG_BOX(&sum_exp_extended));
}

}  // namespace narrowgauge
