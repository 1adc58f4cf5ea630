// CUDA as kernels see it in the emulator. Include common/device.h, which includes this.
#pragma once

#include <math.h>

#include <type_traits>

#include "common/vec.h"
#include "emulator/memory.h"
#include "emulator/scheduler.h"

// Default visibility lets the emulator find a kernel's name by its address.
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline constexpr int warpSize = 32;

// --- arithmetic --------------------------------------------------------------------------------------------

// Mixed types go by C++'s usual conversions; of a number and a NaN the number is returned, as on the GPU.
template <class A, class B>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::is_same_v<T, float> ? fminf(a, b) : fmin(a, b);
    } else {
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
    }
}
template <class A, class B>
std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) {
        return std::is_same_v<T, float> ? fmaxf(a, b) : fmax(a, b);
    } else {
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
    }
}

template <class To, class From>
inline To narrowgauge_same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the bits of one type as those of another");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float x) { return narrowgauge_same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return narrowgauge_same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return narrowgauge_same_bits<float>(x); }
inline float __int_as_float(int x) { return narrowgauge_same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return narrowgauge_same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return narrowgauge_same_bits<double>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }

// --- block barriers ----------------------------------------------------------------------------------------

using NarrowgaugeWhere = narrowgauge::emulator::Where;

inline void __syncthreads(NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    narrowgauge::emulator::block_barrier("__syncthreads", true, where);
}
inline int __syncthreads_or(int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::block_barrier("__syncthreads_or", vote != 0, where) > 0;
}
inline int __syncthreads_and(int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::block_barrier("__syncthreads_and", vote == 0, where) == 0;
}
inline int __syncthreads_count(int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::block_barrier("__syncthreads_count", vote != 0, where);
}

// --- warps -------------------------------------------------------------------------------------------------

