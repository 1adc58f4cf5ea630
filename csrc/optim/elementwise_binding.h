// The binding of elementwise optimizers: guards, the table of tensors, and the run over its chunks.
//
// States follow each other parameter by parameter; scales, one per state, are there when the states are
// codes.
#pragma once

#include <algorithm>
#include <memory>

#include "common/binding.h"
#include "optim/elementwise.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

#if NARROWGAUGE_CPU
constexpr int64_t step_chunk = cpu_chunk;
#else
constexpr int64_t step_chunk = cuda_chunk;
#endif

// What the binding must know of a variant of a rule.
struct RuleShape {
    int states, sums, options;
    bool rows;
    int given;
    bool (*is_signed)(int);
};

struct ElementwiseLists {
    const std::vector<Tensor>&params, &grads, &states, &scales, &steps;
    const std::optional<Tensor>& given;
    const std::optional<Tensor>& lr_tensor;
    double lr;
    const std::vector<double>& options;
    int64_t state_format;
    bool maximize;
    const std::vector<int64_t>& row_lengths;
    const std::optional<Tensor>&grad_scale, &clip;
};

// What only a step has, not a reduction.
struct ElementwiseExtras {
    const std::vector<Tensor>&rests, &emas, &copies;
    const std::optional<Tensor>& rows;
    int64_t param_update;
    bool zero_grad;
    double ema_decay;
    int64_t seed;
    const std::vector<int64_t>&indices, &first_elements;
    const std::optional<Tensor>& found_inf;
};

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

inline void check_list(const std::vector<Tensor>& list, size_t count, const char* name) {
    NG_CHECK(list.empty() || list.size() == count, name, " must be empty or one per parameter");
}

