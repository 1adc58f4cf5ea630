#include "common/cpu.h"

#include <atomic>
#include <cstring>

namespace narrowgauge {
namespace {

constexpr const char* isa_names[] = {"baseline", "v3", "v4"};

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? Isa::v4 : v3 ? Isa::v3 : Isa::baseline;
#else
    return Isa::baseline;
#endif
}

std::atomic<Isa>& current_isa() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

Isa cpu_isa() { return current_isa().load(std::memory_order_relaxed); }

}  // namespace narrowgauge

#define NG_EXPORT extern "C" __attribute__((visibility("default")))

NG_EXPORT const char* narrowgauge_cpu_isa() {
    return narrowgauge::isa_names[static_cast<int>(narrowgauge::cpu_isa())];
}

// Returns 0, or 1 for an unknown name and 2 for an instruction set this processor does not have.
NG_EXPORT int narrowgauge_set_cpu_isa(const char* name) {
    for (int i = 0; i < 3; ++i) {
        if (std::strcmp(name, narrowgauge::isa_names[i]) != 0) continue;
        if (i > static_cast<int>(narrowgauge::best_isa())) return 2;
        narrowgauge::current_isa().store(static_cast<narrowgauge::Isa>(i), std::memory_order_relaxed);
        return 0;
    }
    return 1;
}
