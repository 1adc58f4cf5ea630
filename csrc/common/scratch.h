// Uninitialised working memory of a CPU kernel, freed at the end of the scope.
#pragma once

#include <cstdlib>

#include "common/config.h"

NG_NAMESPACE_BEGIN

template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(count > 0 ? count : 1)))) {
        if (data_ == nullptr) std::abort();  // as any allocation of this size would
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

NG_NAMESPACE_END
