// Arguments of Dynamic Tanh and Derf: one kernel serves both.
//
//     u = alpha x + shift        y = weight f(u) + bias,    f = tanh or erf
//     du = dy weight f'(u)       dx = alpha du,   dalpha = sum of du x,   dshift = sum of du
//                                dweight = sums over a channel of dy f(u),   dbias = of dy
//
// x is [outer, channels, inner]: with the channels last inner is 1. A row is what is contiguous: `channels`
// elements with the channels last, `inner` elements of one channel otherwise.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct DytForward {
    const void* x;
    const void* alpha;  // one element, as is shift
    const void* shift;  // or null
    const void* weight;
    const void* bias;  // or null
    void* y;
    int64_t rows, columns, channels;
    bool channels_last, erf;
    DType x_type, alpha_type, shift_type, weight_type, bias_type;
};

struct DytBackward {
    const void* dy;
    const void* x;
    const void* alpha;
    const void* shift;  // or null
    const void* weight;
    void* dx;
    // Partial sums, or null; float (double for double). Each of `chunks` groups of rows writes one row of
    // dweight and dbias [chunks, channels]; with the channels second a chunk is one of `outer`, and its
    // rows are the channels. dalpha and dshift are [scalar_chunks, 1].
    void* dweight_partial;
    void* dbias_partial;
    void* dalpha_partial;
    void* dshift_partial;
    int64_t rows, columns, channels, chunks, scalar_chunks;
    bool channels_last, erf;
    DType x_type, alpha_type, shift_type, weight_type;
};

#if !NARROWGAUGE_CPU
void launch_dyt_forward(const DytForward& args, Stream stream);

// Sets the numbers of chunks that launch_dyt_backward will write on the current device.
void plan_dyt_backward(DytBackward& args);
void launch_dyt_backward(const DytBackward& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, dyt_forward_rows, (const DytForward& args, int64_t begin, int64_t end))
NG_CPU_KERNEL(void, dyt_backward_chunks, (const DytBackward& args, int64_t begin, int64_t end))
