// From a floating-point type known at run time to one known at compile time.
#pragma once

#include "common/dtype.h"

NG_NAMESPACE_BEGIN

// Calls function(T{}) for the T that `type` names.
template <class F>
void with_floating(DType type, F&& function) {
    if (type == DType::float64) return function(double{});
    if (type == DType::bfloat16) return function(bf16{});
    if (type == DType::float16) return function(f16{});
    function(float{});
}

NG_NAMESPACE_END
