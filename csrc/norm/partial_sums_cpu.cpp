// The CPU kernel that adds partial sums.
#include "common/row_cpu.h"
#include "norm/partial_sums.h"

NG_NAMESPACE_BEGIN
namespace {

template <class A>
void add_columns(const PartialSums& args, int64_t begin, int64_t end) {
    Scratch<A> sums(end - begin);
    for (int64_t j = begin; j < end; ++j) sums.get()[j - begin] = 0;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
        const A* partial = row_of<A>(args.partial, chunk, args.columns) + begin;
        for (int64_t j = 0; j < end - begin; ++j) sums.get()[j] += partial[j];
    }
    for (int64_t j = begin; j < end; ++j) {
        const A sum = sums.get()[j - begin];
        switch (args.result_type) {
            case DType::float64:
                static_cast<double*>(args.result)[j] = sum;
                break;
            case DType::bfloat16:
                static_cast<bf16*>(args.result)[j] = from_float<bf16>(static_cast<float>(sum));
                break;
            case DType::float16:
                static_cast<f16*>(args.result)[j] = from_float<f16>(static_cast<float>(sum));
                break;
            default:
                static_cast<float*>(args.result)[j] = static_cast<float>(sum);
        }
    }
}

}  // namespace

void partial_sums_columns(const PartialSums& args, int64_t begin, int64_t end) {
    if (args.result_type == DType::float64) return add_columns<double>(args, begin, end);
    return add_columns<float>(args, begin, end);
}

NG_NAMESPACE_END
