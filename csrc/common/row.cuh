// What CUDA kernels over rows share: which threads work on which row, and a row in registers.
//
// A group of `threads_per_row` consecutive threads shares a row; a block holds several groups when rows are
// short. Each thread owns `Vectors` vectors of `Width` elements of the row, `threads_per_row` vectors apart,
// and keeps them in registers, so that a row is read once. Vectors = 0 stands for a row too long for that: it
// is read again at each pass. row_plan.h chooses the numbers.
#pragma once

#include "common/reduce.cuh"
#include "common/row_plan.h"

namespace narrowgauge {

// Width elements from `i` on, in pieces of at most 16 bytes.
template <int Width, class A, class T>
__device__ __forceinline__ void load_row(Global<const T> source, int64_t i, A (&values)[Width]) {
    constexpr int piece = Width * sizeof(T) <= 16 ? Width : 16 / sizeof(T);
#pragma unroll
    for (int start = 0; start < Width; start += piece) {
        const auto loaded = load<piece>(source, i + start);
#pragma unroll
        for (int k = 0; k < piece; ++k) values[start + k] = static_cast<A>(to_compute(loaded[k]));
    }
}

template <int Width, class A, class T>
__device__ __forceinline__ void store_row(Global<T> target, int64_t i, const A (&values)[Width]) {
    constexpr int piece = Width * sizeof(T) <= 16 ? Width : 16 / sizeof(T);
#pragma unroll
    for (int start = 0; start < Width; start += piece) {
        Vec<T, piece> narrow;
#pragma unroll
        for (int k = 0; k < piece; ++k) {
            narrow[k] = from_compute<T>(static_cast<compute_t<T>>(values[start + k]));
        }
        store<piece>(target, i + start, narrow);
    }
}

// A tensor beside x whose type is known at run time only (the branch is the same for the whole grid):
// anything that is computed in A.
struct Beside {
    const void* raw;
    DType type;
    const char* name;

    __device__ __forceinline__ explicit operator bool() const { return raw != nullptr; }

    template <int Width>
    __device__ __forceinline__ void load(int64_t i, double (&values)[Width]) const {
        load_row<Width>(global<const double>(raw, name), i, values);
    }
    template <int Width>
    __device__ __forceinline__ void load(int64_t i, float (&values)[Width]) const {
        if (type == DType::float32) {
            load_row<Width>(global<const float>(raw, name), i, values);
        } else if (type == DType::bfloat16) {
            load_row<Width>(global<const bf16>(raw, name), i, values);
        } else {
            load_row<Width>(global<const f16>(raw, name), i, values);
        }
    }
};

// Stores to a tensor that has the type of x, or is float beside a narrow x.
template <class X, int Width, class A>
__device__ __forceinline__ void store_beside(void* raw, DType type, const char* name, int64_t i,
                                             const A (&values)[Width]) {
    if (sizeof(X) < sizeof(float) && type == DType::float32) {
        store_row<Width>(global<float>(raw, name), i, values);
    } else {
        store_row<Width>(global<X>(raw, name), i, values);
    }
}

// The part of a row that is this thread's: vectors at columns first, first + stride, ... below columns.
template <int Width>
struct RowSlice {
    int64_t columns, first, stride;
    int lane;     // of this thread among those that share the row
    bool active;  // false in groups beyond the last row, which still take part in the barriers

    __device__ __forceinline__ RowSlice(int64_t row, int64_t rows, int64_t row_columns, int threads_per_row)
        : columns(row_columns),
          stride(static_cast<int64_t>(threads_per_row) * Width),
          lane(threadIdx.x % threads_per_row),
          active(row < rows) {
        first = active ? static_cast<int64_t>(lane) * Width : columns;
    }

    // Calls f(j, v) for each of this thread's vectors: j is its first column, v its number (0 if Vectors =
    // 0).
    template <int Vectors, class F>
    __device__ __forceinline__ void visit(F&& f) const {
        if constexpr (Vectors > 0) {
#pragma unroll
            for (int v = 0; v < Vectors; ++v) {
                if (first + v * stride < columns) f(first + v * stride, v);
            }
        } else {
            for (int64_t j = first; j < columns; j += stride) f(j, 0);
        }
    }
};

// The row that this thread's group works on when each group takes one.
__device__ __forceinline__ int64_t row_of_group(int threads_per_row) {
    const int groups = blockDim.x / threads_per_row;
    return static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / threads_per_row;
}

// This thread's part of a row of values computed by `load(j, values)`: once, into registers, or with
// Vectors = 0 anew at each visit.
template <class A, int Width, int Vectors>
struct RowValues {
    static constexpr bool in_registers = Vectors > 0;
    A values[in_registers ? Vectors : 1][Width];

    template <class Load>
    __device__ __forceinline__ void load_once(const RowSlice<Width>& slice, Load&& load) {
        if constexpr (in_registers) {
            slice.template visit<Vectors>([&](int64_t j, int v) { load(j, values[v]); });
        }
    }

    // f(j, values) for each vector; what it changes stays, where the row is in registers.
    template <class Load, class F>
    __device__ __forceinline__ void visit(const RowSlice<Width>& slice, Load&& load, F&& f) {
        slice.template visit<Vectors>([&](int64_t j, int v) {
            if constexpr (!in_registers) load(j, values[v]);
            f(j, values[v]);
        });
    }
};

// The launch of a kernel whose groups take one row each.
inline LaunchConfig one_row_per_group(const Plan& plan, int64_t rows, size_t shared_bytes, Stream stream) {
    const int groups = rows_per_block(plan);
    return {dim3(static_cast<unsigned>((rows + groups - 1) / groups)),
            dim3(static_cast<unsigned>(block_threads(plan))), shared_bytes, 1, stream};
}

// A persistent grid, for kernels whose groups walk over many rows and end with one partial sum each: about
// 1024 threads on each multiprocessor, or a block for every few rows where there are not that many.
struct PersistentGrid {
    Plan plan;
    int64_t blocks, groups;  // groups: rows of partial sums

    LaunchConfig config(size_t shared_bytes, Stream stream) const {
        return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(block_threads(plan))),
                shared_bytes, 1, stream};
    }
};

inline PersistentGrid persistent_grid(const Plan& plan, int64_t rows) {
    const int groups = rows_per_block(plan);
    const int64_t wanted = (rows + groups - 1) / groups,
                  filling = static_cast<int64_t>(multiprocessor_count()) * (1024 / block_threads(plan)),
                  blocks = wanted < 1         ? 1
                           : wanted < filling ? wanted
                                              : filling;
    return {plan, blocks, blocks * groups};
}

}  // namespace narrowgauge
