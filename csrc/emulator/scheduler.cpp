#include "emulator/scheduler.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "emulator/fiber.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace narrowgauge::emulator {

int64_t accesses_until_yield = 0;

// --- sites -------------------------------------------------------------------------------------------------

struct Site {
    std::string place;  // "norm/norm.cuh:41"
    std::string kind;   // "__syncthreads"
    bool disabled;
    std::string text() const { return kind + " (" + place + ")"; }
};

static std::map<std::pair<std::string, std::string>, Site>& sites() {
    static std::map<std::pair<std::string, std::string>, Site> by_place_and_kind;
    return by_place_and_kind;
}

static std::string& disabled_site() {
    static std::string place;
    return place;
}

static Site& find_site(const char* kind, Where where) {
    using Key = std::tuple<const char*, const char*, int>;
    static std::map<Key, Site*> seen;
    static std::pair<Key, Site*> last;  // threads tend to come to a site one after the other
    const Key key{kind, where.file, where.line};
    if (last.second != nullptr && last.first == key) return *last.second;
    Site*& site = seen[key];
    if (site == nullptr) {
        std::string file = where.file;
        const size_t root = file.rfind("csrc/");
        if (root != std::string::npos) file = file.substr(root + 5);
        const std::string place = file + ":" + std::to_string(where.line);
        site = &sites().insert({{place, kind}, {place, kind, place == disabled_site()}}).first->second;
    }
    last = {key, site};
    return *site;
}

std::vector<std::string> barrier_sites() {
    static const std::set<std::string> barriers = {
        "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
        "__syncwarp",    "cluster_barrier",  "async_wait"};
    std::vector<std::string> places;
    for (const auto& entry : sites()) {
        if (barriers.count(entry.second.kind)) places.push_back(entry.second.place);
    }
    places.erase(std::unique(places.begin(), places.end()), places.end());
    return places;
}

void disable_barrier(const std::string& place) {
    disabled_site() = place;
    for (auto& entry : sites()) entry.second.disabled = entry.second.place == place;
}

// --- the order of things -----------------------------------------------------------------------------------

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>((next() >> 32) * static_cast<uint64_t>(n) >> 32); }
};

static Random schedule;

void set_schedule(uint64_t seed) { schedule.state = seed; }

// A strict order of up to 32 things, which holds until it is drawn anew: the first runs until it must wait.
class Order {
  public:
    void draw(Random& random) {
        rotation_ = random.below(32);
        reversed_ = random.below(2) == 1;
    }
    int first(unsigned ready) const {
        const unsigned rotated =
            ready >> rotation_ | static_cast<unsigned>(uint64_t{ready} << (32 - rotation_));
        return ((reversed_ ? 31 - __builtin_clz(rotated) : __builtin_ctz(rotated)) + rotation_) % 32;
    }

  private:
    int rotation_ = 0;
    bool reversed_ = false;
};

// --- threads, warps, blocks --------------------------------------------------------------------------------

// Threads of a block or cluster on their way through one barrier.
struct Gathering {
    const Site* site;
    int arrived = 0, votes = 0;
};

struct Copy {
    char* to;
    ByteState* states;
    const char* from;
    int bytes;
};

struct Thread {
    Fiber fiber;
    Stack stack;
    dim3 index;
    struct Block* block;
    int warp, lane;
    const Site* waits_at = nullptr;
    // Asynchronous copies by commit group, oldest first; the last group is still open.
    std::vector<std::vector<Copy>> copies{std::vector<Copy>()};
};

struct Warp {
    Order order;
    unsigned ready = 0, exited = 0;
    std::vector<std::shared_ptr<Exchange>> exchanges;
};

struct Block {
    Order order;
    dim3 index;
    unsigned ready = 0;  // warps
    int exited = 0;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::shared_ptr<Gathering> gathering;
    std::unique_ptr<SharedMemory> shared;
};

