// The norms with a rotation behind them.
#include "norm/modulated.cuh"

namespace narrowgauge {

template void launch_modulated_forward<Around::rotation>(const ModulatedForward&, Stream);
template void launch_modulated_backward<Around::rotation>(const ModulatedBackward&, Stream);

}  // namespace narrowgauge
