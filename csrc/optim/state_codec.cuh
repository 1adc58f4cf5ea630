// Encoding and decoding optimizer states on the GPU.
//
// A warp works on 256 consecutive elements, which begin at a multiple of 256; a lane holds 8 of them, and a
// block of any format is a power of two of neighbouring lanes.
#pragma once

#include "common/device.h"
#include "optim/dynamic_map.h"
#include "optim/state_codes.h"

namespace narrowgauge {

#if defined(__CUDACC__)
#define NG_DEVICE_TABLE static __device__ constexpr
#else
#define NG_DEVICE_TABLE static constexpr
#endif
NG_DEVICE_TABLE DynamicMap<true> device_map_signed = make_dynamic_map<true>();
NG_DEVICE_TABLE DynamicMap<false> device_map_unsigned = make_dynamic_map<false>();
NG_DEVICE_TABLE FourBitMap device_four_bit_map = four_bit_map;
#undef NG_DEVICE_TABLE

// The bytes that the arena hands out for `count` elements.
template <class T>
constexpr int taken(int count) {
    return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

// The maps in shared memory, where lanes can look up different entries at once; nothing when states are not
// codes.
template <bool Quantized>
struct SharedMaps {
    static constexpr int bytes = 0;
    __device__ explicit SharedMaps(SharedArena&) {}
};

template <>
struct SharedMaps<true> {
    static constexpr int bytes = 2 * taken<float>(256) + taken<float>(16) +
                                 taken<uint32_t>(DynamicMap<true>::buckets) +
                                 taken<uint32_t>(DynamicMap<false>::buckets);

    Shared<float> signed_values, unsigned_values, four_bit_values;
    Shared<uint32_t> signed_lookup, unsigned_lookup;

    __device__ explicit SharedMaps(SharedArena& arena)
        : signed_values(arena.take<float>(256)),
          unsigned_values(arena.take<float>(256)),
          four_bit_values(arena.take<float>(16)),
          signed_lookup(arena.take<uint32_t>(DynamicMap<true>::buckets)),
          unsigned_lookup(arena.take<uint32_t>(DynamicMap<false>::buckets)) {}

    // By all threads of the block; a barrier must follow.
    __device__ void fill() {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) signed_values[i] = device_map_signed.values[i];
        for (int i = threadIdx.x; i < 256; i += blockDim.x)
            unsigned_values[i] = device_map_unsigned.values[i];
        for (int i = threadIdx.x; i < 16; i += blockDim.x) four_bit_values[i] = device_four_bit_map.values[i];
        for (int i = threadIdx.x; i < DynamicMap<true>::buckets; i += blockDim.x) {
            signed_lookup[i] = device_map_signed.lookup[i];
        }
        for (int i = threadIdx.x; i < DynamicMap<false>::buckets; i += blockDim.x) {
            unsigned_lookup[i] = device_map_unsigned.lookup[i];
        }
    }
};

// --- int8 and int4: codes that are looked up ---------------------------------------------------------

struct MapDecoder {
    float scale;
};

template <bool Signed>
struct DeviceCodec8 {
    using Stored = float;
    static constexpr int block = 256, columns = 1;
    static constexpr int32_t limit = infinity_bits;
    static constexpr bool needs_smallest = false, packed = false;
    struct Encoder {
        float divisor;
    };

    static __device__ __forceinline__ MapDecoder decoder(const Stored* stored) { return {stored[0]}; }
    static __device__ __forceinline__ Encoder encoder(float largest, float, Stored* stored) {
        stored[0] = largest;
        return {at_least(largest, 1e-12f)};
    }
    static __device__ __forceinline__ float decode(const SharedMaps<true>& maps, uint32_t code,
                                                   const MapDecoder& decoder) {
        const Shared<float> map = Signed ? maps.signed_values : maps.unsigned_values;
        return map[code] * decoder.scale;
    }
    static __device__ __forceinline__ uint32_t encode(const SharedMaps<true>& maps, float x,
                                                      const Encoder& encoder) {
        const Shared<uint32_t> lookup = Signed ? maps.signed_lookup : maps.unsigned_lookup;
        return narrowgauge::encode<Signed>(lookup, x / encoder.divisor);
    }
};

template <bool Signed>
struct DeviceCodec4 : StateCodec<StateFormat::int4, Signed> {
    using Base = StateCodec<StateFormat::int4, Signed>;
    static constexpr bool packed = true;

    static __device__ __forceinline__ MapDecoder decoder(const float* stored) { return {stored[0]}; }
    static __device__ __forceinline__ float decode(const SharedMaps<true>& maps, uint32_t code,
                                                   const MapDecoder& decoder) {
        if constexpr (Signed) {
            return maps.four_bit_values[code] * decoder.scale;
        } else {
            return static_cast<float>(static_cast<int32_t>(code) + 1) * 0.0625f * decoder.scale;
        }
    }
    static __device__ __forceinline__ uint32_t encode(const SharedMaps<true>&, float x,
                                                      const typename Base::Encoder& encoder) {
        return Base::encode(x, encoder);
    }
};

// --- the others: codes that are computed -------------------------------------------------------------

template <StateFormat Format, bool Signed>
struct ComputedCodec : StateCodec<Format, Signed> {
    using Base = StateCodec<Format, Signed>;
    static constexpr bool packed = false;