static std::string text(const dim3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

static std::string count(int n, const std::string& noun) {
    return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

static std::string name_of(const void* kernel) {
    Dl_info info{};
    if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "kernel";
    int status = 0;
    char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    std::string name = status == 0 ? demangled : info.dli_sname;
    std::free(demangled);
    // Of "void narrowgauge::norm_forward<float, 4>(narrowgauge::NormForward)" the middle says it all.
    name = name.substr(0, name.rfind('('));
    for (const std::string prefix : {"void ", "narrowgauge::"}) {
        if (name.compare(0, prefix.size(), prefix) == 0) name = name.substr(prefix.size());
    }
    return name;
}

// One launch, and the state of the cluster of blocks that runs now.
class Launch {
  public:
    Launch(const LaunchConfig& config, std::string name, const std::function<void()>& body);
    ~Launch();
    void run();

    void reschedule();
    void interleave();
    std::shared_ptr<const Exchange> exchange(const Site& site, unsigned mask, uint64_t value);
    int gather_block(const Site& site, bool vote);
    void gather_cluster(const Site& site);
    std::string describe_running() const;

    Thread* running = nullptr;
    std::vector<Block> blocks;

  private:
    static void thread_main();
    void start_cluster(int64_t first_block);
    void stop_block(Block& block);
    Thread& pick();
    void resume(Fiber& from, Thread& to, bool forever);
    void wait(const Site& site);
    void wake(Thread& thread);
    void sleep(Thread& thread);
    void check_exit();
    [[noreturn]] void leave();
    std::string describe_deadlock() const;
    int gather(std::shared_ptr<Gathering>& slot, const Site& site, bool vote, bool whole_cluster);

    const LaunchConfig& config_;
    const std::string name_;
    const std::function<void()>& body_;
    Random random_;
    int patience_;         // on average, an order is drawn anew after this many switches
    int access_interval_;  // and another thread may run after this many memory accesses
    std::shared_ptr<Gathering> cluster_gathering_;
    Order order_;
    unsigned ready_ = 0;  // blocks
    Fiber host_;
    Stack retired_;
    std::exception_ptr error_;
};

static Launch* launch = nullptr;

static Launch& current_launch() {
    if (launch == nullptr) throw EmulatorError("device code was called outside a kernel");
    return *launch;
}

void fail(const std::string& what) {
    throw EmulatorError(launch != nullptr && launch->running != nullptr ? launch->describe_running() + what
                                                                        : what);
}

Launch::Launch(const LaunchConfig& config, std::string name, const std::function<void()>& body)
    : config_(config), name_(std::move(name)), body_(body) {
    const auto refuse = [&](const std::string& why) {
        throw EmulatorError(name_ + ": invalid launch: " + why);
    };
    const dim3 grid = config.grid, block = config.block;
    const int64_t threads = int64_t{block.x} * block.y * block.z;
    if (launch != nullptr) refuse("a kernel is already running");
    if (threads < 1 || threads > 1024 || block.z > 64) refuse("a block of " + text(block) + " threads");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        refuse("a grid of " + text(grid) + " blocks");
    }
    if (config.shared_bytes > 227 * 1024) {
        refuse(std::to_string(config.shared_bytes) + " bytes of shared memory, a block can have 232448");
    }
    if (config.cluster < 1 || config.cluster > 16 || grid.x % static_cast<unsigned>(config.cluster) != 0) {
        refuse("clusters of " + count(config.cluster, "block") + " in a grid of " + text(grid) + " blocks");
    }
    random_.state = schedule.next();
    patience_ = 4 << random_.below(8);
    access_interval_ = 8 << random_.below(8);
    accesses_until_yield = random_.below(access_interval_);
    blocks.resize(static_cast<size_t>(config.cluster));
    for (Block& b : blocks) {
        b.warps.resize(static_cast<size_t>((threads + 31) / 32));
        b.shared.reset(
            new SharedMemory{Memory(config.shared_bytes), static_cast<unsigned>(&b - blocks.data()), false});
    }
    blockDim = block;
    gridDim = grid;
    launch = this;
}

Launch::~Launch() {
    for (Block& block : blocks) stop_block(block);
    launch = nullptr;
}

// Gives back the stacks of threads that an error left suspended.
void Launch::stop_block(Block& block) {
    for (Thread& thread : block.threads) {
        if (thread.stack.bottom != nullptr) give_stack(thread.stack);
    }
    block.threads.clear();
}

void Launch::run() {
    const int64_t grid = int64_t{gridDim.x} * gridDim.y * gridDim.z;
    std::vector<int64_t> clusters(static_cast<size_t>(grid / config_.cluster));
    std::iota(clusters.begin(), clusters.end(), int64_t{0});
    for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[random_.next() % i]);
    for (const int64_t cluster : clusters) {
        start_cluster(cluster * config_.cluster);
        resume(host_, pick(), false);
        running = nullptr;
        if (error_) std::rethrow_exception(error_);
    }
}

