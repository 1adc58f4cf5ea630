// Everything a binding may use, the same for the three ways in which it is compiled (docs/architecture.md).
//
// A binding guards its arguments, allocates its outputs, fills the plain-data arguments of a kernel and runs
// it. All checks come first: an error raised inside a parallel region would lose its message.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"

#if NARROWGAUGE_EMULATOR

#include <sstream>

#include "common/device.h"
#include "emulator/library.h"

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if NARROWGAUGE_CPU
#include "common/cpu.h"
#else
#include <cuda_runtime_api.h>
#endif
#endif

namespace narrowgauge {

// --- one tensor interface ------------------------------------------------------------------------

#if NARROWGAUGE_EMULATOR

using emulator::Tensor;

inline DType dtype(const Tensor& tensor) { return tensor.dtype(); }
inline Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor&) {
    return Tensor::empty(sizes, dtype);
}
inline bool same_device(const Tensor&, const Tensor&) { return true; }
inline void* data(const Tensor& tensor) { return tensor.data_ptr(); }

using OptionalDType = std::optional<std::string>;  // an operator's `ScalarType?`

inline DType dtype_or(const OptionalDType& given, DType otherwise) {
    if (!given) return otherwise;
    for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
        if (*given == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
    }
    throw std::runtime_error("unknown dtype " + *given);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}
#define NG_CHECK(condition, ...) \
    if (!(condition)) ::narrowgauge::fail(__VA_ARGS__)
#define NG_BOX(function) function
#define NG_OPERATORS(m)                                                                                \
    static void narrowgauge_register(::narrowgauge::emulator::Library&);                               \
    static const ::narrowgauge::emulator::Registration narrowgauge_registration(narrowgauge_register); \
    static void narrowgauge_register(::narrowgauge::emulator::Library& m)

#else

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

#define NG_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)
#define NG_BOX(function) TORCH_BOX(function)
#if NARROWGAUGE_CPU
#define NG_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(narrowgauge, CPU, m)
#else
#define NG_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(narrowgauge, CUDA, m)
#endif

constexpr ScalarType scalar_types[] = {ScalarType::Float,       ScalarType::Double, ScalarType::BFloat16,
                                       ScalarType::Half,        ScalarType::Char,   ScalarType::Byte,
                                       ScalarType::Long,        ScalarType::Int,    ScalarType::Float8_e4m3fn,
                                       ScalarType::Float8_e5m2, ScalarType::Short,  ScalarType::Bool};

inline DType dtype(ScalarType scalar_type) {
    for (int i = 0; i < static_cast<int>(sizeof(scalar_types) / sizeof(scalar_types[0])); ++i) {
        if (scalar_types[i] == scalar_type) return static_cast<DType>(i);
    }
    NG_CHECK(false, "narrowgauge: unsupported dtype");
    return DType::float32;
}
inline DType dtype(const Tensor& tensor) { return dtype(tensor.scalar_type()); }

using OptionalDType = std::optional<ScalarType>;  // an operator's `ScalarType?`

inline DType dtype_or(const OptionalDType& given, DType otherwise) {
    return given ? dtype(*given) : otherwise;
}

// A fresh contiguous tensor on the device of `like`. Straight through the C shim: the boxed dispatcher that
// torch::stable::empty_like goes through costs as much as a small kernel.
inline Tensor empty(const std::vector<int64_t>& sizes, DType dtype, const Tensor& like) {
    constexpr size_t max_dimensions = 64;  // PyTorch's own limit
    NG_CHECK(sizes.size() <= max_dimensions, "narrowgauge: more than 64 dimensions");
    int64_t strides[max_dimensions], stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    int32_t device_type, shim_dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    shim_dtype = torch::stable::detail::to<int32_t>(
        torch::stable::detail::from(scalar_types[static_cast<int>(dtype)]));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                    shim_dtype, device_type, like.get_device_index(),
                                                    &handle));
    return Tensor(handle);
}

inline bool same_device([[maybe_unused]] const Tensor& a, [[maybe_unused]] const Tensor& b) {
#if NARROWGAUGE_CPU
    return true;  // one argument elsewhere, and the dispatcher would not have come here
#else
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
#endif
}

inline void* data(const Tensor& tensor) { return tensor.data_ptr(); }

#endif

inline void* data(const std::optional<Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// --- guards --------------------------------------------------------------------------------------

// What every kernel needs of a tensor: rows contiguous, on the device of the operator's first argument.
inline void check_layout(const Tensor& tensor, const Tensor& first, const char* name) {
    NG_CHECK(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() first");
    NG_CHECK(same_device(tensor, first), name, " must be on the device of the first argument");
}

inline bool is_floating(DType dtype) {
    return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16 ||
           dtype == DType::float64;
}

// --- running a kernel ----------------------------------------------------------------------------

#if NARROWGAUGE_CPU

using torch::stable::parallel_for;

// Splits [0, total) into pieces of about `work_per_item * items` = 32768 elements' work, run by torch's
// threads.
template <class F>
void parallel_ranges(int64_t total, int64_t work_per_item, const F& function) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_item));
    if (total <= grain) {
        if (total > 0) function(int64_t{0}, total);
    } else {
        parallel_for(0, total, grain, function);
    }
}

#elif NARROWGAUGE_CUDA

// Makes the tensor's device current for the lifetime of the object and gives its current stream.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    cudaStream_t stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_ = nullptr;
};

#else

class OnDevice {
  public:
    explicit OnDevice(const Tensor&) {}
    Stream stream() const { return {}; }
};

#endif

}  // namespace narrowgauge
