// What the bindings of the modulated norms share: filling in the arguments, running, adding the sums of a
// backward.
#pragma once

#include <cmath>
#include <utility>

#include "norm/guards.h"
#include "norm/modulated.h"
#include "norm/partial_sums.h"

namespace narrowgauge {

inline void check_eps(double eps) {
    NG_CHECK(eps >= 0 && std::isfinite(eps), "eps must be a finite number >= 0, got ", eps);
}

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
    check_layout(tensor, x, name);
    NG_CHECK(same_sizes(tensor, x) && dtype(tensor) == dtype(x), name, " must have the shape and dtype of x");
}

// dy may be narrower than a wide residual stream, or wider than a branch.
inline void check_gradient(const Tensor& dy, const Tensor& x) {
    check_layout(dy, x, "dy");
    NG_CHECK(same_sizes(dy, x), "dy must have the shape of x");
    NG_CHECK(is_companion(dtype(dy), dtype(x)) ||
                 (dtype(x) == DType::float32 && is_floating(dtype(dy)) && dtype(dy) != DType::float64),
             "dy must have the dtype of x, or one of the two must be float32");
}

// The common part, with one vector for all rows; what is not given stays null.
template <class Args>
Args modulation(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                Statistic statistic) {
    const auto [rows, columns] = check_rows(x);
    check_eps(eps);
    Args args{};
    args.x = data(x);
    args.weight = data(weight);
    args.bias = data(bias);
    args.rows = rows;
    args.columns = columns;
    args.vectors = args.run = args.heads = args.positions = 1;
    args.per_column = statistic == Statistic::l2 ? 1.0 : 1.0 / static_cast<double>(columns);
    args.eps = eps;
    args.statistic = statistic;
    args.x_type = dtype(x);
    args.weight_type = weight ? dtype(*weight) : args.x_type;
    args.bias_type = bias ? dtype(*bias) : args.x_type;
    return args;
}

// One vector for each of the first `leading` dimensions of x, whose sizes the vectors' own must be.
inline void check_leading(const Tensor& vectors, const Tensor& x, const char* name) {
    check_layout(vectors, x, name);
    const int64_t dims = vectors.dim();
    bool fits = dims >= 1 && dims <= x.dim() && vectors.size(dims - 1) == x.size(x.dim() - 1);
    for (int64_t i = 0; fits && i + 1 < dims; ++i) fits = vectors.size(i) == x.size(i);
    NG_CHECK(fits, name, " must have the first leading dimensions of x, and its last one");
}

// The rows of x in runs that share a vector, each with its own.
inline void set_leading(Modulation& args, const Tensor& vectors) {
    args.vectors = 1;
    for (int64_t i = 0; i + 1 < vectors.dim(); ++i) args.vectors *= vectors.size(i);
    args.run = args.vectors > 0 ? std::max<int64_t>(args.rows / args.vectors, 1) : 1;
}

template <Around around>
void run_forward(const ModulatedForward& args, [[maybe_unused]] const Tensor& x) {
    if (args.rows == 0 || args.columns == 0) return;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(modulated_forward_rows);
    parallel_ranges(args.rows, args.columns,
                    [&](int64_t begin, int64_t end) { kernel(args, around, begin, end); });
#else
    const OnDevice device(x);
    launch_modulated_forward<around>(args, device.stream());
#endif
}

// Runs a backward whose sums over rows go to dweight and dbias, where they are given.
template <Around around>
void run_backward(ModulatedBackward& args, const Tensor& x, const OptionalTensor& dweight,
                  const OptionalTensor& dbias) {
    const DType compute = args.x_type == DType::float64 ? DType::float64 : DType::float32;
    if (args.columns == 0 || args.vectors == 0) {
        if (dweight && args.one_weight) add_partial_sums(empty({0, 1}, compute, x), *dweight);  // zero
        return;
    }
    const int64_t of_vector = args.rows / args.vectors;
#if NARROWGAUGE_CPU
    // Enough work items for many threads, but few enough that the sums stay a small part of the traffic.
    const int64_t together = vectors_together(args), blocks = (args.vectors + together - 1) / together;
    args.chunks = std::clamp<int64_t>(of_vector / 16, 1, std::max<int64_t>(64 / blocks, 1));
#else
    const OnDevice device(x);
    args.chunks = modulated_chunks_on_device(args, around);
#endif
    const bool direct = of_vector == 1 && !args.one_weight;
    const auto sums_for = [&](const OptionalTensor& result, void*& raw, DType& type) -> OptionalTensor {
        if (!result) return {};
        OptionalTensor partial;
        if (!direct) partial = empty({args.chunks, args.vectors * args.columns}, compute, x);
        raw = data(direct ? *result : *partial);
        type = direct ? dtype(*result) : compute;
        return partial;
    };
    const OptionalTensor dweight_partial = sums_for(dweight, args.dweight, args.dweight_type);
    const OptionalTensor dbias_partial = sums_for(dbias, args.dbias, args.dbias_type);
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(modulated_backward_pieces);
    parallel_ranges(args.chunks * blocks,
                    together * std::max<int64_t>(of_vector / args.chunks, 1) * args.columns,
                    [&](int64_t begin, int64_t end) { kernel(args, around, begin, end); });
#else
    launch_modulated_backward<around>(args, device.stream());
#endif
    if (dweight_partial && args.one_weight) {
        const Tensor columns = empty({args.columns, 1}, compute, x);
        add_partial_sums(*dweight_partial, columns);
        add_partial_sums(columns, *dweight);
    } else if (dweight_partial) {
        add_partial_sums(*dweight_partial, *dweight);
    }
    if (dbias_partial) add_partial_sums(*dbias_partial, *dbias);
}

// Room for the gradient of a parameter; empty where it is not wanted.
inline Tensor gradient_of(const OptionalTensor& parameter, bool wanted, const Tensor& x) {
    const DType compute = dtype(x) == DType::float64 ? DType::float64 : DType::float32;
    if (!parameter || !wanted) return empty({0}, parameter ? dtype(*parameter) : compute, x);
    return empty(sizes_of(*parameter), dtype(*parameter), x);
}
inline OptionalTensor if_wanted(const Tensor& gradient, const OptionalTensor& parameter, bool wanted) {
    return parameter && wanted ? OptionalTensor(gradient) : OptionalTensor();
}

}  // namespace narrowgauge
