// Kernels that are right, and kernels with one fault each, for the tests of the emulator itself.
#include <map>
#include <string>

#include "common/device.h"
#include "emulator/library.h"

namespace narrowgauge::self_test {

struct Args {
    const void* x;
    void* out;
    int n;
};

__device__ int thread_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
__device__ Global<const float> input(const Args& args) { return global<const float>(args.x, "x"); }
__device__ Global<float> output(const Args& args) { return global<float>(args.out, "out"); }

// --- right -------------------------------------------------------------------------------------------------

constexpr int kSteps = 4;

// Four times: add the next thread's value to one's own.
__global__ void block_rotate(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    const int t = threadIdx.x;
    float value = input(args)[thread_index()];
    row[t] = value;
    for (int step = 0; step < kSteps; ++step) {
        __syncthreads();
        value += row[(t + 1) % blockDim.x];
        __syncthreads();
        row[t] = value;
    }
    output(args)[thread_index()] = value;
}

// The same inside each warp.
__global__ void warp_rotate(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    const int t = threadIdx.x, next = t / warpSize * warpSize + (t + 1) % warpSize;
    float value = input(args)[thread_index()];
    row[t] = value;
    for (int step = 0; step < kSteps; ++step) {
        __syncwarp();
        value += row[next];
        __syncwarp();
        row[t] = value;
    }
    output(args)[thread_index()] = value;
}

// The same from each block to the next of its cluster. No block exits before its neighbour has read it.
__global__ void cluster_rotate(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    const int t = threadIdx.x;
    const auto next = cluster_map(row, (cluster_rank() + 1) % cluster_size());
    float value = input(args)[thread_index()];
    row[t] = value;
    for (int step = 0; step < kSteps; ++step) {
        cluster_barrier();
        value += next[t];
        if (step + 1 == kSteps) break;
        cluster_barrier();
        row[t] = value;
    }
    cluster_barrier();
    output(args)[thread_index()] = value;
}

// Reverses tiles of 4 * blockDim.x elements; the next tile is on its way while this one is written.
__global__ void async_reverse(Args args) {
    const int tile = 4 * blockDim.x, t = threadIdx.x;
    SharedArena arena;
    Shared<float> buffers[2] = {arena.take<float>(tile), arena.take<float>(tile)};
    const auto x = input(args);
    const auto out = output(args);
    async_copy<16>(buffers[0], 4 * t, x, 4 * t);
    async_commit();
    for (int i = 0; i * tile < args.n; ++i) {
        if ((i + 1) * tile < args.n) async_copy<16>(buffers[(i + 1) % 2], 4 * t, x, (i + 1) * tile + 4 * t);
        async_commit();
        async_wait<1>();
        __syncthreads();
        for (int k = t; k < tile; k += blockDim.x) out[i * tile + k] = buffers[i % 2][tile - 1 - k];
        __syncthreads();
    }
}

// How many elements of the block equal t, for each thread t.
__global__ void shared_histogram(Args args) {
    SharedArena arena;
    auto counts = arena.take<int>(blockDim.x);
    counts[threadIdx.x] = 0;
    __syncthreads();
    atomicAdd(counts + static_cast<int>(input(args)[thread_index()]), 1);
    __syncthreads();
    output(args)[thread_index()] = counts[threadIdx.x];
}

// Maximum, minimum, a sum by compare-and-swap, and a sum by exchange, to threads 0 to 3 modulo 4.
__global__ void atomics(Args args) {
    SharedArena arena;
    auto results = arena.take<int>(4);
    const int value = static_cast<int>(input(args)[thread_index()]);
    if (threadIdx.x < 4) results[threadIdx.x] = 0;
    __syncthreads();
    atomicMax(results, value);
    atomicMin(results + 1, -value);
    int seen = results[2], expected;
    do {
        expected = seen;
        seen = atomicCAS(results + 2, expected, expected + value);
    } while (seen != expected);
    int mine = value;  // whoever finds the cell occupied carries the sum on
    while (mine != 0) mine = atomicExch(results + 3, mine + atomicExch(results + 3, 0));
    __syncthreads();
    output(args)[thread_index()] = results[threadIdx.x % 4];
}

// Four shuffles of numbers below 64, packed into one: by index, up, down, xor.
template <int Width>
__global__ void shuffles(Args args) {
    const int value = static_cast<int>(input(args)[thread_index()]);
    const int index = __shfl_sync(0xffffffffu, value, 3, Width),
              up = __shfl_up_sync(0xffffffffu, value, 1, Width),
              down = __shfl_down_sync(0xffffffffu, value, 2, Width),
              flipped = __shfl_xor_sync(0xffffffffu, value, 1, Width);
    output(args)[thread_index()] = index + 64 * (up + 64 * (down + 64 * flipped));
}

// Votes over each warp's halves and over the block, packed into one number.
__global__ void votes(Args args) {
    const float value = input(args)[thread_index()];
    const unsigned half = threadIdx.x % warpSize < 16 ? 0x0000ffffu : 0xffff0000u;
    const int lanes = __popc(__ballot_sync(half, value > 0)), any = __any_sync(half, value > 0),
              all = __all_sync(half, value > 0), largest = __reduce_max_sync(half, static_cast<int>(value));
    const int count = __syncthreads_count(value > 0), some = __syncthreads_or(value > 0),
              every = __syncthreads_and(value > 0);
    output(args)[thread_index()] =
        lanes + 32 * (any + 2 * (all + 2 * (some + 2 * (every + 2 * (largest + 64 * count)))));
}

__global__ void vector_double(Args args) {
    auto four = load<4>(input(args), 4 * thread_index());
    for (int k = 0; k < 4; ++k) four[k] *= 2;
    store(output(args), 4 * thread_index(), four);
}

// --- wrong -------------------------------------------------------------------------------------------------

__global__ void read_beyond(Args args) { output(args)[thread_index()] = input(args)[thread_index() + 1]; }

__global__ void read_before(Args args) { output(args)[thread_index()] = input(args)[thread_index() - 1]; }

__global__ void write_beyond(Args args) { output(args)[thread_index() + 1] = 0; }

__global__ void write_beyond_piece(Args) {
    SharedArena arena;
    auto first = arena.take<float>(blockDim.x);
    arena.take<float>(blockDim.x);
    first[threadIdx.x + 1] = 0;
}

__global__ void misaligned_load(Args args) { load<4>(input(args), 1); }

__global__ void misaligned_store(Args args) { store(output(args), 2, Vec<float, 4>{{0, 0, 0, 0}}); }

__global__ void uninitialised_shared(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    output(args)[thread_index()] = row[threadIdx.x];
}

__global__ void uninitialised_output(Args args) { output(args)[thread_index()] += 1; }

__global__ void unwritten_output(Args args) {
    if (thread_index() != 5) output(args)[thread_index()] = 0;
}

__global__ void null_pointer(Args) {
    static_cast<void>(global<const float>(static_cast<void*>(nullptr), "x")[0]);
}

__global__ void foreign_pointer(Args) {
    float local = 0;
    global<float>(&local, "local")[0] = 1;
}

__global__ void divergent_barrier(Args) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void early_exit(Args) {
    if (threadIdx.x == 3) return;
    __syncthreads();
}

__global__ void deadlock(Args) {
    if (threadIdx.x % warpSize == 0) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

__global__ void mask_of_exited_lane(Args) {
    if (threadIdx.x == 3) return;
    __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void mask_without_self(Args) { __ballot_sync(0x1u, 1); }

__global__ void shuffle_outside_mask(Args) {
    if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void divergent_warp(Args) {
    if (threadIdx.x % 2) {
        __syncwarp();
    } else {
        __syncwarp();
    }
}

__global__ void read_before_wait(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    async_copy<4>(row, threadIdx.x, input(args), thread_index());
    async_commit();
    output(args)[thread_index()] = row[threadIdx.x];
    async_wait<0>();
}

__global__ void wait_too_short(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    async_copy<4>(row, threadIdx.x, input(args), thread_index());
    async_commit();
    async_wait<1>();
    output(args)[thread_index()] = row[threadIdx.x];
}

__global__ void arena_overflow(Args) {
    SharedArena arena;
    arena.take<float>(blockDim.x);
    arena.take<char>(1);
}

__global__ void neighbour_has_exited(Args args) {
    SharedArena arena;
    auto row = arena.take<float>(blockDim.x);
    const int t = threadIdx.x;
    row[t] = input(args)[thread_index()];
    cluster_barrier();
    output(args)[thread_index()] = cluster_map(row, (cluster_rank() + 1) % cluster_size())[t];
}

static const std::map<std::string, void (*)(Args)> kernels = {
    {"block_rotate", block_rotate},
    {"warp_rotate", warp_rotate},
    {"cluster_rotate", cluster_rotate},
    {"async_reverse", async_reverse},
    {"shared_histogram", shared_histogram},
    {"atomics", atomics},
    {"shuffles", shuffles<32>},
    {"shuffles_by_eight", shuffles<8>},
    {"votes", votes},
    {"vector_double", vector_double},
    {"read_beyond", read_beyond},
    {"read_before", read_before},
    {"write_beyond", write_beyond},
    {"write_beyond_piece", write_beyond_piece},
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"uninitialised_shared", uninitialised_shared},
    {"uninitialised_output", uninitialised_output},
    {"unwritten_output", unwritten_output},
    {"null_pointer", null_pointer},
    {"foreign_pointer", foreign_pointer},
    {"divergent_barrier", divergent_barrier},
    {"early_exit", early_exit},
    {"deadlock", deadlock},
    {"mask_of_exited_lane", mask_of_exited_lane},
    {"mask_without_self", mask_without_self},
    {"shuffle_outside_mask", shuffle_outside_mask},
    {"divergent_warp", divergent_warp},
    {"read_before_wait", read_before_wait},
    {"wait_too_short", wait_too_short},
    {"arena_overflow", arena_overflow},
    {"neighbour_has_exited", neighbour_has_exited},
};

// Runs one of them over a float32 tensor; the output has its shape.
emulator::Tensor run(const std::string& name, const emulator::Tensor& x, unsigned blocks, unsigned threads,
                     size_t shared_bytes, int cluster) {
    const auto out = emulator::Tensor::empty(x.sizes(), DType::float32);
    launch(LaunchConfig{blocks, threads, shared_bytes, cluster}, kernels.at(name),
           Args{x.data_ptr(), out.data_ptr(), static_cast<int>(x.numel())});
    return out;
}

}  // namespace narrowgauge::self_test

namespace narrowgauge::emulator {

void register_self_test(Library& library) { library.impl("run", &self_test::run); }

}  // namespace narrowgauge::emulator
