// What device code is written against: CUDA itself under nvcc, its model on the CPU under the emulator.
//
// docs/architecture.md describes the three things that differ from ordinary CUDA: global<T>(), SharedArena,
// launch().
#pragma once

#include "common/config.h"
#include "common/dtype.h"
#include "common/vec.h"

#if NARROWGAUGE_EMULATOR
#include "emulator/device.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace narrowgauge {

using Stream = cudaStream_t;

// --- memory --------------------------------------------------------------------------------------

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class T, class Raw>
__device__ __forceinline__ Global<T> global(Raw* raw, const char* /*name, for the emulator's reports*/) {
    return static_cast<T*>(raw);
}

template <class T>
__device__ __forceinline__ bool is_aligned(T* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int N, class T>
__device__ __forceinline__ Vec<std::remove_const_t<T>, N> load(T* pointer, int64_t index) {
    return *reinterpret_cast<const Vec<std::remove_const_t<T>, N>*>(pointer + index);
}

template <int N, class T>
__device__ __forceinline__ void store(T* pointer, int64_t index, const Vec<T, N>& value) {
    *reinterpret_cast<Vec<T, N>*>(pointer + index) = value;
}

extern __shared__ __align__(16) unsigned char narrowgauge_shared_memory[];

// Hands out pieces of the launch's dynamic shared memory; every thread must take the same pieces in the same
// order.
class SharedArena {
  public:
    template <class T>
    __device__ __forceinline__ Shared<T> take(int count) {
        T* piece = reinterpret_cast<T*>(narrowgauge_shared_memory + offset_);
        offset_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        return piece;
    }

  private:
    int offset_ = 0;
};

// --- asynchronous copies -------------------------------------------------------------------------

template <int Bytes, class T>
__device__ __forceinline__ void async_copy(T* shared, int64_t i, const T* global, int64_t j) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared + i));
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global + j) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global + j), "n"(Bytes)
                     : "memory");
    }
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
__device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// --- thread-block clusters (sm_90 and newer) -----------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The address of the same piece of shared memory in another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_map(T* shared, unsigned rank) {
    unsigned long long mapped;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(mapped);
}
#endif

// --- launch --------------------------------------------------------------------------------------

struct LaunchConfig {
    dim3 grid, block;
    size_t shared_bytes = 0;
    int cluster = 1;
    Stream stream = nullptr;
};

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("narrowgauge: ") + what + ": " + cudaGetErrorString(error));
    }
}

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    if (config.shared_bytes > 48 * 1024) {  // beyond the default limit a kernel has to ask
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(config.shared_bytes)),
                   "shared memory");
    }
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = config.stream;
    cudaLaunchAttribute attribute{};
    if (config.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
        launch_config.attrs = &attribute;
        launch_config.numAttrs = 1;
    }
    check_cuda(cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...),
               "kernel launch");
}

// How many blocks fill the current device once.
inline int multiprocessor_count() {
    int device = 0, count = 0;
    check_cuda(cudaGetDevice(&device), "device");
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    return count;
}

// How large a cluster may be here (1: there are none), and the shared memory a block may ask for.
struct BlockLimits {
    int cluster;
    int64_t shared_bytes;
};
inline BlockLimits block_limits() {
    int device = 0, major = 0, shared = 0;
    check_cuda(cudaGetDevice(&device), "device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
    check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "shared memory");
    return {major >= 9 ? 8 : 1, shared};
}

}  // namespace narrowgauge
#endif
