#include "emulator/memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <new>

namespace narrowgauge::emulator {

Memory::Memory(size_t size, size_t misalignment)
    : allocation_(static_cast<char*>(::operator new(size + misalignment, std::align_val_t(kAlignment)))),
      bytes_(allocation_ + misalignment),
      states_(static_cast<ByteState*>(::operator new(size))),
      size_(size) {
    poison();
}

Memory::~Memory() {
    ::operator delete(allocation_, std::align_val_t(kAlignment));
    ::operator delete(states_);
}

void Memory::poison() {
    memset(bytes_, 0xff, size_);
    memset(states_, static_cast<int>(ByteState::never_written), size_);
}

static std::map<uintptr_t, const Memory*>& buffers() {
    static std::map<uintptr_t, const Memory*> by_address;
    return by_address;
}

void register_buffer(const Memory& memory) {
    buffers()[reinterpret_cast<uintptr_t>(memory.bytes())] = &memory;
}

void unregister_buffer(const Memory& memory) { buffers().erase(reinterpret_cast<uintptr_t>(memory.bytes())); }

Span find_buffer(const void* address, const char* name) {
    auto next = buffers().upper_bound(reinterpret_cast<uintptr_t>(address));
    if (next != buffers().begin()) {
        const Memory& memory = *std::prev(next)->second;
        // The end itself is allowed: a pointer to the end of a buffer is a valid pointer that may not be
        // read.
        if (static_cast<const char*>(address) <= memory.bytes() + memory.size()) {
            return {memory.bytes(), static_cast<int64_t>(memory.size()), memory.states(), name, nullptr};
        }
    }
    fail(std::string("the pointer '") + name + "' does not lie in any tensor");
}

void fail_access(Access access, const Span& span, const char* at, int64_t bytes, int64_t element_bytes) {
    const bool is_write = access != Access::read;
    const std::string action = access == Access::copy ? "async copy to "
                               : is_write             ? "write of "
                                                      : "read of ";
    if (span.begin == nullptr) fail(action + "a null pointer");
    const int64_t offset = reinterpret_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(span.begin);
    const int64_t index = (offset < 0 ? offset - element_bytes + 1 : offset) / element_bytes;
    std::string where = std::string(span.name) + "[" + std::to_string(index) + "]";
    if (bytes > element_bytes) where += " (" + std::to_string(bytes / element_bytes) + " elements at once)";
    std::string extent = std::string(span.name) + " has " + std::to_string(span.bytes / element_bytes) +
                         " elements of " + std::to_string(element_bytes) + " bytes";
    if (span.home != nullptr)
        extent += ", taken at byte " + std::to_string(span.begin - span.home->memory.bytes());
    if (offset < 0 || offset + bytes > span.bytes) fail("out-of-bounds " + action + where + ": " + extent);
    if (span.home != nullptr && !span.home->running) {
        fail(action + where + " in the shared memory of block " + std::to_string(span.home->rank) +
             " of the cluster, which has not started or has exited");
    }
    const ByteState* states = span.states + offset;
    for (int64_t i = 0; i < bytes; ++i) {
        if (states[i] == ByteState::in_flight)
            fail(action + where + " before the async_wait of the copy to it");
        if (!is_write && states[i] == ByteState::never_written)
            fail("uninitialised " + action + where + ": " + extent);
    }
    fail("misaligned " + action + where + ": the address is not a multiple of " + std::to_string(bytes) +
         " bytes");
}

}  // namespace narrowgauge::emulator
