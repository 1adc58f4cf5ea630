// The binding that all elementwise optimizers share: guards, and the list of parameters as plain data.
//
// Every operator has the schema
//     (Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] scales, Tensor(d!)[] steps,
//      Tensor? lr_tensor, float lr, <the rule's options>, bool maximize, bool stochastic, int seed, int[]
//      indices, int[] first_elements, Tensor? grad_scale, Tensor? found_inf) -> ()
// States follow each other parameter by parameter; scales, one per state, are there when the states are 8-bit
// codes.
#pragma once

#include <algorithm>
#include <memory>

#include "common/binding.h"
#include "optim/elementwise.h"

namespace narrowgauge {

struct ElementwiseLists {
    const std::vector<Tensor>&params, &grads, &states, &scales, &steps;
    const std::optional<Tensor>& lr_tensor;
    double lr;
    bool maximize, stochastic;
    int64_t seed;
    const std::vector<int64_t>&indices, &first_elements;
    const std::optional<Tensor>&grad_scale, &found_inf;
};

// splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): streams of neighbouring parameters have
// nothing in common.
inline uint64_t stream_seed(int64_t seed, int64_t index) {
    uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(index) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

#if NARROWGAUGE_EMULATOR
inline bool same_strides(const Tensor&, const Tensor&) { return true; }
inline bool is_dense(const Tensor&) { return true; }
#else
inline bool same_strides(const Tensor& a, const Tensor& b) {
    const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
    for (size_t d = 0; d < sizes.size(); ++d) {
        if (sizes[d] > 1 && x[d] != y[d]) return false;
    }
    return true;
}

// Whether the elements fill one piece of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return true;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t covered = 1;
    for (bool grew = true; grew;) {
        grew = false;
        for (size_t d = 0; d < sizes.size(); ++d) {
            if (sizes[d] > 1 && strides[d] == covered) {
                covered *= sizes[d];
                grew = true;
            }
        }
    }
    return covered == tensor.numel();
}
#endif

inline bool same_layout(const Tensor& a, const Tensor& b) {
    const auto x = a.sizes(), y = b.sizes();
    return std::equal(x.begin(), x.end(), y.begin(), y.end()) &&
           ((a.is_contiguous() && b.is_contiguous()) || same_strides(a, b));
}

inline void check_scalar(const std::optional<Tensor>& scalar, const Tensor& first, const char* name,
                         bool allow_float64) {
    if (!scalar) return;
    NG_CHECK(scalar->numel() == 1, name, " must have one element");
    NG_CHECK(dtype(*scalar) == DType::float32 || (allow_float64 && dtype(*scalar) == DType::float64), name,
             " must be float32", allow_float64 ? " or float64" : "", ", got ", name_of(dtype(*scalar)));
    NG_CHECK(same_device(*scalar, first), name, " must be on the device of the parameters");
}

// Checks the lists and fills in everything but the options.
template <int States, class Options>
std::vector<ElementwiseTensor<States>> collect(const ElementwiseLists& lists, int64_t chunk,
                                               ElementwiseArgs<Options>& args) {
    const size_t count = lists.params.size();
    NG_CHECK(lists.grads.size() == count && lists.steps.size() == count,
             "params, grads and steps must be equally long");
    NG_CHECK(lists.states.size() == count * States, "states must hold ", States, " tensors per parameter");
    NG_CHECK(lists.scales.empty() || lists.scales.size() == lists.states.size(),
             "scales must be empty or as long as states");
    const Tensor& first = lists.params[0];
    args.lr = lists.lr;
    args.lr_tensor = data(lists.lr_tensor);
    args.lr_type = lists.lr_tensor ? dtype(*lists.lr_tensor) : DType::float64;
    args.param_type = dtype(first);
    args.grad_type = dtype(lists.grads[0]);
    args.quantized = !lists.scales.empty();
    args.maximize = lists.maximize;
    args.stochastic = lists.stochastic;
    args.grad_scale = static_cast<const float*>(data(lists.grad_scale));
    args.found_inf = static_cast<const float*>(data(lists.found_inf));

    const bool wide = args.param_type == DType::float64;
    NG_CHECK(is_floating(args.param_type), "params must be floating point, got ", name_of(args.param_type));
    NG_CHECK(args.grad_type == args.param_type ||
                 (!wide && (args.grad_type == DType::float32 || args.grad_type == DType::bfloat16)),
             "grads must have the dtype of params, float32 or bfloat16, got ", name_of(args.grad_type));
    NG_CHECK(!(wide && args.quantized), "float64 params need float64 states");
    NG_CHECK(!lists.stochastic || args.param_type == DType::bfloat16,
             "stochastic rounding is for bfloat16 params, got ", name_of(args.param_type));
    NG_CHECK(!lists.stochastic || (lists.indices.size() == count && lists.first_elements.size() == count),
             "stochastic rounding needs one index and one first element per parameter");
    const DType state_type = args.quantized ? DType::uint8 : wide ? DType::float64 : DType::float32;
    check_scalar(lists.lr_tensor, first, "lr_tensor", true);
    check_scalar(lists.grad_scale, first, "grad_scale", false);
    check_scalar(lists.found_inf, first, "found_inf", false);

    std::vector<ElementwiseTensor<States>> tensors(count);
    for (size_t i = 0; i < count; ++i) {
        const Tensor &param = lists.params[i], &grad = lists.grads[i], &step = lists.steps[i];
        auto& tensor = tensors[i];
        NG_CHECK(dtype(param) == args.param_type && same_device(param, first),
                 "params differ in dtype or device");
        NG_CHECK(is_dense(param), "params[", i, "] has gaps or overlaps in memory");
        NG_CHECK(dtype(grad) == args.grad_type && same_device(grad, first), "grads[", i,
                 "] differs in dtype or device");
        NG_CHECK(same_layout(grad, param), "grads[", i, "] must be laid out like its parameter");
        NG_CHECK(dtype(step) == DType::float32 && step.numel() == 1 && same_device(step, first), "steps[", i,
                 "] must be one float32 number on the device of the parameters");
        tensor.param = data(param);
        tensor.grad = data(grad);
        tensor.step = static_cast<float*>(data(step));
        tensor.numel = param.numel();
        for (size_t k = 0; k < States; ++k) {
            const Tensor& state = lists.states[i * States + k];
            NG_CHECK(dtype(state) == state_type && same_device(state, first), "states[", i * States + k,
                     "] must be ", name_of(state_type), " on the device of the parameters, got ",
                     name_of(dtype(state)));
            NG_CHECK(same_layout(state, param), "states[", i * States + k,
                     "] must be laid out like its parameter");
            tensor.states[k] = data(state);
            if (!args.quantized) continue;
            const Tensor& scale = lists.scales[i * States + k];
            NG_CHECK(dtype(scale) == DType::float32 && same_device(scale, first) && scale.is_contiguous() &&
                         scale.numel() == (tensor.numel + state_block - 1) / state_block,
                     "scales[", i * States + k, "] must hold one float32 per ", state_block, " elements");
            tensor.scales[k] = static_cast<float*>(data(scale));
        }
        if (lists.stochastic) {
            tensor.seed = stream_seed(lists.seed, lists.indices[i]);
            tensor.first_element = lists.first_elements[i];
        }
        args.chunks += (tensor.numel + chunk - 1) / chunk;
        tensor.last_chunk = args.chunks;
    }
    args.count = static_cast<int64_t>(count);
    return tensors;
}

#if NARROWGAUGE_CPU

// `kernel` is the rule's instantiation of update_chunks (elementwise_cpu.h).
template <int States, class Options, class Kernel>
void run_elementwise(const ElementwiseLists& lists, const Options& options, Kernel kernel) {
    if (lists.params.empty()) return;
    ElementwiseArgs<Options> args{};
    args.options = options;
    const auto tensors = collect<States>(lists, cpu_chunk, args);
    if (args.found_inf && *args.found_inf != 0) return;
    for (const auto& tensor : tensors) *tensor.step += 1;
    int64_t elements = 1;
    for (const auto& tensor : tensors) elements += tensor.numel;
    const int64_t grain = std::max<int64_t>(1, args.chunks * 32768 / elements);  // worth waking a thread
    parallel_for(0, args.chunks, grain,
                 [&](int64_t begin, int64_t end) { kernel(args, tensors.data(), begin, end); });
}

#else

// `launch` is the rule's instantiation of launch_elementwise (elementwise.cuh).
template <int States, class Options, class Launch>
void run_elementwise(const ElementwiseLists& lists, const Options& options, Launch launch) {
    if (lists.params.empty()) return;
    auto table = std::make_unique<ElementwiseLaunch<States, Options>>();
    ElementwiseArgs<Options>& args = table->args;
    args.options = options;
    const auto tensors = collect<States>(lists, cuda_chunk, args);
    const OnDevice device(lists.params[0]);
    int64_t before = 0;
    for (size_t begin = 0; begin < tensors.size(); begin += args.count) {
        args.count = std::min<int64_t>(table->capacity, tensors.size() - begin);
        std::copy_n(tensors.begin() + begin, args.count, table->tensors);
        for (int64_t i = 0; i < args.count; ++i) table->tensors[i].last_chunk -= before;
        args.chunks = table->tensors[args.count - 1].last_chunk;
        before += args.chunks;
        launch(*table, device.stream());
    }
}

#endif

}  // namespace narrowgauge
