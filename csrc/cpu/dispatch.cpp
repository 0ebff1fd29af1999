#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(VITOK_HAVE_AVX2)
#include <cpuid.h>
#endif
#if defined(VITOK_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitok {
namespace {

bool always() { return true; }

#if defined(VITOK_HAVE_AVX2)
// Not every compiler's __builtin_cpu_supports knows the half-precision conversions.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif
#if defined(VITOK_HAVE_AVX512)
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(VITOK_HAVE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(VITOK_HAVE_AMX)
// Tiles, their bf16 and their int8 products; and Linux wants to be asked before a process uses them.
bool has_amx() {
    constexpr unsigned tiles = 1u << 24, bf16 = 1u << 22, int8 = 1u << 25, wanted = tiles | bf16 | int8;
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted &&
           syscall(SYS_arch_prctl, ask, tile_data) == 0;
}
#endif

#define VITOK_BASELINE(op, Args) baseline::op,
#define VITOK_AVX2(op, Args) avx2::op,
#define VITOK_AVX512(op, Args) avx512::op,
#define VITOK_AVX512_BF16(op, Args) avx512_bf16::op,
#define VITOK_AMX(op, Args) amx::op,

const CpuLevel levels[] = {
    {"baseline", always, VITOK_OPS(VITOK_BASELINE) VITOK_CPU_OPS(VITOK_BASELINE)},
#if defined(VITOK_HAVE_AVX2)
    {"avx2", has_avx2, VITOK_OPS(VITOK_AVX2) VITOK_CPU_OPS(VITOK_AVX2)},
#endif
#if defined(VITOK_HAVE_AVX512)
    {"avx512", has_avx512, VITOK_OPS(VITOK_AVX512) VITOK_CPU_OPS(VITOK_AVX512)},
#endif
#if defined(VITOK_HAVE_AVX512_BF16)
    {"avx512_bf16", has_avx512_bf16, VITOK_OPS(VITOK_AVX512_BF16) VITOK_CPU_OPS(VITOK_AVX512_BF16)},
#endif
#if defined(VITOK_HAVE_AMX)
    {"amx", has_amx, VITOK_OPS(VITOK_AVX512_BF16) VITOK_CPU_OPS(VITOK_AMX)},
#endif
};

const CpuLevel* best() {
    const CpuLevel* chosen = levels;
    for (const CpuLevel& level : levels)
        if (level.supported()) chosen = &level;
    return chosen;
}

std::atomic<const CpuLevel*>& active() {
    static std::atomic<const CpuLevel*> level{best()};
    return level;
}

}  // namespace

int cpu_level_count() { return static_cast<int>(sizeof levels / sizeof *levels); }

const CpuLevel& cpu_level(int index) { return levels[index]; }

const CpuLevel& active_cpu_level() { return *active().load(std::memory_order_relaxed); }

bool select_cpu_level(const char* name) {
    for (const CpuLevel& level : levels) {
        if (std::strcmp(level.name, name) == 0 && level.supported()) {
            active().store(&level, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace vitok
