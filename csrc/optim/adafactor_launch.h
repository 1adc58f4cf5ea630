// What the bindings call to run the CUDA kernels of Adafactor.
#pragma once

#include "common/stream.h"
#include "optim/adafactor.h"

namespace narrowgauge {

void launch_adafactor_sums(const AdafactorLaunch& table, Stream stream);
void launch_adafactor_norms(const AdafactorLaunch& table, Stream stream);
void launch_adafactor_step(const AdafactorLaunch& table, Stream stream);

}  // namespace narrowgauge
