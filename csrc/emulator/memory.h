// Memory that knows which of its bytes hold a value, and the checked pointers through which kernels touch it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/vec.h"

namespace narrowgauge::emulator {

// What a kernel did wrong, in words.
class EmulatorError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Raises an EmulatorError; inside a kernel the message starts with the kernel, block and thread that run.
[[noreturn]] void fail(const std::string& what);

enum class ByteState : uint8_t { never_written, written, in_flight };

// A block of bytes: poisoned, and none of them written.
class Memory {
  public:
    static constexpr size_t kAlignment = 256;

    // The first byte lies `misalignment` bytes beyond an aligned address.
    explicit Memory(size_t size, size_t misalignment = 0);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    char* bytes() const { return bytes_; }
    ByteState* states() const { return states_; }
    size_t size() const { return size_; }
    void poison();

  private:
    char* allocation_;
    char* bytes_;
    ByteState* states_;
    size_t size_;
};

// Global memory is whatever has been registered: kernels receive raw addresses and look them up.
void register_buffer(const Memory& memory);
void unregister_buffer(const Memory& memory);

// The shared memory of one block, which exists only while the block runs.
struct SharedMemory {
    Memory memory;
    unsigned rank;  // of its block in the cluster
    bool running;
};

// The bytes a pointer may touch.
struct Span {
    char* begin = nullptr;
    int64_t bytes = 0;
    ByteState* states = nullptr;
    const char* name = nullptr;
    const SharedMemory* home = nullptr;  // null in global memory
};

enum class Access { read, write, copy };

[[noreturn]] void fail_access(Access access, const Span& span, const char* at, int64_t bytes,
                              int64_t element_bytes);

// Now and then lets another thread run, as the hardware may at any access.
extern int64_t accesses_until_yield;
void yield();
inline void tick() {
    if (--accesses_until_yield < 0) yield();
}

// Checks an access of `bytes` bytes and records what it does to them.
inline void check_access(Access access, const Span& span, const char* at, int64_t bytes,
                         int64_t element_bytes, uintptr_t alignment) {
    tick();
    const int64_t offset = reinterpret_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(span.begin);
    bool good = offset >= 0 && offset + bytes <= span.bytes &&
                reinterpret_cast<uintptr_t>(at) % alignment == 0 &&
                (span.home == nullptr || span.home->running);
    if (good) {
        ByteState* states = span.states + offset;
        for (int64_t i = 0; i < bytes; ++i) {
            good &=
                access == Access::read ? states[i] == ByteState::written : states[i] != ByteState::in_flight;
        }
        if (good && access != Access::read) {
            memset(states,
                   static_cast<int>(access == Access::write ? ByteState::written : ByteState::in_flight),
                   bytes);
        }
    }
    if (!good) fail_access(access, span, at, bytes, element_bytes);
}

struct GlobalSpace {};
struct SharedSpace {};

// A pointer to elements T in a memory space. Arithmetic is free; accesses are checked.
template <class T, class Space>
class Pointer {
  public:
    using Value = std::remove_const_t<T>;

    // What x[i] is: a value when read, a checked store when assigned.
    class Reference {
      public:
        explicit Reference(const Pointer& pointer) : pointer_(pointer) {}
        Reference(const Reference&) = default;
        operator Value() const { return pointer_.template read<Value>(); }
        template <class U, std::enable_if_t<std::is_arithmetic_v<U> && std::is_arithmetic_v<Value> &&
                                                !std::is_same_v<U, Value>,
                                            int> = 0>
        explicit operator U() const {
            return static_cast<U>(static_cast<Value>(*this));
        }
        const Reference& operator=(const Value& value) const {
            pointer_.write(value);
            return *this;
        }
        const Reference& operator=(const Reference& other) const { return *this = static_cast<Value>(other); }
        const Reference& operator+=(const Value& value) const { return *this = *this + value; }
        const Reference& operator-=(const Value& value) const { return *this = *this - value; }
        const Reference& operator*=(const Value& value) const { return *this = *this * value; }
        const Reference& operator/=(const Value& value) const { return *this = *this / value; }
        const Reference& operator|=(const Value& value) const { return *this = *this | value; }
        const Reference& operator&=(const Value& value) const { return *this = *this & value; }
        const Reference& operator^=(const Value& value) const { return *this = *this ^ value; }
        Pointer operator&() const { return pointer_; }

      private:
        Pointer pointer_;
    };

    Pointer() = default;
    Pointer(std::nullptr_t) {}
    Pointer(const Span& span, T* address) : span_(span), address_(address) {}
    template <class U, std::enable_if_t<std::is_same_v<const U, T>, int> = 0>
    Pointer(const Pointer<U, Space>& other) : span_(other.span()), address_(other.address()) {}

    explicit operator bool() const { return address_ != nullptr; }
    T* address() const { return address_; }
    const Span& span() const { return span_; }

    Pointer operator+(int64_t n) const { return {span_, moved(n)}; }
    Pointer operator-(int64_t n) const { return {span_, moved(-n)}; }
    Pointer& operator+=(int64_t n) { return *this = *this + n; }
    Pointer& operator-=(int64_t n) { return *this = *this - n; }

    std::conditional_t<std::is_const_v<T>, Value, Reference> operator[](int64_t i) const {
        if constexpr (std::is_const_v<T>) {
            return (*this + i).template read<Value>();
        } else {
            return Reference(*this + i);
        }
    }
    auto operator*() const { return (*this)[0]; }

    // One aligned access of sizeof(Data) bytes.
    template <class Data>
    Data read() const {
        check<Data>(Access::read);
        Data data;
        memcpy(&data, static_cast<const void*>(address_), sizeof(Data));
        return data;
    }
    template <class Data>
    void write(const Data& data) const {
        static_assert(!std::is_const_v<T>, "writing through a pointer to const");
        check<Data>(Access::write);
        memcpy(static_cast<void*>(address_), &data, sizeof(Data));
    }

  private:
    template <class Data>
    void check(Access access) const {
        check_access(access, span_, reinterpret_cast<const char*>(address_), sizeof(Data), sizeof(T),
                     alignof(Data));
    }
    // Pointers may stray outside their buffer as long as they are not used, so this is integer arithmetic.
    T* moved(int64_t n) const {
        return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address_) +
                                    static_cast<uintptr_t>(n) * sizeof(T));
    }

    Span span_;
    T* address_ = nullptr;
};

// The registered buffer around an address; an error when there is none.
Span find_buffer(const void* address, const char* name);

}  // namespace narrowgauge::emulator

namespace narrowgauge {

template <class T>
using Global = emulator::Pointer<T, emulator::GlobalSpace>;
template <class T>
using Shared = emulator::Pointer<T, emulator::SharedSpace>;

template <class T, class Raw>
Global<T> global(Raw* raw, const char* name) {
    if (raw == nullptr) return {};
    return {emulator::find_buffer(raw, name), static_cast<T*>(raw)};
}

template <class T, class Space>
bool is_aligned(const emulator::Pointer<T, Space>& pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer.address()) % bytes == 0;
}

template <int N, class T, class Space>
Vec<std::remove_const_t<T>, N> load(const emulator::Pointer<T, Space>& pointer, int64_t index) {
    return (pointer + index).template read<Vec<std::remove_const_t<T>, N>>();
}

template <int N, class T, class Space>
void store(const emulator::Pointer<T, Space>& pointer, int64_t index, const Vec<T, N>& value) {
    (pointer + index).write(value);
}

}  // namespace narrowgauge
