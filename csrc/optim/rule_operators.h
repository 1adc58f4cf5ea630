// The two operators of a rule: its step, and its sums where it has any.
#pragma once

#include "common/cpu.h"
#include "optim/elementwise_binding.h"
#include "optim/rule.h"

namespace narrowgauge {

template <template <int> class Rule, int Variants, int Variant = 0>
RuleShape shape_of(int64_t variant, int options) {
    if constexpr (Variant < Variants) {
        using Chosen = Rule<Variant>;
        static_assert(Chosen::states <= max_states && Chosen::sums <= max_sums && Chosen::given <= max_given,
                      "raise the limits");
        if (variant == Variant)
            return {Chosen::states, Chosen::sums,  options,
                    Chosen::rows,   Chosen::given, [](int k) { return Chosen::is_signed(k); }};
        return shape_of<Rule, Variants, Variant + 1>(variant, options);
    }
    NG_CHECK(false, "variant must be in [0, ", Variants, "), got ", variant);
    return {};
}

template <template <int> class Rule, int Variants, int Variant = 0>
constexpr bool any_sums() {
    if constexpr (Variant < Variants) {
        return Rule<Variant>::sums > 0 || any_sums<Rule, Variants, Variant + 1>();
    }
    return false;
}

template <class Entry>
void rule_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& states, const std::vector<Tensor>& scales,
               const std::vector<Tensor>& steps, const std::vector<Tensor>& rests,
               const std::vector<Tensor>& emas, const std::vector<Tensor>& copies,
               const std::optional<Tensor>& given, const std::optional<Tensor>& rows,
               const std::optional<Tensor>& lr_tensor, double lr, const std::vector<double>& options,
               int64_t variant, int64_t state_format, int64_t param_update, bool maximize, bool zero_grad,
               double ema_decay, const std::vector<int64_t>& row_lengths, int64_t seed,
               const std::vector<int64_t>& indices, const std::vector<int64_t>& first_elements,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip,
               const std::optional<Tensor>& found_inf) {
    if (params.empty()) return;
    const RuleShape rule = Entry::shape(variant);
    const ElementwiseLists lists{params, grads,   states,       scales,   steps,       given,      lr_tensor,
                                 lr,     options, state_format, maximize, row_lengths, grad_scale, clip};
    const ElementwiseExtras extras{rests,     emas, copies,  rows,           param_update, zero_grad,
                                   ema_decay, seed, indices, first_elements, found_inf};
    ElementwiseArgs args{};
    NG_CHECK(rule.given == 0 || given, "given must be there");
    std::vector<ElementwiseTensor> tensors = collect(rule, lists, args);
    collect_extras(rule, lists, extras, args, tensors);
    number_chunks(args, tensors, [](const ElementwiseTensor& tensor) {
        return (tensor.numel + step_chunk - 1) / step_chunk;
    });
    run_step(Entry::step(), static_cast<int>(variant), args, tensors, params[0]);
}

template <class Entry>
Tensor rule_sums(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& states, const std::vector<Tensor>& scales,
                 const std::vector<Tensor>& steps, const std::optional<Tensor>& given,
                 const std::optional<Tensor>& lr_tensor, double lr, const std::vector<double>& options,
                 int64_t variant, int64_t state_format, int64_t param_update,
                 const std::vector<Tensor>& rests, bool maximize, const std::vector<int64_t>& row_lengths,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip) {
    const RuleShape rule = Entry::shape(variant);
    NG_CHECK(rule.sums > 0, "this variant has no sums");
    NG_CHECK(!params.empty(), "params must not be empty");
    const ElementwiseLists lists{params, grads,   states,       scales,   steps,       given,      lr_tensor,
                                 lr,     options, state_format, maximize, row_lengths, grad_scale, clip};
    ElementwiseArgs args{};
    std::vector<ElementwiseTensor> tensors = collect(rule, lists, args);
    args.update = static_cast<ParamUpdate>(param_update);
    if (args.update == ParamUpdate::split) {
        NG_CHECK(rests.size() == params.size(), "split needs rests, one per parameter");
        args.rest_type = dtype(rests[0]);
        NG_CHECK(args.param_type == DType::bfloat16 &&
                     (args.rest_type == DType::int8 || args.rest_type == DType::int16),
                 "rests must be int8 or int16, of bfloat16 params");
        for (size_t i = 0; i < rests.size(); ++i) {
            NG_CHECK(dtype(rests[i]) == args.rest_type && same_layout(rests[i], params[i]), "rests[", i,
                     "] must be laid out like its parameter");
            tensors[i].rest = data(rests[i]);
        }
    }
    int64_t rows = 0;
    for (const auto& tensor : tensors) rows += rows_of(tensor);
    number_chunks(args, tensors, pieces_of);
    const DType compute = args.param_type == DType::float64 ? DType::float64 : DType::float32;
    const Tensor sums = empty({rows, rule.sums}, compute, params[0]);
    const Tensor partial = empty({args.chunks, rule.sums}, compute, params[0]);
    args.sums = data(sums);
    args.partial = data(partial);
    run_sums(Entry::sums(), static_cast<int>(variant), rule.sums, args, tensors, params[0]);
    return sums;
}

}  // namespace narrowgauge

#if NARROWGAUGE_CPU

#define NG_RULE_KERNELS(rule)                                                                  \
    NG_CPU_KERNEL(void, rule##_chunks,                                                         \
                  (int variant, const ElementwiseArgs& args, const ElementwiseTensor* tensors, \
                   int64_t begin, int64_t end))                                                \
    NG_CPU_KERNEL(void, rule##_pieces,                                                         \
                  (int variant, const ElementwiseArgs& args, const ElementwiseTensor* tensors, \
                   int64_t begin, int64_t end))
#define NG_RULE_STEP(rule) NG_CPU_POINTER(rule##_chunks)
#define NG_RULE_SUMS(rule) NG_CPU_POINTER(rule##_pieces)

#else

#define NG_RULE_KERNELS(rule)                                                              \
    namespace narrowgauge {                                                                \
    void launch_##rule(int variant, const ElementwiseLaunch& table, Stream stream);        \
    void launch_##rule##_sums(int variant, const ElementwiseLaunch& table, Stream stream); \
    }
#define NG_RULE_STEP(rule) launch_##rule
#define NG_RULE_SUMS(rule) launch_##rule##_sums

#endif

// One per rule before the registration, one inside it; the build writes both.
#define NG_RULE_ENTRY(name)                                                      \
    NG_RULE_KERNELS(name)                                                        \
    namespace narrowgauge {                                                      \
    struct name##_entry {                                                        \
        static constexpr bool has_sums = any_sums<name::Rule, name::variants>(); \
        static RuleShape shape(int64_t variant) {                                \
            return shape_of<name::Rule, name::variants>(variant, name::options); \
        }                                                                        \
        static ElementwiseKernel step() { return NG_RULE_STEP(name); }           \
        static ElementwiseKernel sums() { return NG_RULE_SUMS(name); }           \
    };                                                                           \
    }
#define NG_RULE_REGISTER(name)                                                         \
    m.impl(#name "_", NG_BOX(&::narrowgauge::rule_step<::narrowgauge::name##_entry>)); \
    if (::narrowgauge::name##_entry::has_sums)                                         \
        m.impl(#name "_sums", NG_BOX(&::narrowgauge::rule_sums<::narrowgauge::name##_entry>));