// Checks the lists and fills in `args` and the table.
inline std::vector<ElementwiseTensor> collect(const RuleShape& rule, const ElementwiseLists& lists,
                                              ElementwiseArgs& args) {
    const size_t count = lists.params.size(), states = static_cast<size_t>(rule.states);
    NG_CHECK(lists.grads.size() == count && lists.steps.size() == count,
             "params, grads and steps must be equally long");
    NG_CHECK(lists.states.size() == count * states, "states must hold ", rule.states,
             " tensors per parameter");
    NG_CHECK(lists.scales.empty() || lists.scales.size() == lists.states.size(),
             "scales must be empty or as long as states");
    NG_CHECK(lists.options.size() == static_cast<size_t>(rule.options), "options must hold ", rule.options,
             " numbers, got ", lists.options.size());
    NG_CHECK(lists.row_lengths.empty() || lists.row_lengths.size() == count,
             "row_lengths must be empty or one per parameter");
    NG_CHECK(lists.state_format >= 0 && lists.state_format < state_formats, "unknown state_format ",
             lists.state_format);
    const Tensor& first = lists.params[0];
    std::copy(lists.options.begin(), lists.options.end(), args.options);
    args.lr = lists.lr;
    args.lr_tensor = data(lists.lr_tensor);
    args.lr_type = lists.lr_tensor ? dtype(*lists.lr_tensor) : DType::float64;
    args.param_type = dtype(first);
    args.grad_type = dtype(lists.grads[0]);
    args.format = static_cast<StateFormat>(lists.state_format);
    args.maximize = lists.maximize;
    args.grad_scale = static_cast<const float*>(data(lists.grad_scale));
    args.clip = static_cast<const float*>(data(lists.clip));

    const bool wide = args.param_type == DType::float64, coded = args.format != StateFormat::fp32;
    const bool scaled = has_codes(args.format) && states > 0;
    NG_CHECK(is_floating(args.param_type), "params must be floating point, got ", name_of(args.param_type));
    NG_CHECK(args.grad_type == args.param_type ||
                 (!wide && (args.grad_type == DType::float32 || args.grad_type == DType::bfloat16)),
             "grads must have the dtype of params, float32 or bfloat16, got ", name_of(args.grad_type));
    NG_CHECK(!(wide && coded), "float64 params need float64 states");
    NG_CHECK(lists.scales.empty() != scaled, "scales are there for states of codes, and only then");
    check_scalar(lists.lr_tensor, first, "lr_tensor", true);
    check_scalar(lists.grad_scale, first, "grad_scale", false);
    check_scalar(lists.clip, first, "clip", false);
    int64_t given_count = 0;
    if (lists.given) {
        NG_CHECK(dtype(*lists.given) == DType::float64 && same_device(*lists.given, first) &&
                     lists.given->is_contiguous() && lists.given->dim() == 2 &&
                     lists.given->size(0) == static_cast<int64_t>(count),
                 "given must be a contiguous float64 tensor with one row per parameter");
        given_count = lists.given->size(1);
    }
    NG_CHECK(!lists.given || given_count >= rule.given, "given must have at least ", rule.given,
             " columns, got ", given_count);

    std::vector<ElementwiseTensor> tensors(count);
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
        tensor.row_length = tensor.numel;
        if (!lists.row_lengths.empty()) {
            tensor.row_length = lists.row_lengths[i];
            NG_CHECK(tensor.row_length >= 0 &&
                         (tensor.row_length > 0 ? tensor.numel % tensor.row_length == 0 : tensor.numel == 0),
                     "row_lengths[", i, "] must divide the elements of its parameter");
            NG_CHECK(param.is_contiguous(), "params[", i, "] must be contiguous to have rows");
        }
        if (given_count > 0) tensor.given = static_cast<const double*>(data(*lists.given)) + i * given_count;
        for (size_t k = 0; k < states; ++k) {
            const Tensor& state = lists.states[i * states + k];
            const DType state_type =
                wide ? DType::float64 : state_codes_type(args.format, rule.is_signed(static_cast<int>(k)));
            NG_CHECK(dtype(state) == state_type && same_device(state, first), "states[", i * states + k,
                     "] must be ", name_of(state_type), " on the device of the parameters, got ",
                     name_of(dtype(state)));
            if (is_packed(args.format)) {
                NG_CHECK(
                    state.is_contiguous() && state.numel() == state_codes_numel(args.format, tensor.numel),
                    "states[", i * states + k, "] must hold one byte per two elements");
            } else {
                NG_CHECK(same_layout(state, param), "states[", i * states + k,
                         "] must be laid out like its parameter");
            }
            tensor.states[k] = data(state);
            if (!scaled) continue;
            const Tensor& scale = lists.scales[i * states + k];
            NG_CHECK(
                dtype(scale) == state_scale_type(args.format) && same_device(scale, first) &&
                    scale.is_contiguous() && scale.numel() == state_scale_numel(args.format, tensor.numel),
                "scales[", i * states + k, "] must hold ", state_scale_columns(args.format), " ",
                name_of(state_scale_type(args.format)), " per ", state_block_size(args.format), " elements");
            tensor.scales[k] = data(scale);
        }
    }
    args.count = static_cast<int64_t>(count);
    return tensors;
}

