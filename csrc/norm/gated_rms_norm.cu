// The norms with a gate.
#include "norm/modulated.cuh"

namespace narrowgauge {

template void launch_modulated_forward<Around::gate>(const ModulatedForward&, Stream);
template void launch_modulated_backward<Around::gate>(const ModulatedBackward&, Stream);

}  // namespace narrowgauge
