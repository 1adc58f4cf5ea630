// Macros that let one source serve the host compiler, nvcc and the emulator.
#pragma once

#include <cstdint>

#ifndef NARROWGAUGE_EMULATOR
#define NARROWGAUGE_EMULATOR 0
#endif

#if defined(__CUDACC__)
#define NG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NG_HOST_DEVICE inline __attribute__((always_inline))
#endif

// A CPU kernel file is compiled once per instruction set. Everything it can inline lives in a namespace named
// after that set, so the linker never keeps an AVX-512 copy of a function that an older processor will call.
#ifdef NG_ISA
#define NG_NAMESPACE_BEGIN  \
    namespace narrowgauge { \
    inline namespace NG_ISA {
#define NG_NAMESPACE_END \
    }                    \
    }
#else
#define NG_NAMESPACE_BEGIN namespace narrowgauge {
#define NG_NAMESPACE_END }
#endif