namespace narrowgauge::emulator {

template <class T>
uint64_t to_word(T value) {
    static_assert(std::is_arithmetic_v<T>, "warp operations move numbers of up to 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    return word;
}

template <class T>
T from_word(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T>
T shuffle(const char* kind, unsigned mask, T value, int source, Where where) {
    const auto exchange = warp_exchange(kind, mask, to_word(value), where);
    if ((mask >> source & 1u) == 0) {
        fail(std::string(kind) + " reads lane " + std::to_string(source) + ", which the mask does not name");
    }
    return from_word<T>(exchange->values[source]);
}

inline unsigned ballot(const char* kind, unsigned mask, bool vote, Where where) {
    const auto exchange = warp_exchange(kind, mask, vote, where);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(exchange->values[lane]) << lane;
    return votes & mask;
}

template <class T, class F>
T reduce(const char* kind, unsigned mask, T value, F combine, Where where) {
    const auto exchange = warp_exchange(kind, mask, to_word(value), where);
    for (int lane = 0; lane < 32; ++lane) {
        if (lane != lane_id() && (mask >> lane & 1u))
            value = combine(value, from_word<T>(exchange->values[lane]));
    }
    return value;
}

}  // namespace narrowgauge::emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    narrowgauge::emulator::warp_barrier(mask, where);
}

// A warp is cut into segments of `width` lanes; lanes that would read beyond theirs keep their own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    const int first = narrowgauge::emulator::lane_id() & ~(width - 1);
    return narrowgauge::emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    const int lane = narrowgauge::emulator::lane_id(), source = lane - static_cast<int>(delta);
    return narrowgauge::emulator::shuffle("__shfl_up_sync", mask, value,
                                          source < (lane & ~(width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    const int lane = narrowgauge::emulator::lane_id(), source = lane + static_cast<int>(delta);
    return narrowgauge::emulator::shuffle("__shfl_down_sync", mask, value,
                                          source > (lane | (width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    const int lane = narrowgauge::emulator::lane_id(), source = lane ^ lanes;
    return narrowgauge::emulator::shuffle("__shfl_xor_sync", mask, value,
                                          source > (lane | (width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::ballot("__ballot_sync", mask, vote != 0, where);
}
inline int __any_sync(unsigned mask, int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::ballot("__any_sync", mask, vote != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::ballot("__all_sync", mask, vote != 0, where) == mask;
}
// Which lanes happen to run together is the hardware's choice. The emulator's: those that have not exited.
inline unsigned __activemask() { return narrowgauge::emulator::running_lanes(); }

template <class T>
T __reduce_add_sync(unsigned mask, T value, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::reduce(
        "__reduce_add_sync", mask, value, [](T a, T b) { return a + b; }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::reduce(
        "__reduce_min_sync", mask, value, [](T a, T b) { return min(a, b); }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, NarrowgaugeWhere where = NarrowgaugeWhere::here()) {
    return narrowgauge::emulator::reduce(
        "__reduce_max_sync", mask, value, [](T a, T b) { return max(a, b); }, where);
}

// --- atomics -----------------------------------------------------------------------------------------------

namespace narrowgauge::emulator {

template <class T, class Space, class F>
T atomic(const Pointer<T, Space>& pointer, F change) {
    const T old = pointer.template read<T>();
    const int64_t until_yield = accesses_until_yield;
    accesses_until_yield = 1;  // nothing may come between the read and the write
    pointer.write(static_cast<T>(change(old)));
    accesses_until_yield = until_yield;
    return old;
}

}  // namespace narrowgauge::emulator

template <class T, class Space>
T atomicAdd(const narrowgauge::emulator::Pointer<T, Space>& pointer, std::common_type_t<T> value) {
    return narrowgauge::emulator::atomic(pointer, [&](T old) { return old + value; });
}
template <class T, class Space>
T atomicMax(const narrowgauge::emulator::Pointer<T, Space>& pointer, std::common_type_t<T> value) {
    return narrowgauge::emulator::atomic(pointer, [&](T old) { return max(old, value); });
}
template <class T, class Space>
T atomicMin(const narrowgauge::emulator::Pointer<T, Space>& pointer, std::common_type_t<T> value) {
    return narrowgauge::emulator::atomic(pointer, [&](T old) { return min(old, value); });
}
template <class T, class Space>
T atomicExch(const narrowgauge::emulator::Pointer<T, Space>& pointer, std::common_type_t<T> value) {
    return narrowgauge::emulator::atomic(pointer, [&](T) { return value; });
}
template <class T, class Space>
T atomicCAS(const narrowgauge::emulator::Pointer<T, Space>& pointer, std::common_type_t<T> expected,
            std::common_type_t<T> value) {
    return narrowgauge::emulator::atomic(pointer, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace narrowgauge {

// --- shared memory -----------------------------------------------------------------------------------------

// Hands out pieces of the launch's dynamic shared memory; every thread must take the same pieces in the same
// order.
class SharedArena {
  public:
    template <class T>
    Shared<T> take(int count) {
        const emulator::SharedMemory& shared = emulator::shared_memory();
        const size_t bytes = static_cast<size_t>(count) * sizeof(T), begin = offset_;
        if (begin + bytes > shared.memory.size()) {
            emulator::fail("shared memory overflow: " + std::to_string(bytes) + " bytes taken after " +
                           std::to_string(begin) + ", the launch gave " +
                           std::to_string(shared.memory.size()));
        }
        offset_ = (begin + bytes + 15) / 16 * 16;
        char* address = shared.memory.bytes() + begin;
        return {
            {address, static_cast<int64_t>(bytes), shared.memory.states() + begin, "shared memory", &shared},
            reinterpret_cast<T*>(address)};
    }

  private:
    size_t offset_ = 0;
};

// --- asynchronous copies -----------------------------------------------------------------------------------

template <int Bytes, class T, class U>
void async_copy(const Shared<T>& shared, int64_t i, const Global<U>& global, int64_t j) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    static_assert(std::is_same_v<const T, const U>, "both sides have the same element type");
    const auto to = shared + i;
    const auto from = global + j;
    const char* from_address = reinterpret_cast<const char*>(from.address());
    char* to_address = reinterpret_cast<char*>(to.address());
    emulator::check_access(emulator::Access::read, from.span(), from_address, Bytes, sizeof(T), Bytes);
    emulator::check_access(emulator::Access::copy, to.span(), to_address, Bytes, sizeof(T), Bytes);
    emulator::async_copy(to_address, to.span(), from_address, Bytes);
}
inline void async_commit() { emulator::async_commit(); }
template <int Groups>
void async_wait(emulator::Where where = emulator::Where::here()) {
    emulator::async_wait(Groups, where);
}

// --- thread-block clusters ---------------------------------------------------------------------------------

using emulator::cluster_rank;
using emulator::cluster_size;

inline void cluster_barrier(emulator::Where where = emulator::Where::here()) {
    emulator::cluster_barrier(where);
}

// The same piece of shared memory in another block of the cluster.
template <class T>
Shared<T> cluster_map(const Shared<T>& shared, unsigned rank) {
    emulator::Span span = shared.span();
    const emulator::Memory &from = span.home->memory, &to = emulator::shared_memory_of(rank).memory;
    const auto mapped = [&](const void* address) {
        return to.bytes() + (static_cast<const char*>(address) - from.bytes());
    };
    span.states = to.states() + (span.begin - from.bytes());
    span.home = &emulator::shared_memory_of(rank);
    T* address = reinterpret_cast<T*>(mapped(shared.address()));
    span.begin = mapped(span.begin);
    return {span, address};
}

// --- launch ------------------------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    emulator::run_grid(config, reinterpret_cast<const void*>(kernel),
                       [&] { kernel(static_cast<Parameters>(arguments)...); });
}

// Few, so that a persistent grid visits several rows per block.
inline int multiprocessor_count() { return 2; }

// Small, so that short rows reach the paths of rows that do not fit.
struct BlockLimits {
    int cluster;
    int64_t shared_bytes;
};
inline BlockLimits block_limits() { return {2, 48 * 1024}; }

}  // namespace narrowgauge
