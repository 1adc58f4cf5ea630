// The tensor that bindings see in the emulator: contiguous, and aware of which of its bytes were ever
// written.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "emulator/memory.h"

namespace narrowgauge::emulator {

class Tensor {
  public:
    Tensor() = default;

    // Poisoned and unwritten. The first element lies `offset` elements beyond an aligned address.
    static Tensor empty(const std::vector<int64_t>& sizes, DType dtype, int64_t offset = 0) {
        Tensor tensor;
        tensor.storage_ = std::make_shared<Storage>(sizes, dtype, offset);
        return tensor;
    }

    const std::vector<int64_t>& sizes() const { return storage_->sizes; }
    int64_t dim() const { return static_cast<int64_t>(sizes().size()); }
    int64_t size(int64_t i) const { return sizes()[static_cast<size_t>(i < 0 ? i + dim() : i)]; }
    int64_t numel() const { return count(sizes()); }
    DType dtype() const { return storage_->dtype; }
    bool is_contiguous() const { return true; }
    const Memory& memory() const { return storage_->memory; }
    // As in PyTorch, null when there are no elements.
    void* data_ptr() const { return numel() == 0 ? nullptr : memory().bytes(); }

  private:
    static int64_t count(const std::vector<int64_t>& sizes) {
        int64_t n = 1;
        for (const int64_t size : sizes) n *= size;
        return n;
    }

    struct Storage {
        Storage(const std::vector<int64_t>& sizes, DType dtype, int64_t offset)
            : sizes(sizes),
              dtype(dtype),
              memory(static_cast<size_t>(count(sizes) * size_of(dtype)),
                     static_cast<size_t>(offset * size_of(dtype))) {
            register_buffer(memory);
        }
        ~Storage() { unregister_buffer(memory); }

        std::vector<int64_t> sizes;
        DType dtype;
        Memory memory;
    };

    std::shared_ptr<Storage> storage_;
};

}  // namespace narrowgauge::emulator