    static __device__ __forceinline__ float decode(const SharedMaps<true>&, uint32_t code,
                                                   const typename Base::Decoder& decoder) {
        return Base::decode(static_cast<uint8_t>(code), decoder);
    }
    static __device__ __forceinline__ uint32_t encode(const SharedMaps<true>&, float x,
                                                      const typename Base::Encoder& encoder) {
        return Base::encode(x, encoder);
    }
};

// Calls function(codec), by a format that is the same for the whole warp and has codes.
template <bool Signed, class F>
__device__ __forceinline__ void with_device_codec(StateFormat format, F&& function) {
    switch (format) {
        case StateFormat::int8:
            return function(DeviceCodec8<Signed>{});
        case StateFormat::int4:
            return function(DeviceCodec4<Signed>{});
        case StateFormat::fp8:
            return function(ComputedCodec<StateFormat::fp8, Signed>{});
        case StateFormat::fp8_expanded:
            return function(ComputedCodec<StateFormat::fp8_expanded, Signed>{});
        default:
            return function(ComputedCodec<StateFormat::int8_companded, Signed>{});
    }
}

template <class Codec>
__device__ __forceinline__ auto load_decoder(const void* scales, int64_t i) {
    const auto all = global<const typename Codec::Stored>(scales, "scale");
    typename Codec::Stored stored[Codec::columns];
    const int64_t first = i / Codec::block * Codec::columns;
#pragma unroll
    for (int column = 0; column < Codec::columns; ++column) stored[column] = all[first + column];
    return Codec::decoder(stored);
}

// --- eight elements of a lane --------------------------------------------------------------------------

// Elements [i, i + n) of this lane, with i a multiple of 8 and n at most 8; the rest of `values` is 0.
// `whole`: n is 8, and the codes begin at a multiple of 8 bytes (bf16: 16).
template <class Codec>
__device__ __forceinline__ void decode_lane(const void* codes, const void* scales, int64_t i, int n,
                                            bool whole, const SharedMaps<true>& maps, float (&values)[8]) {
    constexpr int bytes = Codec::packed ? 4 : 8;
    if (n == 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = 0.0f;
        return;
    }
    const auto from = global<const uint8_t>(codes, "codes");
    const int64_t first = Codec::packed ? i / 2 : i;
    Vec<uint8_t, bytes> stored{};
    if (whole) {
        stored = load<bytes>(from, first);
    } else {
        const int present = Codec::packed ? (n + 1) / 2 : n;
#pragma unroll
        for (int j = 0; j < bytes; ++j) {
            if (j < present) stored[j] = from[first + j];
        }
    }
    const auto decoder = load_decoder<Codec>(scales, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        uint32_t code;
        if constexpr (Codec::packed) {
            code = j % 2 == 0 ? stored[j / 2] >> 4 : stored[j / 2] & 15u;
        } else {
            code = stored[j];
        }
        const float value = Codec::decode(maps, code, decoder);
        values[j] = j < n ? value : 0.0f;
    }
}

// All lanes of the warp must be here, those with n == 0 too.
template <class Codec>
__device__ __forceinline__ void encode_lane(void* codes, void* scales, int64_t i, int n, bool whole,
                                            const SharedMaps<true>& maps, const float (&values)[8]) {
    constexpr int lanes = Codec::block / 8, bytes = Codec::packed ? 4 : 8;
    int largest = 0;                  // magnitudes compare as integers, and NaN is the largest of all
    unsigned smallest = 0xffffffffu;  // of those above 0: less one, 0 is the largest
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int magnitude = j < n ? __float_as_int(values[j]) & 0x7fffffff : 0;
        largest = max(largest, magnitude);
        if constexpr (Codec::needs_smallest) smallest = min(smallest, static_cast<unsigned>(magnitude) - 1u);
    }
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
        if constexpr (Codec::needs_smallest)
            smallest = min(smallest, __shfl_xor_sync(0xffffffffu, smallest, distance));
    }
    if (n == 0) return;

    const bool finite = largest < Codec::limit;
    typename Codec::Stored stored[Codec::columns];
    // Nothing that is not finite is converted to an integer: such a block is encoded as if it were zeros.
    const auto encoder = Codec::encoder(__int_as_float(finite ? largest : 0),
                                        __uint_as_float(finite ? smallest + 1u : 0u), stored);
    const auto value = [&](int j) { return finite && j < n ? values[j] : 0.0f; };
    Vec<uint8_t, bytes> packed;
