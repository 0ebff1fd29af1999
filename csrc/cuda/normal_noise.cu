// normal_noise of common/noise.h on CUDA: a thread makes one block of four elements.
#include "../common/noise.h"

#include "launch.h"
#include "ops.h"

namespace vitok {
namespace {

constexpr int kThreads = 256;

template <bool Vector>
__global__ void __launch_bounds__(kThreads) normal_noise_kernel(const NoiseKeys keys, int64_t elements, int64_t blocks,
                                                                uint32_t groups, float* __restrict__ out) {
    const int64_t b = blockIdx.x / groups;
    const int64_t block = static_cast<int64_t>(blockIdx.x % groups) * kThreads + threadIdx.x;
    if (block >= blocks) return;
    const uint64_t sample = NoiseKeys::sample(keys, b);
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32),
                     static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)};
    float value[4];
    normal_block<ScalarMath>(c, NoiseKeys::the_seed(keys), value);
    float* const to = out + b * elements + block * 4;
    if constexpr (Vector) {
        *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (block * 4 + i < elements) to[i] = value[i];
    }
}

}  // namespace

void normal_noise_cuda(const NormalNoise& args, void* stream) {
    const DeviceGuard guard("normal_noise", args.out);
    const int64_t blocks = ceil_div(args.elements, 4), groups = ceil_div(blocks, kThreads);
    if (args.samples > INT32_MAX / groups) throw std::runtime_error("normal_noise: too many elements for one launch");
    const unsigned grid = static_cast<unsigned>(args.samples * groups);
    const auto on = static_cast<cudaStream_t>(stream);
    float* const out = static_cast<float*>(args.out);
    if (args.elements % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0)
        normal_noise_kernel<true><<<grid, kThreads, 0, on>>>(args.keys, args.elements, blocks, static_cast<uint32_t>(groups), out);
    else
        normal_noise_kernel<false><<<grid, kThreads, 0, on>>>(args.keys, args.elements, blocks, static_cast<uint32_t>(groups), out);
    check_launch("normal_noise");
}

}  // namespace vitok
