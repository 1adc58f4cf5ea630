// Arguments of the passes over tokens behind PowerNorm and UnifiedNorm, whose statistics belong to channels.
//
//     u = x                            groups = 0
//     u = x / sqrt(mean(x^2) + eps)    the mean over each of `groups` equal pieces of a token's channels
//
// Tokens are contiguous rows. Vectors of one element per channel, and sums, are float (double for double).
// Each of `chunks` sets of tokens is summed into one row of the partial buffer; partial_sums.h adds these.
// The cut depends on the shape alone.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

//     y = u * scale + bias         where *condition == wanted (always without a condition)
//     squares = sum of u^2         over tokens that are not padding
struct ChannelForward {
    const void* x;
    const void* pad_mask;   // or null; [rows], true for padding
    const void* condition;  // or null; one bool
    const void* scale;      // or null, without y
    const void* bias;       // likewise
    void* y;                // or null; in the type of x
    void* squares_partial;  // or null; [chunks, columns]
    int64_t rows, columns, groups, chunks;
    double eps;
    bool wanted;
    DType x_type;
};

//     du = dy * scale (- u * projection)
//     dx = (du - u * mean(du * u)) / sqrt(mean(x^2) + eps)   with groups;  du without
//     sums of dy * u, of dy and, with groups, of u^2
// Tokens that pad_mask marks get zeros and enter no sum.
struct ChannelBackward {
    const void* dy;  // in the type of x
    const void* x;
    const void* pad_mask;    // or null; [rows]
    const void* scale;       // or null, without dx
    const void* projection;  // or null
    void* dx;                // or null; in the type of x
    void* sums_partial;      // or null; [chunks, terms, columns]
    int64_t rows, columns, groups, chunks;
    double eps;
    DType x_type;
};

constexpr int64_t channel_terms(int64_t groups) { return groups > 0 ? 3 : 2; }

#if !NARROWGAUGE_CPU
// The launches, and before them how many rows of partial sums they will write on the current device.
int64_t channel_chunks_on_device(const ChannelForward& args);
int64_t channel_chunks_on_device(const ChannelBackward& args);
void launch_channel_pass(const ChannelForward& args, Stream stream);
void launch_channel_pass(const ChannelBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, channel_forward_chunks, (const ChannelForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, channel_backward_chunks, (const ChannelBackward& args, int64_t begin, int64_t end))
