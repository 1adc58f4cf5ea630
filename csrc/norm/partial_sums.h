// The second step of every sum over rows (dweight, dbias, ...): a kernel cuts the rows into chunks by the
// shape alone and writes one row of sums for each; these are added in order, so the bits do not depend on
// threads.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

// result[j] = sum over chunks of partial[chunk, j].
struct PartialSums {
    const void* partial;  // [chunks, columns], float (double for a double result)
    void* result;         // [columns]
    int64_t chunks, columns;
    DType result_type;
};

#if !NARROWGAUGE_CPU
void launch_partial_sums(const PartialSums& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, partial_sums_columns, (const PartialSums& args, int64_t begin, int64_t end))
