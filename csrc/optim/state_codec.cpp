// Encoding and decoding one optimizer state: the bindings.
#include "optim/state_codec.h"

#include "common/binding.h"

#if !NARROWGAUGE_CPU
#include "optim/state_codec_launch.h"
#endif

namespace narrowgauge {
namespace {

StateFormat format_of(int64_t number) {
    NG_CHECK(number > 0 && number < state_formats, "format must be 1 to ", state_formats - 1, ", got ",
             number);
    return static_cast<StateFormat>(number);
}

std::vector<int64_t> scale_sizes(StateFormat format, int64_t numel) {
    const int columns = state_scale_columns(format);
    const int64_t total = state_scale_numel(format, numel);
    return columns == 1 ? std::vector<int64_t>{total} : std::vector<int64_t>{total / columns, columns};
}

std::vector<int64_t> codes_sizes(StateFormat format, const std::vector<int64_t>& sizes, int64_t numel) {
    return is_packed(format) ? std::vector<int64_t>{state_codes_numel(format, numel)} : sizes;
}

std::tuple<Tensor, Tensor> state_encode(const Tensor& x, int64_t format_number, bool is_signed) {
    const StateFormat format = format_of(format_number);
    const int64_t numel = x.numel();
    check_layout(x, x, "x");
    NG_CHECK(is_floating(dtype(x)), "x must be floating point, got ", name_of(dtype(x)));
    Tensor codes = empty(codes_sizes(format, sizes_of(x), numel), state_codes_type(format, is_signed), x);
    Tensor scale = empty(scale_sizes(format, numel), state_scale_type(format), x);
    const StateEncode args{data(x), data(codes), data(scale), numel, format, is_signed, dtype(x)};
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(state_encode_chunks);
    parallel_ranges((numel + state_chunk - 1) / state_chunk, state_chunk,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(x);
    launch_state_encode(args, device.stream());
#endif
    return {codes, scale};
}

Tensor state_decode(const Tensor& codes, const Tensor& scale, int64_t format_number, bool is_signed,
                    std::vector<int64_t> shape) {
    const StateFormat format = format_of(format_number);
    int64_t numel = 1;
    for (const int64_t size : shape) numel *= size;
    check_layout(codes, codes, "codes");
    check_layout(scale, codes, "scale");
    NG_CHECK(dtype(codes) == state_codes_type(format, is_signed) &&
                 codes.numel() == state_codes_numel(format, numel),
             "codes must be ", name_of(state_codes_type(format, is_signed)),
             ", one per element of shape, got ", name_of(dtype(codes)));
    NG_CHECK(dtype(scale) == state_scale_type(format) && scale.numel() == state_scale_numel(format, numel),
             "scale must be ", name_of(state_scale_type(format)), ", one row per block, got ",
             name_of(dtype(scale)));
    Tensor values = empty(shape, DType::float32, codes);
    const StateDecode args{data(codes), data(scale), static_cast<float*>(data(values)),
                           numel,       format,      is_signed};
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(state_decode_chunks);
    parallel_ranges((numel + state_chunk - 1) / state_chunk, state_chunk,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(codes);
    launch_state_decode(args, device.stream());
#endif
    return values;
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("state_encode", NG_BOX(&state_encode));
    m.impl("state_decode", NG_BOX(&state_decode));
}

}  // namespace narrowgauge