// Adds what a step has beside the lists.
inline void collect_extras(const RuleShape& rule, const ElementwiseLists& lists,
                           const ElementwiseExtras& extras, ElementwiseArgs& args,
                           std::vector<ElementwiseTensor>& tensors) {
    const size_t count = tensors.size();
    const Tensor& first = lists.params[0];
    NG_CHECK(extras.param_update >= 0 && extras.param_update <= static_cast<int>(ParamUpdate::split),
             "unknown param_update ", extras.param_update);
    args.update = static_cast<ParamUpdate>(extras.param_update);
    args.zero_grad = extras.zero_grad;
    args.ema_weight = 1.0 - extras.ema_decay;
    args.found_inf = static_cast<const float*>(data(extras.found_inf));
    check_scalar(extras.found_inf, first, "found_inf", false);
    check_list(extras.rests, count, "rests");
    check_list(extras.emas, count, "emas");
    check_list(extras.copies, count, "copies");

    const bool narrow = args.param_type == DType::bfloat16 || args.param_type == DType::float16;
    const bool stochastic = args.update == ParamUpdate::stochastic;
    const bool rests = args.update == ParamUpdate::kahan || args.update == ParamUpdate::split;
    NG_CHECK(args.update == ParamUpdate::nearest || (narrow && args.update == ParamUpdate::kahan) ||
                 args.param_type == DType::bfloat16 || (stochastic && args.format == StateFormat::bf16),
             "this param_update is for bfloat16 params, got ", name_of(args.param_type));
    NG_CHECK(!stochastic || (extras.indices.size() == count && extras.first_elements.size() == count),
             "stochastic rounding needs one index and one first element per parameter");
    NG_CHECK(rests != extras.rests.empty(),
             "rests are there for param_update kahan and split, and only then");
    if (rests) args.rest_type = dtype(extras.rests[0]);
    NG_CHECK(!rests || (args.update == ParamUpdate::kahan
                            ? args.rest_type == args.param_type
                            : args.rest_type == DType::int8 || args.rest_type == DType::int16),
             "rests must have the dtype of params for kahan, int8 or int16 for split");
    if (!extras.copies.empty()) args.copy_type = dtype(extras.copies[0]);
    NG_CHECK(extras.copies.empty() || (args.param_type != DType::float64 && is_floating(args.copy_type) &&
                                       args.copy_type != DType::float64),
             "copies must be bfloat16, float16 or float32, of params that are not float64");

    int64_t rows = 0;
    if (rule.rows) {
        for (const auto& tensor : tensors) rows += rows_of(tensor);
        NG_CHECK(
            extras.rows && same_device(*extras.rows, first) && extras.rows->is_contiguous() &&
                extras.rows->numel() == rows &&
                dtype(*extras.rows) == (args.param_type == DType::float64 ? DType::float64 : DType::float32),
            "rows must be contiguous and hold one number per row, in the type of computation");
    }
    int64_t row = 0;
    for (size_t i = 0; i < count; ++i) {
        auto& tensor = tensors[i];
        const Tensor& param = lists.params[i];
        const auto extra = [&](const std::vector<Tensor>& list, DType type, const char* name) -> void* {
            if (list.empty()) return nullptr;
            NG_CHECK(dtype(list[i]) == type && same_device(list[i], first) && same_layout(list[i], param),
                     name, "[", i, "] must be ", name_of(type),
                     ", on the device and in the layout of its parameter");
            return data(list[i]);
        };
        tensor.rest = extra(extras.rests, args.rest_type, "rests");
        tensor.ema = static_cast<float*>(extra(extras.emas, DType::float32, "emas"));
        tensor.copy = extra(extras.copies, args.copy_type, "copies");
        if (rule.rows) {
            tensor.rows = static_cast<const char*>(data(*extras.rows)) + row * size_of(dtype(*extras.rows));
            row += rows_of(tensor);
        }
        if (stochastic) {
            tensor.seed =
                stream_seed(static_cast<uint64_t>(extras.seed), static_cast<uint64_t>(extras.indices[i]));
            tensor.first_element = extras.first_elements[i];
        }
    }
}

// Counts the chunks of the list.
template <class Chunks>
void number_chunks(ElementwiseArgs& args, std::vector<ElementwiseTensor>& tensors, const Chunks& chunks) {
    for (auto& tensor : tensors) tensor.last_chunk = args.chunks += chunks(tensor);
}

#if NARROWGAUGE_CPU

using ElementwiseKernel = void (*)(int, const ElementwiseArgs&, const ElementwiseTensor*, int64_t, int64_t);

inline void run_chunks(ElementwiseKernel kernel, int variant, const ElementwiseArgs& args,
                       const std::vector<ElementwiseTensor>& tensors) {
    int64_t elements = 1;
    for (const auto& tensor : tensors) elements += tensor.numel;
    const int64_t grain = std::max<int64_t>(1, args.chunks * 32768 / elements);  // worth waking a thread
    parallel_for(0, args.chunks, grain,
                 [&](int64_t begin, int64_t end) { kernel(variant, args, tensors.data(), begin, end); });
}

