// What the bindings of the row norms check of their arguments, and how they end a sum over rows.
#pragma once

#include "common/binding.h"

namespace narrowgauge {

using OptionalTensor = std::optional<Tensor>;

// The type next to a narrow input may be the same or float32; float64 goes with float64 only.
inline bool is_companion(DType type, DType of) {
    return type == of || (type == DType::float32 && of != DType::float64);
}

inline void check_vector(const OptionalTensor& vector, const char* name, const Tensor& x, int64_t columns) {
    if (!vector) return;
    check_layout(*vector, x, name);
    NG_CHECK(vector->dim() == 1 && vector->numel() == columns, name, " must have shape [", columns, "]");
    NG_CHECK(is_companion(dtype(*vector), dtype(x)), name, " must have the dtype of x or float32, got ",
             name_of(dtype(*vector)));
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
    const auto a_sizes = a.sizes(), b_sizes = b.sizes();
    return a_sizes.size() == b_sizes.size() && std::equal(a_sizes.begin(), a_sizes.end(), b_sizes.begin());
}

inline void check_residual(const OptionalTensor& residual, const Tensor& x) {
    if (!residual) return;
    check_layout(*residual, x, "residual");
    NG_CHECK(same_sizes(*residual, x), "residual must have the shape of x");
    NG_CHECK(is_companion(dtype(*residual), dtype(x)), "residual must have the dtype of x or float32");
}

struct Shape {
    int64_t rows, columns;
};

inline Shape check_rows(const Tensor& x) {
    NG_CHECK(is_floating(dtype(x)), "x must be float32, bfloat16, float16 or float64, got ",
             name_of(dtype(x)));
    NG_CHECK(x.dim() >= 1, "x must have at least one dimension");
    NG_CHECK(x.is_contiguous(), "x must be contiguous; call .contiguous() first");
    Shape shape{1, x.size(x.dim() - 1)};
    for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.rows *= x.size(i);
    return shape;
}

// result[j] = sum over chunks of partial[chunk, j], in order (partial_sums.h).
void add_partial_sums(const Tensor& partial, const Tensor& result);

}  // namespace narrowgauge
