// CPU kernels of the state formats. Everything works on whole chunks of 256 elements, whose loops have
// constant ends; the last chunk of a state goes through a copy.
#include "optim/state_codec_cpu.h"

#include <algorithm>
#include <type_traits>

#include "common/floating.h"
#include "common/simd.h"
#include "optim/dynamic_map.h"
#include "optim/state_codec.h"
#include "optim/state_codes.h"

NG_NAMESPACE_BEGIN
namespace {

constexpr float nan_scale = __builtin_nanf("");

// --- int8 -------------------------------------------------------------------------------------------

template <bool Signed>
constexpr DynamicMap<Signed> dynamic_map = make_dynamic_map<Signed>();

struct MagnitudeRange {
    int32_t largest, smallest;
};

// Magnitudes compare as integers, and NaN is the largest of all.
template <int Count>
int32_t largest_magnitude(const float* values) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < Count; ++i) {
        const int32_t magnitude = bit_cast<int32_t>(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

template <int Count>
int32_t smallest_magnitude_above_zero(const float* values) {
    uint32_t smallest = 0xffffffffu;  // less one, 0 is the largest
#pragma omp simd reduction(min : smallest)
    for (int i = 0; i < Count; ++i) {
        const uint32_t magnitude = (bit_cast<uint32_t>(values[i]) & 0x7fffffffu) - 1u;
        smallest = magnitude < smallest ? magnitude : smallest;
    }
    return static_cast<int32_t>(smallest + 1u);
}

// Table look-ups are written out for eight elements: compilers make worse of a loop, and the gather
// instruction is slow.
template <bool Signed>
void decode_map(const uint8_t* codes, const float* scales, float* values) {
    const float* map = dynamic_map<Signed>.values;
    const float scale = scales[0];
    for (int i = 0; i < state_chunk; i += 8) {
        uint64_t w;
        memcpy(&w, codes + i, sizeof(w));
        const F32x8 entries{map[w & 255],       map[w >> 8 & 255],  map[w >> 16 & 255], map[w >> 24 & 255],
                            map[w >> 32 & 255], map[w >> 40 & 255], map[w >> 48 & 255], map[w >> 56]};
        store_pack(values + i, entries * scale);
    }
}

// In three passes, because the look-ups between them do not vectorise.
template <bool Signed>
void encode_map(const float* values, uint8_t* codes, float* scales) {
    using Map = DynamicMap<Signed>;
    const int32_t largest = largest_magnitude<state_chunk>(values);
    if (largest >= infinity_bits) {
        std::fill(codes, codes + state_chunk, uint8_t{0});
        scales[0] = nan_scale;
        return;
    }
    scales[0] = bit_cast<float>(largest);
    const float divisor = at_least(scales[0], 1e-12f);
    const uint32_t* lookup = dynamic_map<Signed>.lookup;
    alignas(64) uint32_t places[state_chunk];
#pragma omp simd
    for (int i = 0; i < state_chunk; ++i) places[i] = Map::place(values[i] / divisor);
    for (int i = 0; i < state_chunk; i += 8) {
        uint32_t* p = places + i;
        const auto entry = [&](int k) { return lookup[p[k] >> Map::low_bits]; };
        const U32x8 entries{entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7)};
        U32x8 place;
        memcpy(&place, p, sizeof(place));
        const auto before = bit_cast<I32x8>(place & Map::low_mask) < bit_cast<I32x8>(entries & 0xffffffu);
        const U32x8 code = (entries >> 24) + 1 + bit_cast<U32x8>(before);  // true is -1
        memcpy(p, &code, sizeof(code));
    }
#pragma omp simd
    for (int i = 0; i < state_chunk; ++i) codes[i] = static_cast<uint8_t>(places[i]);
}

// --- int4 -------------------------------------------------------------------------------------------

// The two values of every byte.
struct PairMap {
    float values[256][2];
};
constexpr PairMap make_pair_map() {
    PairMap map{};
    for (int byte = 0; byte < 256; ++byte) {
        map.values[byte][0] = four_bit_map.values[byte >> 4];
        map.values[byte][1] = four_bit_map.values[byte & 15];
    }
    return map;
}
constexpr PairMap pair_map = make_pair_map();

template <bool Signed>
void decode_packed(const uint8_t* codes, const float* scales, float* values) {
    constexpr int block = StateCodec<StateFormat::int4, Signed>::block;
    for (int first = 0; first < state_chunk; first += block) {
        const float scale = scales[first / block];
        const uint8_t* bytes = codes + first / 2;
        float* to = values + first;
        if constexpr (Signed) {
            for (int i = 0; i < block / 2; ++i) memcpy(to + 2 * i, pair_map.values[bytes[i]], 8);
#pragma omp simd
            for (int i = 0; i < block; ++i) to[i] *= scale;
        } else {
#pragma omp simd
            for (int i = 0; i < block / 2; ++i) {
                const int32_t high = (bytes[i] >> 4) + 1, low = (bytes[i] & 15) + 1;
                to[2 * i] = static_cast<float>(high) * 0.0625f * scale;
                to[2 * i + 1] = static_cast<float>(low) * 0.0625f * scale;
            }
        }
    }
}

// --- all that is computed ---------------------------------------------------------------------------

template <class Codec>
void decode_computed(const uint8_t* codes, const typename Codec::Stored* scales, float* values) {
    for (int first = 0; first < state_chunk; first += Codec::block) {
        const auto decoder = Codec::decoder(scales + first / Codec::block * Codec::columns);
        const uint8_t* from = codes + first;
        float* to = values + first;
#pragma omp simd
        for (int i = 0; i < Codec::block; ++i) to[i] = Codec::decode(from[i], decoder);
    }
}

template <class Stored>
void store_nan(Stored* stored, int columns) {
    for (int i = 0; i < columns; ++i) stored[i] = from_float<Stored>(nan_scale);
}

template <class Codec, bool Packed = false>
void encode_computed(const float* values, uint8_t* codes, typename Codec::Stored* scales) {
    constexpr int block = Codec::block;
    for (int first = 0; first < state_chunk; first += block) {
        auto* stored = scales + first / block * Codec::columns;
        const float* from = values + first;
        uint8_t* to = codes + (Packed ? first / 2 : first);
        const int32_t largest = largest_magnitude<block>(from);
        if (largest >= Codec::limit) {
            std::fill(to, to + (Packed ? block / 2 : block), uint8_t{0});
            store_nan(stored, Codec::columns);
            continue;
        }
        const int32_t smallest = Codec::needs_smallest ? smallest_magnitude_above_zero<block>(from) : 0;
        const auto encoder = Codec::encoder(bit_cast<float>(largest), bit_cast<float>(smallest), stored);
        if constexpr (Packed) {
            alignas(64) uint8_t unpacked[block];
#pragma omp simd
            for (int i = 0; i < block; ++i)
                unpacked[i] = static_cast<uint8_t>(Codec::encode(from[i], encoder));
#pragma omp simd
            for (int i = 0; i < block / 2; ++i) {
                to[i] = static_cast<uint8_t>(unpacked[2 * i] << 4 | unpacked[2 * i + 1]);
            }
        } else {
#pragma omp simd
            for (int i = 0; i < block; ++i) to[i] = static_cast<uint8_t>(Codec::encode(from[i], encoder));
        }
    }
}

void decode_bf16(const bf16* codes, float* values) {
#pragma omp simd
    for (int i = 0; i < state_chunk; ++i) values[i] = to_float(codes[i]);
}
void encode_bf16(const float* values, bf16* codes) {
#pragma omp simd
    for (int i = 0; i < state_chunk; ++i) codes[i] = from_float<bf16>(values[i]);
}

// --- one chunk --------------------------------------------------------------------------------------

// Calls function(std::bool_constant<is_signed>).
template <class F>
void with_sign(bool is_signed, F&& function) {
    is_signed ? function(std::true_type{}) : function(std::false_type{});
}

void decode_chunk(StateFormat format, bool is_signed, const void* codes, const void* scales, float* values) {
    const auto* bytes = static_cast<const uint8_t*>(codes);
    const auto* floats = static_cast<const float*>(scales);
    with_sign(is_signed, [&](auto sign) {
        constexpr bool Signed = decltype(sign)::value;
        switch (format) {
            case StateFormat::int8:
                return decode_map<Signed>(bytes, floats, values);
            case StateFormat::int4:
                return decode_packed<Signed>(bytes, floats, values);
            case StateFormat::fp8:
                return decode_computed<StateCodec<StateFormat::fp8, Signed>>(bytes, floats, values);
            case StateFormat::fp8_expanded:
                return decode_computed<StateCodec<StateFormat::fp8_expanded, Signed>>(bytes, floats, values);
            case StateFormat::int8_companded:
                return decode_computed<StateCodec<StateFormat::int8_companded, Signed>>(
                    bytes, static_cast<const f16*>(scales), values);
            default:
                return decode_bf16(static_cast<const bf16*>(codes), values);
        }
    });
}

void encode_chunk(StateFormat format, bool is_signed, const float* values, void* codes, void* scales) {
    auto* bytes = static_cast<uint8_t*>(codes);
    auto* floats = static_cast<float*>(scales);
    with_sign(is_signed, [&](auto sign) {
        constexpr bool Signed = decltype(sign)::value;
        switch (format) {
            case StateFormat::int8:
                return encode_map<Signed>(values, bytes, floats);
            case StateFormat::int4:
                return encode_computed<StateCodec<StateFormat::int4, Signed>, true>(values, bytes, floats);
            case StateFormat::fp8:
                return encode_computed<StateCodec<StateFormat::fp8, Signed>>(values, bytes, floats);
            case StateFormat::fp8_expanded:
                return encode_computed<StateCodec<StateFormat::fp8_expanded, Signed>>(values, bytes, floats);
            case StateFormat::int8_companded:
                return encode_computed<StateCodec<StateFormat::int8_companded, Signed>>(
                    values, bytes, static_cast<f16*>(scales));
            default:
                return encode_bf16(values, static_cast<bf16*>(codes));
        }
    });
}

// Where a chunk begins, in bytes.
int64_t codes_offset(StateFormat format, int64_t begin) {
    return state_codes_numel(format, begin) * (format == StateFormat::bf16 ? 2 : 1);
}
int64_t scale_offset(StateFormat format, int64_t begin) {
    return state_scale_numel(format, begin) * (format == StateFormat::int8_companded ? 2 : 4);
}

// A chunk of its own, for the end of a state.
struct Tail {
    alignas(64) unsigned char codes[2 * state_chunk] = {};
    alignas(64) unsigned char scales[4 * state_chunk / 32] = {};
};

}  // namespace

