// Cross-entropy with its gradient: the bindings.
#include "norm/cross_entropy.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

#if !NARROWGAUGE_CPU
#include "norm/cross_entropy_launch.h"
#endif

namespace narrowgauge {
namespace {

struct Options {
    int64_t ignore_index;
    double label_smoothing, z_loss, softcap;
};

#if NARROWGAUGE_CPU
void run(const CrossEntropy& args, const Tensor&) {
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t k = args.target[row];
        NG_CHECK(k == args.ignore_index || (k >= 0 && k < args.columns), "target[", row, "] is ", k,
                 "; expected a class from 0 to ", args.columns - 1, ", or ignore_index ", args.ignore_index);
    }
    const auto kernel = NG_CPU_POINTER(cross_entropy_rows);
    parallel_ranges(args.rows, 4 * args.columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
void run(const ScaleRows& args, const Tensor&) {
    const auto kernel = NG_CPU_POINTER(scale_rows);
    parallel_ranges(args.rows, args.columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}
#else
void run(const CrossEntropy& args, const Tensor& logits) {
    if (args.rows == 0) return;
    const OnDevice device(logits);
    launch_cross_entropy(args, device.stream());
}
void run(const ScaleRows& args, const Tensor& x) {
    if (args.rows == 0 || args.columns == 0) return;
    const OnDevice device(x);
    launch_scale_rows(args, device.stream());
}
#endif

DType compute_type(DType type) { return type == DType::float64 ? DType::float64 : DType::float32; }

std::tuple<Tensor, Tensor> run_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                    const OptionalTensor& scale, const Options& options, void* dlogits) {
    const auto [rows, columns] = check_rows(logits);
    check_layout(target, logits, "target");
    NG_CHECK(dtype(target) == DType::int64, "target must be int64, got ", name_of(dtype(target)));
    std::vector<int64_t> sizes = sizes_of(logits);
    sizes.pop_back();
    NG_CHECK(sizes_of(target) == sizes, "target must have the shape of logits without its last dimension");
    NG_CHECK(columns > 0 || rows == 0, "logits must have at least one class");
    check_vector(weight, "weight", logits, columns);
    const DType wide = compute_type(dtype(logits));
    if (scale) {
        check_layout(*scale, logits, "scale");
        NG_CHECK(scale->numel() == 1 && dtype(*scale) == wide, "scale must be one ", name_of(wide));
    }
    NG_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1,
             "label_smoothing must be from 0 to 1, got ", options.label_smoothing);
    NG_CHECK(options.softcap >= 0 && std::isfinite(options.softcap),
             "softcap must be positive, or 0 for none");

    Tensor loss = empty(sizes, wide, logits), lse = empty(sizes, wide, logits);
    CrossEntropy args{};
    args.logits = data(logits);
    args.target = static_cast<const int64_t*>(data(target));
    args.weight = data(weight);
    args.scale = data(scale);
    args.loss = data(loss);
    args.lse = data(lse);
    args.dlogits = dlogits;
    args.rows = rows;
    args.columns = columns;
    args.ignore_index = options.ignore_index;
    args.label_smoothing = options.label_smoothing;
    args.z_loss = options.z_loss;
    args.softcap = options.softcap;
    args.type = dtype(logits);
    args.weight_type = weight ? dtype(*weight) : args.type;
    run(args, logits);
    return {std::move(loss), std::move(lse)};
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                         const OptionalTensor& weight, int64_t ignore_index,
                                         double label_smoothing, double z_loss, double softcap) {
    return run_rows(logits, target, weight, {}, {ignore_index, label_smoothing, z_loss, softcap}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const OptionalTensor& weight,
                                                         const OptionalTensor& scale, int64_t ignore_index,
                                                         double label_smoothing, double z_loss,
                                                         double softcap) {
    check_rows(logits);
    Tensor dlogits = empty(sizes_of(logits), dtype(logits), logits);
    auto [loss, lse] = run_rows(logits, target, weight, scale,
                                {ignore_index, label_smoothing, z_loss, softcap}, data(dlogits));
    return {std::move(loss), std::move(lse), std::move(dlogits)};
}

std::tuple<Tensor, Tensor> cross_entropy_forward_(const Tensor& logits, const Tensor& target,
                                                  const OptionalTensor& weight, const OptionalTensor& scale,
                                                  int64_t ignore_index, double label_smoothing, double z_loss,
                                                  double softcap) {
    return run_rows(logits, target, weight, scale, {ignore_index, label_smoothing, z_loss, softcap},
                    data(logits));
}

void scale_rows_(const Tensor& x, const Tensor& factor) {
    const auto [rows, columns] = check_rows(x);
    check_layout(factor, x, "factor");
    NG_CHECK(dtype(factor) == compute_type(dtype(x)), "factor must be ", name_of(compute_type(dtype(x))));
    NG_CHECK(factor.numel() == 1 || factor.numel() == rows, "factor must have one element, or one per row");
    run(ScaleRows{data(x), data(factor), rows, columns, factor.numel() == 1, dtype(x)}, x);
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("cross_entropy", NG_BOX(&cross_entropy));
    m.impl("cross_entropy_forward", NG_BOX(&cross_entropy_forward));
    m.impl("cross_entropy_forward_", NG_BOX(&cross_entropy_forward_));
    m.impl("scale_rows_", NG_BOX(&scale_rows_));
}

}  // namespace narrowgauge
