#include "optim/adamw.h"
#include "optim/elementwise_cpu.h"

NG_NAMESPACE_BEGIN

namespace {

template <class Rule>
void chunks(const ElementwiseArgs<AdamWOptions>& args, const void* tensors, int64_t begin, int64_t end) {
    const auto* list = static_cast<const ElementwiseTensor<Rule::states>*>(tensors);
    if (args.param_type == DType::float64) {
        update_chunks<Rule, double>(args, list, begin, end);
    } else {
        update_chunks<Rule, float>(args, list, begin, end);
    }
}

}  // namespace

void adamw_chunks(const ElementwiseArgs<AdamWOptions>& args, const void* tensors, int64_t begin,
                  int64_t end) {
    args.options.amsgrad ? chunks<AdamW<true>>(args, tensors, begin, end)
                         : chunks<AdamW<false>>(args, tensors, begin, end);
}

NG_NAMESPACE_END
