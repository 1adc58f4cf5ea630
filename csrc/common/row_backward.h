// How a backward that ends with one partial sum for each group of threads is launched: both the launch and
// the size of its partial buffers follow from this.
#pragma once

#include "common/dtype.h"
#include "common/row.cuh"

namespace narrowgauge {

struct BackwardLaunch {
    int width;  // of a vector: 16 bytes, where rows and pointers allow it, or 1
    PersistentGrid grid;
};

inline BackwardLaunch backward_launch(DType type, int64_t rows, int64_t columns,
                                      std::initializer_list<const void*> pointers) {
    const int width = static_cast<int>(16 / size_of(type));
    const int used = columns % width == 0 && aligned(pointers) ? width : 1;
    return {used, persistent_grid(plan_for(backward_plans, (columns + used - 1) / used), rows)};
}

// Calls f(width, vectors), both as integral constants.
template <class X, class F>
void with_backward_shape(const BackwardLaunch& how, F&& f) {
    const auto of_width = [&](auto width) {
        with_vectors<1, 2, 0>(how.grid.plan.vectors, [&](auto vectors) { f(width, vectors); });
    };
    constexpr int width = 16 / sizeof(X);
    if (how.width == width) return of_width(std::integral_constant<int, width>{});
    of_width(std::integral_constant<int, 1>{});
}

}  // namespace narrowgauge
