// What the bindings of quantizing operators check of their arguments.
#pragma once

#include "common/binding.h"

namespace narrowgauge {

inline DType code_type_of(const std::string& format) {
    if (format == "int8") return DType::int8;
    if (format == "e4m3") return DType::e4m3;
    if (format == "e5m2") return DType::e5m2;
    NG_CHECK(false, "format must be int8, e4m3 or e5m2, got ", format);
    return DType::int8;
}

}  // namespace narrowgauge
