// normal_noise of common/noise.h on the CPU. Compiled once per instruction set, in the namespace VITOK_ISA.
#include "dispatch.h"
#include "noise_lanes.h"

namespace vitok {
namespace VITOK_ISA {

void normal_noise(const NormalNoise& args) {
    constexpr int64_t kChunk = 4096;  // elements of one work item, some 10 us
    const int64_t chunks = ceil_div(args.elements, kChunk), items = args.samples * chunks;
    const uint64_t seed = NoiseKeys::the_seed(args.keys);
    float* const out = static_cast<float*>(args.out);

#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (items > 1 && args.samples * args.elements >= 2 * kChunk)
#endif
    for (int64_t item = 0; item < items; ++item) {
        const int64_t b = item / chunks, first = item % chunks * kChunk;
        const int64_t n = args.elements - first < kChunk ? args.elements - first : kChunk;
        const int64_t whole = n / kNoiseGroup * kNoiseGroup;
        const uint64_t sample = NoiseKeys::sample(args.keys, b);
        float* const to = out + b * args.elements + first;
        fill_noise(to, seed, sample, first, whole);
        if (whole < n) {
            float rest[kNoiseGroup];
            noise_group(rest, seed, sample, first + whole);
            memcpy(to + whole, rest, static_cast<size_t>(n - whole) * sizeof(float));
        }
    }
}

}  // namespace VITOK_ISA
}  // namespace vitok
