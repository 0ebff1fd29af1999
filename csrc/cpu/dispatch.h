// Which copy of the CPU kernels runs: one per instruction set level, chosen at run time.
#pragma once

#include "../common/ops.h"

namespace vitok {

#define VITOK_DECLARE(op, Args) void op(const Args& args);
#define VITOK_DECLARE_LEVEL(level) \
    namespace level {              \
    VITOK_OPS(VITOK_DECLARE)       \
    VITOK_CPU_OPS(VITOK_DECLARE)   \
    }

VITOK_DECLARE_LEVEL(baseline)
VITOK_DECLARE_LEVEL(avx2)
VITOK_DECLARE_LEVEL(avx512)
VITOK_DECLARE_LEVEL(avx512_bf16)
namespace amx {  // the others are those of avx512_bf16
VITOK_CPU_OPS(VITOK_DECLARE)
}

#undef VITOK_DECLARE_LEVEL
#undef VITOK_DECLARE

struct CpuLevel {
    const char* name;
    bool (*supported)();  // by this machine
#define VITOK_MEMBER(op, Args) void (*op)(const Args&);
    VITOK_OPS(VITOK_MEMBER)
    VITOK_CPU_OPS(VITOK_MEMBER)
#undef VITOK_MEMBER
};

// Every compiled level, lowest first.
int cpu_level_count();
const CpuLevel& cpu_level(int index);

// The level in use: the highest that the machine supports unless one was selected.
const CpuLevel& active_cpu_level();

// False, with nothing changed, when the build or the machine lacks the level.
bool select_cpu_level(const char* name);

}  // namespace vitok
