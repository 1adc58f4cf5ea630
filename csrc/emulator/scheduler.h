// Runs a grid on one OS thread. Every CUDA thread is a fiber; which one runs next is drawn from a seeded
// generator and skewed, so that some threads run far ahead of others and only a barrier holds them back.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/memory.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace narrowgauge {

struct Stream {};

struct LaunchConfig {
    dim3 grid, block;
    size_t shared_bytes = 0;
    int cluster = 1;
    Stream stream{};
};

}  // namespace narrowgauge

namespace narrowgauge::emulator {

// A place in the source: as the default of a function's last argument, the place of the call.
struct Where {
    const char* file;
    int line;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// --- control, from the tests -------------------------------------------------------------------------------

void set_schedule(uint64_t seed);
// The barriers executed so far, as "norm/norm.cuh:41".
std::vector<std::string> barrier_sites();
// Makes one of them a no-op; the empty string none.
void disable_barrier(const std::string& site);

// --- what device.h is made of ------------------------------------------------------------------------------

void run_grid(const LaunchConfig& config, const void* kernel, const std::function<void()>& thread);

// What the lanes of a warp showed each other in one warp operation.
struct Exchange {
    unsigned mask, arrived;
    const struct Site* site;
    uint64_t values[32];
};

int lane_id();
unsigned running_lanes();
std::shared_ptr<const Exchange> warp_exchange(const char* kind, unsigned mask, uint64_t value, Where where);
void warp_barrier(unsigned mask, Where where);
// Returns how many threads of the block came with a true vote.
int block_barrier(const char* kind, bool vote, Where where);
void cluster_barrier(Where where);
unsigned cluster_rank();
unsigned cluster_size();

const SharedMemory& shared_memory();
const SharedMemory& shared_memory_of(unsigned rank);

void async_copy(char* to, const Span& to_span, const char* from, int bytes);
void async_commit();
void async_wait(int groups, Where where);

}  // namespace narrowgauge::emulator
