// How many threads share a row, and how much of it each of them holds.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace narrowgauge {

// Rows of up to `max_vectors` vectors: `threads` threads share a row and hold `vectors` vectors each.
struct Plan {
    int64_t max_vectors;
    int threads, vectors;
};

// The forward holds up to 32 values a thread. Short rows share a warp; a warp's reduction needs no barrier,
// so a row stays in one warp until its registers are full.
constexpr Plan forward_plans[] = {{8, 8, 1},    {16, 16, 1},   {32, 32, 1},    {128, 32, 4},
                                  {256, 64, 4}, {512, 128, 4}, {1024, 256, 4}, {2048, 512, 4}};

// A backward that sums over rows also holds dy and the sums for dweight and dbias, so it spreads a row over
// more threads.
constexpr Plan backward_plans[] = {{8, 8, 1},    {16, 16, 1},   {32, 32, 1},   {64, 32, 2},
                                   {128, 64, 2}, {256, 128, 2}, {512, 256, 2}, {1024, 512, 2}};

template <int Count>
Plan plan_for(const Plan (&plans)[Count], int64_t vectors) {
    for (const Plan& plan : plans) {
        if (vectors <= plan.max_vectors) return plan;
    }
    return {0, 512, 0};  // too long for registers: read again at each pass
}

constexpr int block_threads(const Plan& plan) { return plan.threads < 128 ? 128 : plan.threads; }
constexpr int rows_per_block(const Plan& plan) { return block_threads(plan) / plan.threads; }

// Calls f(std::integral_constant<int, vectors>) for the one of Vectors that a plan chose, 0 standing for all
// others: `with_vectors<1, 4, 0>(plan.vectors, [&](auto vectors) { launch(..., kernel<vectors>) })`.
template <int First, int... Others, class F>
void with_vectors(int vectors, F&& f) {
    if constexpr (sizeof...(Others) > 0) {
        if (vectors != First) return with_vectors<Others...>(vectors, f);
    }
    f(std::integral_constant<int, First>{});
}

inline bool aligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    }
    return true;
}

// 16 bytes of T, when rows and pointers allow it.
template <class T>
bool vectorizable(int64_t columns, std::initializer_list<const void*> pointers) {
    return columns % (16 / sizeof(T)) == 0 && aligned(pointers);
}

}  // namespace narrowgauge
