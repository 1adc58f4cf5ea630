// Quantize and dequantize: the bindings.
#include "quant/quantize.h"

#include "quant/guards.h"

#if NARROWGAUGE_CPU
#include "common/scratch.h"
#else
#include "quant/quantize_launch.h"
#endif

namespace narrowgauge {
namespace {

Granularity granularity_of(const std::string& name) {
    if (name == "tensor") return Granularity::tensor;
    if (name == "row" || name == "block") return Granularity::row;
    if (name == "column") return Granularity::column;
    NG_CHECK(false, "granularity must be tensor, row, column or block, got ", name);
    return Granularity::tensor;
}

bool is_narrow_floating(DType type) {
    return type == DType::float32 || type == DType::bfloat16 || type == DType::float16;
}

// A tensor seen as rows of its last dimension, and the shape of its scales.
struct Groups {
    int64_t rows, columns, segment, segments;
    std::vector<int64_t> scale_sizes;
};

Groups groups_of(const std::vector<int64_t>& sizes, const std::string& granularity) {
    const int64_t columns = sizes.empty() ? 1 : sizes.back();
    Groups groups{1, columns, columns, 1, {}};
    for (size_t i = 0; i + 1 < sizes.size(); ++i) groups.rows *= sizes[i];
    if ((granularity == "row" || granularity == "block") && !sizes.empty())
        groups.scale_sizes.assign(sizes.begin(), sizes.end() - 1);
    if (granularity == "column" && !sizes.empty()) groups.scale_sizes.assign(sizes.end() - 1, sizes.end());
    if (granularity == "block") {
        groups.segment = kQuantizeBlock;
        groups.segments = (columns + kQuantizeBlock - 1) / kQuantizeBlock;
        groups.scale_sizes.push_back(groups.segments);
    }
    return groups;
}

#if NARROWGAUGE_CPU
void run(Quantize& args, const Tensor&) {
    if (args.granularity == Granularity::row) {
        const auto kernel = NG_CPU_POINTER(quantize_segments);
        parallel_ranges(args.rows * args.segments, args.segment,
                        [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    } else if (args.granularity == Granularity::column) {
        const auto kernel = NG_CPU_POINTER(quantize_column_tiles);
        const int64_t tiles = (args.columns + kQuantizeColumns - 1) / kQuantizeColumns;
        parallel_ranges(tiles, args.rows * kQuantizeColumns,
                        [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    } else {
        args.chunks = (args.rows * args.columns + kQuantizeChunk - 1) / kQuantizeChunk;
        const Scratch<uint32_t> largest(args.chunks);
        args.largest = largest.get();
        const auto find_largest = NG_CPU_POINTER(quantize_find_largest);
        const auto encode = NG_CPU_POINTER(quantize_encode_chunks);
        parallel_ranges(args.chunks, kQuantizeChunk,
                        [&](int64_t begin, int64_t end) { find_largest(args, begin, end); });
        *args.scale = NG_CPU_POINTER(quantize_tensor_scale)(args);
        parallel_ranges(args.chunks, kQuantizeChunk,
                        [&](int64_t begin, int64_t end) { encode(args, begin, end); });
    }
}
#else
void run(Quantize& args, const Tensor& x) {
    const OnDevice device(x);
    args.chunks = quantize_chunks(args);
    const int64_t groups = args.granularity == Granularity::column ? args.columns : 1;
    const Tensor largest = empty({args.chunks * groups}, DType::int32, x);
    args.largest = static_cast<uint32_t*>(data(largest));
    launch_quantize(args, device.stream());
}
#endif

std::tuple<Tensor, Tensor> quantize(const Tensor& x, std::string format, std::string granularity,
                                    std::optional<Tensor> rng, std::optional<Tensor> noise) {
    Quantize args{};
    args.code_type = code_type_of(format);
    args.granularity = granularity_of(granularity);
    args.x_type = dtype(x);
    NG_CHECK(is_narrow_floating(args.x_type), "x must be float32, bfloat16 or float16, got ",
             name_of(args.x_type));
    check_layout(x, x, "x");
    if (rng) {
        check_layout(*rng, x, "rng");
        NG_CHECK(dtype(*rng) == DType::int64 && rng->numel() == 2,
                 "rng must be an int64 tensor [seed, offset]");
    }
    if (noise) {
        check_layout(*noise, x, "noise");
        NG_CHECK(dtype(*noise) == DType::float32 && noise->numel() == x.numel(),
                 "noise must be float32, like x");
    }
    const std::vector<int64_t> sizes = sizes_of(x);
    const Groups groups = groups_of(sizes, granularity);
    Tensor codes = empty(sizes, args.code_type, x), scale = empty(groups.scale_sizes, DType::float32, x);
    args.x = data(x);
    args.rng = static_cast<const int64_t*>(data(rng));
    args.noise = static_cast<const float*>(data(noise));
    args.codes = data(codes);
    args.scale = static_cast<float*>(data(scale));
    args.rows = groups.rows;
    args.columns = groups.columns;
    args.segment = groups.segment;
    args.segments = groups.segments;
    run(args, x);
    return {codes, scale};
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, std::string granularity, OptionalDType y_dtype) {
    Dequantize args{};
    args.granularity = granularity_of(granularity);
    args.code_type = dtype(codes);
    args.y_type = dtype_or(y_dtype, DType::float32);
    NG_CHECK(args.code_type == DType::int8 || args.code_type == DType::e4m3 || args.code_type == DType::e5m2,
             "codes must be int8, float8_e4m3fn or float8_e5m2, got ", name_of(args.code_type));
    NG_CHECK(is_narrow_floating(args.y_type), "dtype must be float32, bfloat16 or float16, got ",
             name_of(args.y_type));
    check_layout(codes, codes, "codes");
    check_layout(scale, codes, "scale");
    const std::vector<int64_t> sizes = sizes_of(codes);
    const Groups groups = groups_of(sizes, granularity);
    NG_CHECK(dtype(scale) == DType::float32 && sizes_of(scale) == groups.scale_sizes,
             "scale must be float32 with one entry per ", granularity);
    Tensor y = empty(sizes, args.y_type, codes);
    args.codes = data(codes);
    args.scale = static_cast<const float*>(data(scale));
    args.y = data(y);
    args.rows = groups.rows;
    args.columns = groups.columns;
    args.segment = groups.segment;
    args.segments = groups.segments;
#if NARROWGAUGE_CPU
    const auto kernel = NG_CPU_POINTER(dequantize_elements);
    parallel_ranges(args.rows * args.columns, 1,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
#else
    const OnDevice device(codes);
    launch_dequantize(args, device.stream());
#endif
    return y;
}

}  // namespace

NG_OPERATORS(m) {
    m.impl("quantize", NG_BOX(&quantize));
    m.impl("dequantize", NG_BOX(&dequantize));
}

}  // namespace narrowgauge