void Launch::start_cluster(int64_t first_block) {
    ready_ = 0;
    order_.draw(random_);
    for (Block& block : blocks) {
        const int64_t index = first_block + (&block - blocks.data());
        block.index = dim3(static_cast<unsigned>(index % gridDim.x),
                           static_cast<unsigned>(index / gridDim.x % gridDim.y),
                           static_cast<unsigned>(index / gridDim.x / gridDim.y));
        block.exited = 0;
        block.ready = 0;
        block.order.draw(random_);
        block.shared->memory.poison();
        const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
        block.threads.clear();
        block.threads.resize(threads);
        for (Warp& warp : block.warps) {
            warp = Warp{};
            warp.order.draw(random_);
        }
        for (unsigned i = 0; i < threads; ++i) {
            Thread& thread = block.threads[i];
            thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
            thread.block = &block;
            thread.warp = static_cast<int>(i / 32);
            thread.lane = static_cast<int>(i % 32);
            wake(thread);
        }
        // Lanes that a short last warp does not have can take part in nothing.
        if (threads % 32 != 0) block.warps.back().exited = ~0u << threads % 32;
    }
}

void Launch::wake(Thread& thread) {
    Block& block = *thread.block;
    thread.waits_at = nullptr;
    block.warps[static_cast<size_t>(thread.warp)].ready |= 1u << thread.lane;
    block.ready |= 1u << thread.warp;
    ready_ |= 1u << (&block - blocks.data());
}

void Launch::sleep(Thread& thread) {
    Block& block = *thread.block;
    unsigned& ready = block.warps[static_cast<size_t>(thread.warp)].ready;
    ready &= ~(1u << thread.lane);
    if (ready == 0) block.ready &= ~(1u << thread.warp);
    if (block.ready == 0) ready_ &= ~(1u << (&block - blocks.data()));
}

Thread& Launch::pick() {
    if (random_.below(patience_) == 0) order_.draw(random_);
    Block& block = blocks[static_cast<size_t>(order_.first(ready_))];
    if (random_.below(patience_) == 0) block.order.draw(random_);
    const int w = block.order.first(block.ready);
    Warp& warp = block.warps[static_cast<size_t>(w)];
    if (random_.below(patience_) == 0) warp.order.draw(random_);
    return block.threads[static_cast<size_t>(w * 32 + warp.order.first(warp.ready))];
}

void Launch::resume(Fiber& from, Thread& to, bool forever) {
    if (to.stack.bottom == nullptr) {
        to.stack = take_stack();
        to.fiber.prepare(to.stack, &Launch::thread_main);
        to.block->shared->running = true;
    }
    running = &to;
    threadIdx = to.index;
    blockIdx = to.block->index;
    to.fiber.switch_from(from, forever);
    // Here `from` has been resumed, and a thread that exited on the way is off its stack.
    if (retired_.bottom != nullptr) give_stack(std::exchange(retired_, Stack{}));
}

void Launch::thread_main() {
    Launch& self = *launch;
    self.running->fiber.arrived();
    if (self.retired_.bottom != nullptr) give_stack(std::exchange(self.retired_, Stack{}));
    try {
        self.body_();
        self.check_exit();
    } catch (...) {
        self.error_ = std::current_exception();
    }
    self.leave();
}

void Launch::leave() {
    Thread& thread = *running;
    if (!error_) {
        Block& block = *thread.block;
        retired_ = std::exchange(thread.stack, Stack{});
        sleep(thread);
        block.warps[static_cast<size_t>(thread.warp)].exited |= 1u << thread.lane;
        if (++block.exited == static_cast<int>(block.threads.size())) block.shared->running = false;
        if (ready_ != 0) resume(thread.fiber, pick(), true);
        for (const Block& other : blocks) {
            if (other.exited < static_cast<int>(other.threads.size()) && !error_) {
                error_ = std::make_exception_ptr(EmulatorError(describe_deadlock()));
            }
        }
    }
    host_.switch_from(thread.fiber, true);
    std::terminate();
}

