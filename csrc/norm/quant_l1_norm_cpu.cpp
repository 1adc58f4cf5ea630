// CPU kernel of L1 LayerNorm in integers. Integer sums have no order, so the loops are left to the
// vectoriser: distances become psadbw, 32 codes an instruction, and the rest 16-bit multiplications
// (pmulhrsw).
#include <cstdlib>

#include "common/scratch.h"
#include "norm/quant_l1_norm.h"

NG_NAMESPACE_BEGIN
namespace {

// Sum of |X - pivot| over 128 + X, as bytes.
int64_t distances(const int8_t* codes, int64_t columns, int64_t pivot) {
    const uint8_t from = static_cast<uint8_t>(pivot < 127 ? pivot + 128 : 255);
    int sum = 0;
    for (int64_t j = 0; j < columns; ++j) {
        const uint8_t code = static_cast<uint8_t>(static_cast<uint8_t>(codes[j]) ^ 0x80);
        sum += std::abs(code - from);
    }
    return sum;
}

int16_t clip(int16_t value, int16_t bound) {
    value = value < -bound ? static_cast<int16_t>(-bound) : value;
    return value > bound ? bound : value;
}

}  // namespace

void quant_l1_norm_rows(const QuantL1Norm& args, int64_t begin, int64_t end) {
    const int64_t columns = args.columns;
    const Scratch<int16_t> space(3 * columns);
    int16_t *weight = space.get(), *bias = weight + columns, *h = bias + columns;
    for (int64_t j = 0; j < columns; ++j) {
        weight[j] = static_cast<int16_t>(args.weight[j]);
        bias[j] = static_cast<int16_t>(args.bias[j] + 16);  // the rounding of the last shift
    }
    for (int64_t i = begin; i < end; ++i) {
        const int8_t* codes = args.codes + i * columns;
        int8_t* result = args.result + i * columns;
        const int64_t sum = distances(codes, columns, -128) - 128 * columns;
        const int64_t pivot = quant_l1_floor_mean(sum, columns);
        const QuantL1Row row = quant_l1_row(sum, pivot, distances(codes, columns, pivot),
                                            distances(codes, columns, pivot + 1), columns, args.limit);
        const int16_t centre = static_cast<int16_t>(row.centre), reach = static_cast<int16_t>(row.reach),
                      unit = static_cast<int16_t>(1 << row.shift), gain = static_cast<int16_t>(row.gain),
                      offset = static_cast<int16_t>(row.offset);
        // In two loops: GCC sees the 16-bit product only where it does not know how large h is.
        for (int64_t j = 0; j < columns; ++j) {
            const int16_t scaled =
                static_cast<int16_t>(clip(static_cast<int16_t>(codes[j] - centre), reach) * unit);
            h[j] = clip(static_cast<int16_t>(quant_l1_product(scaled, gain) + offset), quant_l1_range);
        }
        for (int64_t j = 0; j < columns; ++j) {
            const int16_t product = static_cast<int16_t>(quant_l1_product(h[j], weight[j]));
            result[j] = static_cast<int8_t>(static_cast<int16_t>(product + bias[j]) >> 5);
        }
    }
}

NG_NAMESPACE_END