#pragma unroll
    for (int j = 0; j < bytes; ++j) {
        uint32_t code;
        if constexpr (Codec::packed) {
            const uint32_t high = Codec::encode(maps, value(2 * j), encoder);
            const uint32_t low = 2 * j + 1 < n ? Codec::encode(maps, value(2 * j + 1), encoder) : 0u;
            code = high << 4 | low;
        } else {
            code = Codec::encode(maps, value(j), encoder);
        }
        packed[j] = static_cast<uint8_t>(finite ? code : 0u);
    }
    const auto to = global<uint8_t>(codes, "codes");
    const int64_t first = Codec::packed ? i / 2 : i;
    if (whole) {
        store<bytes>(to, first, packed);
    } else {
        const int present = Codec::packed ? (n + 1) / 2 : n;
#pragma unroll
        for (int j = 0; j < bytes; ++j) {
            if (j < present) to[first + j] = packed[j];
        }
    }
    if (i % Codec::block == 0) {
        const auto all = global<typename Codec::Stored>(scales, "scale");
        const int64_t first_scale = i / Codec::block * Codec::columns;
#pragma unroll
        for (int column = 0; column < Codec::columns; ++column) {
            all[first_scale + column] =
                finite ? stored[column] : from_float<typename Codec::Stored>(__int_as_float(0x7fc00000));
        }
    }
}

// --- what kernels call: any format but fp32 --------------------------------------------------------------

template <bool Signed>
__device__ __forceinline__ void decode_state(StateFormat format, const void* codes, const void* scales,
                                             int64_t i, int n, bool whole, const SharedMaps<true>& maps,
                                             float (&values)[8]) {
    if (format == StateFormat::bf16) {
        const auto from = global<const bf16>(codes, "codes");
        if (whole) {
            const Vec<bf16, 8> vector = load<8>(from, i);
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = to_float(vector[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = j < n ? to_float(static_cast<bf16>(from[i + j])) : 0.0f;
        }
        return;
    }
    with_device_codec<Signed>(
        format, [&](auto codec) { decode_lane<decltype(codec)>(codes, scales, i, n, whole, maps, values); });
}

// All lanes of the warp must call it, those with n == 0 too.
template <bool Signed>
__device__ __forceinline__ void encode_state(StateFormat format, void* codes, void* scales, int64_t i, int n,
                                             bool whole, const SharedMaps<true>& maps,
                                             const float (&values)[8]) {
    if (format == StateFormat::bf16) {
        const auto to = global<bf16>(codes, "codes");
        if (whole) {
            Vec<bf16, 8> vector;
#pragma unroll
            for (int j = 0; j < 8; ++j) vector[j] = from_float<bf16>(values[j]);
            store<8>(to, i, vector);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (j < n) to[i + j] = from_float<bf16>(values[j]);
            }
        }
        return;
    }
    with_device_codec<Signed>(
        format, [&](auto codec) { encode_lane<decltype(codec)>(codes, scales, i, n, whole, maps, values); });
}

// With the sign known at run time only: the same for the whole warp.
__device__ __forceinline__ void decode_state(StateFormat format, bool is_signed, const void* codes,
                                             const void* scales, int64_t i, int n, bool whole,
                                             const SharedMaps<true>& maps, float (&values)[8]) {
    is_signed ? decode_state<true>(format, codes, scales, i, n, whole, maps, values)
              : decode_state<false>(format, codes, scales, i, n, whole, maps, values);
}
__device__ __forceinline__ void encode_state(StateFormat format, bool is_signed, void* codes, void* scales,
                                             int64_t i, int n, bool whole, const SharedMaps<true>& maps,
                                             const float (&values)[8]) {
    is_signed ? encode_state<true>(format, codes, scales, i, n, whole, maps, values)
              : encode_state<false>(format, codes, scales, i, n, whole, maps, values);
}

// One element at any index, in any format.
template <bool Signed>
__device__ __forceinline__ float decode_element(StateFormat format, const void* codes, const void* scales,
                                                int64_t i, const SharedMaps<true>& maps) {
    if (format == StateFormat::fp32) return global<const float>(codes, "codes")[i];
    if (format == StateFormat::bf16)
        return to_float(static_cast<bf16>(global<const bf16>(codes, "codes")[i]));
    float value = 0.0f;
    with_device_codec<Signed>(format, [&](auto codec) {
        using Codec = decltype(codec);
        const uint32_t byte =
            static_cast<uint8_t>(global<const uint8_t>(codes, "codes")[Codec::packed ? i / 2 : i]);
        const uint32_t code = Codec::packed ? (i % 2 == 0 ? byte >> 4 : byte & 15u) : byte;
        value = Codec::decode(maps, code, load_decoder<Codec>(scales, i));
    });
    return value;
}
__device__ __forceinline__ float decode_element(StateFormat format, bool is_signed, const void* codes,
                                                const void* scales, int64_t i, const SharedMaps<true>& maps) {
    return is_signed ? decode_element<true>(format, codes, scales, i, maps)
                     : decode_element<false>(format, codes, scales, i, maps);
}

}  // namespace narrowgauge
