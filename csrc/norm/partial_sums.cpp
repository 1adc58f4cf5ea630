// Adding partial sums, for the bindings.
#include "norm/partial_sums.h"

#include "norm/guards.h"

namespace narrowgauge {

void add_partial_sums(const Tensor& partial, const Tensor& result) {
    const PartialSums args{data(partial), data(result), partial.size(0), partial.size(1), dtype(result)};
    if (args.columns == 0) return;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(partial_sums_columns);
    parallel_ranges(args.columns, args.chunks, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(partial);
    launch_partial_sums(args, device.stream());
#endif
}

}  // namespace narrowgauge