void Launch::wait(const Site& site) {
    Thread& thread = *running;
    thread.waits_at = &site;
    sleep(thread);
    if (ready_ == 0) {
        error_ = std::make_exception_ptr(EmulatorError(describe_deadlock()));
        host_.switch_from(thread.fiber, true);
    }
    resume(thread.fiber, pick(), false);
}

void Launch::reschedule() {
    Thread& thread = *running;
    Thread& next = pick();
    if (&next != &thread) resume(thread.fiber, next, false);
}

// Between two memory accesses: an order drawn anew, or the same thread would go on.
void Launch::interleave() {
    accesses_until_yield = 1 + random_.below(2 * access_interval_);
    Block& block = *running->block;
    switch (random_.below(4)) {
        case 0:
            order_.draw(random_);
            break;
        case 1:
            block.order.draw(random_);
            break;
        default:
            block.warps[static_cast<size_t>(running->warp)].order.draw(random_);
    }
    reschedule();
}

// --- barriers ----------------------------------------------------------------------------------------------

std::shared_ptr<const Exchange> Launch::exchange(const Site& site, unsigned mask, uint64_t value) {
    Thread& thread = *running;
    Warp& warp = thread.block->warps[static_cast<size_t>(thread.warp)];
    const unsigned me = 1u << thread.lane;
    if ((mask & me) == 0)
        fail(site.text() + ": the mask does not name the calling lane " + std::to_string(thread.lane));
    if ((mask & warp.exited) != 0) {
        fail(site.text() + ": the mask names lane " + std::to_string(__builtin_ctz(mask & warp.exited)) +
             ", which has exited or does not exist");
    }
    std::shared_ptr<Exchange> mine;
    for (const auto& other : warp.exchanges) {
        if ((other->mask & mask) == 0) continue;
        if (other->site != &site || other->mask != mask) {
            fail("divergent warp: " + site.text() + " while lane " +
                 std::to_string(__builtin_ctz(other->arrived)) + " waits at " + other->site->text() +
                 (other->mask != mask ? " with another mask" : ""));
        }
        mine = other;
    }
    if (!mine) {
        mine = std::make_shared<Exchange>(Exchange{mask, 0, &site, {}});
        warp.exchanges.push_back(mine);
    }
    mine->values[thread.lane] = value;
    mine->arrived |= me;
    if (mine->arrived == mask) {
        warp.exchanges.erase(std::find(warp.exchanges.begin(), warp.exchanges.end(), mine));
        for (int lane = 0; lane < 32; ++lane) {
            if (mask >> lane & 1u) wake(thread.block->threads[static_cast<size_t>(thread.warp * 32 + lane)]);
        }
        reschedule();
    } else {
        wait(site);
    }
    return mine;
}

int Launch::gather(std::shared_ptr<Gathering>& slot, const Site& site, bool vote, bool whole_cluster) {
    Block& own = *running->block;
    int expected = 0, exited = 0;
    for (const Block& block : blocks) {
        if (!whole_cluster && &block != &own) continue;
        expected += static_cast<int>(block.threads.size());
        exited += block.exited;
    }
    if (exited > 0)
        fail("divergent barrier: " + site.text() + " after " + count(exited, "thread") + " exited");
    if (slot && slot->site != &site) {
        fail("divergent barrier: " + site.text() + " while " + count(slot->arrived, "thread") + " wait at " +
             slot->site->text());
    }
    if (!slot) slot = std::make_shared<Gathering>(Gathering{&site});
    const std::shared_ptr<Gathering> mine = slot;
    mine->votes += vote;
    if (++mine->arrived < expected) {
        wait(site);
        return mine->votes;
    }
    slot.reset();
    for (Block& block : blocks) {
        if (!whole_cluster && &block != &own) continue;
        for (Thread& thread : block.threads) wake(thread);
    }
    reschedule();
    return mine->votes;
}

int Launch::gather_block(const Site& site, bool vote) {
    return gather(running->block->gathering, site, vote, false);
}

void Launch::gather_cluster(const Site& site) { gather(cluster_gathering_, site, true, true); }

