#pragma once

#include "../common/tubelet_gather.h"

namespace vitok {

// Runs on the device that owns gather.target, ordered by stream (a cudaStream_t). Throws std::runtime_error with CUDA's
// own text when the launch is refused; errors during execution surface at the caller's next synchronisation.
void tubelet_gather_cuda(const TubeletGather& gather, void* stream);

}  // namespace vitok
