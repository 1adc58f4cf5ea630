// Choosing a CPU kernel by instruction set.
//
//     NG_CPU_KERNEL(void, norm_forward_rows, (const NormForward& args, int64_t begin, int64_t end))
//
// in an argument header declares the function that a *_cpu.cpp file defines (once per instruction set), and
// NG_CPU_POINTER(norm_forward_rows) in a binding points to the one for this processor.
#pragma once

#include "common/config.h"

#ifdef NG_ISA  // inside a kernel file: declare it in this file's own instruction set
#define NG_CPU_KERNEL(result, name, parameters) \
    NG_NAMESPACE_BEGIN                          \
    result name parameters;                     \
    NG_NAMESPACE_END
#elif defined(__x86_64__)
#define NG_CPU_KERNEL(result, name, parameters) \
    namespace narrowgauge {                     \
    namespace v4 {                              \
    result name parameters;                     \
    }                                           \
    namespace v3 {                              \
    result name parameters;                     \
    }                                           \
    namespace baseline {                        \
    result name parameters;                     \
    }                                           \
    }
#define NG_CPU_POINTER(name)                                                       \
    (::narrowgauge::cpu_select(&::narrowgauge::v4::name, &::narrowgauge::v3::name, \
                               &::narrowgauge::baseline::name))
#else
#define NG_CPU_KERNEL(result, name, parameters) \
    namespace narrowgauge {                     \
    namespace baseline {                        \
    result name parameters;                     \
    }                                           \
    }
#define NG_CPU_POINTER(name) (&::narrowgauge::baseline::name)
#endif

#ifndef NG_ISA
namespace narrowgauge {

enum class Isa : int { baseline, v3, v4 };

// The instruction set in use: the best this processor has, unless NARROWGAUGE_CPU_ISA or a test chose
// another.
Isa cpu_isa();

template <class F>
F* cpu_select(F* v4, F* v3, F* baseline) {
    const Isa isa = cpu_isa();
    return isa == Isa::v4 ? v4 : isa == Isa::v3 ? v3 : baseline;
}

}  // namespace narrowgauge
#endif
