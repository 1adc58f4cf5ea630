// Switching between stacks: what lets one OS thread play a thousand CUDA threads.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace narrowgauge::emulator {

struct Stack {
    char* bottom = nullptr;
    size_t size = 0;
};

// Stacks are kept for the next fiber: mapping one costs more than running most kernels' threads.
Stack take_stack();
void give_stack(Stack stack);

// A suspended flow of control.
class Fiber {
  public:
    // The first switch to this fiber calls `entry` on `stack`; entry must call arrived() first and never
    // return.
    void prepare(Stack stack, void (*entry)());
    // Suspends the running flow in `from` and resumes this one; with `forever`, `from` will not be resumed.
    void switch_from(Fiber& from, bool forever);
    // Tells the sanitizers that the switch is complete.
    void arrived();

  private:
#if defined(__x86_64__)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
    Stack stack_;
    void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace narrowgauge::emulator
