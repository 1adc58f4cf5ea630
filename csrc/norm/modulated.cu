// The modulated norms with nothing around them (AdaLN, ScaleNorm, per-head RMSNorm) and behind a residual.
#include "norm/modulated.cuh"

namespace narrowgauge {

template void launch_modulated_forward<Around::nothing>(const ModulatedForward&, Stream);
template void launch_modulated_backward<Around::nothing>(const ModulatedBackward&, Stream);
template void launch_modulated_forward<Around::residual>(const ModulatedForward&, Stream);

int64_t modulated_chunks_on_device(const ModulatedBackward& args, Around around) {
    return modulated::backward_of(args, around).chunks;
}

}  // namespace narrowgauge
