// The junction of a Peri-LN transformer: the bindings.
#include "norm/peri_add_norm.h"

#include <cmath>
#include <utility>

#include "norm/guards.h"

namespace narrowgauge {
namespace {

void check_stream(const Tensor& tensor, const char* name, const Tensor& f) {
    check_layout(tensor, f, name);
    NG_CHECK(same_sizes(tensor, f), name, " must have the shape of f");
    NG_CHECK(is_companion(dtype(tensor), dtype(f)), name, " must have the dtype of f or float32");
}

struct Forward {
    Tensor y, x_new;
    OptionalTensor rstd_out, rstd_in;
};

Forward forward(const Tensor& f, const Tensor& x, const OptionalTensor& weight_out,
                const OptionalTensor& weight_in, double eps, double weight_offset, bool keep_statistics) {
    const auto [rows, columns] = check_rows(f);
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
    check_stream(x, "x", f);
    check_vector(weight_out, "weight_out", f, columns);
    check_vector(weight_in, "weight_in", f, columns);

    const std::vector<int64_t> sizes = sizes_of(f);
    Forward out{empty(sizes, dtype(f), f), empty(sizes, dtype(x), f), {}, {}};
    if (keep_statistics) {
        const DType statistics = dtype(f) == DType::float64 ? DType::float64 : DType::float32;
        const std::vector<int64_t> row_sizes(sizes.begin(), sizes.end() - 1);
        out.rstd_out = empty(row_sizes, statistics, f);
        out.rstd_in = empty(row_sizes, statistics, f);
    }
    PeriForward args{};
    args.f = data(f);
    args.x = data(x);
    args.weight_out = data(weight_out);
    args.weight_in = data(weight_in);
    args.y = data(out.y);
    args.x_new = data(out.x_new);
    args.rstd_out = data(out.rstd_out);
    args.rstd_in = data(out.rstd_in);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.weight_offset = weight_offset;
    args.f_type = dtype(f);
    args.x_type = dtype(x);
    args.weight_out_type = weight_out ? dtype(*weight_out) : args.f_type;
    args.weight_in_type = weight_in ? dtype(*weight_in) : args.f_type;
    if (rows == 0) return out;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(peri_forward_rows);
    parallel_ranges(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(f);
    launch_peri_forward(args, device.stream());
#endif
    return out;
}

std::tuple<Tensor, Tensor> peri_add_norm(const Tensor& f, const Tensor& x, const OptionalTensor& weight_out,
                                         const OptionalTensor& weight_in, double eps, double weight_offset) {
    Forward out = forward(f, x, weight_out, weight_in, eps, weight_offset, false);
    return {std::move(out.y), std::move(out.x_new)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peri_add_norm_forward(const Tensor& f, const Tensor& x,
                                                                 const OptionalTensor& weight_out,
                                                                 const OptionalTensor& weight_in, double eps,
                                                                 double weight_offset) {
    Forward out = forward(f, x, weight_out, weight_in, eps, weight_offset, true);
    return {std::move(out.y), std::move(out.x_new), std::move(*out.rstd_out), std::move(*out.rstd_in)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peri_add_norm_backward(
    const Tensor& dy, const OptionalTensor& dx_new, const Tensor& f, const Tensor& x_new,
    const Tensor& rstd_out, const Tensor& rstd_in, const OptionalTensor& weight_out,
    const OptionalTensor& weight_in, double weight_offset, bool weight_gradients) {
    const auto [rows, columns] = check_rows(f);
    check_layout(dy, f, "dy");
    NG_CHECK(same_sizes(dy, f) && dtype(dy) == dtype(f), "dy must have the shape and dtype of f");
    check_stream(x_new, "x_new", f);
    if (dx_new) {
        check_stream(*dx_new, "dx_new", f);
        NG_CHECK(dtype(*dx_new) == dtype(x_new), "dx_new must have the dtype of x_new");
    }
    const DType statistics = dtype(f) == DType::float64 ? DType::float64 : DType::float32;
    for (const Tensor& statistic : {rstd_out, rstd_in}) {
        check_layout(statistic, f, "rstd_out and rstd_in");
        NG_CHECK(statistic.numel() == rows && dtype(statistic) == statistics,
                 "rstd_out and rstd_in must hold one ", name_of(statistics), " per row");
    }
    check_vector(weight_out, "weight_out", f, columns);
    check_vector(weight_in, "weight_in", f, columns);

    const bool out = weight_gradients && weight_out, in = weight_gradients && weight_in;
    Tensor df = empty(sizes_of(f), dtype(f), f), dx = empty(sizes_of(f), dtype(x_new), f);
    Tensor dweight_out = empty({out ? columns : 0}, weight_out ? dtype(*weight_out) : statistics, f);
    Tensor dweight_in = empty({in ? columns : 0}, weight_in ? dtype(*weight_in) : statistics, f);
    PeriBackward args{};
    args.dy = data(dy);
    args.dx_new = data(dx_new);
    args.f = data(f);
    args.x_new = data(x_new);
    args.rstd_out = data(rstd_out);
    args.rstd_in = data(rstd_in);
    args.weight_out = data(weight_out);
    args.weight_in = data(weight_in);
    args.df = data(df);
    args.dx = data(dx);
    args.rows = rows;
    args.columns = columns;
    args.per_column = 1.0 / static_cast<double>(columns);
    args.weight_offset = weight_offset;
    args.f_type = dtype(f);
    args.x_type = dtype(x_new);
    args.weight_out_type = weight_out ? dtype(*weight_out) : args.f_type;
    args.weight_in_type = weight_in ? dtype(*weight_in) : args.f_type;
#if NARROWGAUGE_CPU
    args.chunks = std::clamp<int64_t>(rows / 16, 1, 64);
#else
    const OnDevice device(f);
    args.chunks = peri_backward_chunks_on_device(args);
#endif
    OptionalTensor out_partial, in_partial;
    if (out) out_partial = empty({args.chunks, columns}, statistics, f);
    if (in) in_partial = empty({args.chunks, columns}, statistics, f);
    args.dweight_out_partial = data(out_partial);
    args.dweight_in_partial = data(in_partial);
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(peri_backward_chunks);
    parallel_ranges(args.chunks, rows / args.chunks * columns,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    launch_peri_backward(args, device.stream());
#endif
    if (out_partial) add_partial_sums(*out_partial, dweight_out);
    if (in_partial) add_partial_sums(*in_partial, dweight_in);
    return {std::move(df), std::move(dx), std::move(dweight_out), std::move(dweight_in)};
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("peri_add_norm", NG_BOX(&peri_add_norm));
    m.impl("peri_add_norm_forward", NG_BOX(&peri_add_norm_forward));
    m.impl("peri_add_norm_backward", NG_BOX(&peri_add_norm_backward));
}

}  // namespace narrowgauge
