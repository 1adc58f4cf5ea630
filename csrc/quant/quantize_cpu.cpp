// CPU kernels of quantize and dequantize.
#include "common/philox_cpu.h"
#include "quant/encode_cpu.h"
#include "quant/quantize.h"

NG_NAMESPACE_BEGIN
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Codes of the `count` elements from `first` on; scale_at(j) is the scale of the j-th of them.
template <class T, class Code, class ScaleAt>
void encode(const Quantize& args, int64_t first, int64_t count, ScaleAt scale_at) {
    const T* x = static_cast<const T*>(args.x) + first;
    Code* codes = static_cast<Code*>(args.codes) + first;
    if (args.rng) {
        const Philox philox{static_cast<uint64_t>(args.rng[0]), static_cast<uint64_t>(args.rng[1])};
        constexpr int64_t kBlock = 256;
        uint32_t space[kBlock + philox_slack];
        for (int64_t begin = 0; begin < count; begin += kBlock) {
            const int64_t end = smaller(begin + kBlock, count);
            const uint32_t* words = fill_words(philox, first + begin, end - begin, space);
            for (int64_t j = begin; j < end; ++j) {
                const auto draw = Draw<Code>::of_word(words[j - begin]);
                codes[j] = round_stochastic<Code>(to_float(x[j]) / scale_at(j), draw);
            }
        }
    } else if (args.noise) {
        const float* noise = args.noise + first;
        for (int64_t j = 0; j < count; ++j) {
            const auto draw = Draw<Code>::of_noise(noise[j]);
            codes[j] = round_stochastic<Code>(to_float(x[j]) / scale_at(j), draw);
        }
    } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) codes[j] = round_nearest<Code>(to_float(x[j]) / scale_at(j));
    }
}

template <class T, class Code>
struct Kernels {
    // A segment is encoded while it is still in the cache.
    static void segments(const Quantize& args, int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            const int64_t row = group / args.segments, left = group % args.segments * args.segment,
                          first = row * args.columns + left;
            const int64_t count = smaller(args.segment, args.columns - left);
            const T* x = static_cast<const T*>(args.x) + first;
            const float scale = scale_of<Code>(magnitude_to_float<T>(largest_magnitude(x, count)));
            args.scale[group] = scale;
            encode<T, Code>(args, first, count, [=](int64_t) { return scale; });
        }
    }

    static void column_tiles(const Quantize& args, int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t left = tile * kQuantizeColumns,
                          width = smaller(kQuantizeColumns, args.columns - left);
            const T* x = static_cast<const T*>(args.x) + left;
            uint32_t largest[kQuantizeColumns] = {};
            for (int64_t row = 0; row < args.rows; ++row) {
                for (int64_t j = 0; j < width; ++j) {
                    const uint32_t bits = magnitude_bits(x[row * args.columns + j]);
                    largest[j] = bits > largest[j] ? bits : largest[j];
                }
            }
            float* scale = args.scale + left;
            for (int64_t j = 0; j < width; ++j) scale[j] = scale_of<Code>(magnitude_to_float<T>(largest[j]));
            for (int64_t row = 0; row < args.rows; ++row) {
                encode<T, Code>(args, row * args.columns + left, width, [=](int64_t j) { return scale[j]; });
            }
        }
    }

    static void find_largest(const Quantize& args, int64_t begin, int64_t end) {
        const int64_t total = args.rows * args.columns;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t first = chunk * kQuantizeChunk;
            args.largest[chunk] = largest_magnitude(static_cast<const T*>(args.x) + first,
                                                    smaller(kQuantizeChunk, total - first));
        }
    }

    static float tensor_scale(const Quantize& args) {
        uint32_t largest = 0;
        for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
            largest = args.largest[chunk] > largest ? args.largest[chunk] : largest;
        }
        return scale_of<Code>(magnitude_to_float<T>(largest));
    }

    static void encode_chunks(const Quantize& args, int64_t begin, int64_t end) {
        const int64_t total = args.rows * args.columns;
        const float scale = *args.scale;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t first = chunk * kQuantizeChunk;
            encode<T, Code>(args, first, smaller(kQuantizeChunk, total - first),
                            [=](int64_t) { return scale; });
        }
    }
};

// Calls with (T{}, Code{}): the types of x and of the codes.
template <class F>
auto with_types(const Quantize& args, F function) {
    const auto with_code = [&](auto x) {
        if (args.code_type == DType::int8) return function(x, int8_t{});
        if (args.code_type == DType::e4m3) return function(x, e4m3{});
        return function(x, e5m2{});
    };
    if (args.x_type == DType::bfloat16) return with_code(bf16{});
    if (args.x_type == DType::float16) return with_code(f16{});
    return with_code(float{});
}

template <class Code, class Y>
void decode(const Dequantize& args, int64_t begin, int64_t end) {
    const Code* codes = static_cast<const Code*>(args.codes);
    Y* y = static_cast<Y*>(args.y);
    const auto write = [=](int64_t first, int64_t last, auto scale_at) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            y[i] = from_float<Y>(to_float(codes[i]) * scale_at(i));
        }
    };
    if (args.granularity == Granularity::tensor) {
        const float scale = *args.scale;
        return write(begin, end, [=](int64_t) { return scale; });
    }
    for (int64_t first = begin; first < end;) {
        const int64_t row = first / args.columns, left = row * args.columns;
        int64_t last = left + args.columns;
        if (args.granularity == Granularity::row) {
            const int64_t segment = (first - left) / args.segment;
            last = smaller(smaller(end, last), left + (segment + 1) * args.segment);
            const float scale = args.scale[row * args.segments + segment];
            write(first, last, [=](int64_t) { return scale; });
        } else {
            last = smaller(end, last);
            const float* scale = args.scale - left;
            write(first, last, [=](int64_t i) { return scale[i]; });
        }
        first = last;
    }
}

}  // namespace

void quantize_segments(const Quantize& args, int64_t begin, int64_t end) {
    with_types(args,
               [&](auto x, auto code) { Kernels<decltype(x), decltype(code)>::segments(args, begin, end); });
}

void quantize_column_tiles(const Quantize& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto x, auto code) {
        Kernels<decltype(x), decltype(code)>::column_tiles(args, begin, end);
    });
}

void quantize_find_largest(const Quantize& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto x, auto code) {
        Kernels<decltype(x), decltype(code)>::find_largest(args, begin, end);
    });
}

float quantize_tensor_scale(const Quantize& args) {
    return with_types(
        args, [&](auto x, auto code) { return Kernels<decltype(x), decltype(code)>::tensor_scale(args); });
}

void quantize_encode_chunks(const Quantize& args, int64_t begin, int64_t end) {
    with_types(args, [&](auto x, auto code) {
        Kernels<decltype(x), decltype(code)>::encode_chunks(args, begin, end);
    });
}

void dequantize_elements(const Dequantize& args, int64_t begin, int64_t end) {
    const auto with_code = [&](auto code) {
        using Code = decltype(code);
        if (args.y_type == DType::bfloat16) return decode<Code, bf16>(args, begin, end);
        if (args.y_type == DType::float16) return decode<Code, f16>(args, begin, end);
        return decode<Code, float>(args, begin, end);
    };
    if (args.code_type == DType::int8) return with_code(int8_t{});
    if (args.code_type == DType::e4m3) return with_code(e4m3{});
    return with_code(e5m2{});
}

NG_NAMESPACE_END
