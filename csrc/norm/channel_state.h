// Arguments of the steps that PowerNorm and UnifiedNorm make between their passes over tokens: one element
// per channel, everything decided on the device. All vectors are float, or double.
#pragma once

#include "common/cpu.h"
#include "common/dtype.h"

#if !NARROWGAUGE_CPU
#include "common/stream.h"
#endif

namespace narrowgauge {

struct PowerNormUpdate {
    const void* squares;  // [channels], sum of u^2
    const void* count;    // [1], tokens in that sum; with none of them the state stays
    const int64_t* step;  // [1], before this one
    void* phi;            // [channels], changes
    void* factors;        // [2, channels]: of u in z, and 1 / sqrt(q + eps)
    int64_t channels, warmup;
    double alpha, eps;
    DType type;
};

struct UnifiedNormUpdate {
    const void* squares;  // [channels], sum of x^2
    const void* count;    // [1]
    const int64_t* step;  // [1], before this one
    void* variance;       // [channels], changes
    void* window;         // [window_size, channels], one row of it changes
    int64_t* skips;       // [1], changes
    void* factors;        // [2, channels]: 1 / sqrt(v + eps), and the scale of the gradient
    int64_t* decisions;   // [3]: is the step skipped, is the gradient statistic taken as it is, backward slot
    int64_t channels, window_size, backward_window, warmup, first_ratio;
    double momentum, eps;
    bool filtration;
    DType type;
};

#if !NARROWGAUGE_CPU
void launch_channel_update(const PowerNormUpdate& args, Stream stream);
void launch_channel_update(const UnifiedNormUpdate& args, Stream stream);
#endif

}  // namespace narrowgauge

NG_CPU_KERNEL(void, power_norm_update_channels, (const PowerNormUpdate& args))
NG_CPU_KERNEL(void, unified_norm_update_channels, (const UnifiedNormUpdate& args))
