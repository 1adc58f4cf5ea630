// What the binding calls to run the CUDA kernels of softmax.
#pragma once

#include "common/stream.h"
#include "norm/softmax.h"

namespace narrowgauge {

void launch_softmax_forward(const SoftmaxForward& args, Stream stream);
void launch_softmax_backward(const SoftmaxBackward& args, Stream stream);

}  // namespace narrowgauge