// --- reports -----------------------------------------------------------------------------------------------

std::string Launch::describe_running() const {
    return name_ + ", block " + text(running->block->index) + ", thread " + text(running->index) + ": ";
}

// A thread may not go while others wait for it.
void Launch::check_exit() {
    const Thread& thread = *running;
    for (const auto* gathering : {&thread.block->gathering, &cluster_gathering_}) {
        if (*gathering) {
            fail("divergent barrier: the thread exited while " + count((*gathering)->arrived, "thread") +
                 " wait at " + (*gathering)->site->text());
        }
    }
    for (const auto& exchange : thread.block->warps[static_cast<size_t>(thread.warp)].exchanges) {
        if (exchange->mask >> thread.lane & 1u) {
            fail("divergent warp: the thread exited while lane " +
                 std::to_string(__builtin_ctz(exchange->arrived)) + " waits for it at " +
                 exchange->site->text());
        }
    }
}

std::string Launch::describe_deadlock() const {
    std::map<const Site*, std::pair<int, const Thread*>> waiting;
    int exited = 0;
    for (const Block& block : blocks) {
        exited += block.exited;
        for (const Thread& thread : block.threads) {
            if (thread.waits_at == nullptr) continue;
            auto& entry = waiting[thread.waits_at];
            if (entry.first++ == 0) entry.second = &thread;
        }
    }
    std::string report = name_ + ": deadlock";
    for (const auto& [site, who] : waiting) {
        report += "\n  " + count(who.first, "thread") + (who.first == 1 ? " waits at " : " wait at ") +
                  site->text() + ", the first is block " + text(who.second->block->index) + ", thread " +
                  text(who.second->index);
    }
    return exited > 0 ? report + "\n  " + count(exited, "thread") + " exited" : report;
}

// --- what device.h is made of ------------------------------------------------------------------------------

void run_grid(const LaunchConfig& config, const void* kernel, const std::function<void()>& thread) {
    Launch(config, name_of(kernel), thread).run();
}

void yield() {
    if (launch != nullptr && launch->running != nullptr) launch->interleave();
}

int lane_id() { return current_launch().running->lane; }

unsigned running_lanes() {
    const Thread& thread = *current_launch().running;
    return ~thread.block->warps[static_cast<size_t>(thread.warp)].exited;
}

std::shared_ptr<const Exchange> warp_exchange(const char* kind, unsigned mask, uint64_t value, Where where) {
    return current_launch().exchange(find_site(kind, where), mask, value);
}

void warp_barrier(unsigned mask, Where where) {
    const Site& site = find_site("__syncwarp", where);
    if (!site.disabled) current_launch().exchange(site, mask, 0);
}

int block_barrier(const char* kind, bool vote, Where where) {
    const Site& site = find_site(kind, where);
    return site.disabled ? vote : current_launch().gather_block(site, vote);
}

void cluster_barrier(Where where) {
    const Site& site = find_site("cluster_barrier", where);
    if (!site.disabled) current_launch().gather_cluster(site);
}

unsigned cluster_rank() { return current_launch().running->block->shared->rank; }

unsigned cluster_size() { return static_cast<unsigned>(current_launch().blocks.size()); }

const SharedMemory& shared_memory() { return *current_launch().running->block->shared; }

const SharedMemory& shared_memory_of(unsigned rank) {
    if (rank >= cluster_size())
        fail("cluster_map to block " + std::to_string(rank) + " of " + std::to_string(cluster_size()));
    return *current_launch().blocks[rank].shared;
}

void async_copy(char* to, const Span& span, const char* from, int bytes) {
    current_launch().running->copies.back().push_back({to, span.states + (to - span.begin), from, bytes});
}

void async_commit() { current_launch().running->copies.emplace_back(); }

void async_wait(int groups, Where where) {
    if (find_site("async_wait", where).disabled) return;
    auto& copies = current_launch().running->copies;
    while (static_cast<int>(copies.size()) - 1 > groups) {
        for (const Copy& copy : copies.front()) {
            memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
            memset(copy.states, static_cast<int>(ByteState::written), static_cast<size_t>(copy.bytes));
        }
        copies.erase(copies.begin());
    }
}

}  // namespace narrowgauge::emulator