void decode_state_block(StateFormat format, bool is_signed, const void* codes, const void* scales,
                        int64_t begin, int n, float* values) {
    const auto* codes_here = static_cast<const unsigned char*>(codes) + codes_offset(format, begin);
    const auto* scales_here = static_cast<const unsigned char*>(scales) + scale_offset(format, begin);
    if (n == state_chunk) return decode_chunk(format, is_signed, codes_here, scales_here, values);
    Tail tail;
    memcpy(tail.codes, codes_here, codes_offset(format, n));
    if (has_codes(format)) memcpy(tail.scales, scales_here, scale_offset(format, n));
    decode_chunk(format, is_signed, tail.codes, tail.scales, values);
}

void encode_state_block(StateFormat format, bool is_signed, const float* values, int64_t begin, int n,
                        void* codes, void* scales) {
    auto* codes_here = static_cast<unsigned char*>(codes) + codes_offset(format, begin);
    auto* scales_here = static_cast<unsigned char*>(scales) + scale_offset(format, begin);
    if (n == state_chunk) return encode_chunk(format, is_signed, values, codes_here, scales_here);
    alignas(64) float padded[state_chunk] = {};
    memcpy(padded, values, n * sizeof(float));
    Tail tail;
    encode_chunk(format, is_signed, padded, tail.codes, tail.scales);
    if (is_packed(format) && n % 2 == 1) tail.codes[n / 2] &= 0xf0u;  // half of the last byte is unused
    memcpy(codes_here, tail.codes, codes_offset(format, n));
    if (has_codes(format)) memcpy(scales_here, tail.scales, scale_offset(format, n));
}

// --- the operators ----------------------------------------------------------------------------------

void state_encode_chunks(const StateEncode& args, int64_t begin, int64_t end) {
    with_floating(args.x_type, [&](auto type) {
        using X = decltype(type);
        alignas(64) float values[state_chunk];
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t first = chunk * state_chunk;
            const int n = static_cast<int>(std::min<int64_t>(state_chunk, args.numel - first));
            const X* x = static_cast<const X*>(args.x) + first;
#pragma omp simd
            for (int i = 0; i < n; ++i) values[i] = to_float(x[i]);
            encode_state_block(args.format, args.is_signed, values, first, n, args.codes, args.scales);
        }
    });
}

void state_decode_chunks(const StateDecode& args, int64_t begin, int64_t end) {
    alignas(64) float values[state_chunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * state_chunk;
        const int n = static_cast<int>(std::min<int64_t>(state_chunk, args.numel - first));
        float* to = n == state_chunk ? args.values + first : values;
        decode_state_block(args.format, args.is_signed, args.codes, args.scales, first, n, to);
        if (to == values) std::copy(values, values + n, args.values + first);
    }
}

NG_NAMESPACE_END
