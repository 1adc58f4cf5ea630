#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define NG_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NG_ASAN 1
#endif
#endif
#ifndef NG_ASAN
#define NG_ASAN 0
#endif
#if NG_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace narrowgauge::emulator {

static constexpr size_t kGuard = 4096;
static constexpr size_t kStackSize = NG_ASAN ? 512 * 1024 : 128 * 1024;

static std::vector<Stack>& free_stacks() {
    static std::vector<Stack> stacks;
    return stacks;
}

Stack take_stack() {
    if (free_stacks().empty()) {
        void* memory = mmap(nullptr, kGuard + kStackSize, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
        return {static_cast<char*>(memory) + kGuard, kStackSize};
    }
    const Stack stack = free_stacks().back();
    free_stacks().pop_back();
#if NG_ASAN
    __asan_unpoison_memory_region(stack.bottom,
                                  stack.size);  // an abandoned fiber leaves its red zones behind
#endif
    return stack;
}

void give_stack(Stack stack) { free_stacks().push_back(stack); }

#if defined(__x86_64__)

// The ABI's callee-saved registers go onto the old stack and come from the new one. swapcontext would also
// save the signal mask, a system call that costs far more than the switch.
extern "C" void narrowgauge_switch_stack(void** save, void* resume);
asm(R"(
.text
.globl narrowgauge_switch_stack
.hidden narrowgauge_switch_stack
.type narrowgauge_switch_stack, @function
narrowgauge_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size narrowgauge_switch_stack, . - narrowgauge_switch_stack
)");

void Fiber::prepare(Stack stack, void (*entry)()) {
    stack_ = stack;
    fake_stack_ = nullptr;
    auto* top = reinterpret_cast<void**>(stack.bottom + stack.size);
    *--top = nullptr;  // where entry's return address would be
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
}

#else

void Fiber::prepare(Stack stack, void (*entry)()) {
    stack_ = stack;
    fake_stack_ = nullptr;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom;
    context_.uc_stack.ss_size = stack.size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
}

#endif

static Fiber* previous = nullptr;

void Fiber::switch_from(Fiber& from, bool forever) {
    previous = &from;
#if NG_ASAN
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack_, stack_.bottom, stack_.size);
#else
    static_cast<void>(forever);
#endif
#if defined(__x86_64__)
    narrowgauge_switch_stack(&from.stack_pointer_, stack_pointer_);
#else
    swapcontext(&from.context_, &context_);
#endif
    from.arrived();
}

void Fiber::arrived() {
#if NG_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    // Only here does the OS thread's own stack become known.
    previous->stack_ = {static_cast<char*>(const_cast<void*>(bottom)), size};
#endif
}

}  // namespace narrowgauge::emulator
