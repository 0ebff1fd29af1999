// Threads that work together on one call.
#pragma once

#include "../common/formulas.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vitok {
namespace VITOK_ISA {
namespace {

struct Interval {
    int64_t begin, end;
};

// This thread among those that work together.
struct Team {
    int64_t thread = 0, threads = 1;

    static Team current() {
        Team team;
#if defined(_OPENMP)
        team.thread = omp_get_thread_num();
        team.threads = omp_get_num_threads();
#endif
        return team;
    }
    void barrier() const {
#if defined(_OPENMP)
        if (threads > 1) {
#pragma omp barrier
        }
#endif
    }
    // This thread's part of items 0 .. n - 1.
    Interval share(int64_t n) const {
        const int64_t each = n / threads, rest = n % threads;
        const int64_t begin = each * thread + smaller(thread, rest);
        return {begin, begin + each + (thread < rest)};
    }
};

}  // namespace
}  // namespace VITOK_ISA
}  // namespace vitok
