#pragma once

#include "../common/ops.h"

namespace vitok {

// <op>_cuda runs on the device that owns its output, ordered by stream (a cudaStream_t). It throws std::runtime_error with
// CUDA's own text when the launch is refused; errors during execution surface at the caller's next synchronisation.
#define VITOK_DECLARE(op, Args) void op##_cuda(const Args& args, void* stream);
VITOK_OPS(VITOK_DECLARE)
#undef VITOK_DECLARE

}  // namespace vitok
