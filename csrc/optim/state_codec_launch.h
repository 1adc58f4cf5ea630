// What the bindings call to run the CUDA kernels that encode and decode one state.
#pragma once

#include "common/stream.h"
#include "optim/state_codec.h"

namespace narrowgauge {

void launch_state_encode(const StateEncode& args, Stream stream);
void launch_state_decode(const StateDecode& args, Stream stream);

}  // namespace narrowgauge
