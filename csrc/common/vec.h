// A small aligned array: what one vector load or store moves.
#pragma once

#include "common/config.h"

NG_NAMESPACE_BEGIN

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T values[N];
    NG_HOST_DEVICE T& operator[](int i) { return values[i]; }
    NG_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

NG_NAMESPACE_END