inline void run_step(ElementwiseKernel kernel, int variant, const ElementwiseArgs& args,
                     const std::vector<ElementwiseTensor>& tensors, const Tensor&) {
    if (args.found_inf && *args.found_inf != 0) return;
    for (const auto& tensor : tensors) *tensor.step += 1;
    run_chunks(kernel, variant, args, tensors);
}

inline void run_sums(ElementwiseKernel kernel, int variant, int sums, const ElementwiseArgs& args,
                     const std::vector<ElementwiseTensor>& tensors, const Tensor&) {
    run_chunks(kernel, variant, args, tensors);
    // The pieces of a row, in order.
    const auto add = [&](const auto* partial, auto* result) {
        using T = std::remove_pointer_t<decltype(result)>;
        for (const auto& tensor : tensors) {
            const int64_t rows = rows_of(tensor), per_row = pieces_of(tensor) / std::max<int64_t>(rows, 1);
            for (int64_t row = 0; row < rows; ++row, result += sums) {
                double total[max_sums] = {};
                for (int64_t piece = 0; piece < per_row; ++piece, partial += sums) {
                    for (int s = 0; s < sums; ++s) total[s] += static_cast<double>(partial[s]);
                }
                for (int s = 0; s < sums; ++s) result[s] = static_cast<T>(total[s]);
            }
        }
    };
    args.param_type == DType::float64
        ? add(static_cast<const double*>(args.partial), static_cast<double*>(args.sums))
        : add(static_cast<const float*>(args.partial), static_cast<float*>(args.sums));
}

#else

using ElementwiseKernel = void (*)(int, const ElementwiseLaunch&, Stream);

// Parts of the list that fit into the parameters of a launch each.
template <class Launch, class Args, class Entry, class F>
void for_launches(const Args& args, const std::vector<Entry>& tensors, const F& function) {
    auto table = std::make_unique<Launch>();
    int64_t before = 0;
    for (size_t begin = 0; begin < tensors.size(); begin += static_cast<size_t>(table->args.count)) {
        table->args = args;
        table->args.count = std::min<int64_t>(table->capacity, static_cast<int64_t>(tensors.size() - begin));
        std::copy_n(tensors.begin() + static_cast<int64_t>(begin), table->args.count, table->tensors);
        for (int64_t i = 0; i < table->args.count; ++i) table->tensors[i].last_chunk -= before;
        table->args.chunks = table->tensors[table->args.count - 1].last_chunk;
        function(*table, before);
        before += table->args.chunks;
    }
}

inline void run_step(ElementwiseKernel kernel, int variant, const ElementwiseArgs& args,
                     const std::vector<ElementwiseTensor>& tensors, const Tensor& first) {
    const OnDevice device(first);
    for_launches<ElementwiseLaunch>(
        args, tensors, [&](ElementwiseLaunch& table, int64_t) { kernel(variant, table, device.stream()); });
}

inline void run_sums(ElementwiseKernel kernel, int variant, int sums, const ElementwiseArgs& args,
                     const std::vector<ElementwiseTensor>& tensors, const Tensor& first) {
    if (args.sums == nullptr) return;
    const OnDevice device(first);
    int64_t rows = 0;
    const int64_t size = args.param_type == DType::float64 ? 8 : 4;
    for_launches<ElementwiseLaunch>(args, tensors, [&](ElementwiseLaunch& table, int64_t before) {
        if (args.partial) table.args.partial = static_cast<char*>(args.partial) + before * sums * size;
        for (int64_t i = 0; i < table.args.count; ++i) {
            table.tensors[i].first_row = rows;
            rows += rows_of(table.tensors[i]);
        }
        kernel(variant, table, device.stream());
    });
}

#endif

}  // namespace narrowgauge
