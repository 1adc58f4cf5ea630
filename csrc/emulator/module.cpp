// The Python module narrowgauge_emulator: tensors from NumPy arrays, control of the schedule, and every
// operator.
#include <pybind11/numpy.h>

#include <cstdlib>

#include "emulator/library.h"
#include "emulator/scheduler.h"

namespace py = pybind11;

namespace narrowgauge::emulator {

void register_self_test(Library& library);

namespace {

constexpr int kDTypes = static_cast<int>(DType::boolean) + 1;

// NumPy has no bfloat16 and no float8; those travel as integers of their size.
py::dtype carrier(DType dtype) {
    constexpr const char* names[] = {"float32", "float64", "uint16", "uint16", "int8",  "uint8",
                                     "int64",   "int32",   "uint8",  "uint8",  "int16", "bool"};
    return py::dtype(names[static_cast<int>(dtype)]);
}

DType parse_dtype(const std::string& name) {
    for (int i = 0; i < kDTypes; ++i) {
        if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
    }
    throw py::value_error("no dtype is named '" + name + "'");
}

Tensor from_numpy(const py::array& array, const std::string& dtype_name, int64_t offset) {
    const DType dtype = parse_dtype(dtype_name);
    if (array.itemsize() != size_of(dtype)) {
        throw py::value_error("an array of " + std::to_string(array.itemsize()) + "-byte elements is not " +
                              dtype_name);
    }
    if (!(array.flags() & py::array::c_style)) throw py::value_error("the array must be C-contiguous");
    const Tensor tensor = Tensor::empty({array.shape(), array.shape() + array.ndim()}, dtype, offset);
    const Memory& memory = tensor.memory();
    if (memory.size() > 0) {
        memcpy(memory.bytes(), array.data(), memory.size());
        memset(memory.states(), static_cast<int>(ByteState::written), memory.size());
    }
    return tensor;
}

py::array to_numpy(const Tensor& tensor) {
    const Memory& memory = tensor.memory();
    const int64_t element_bytes = size_of(tensor.dtype());
    int64_t unwritten = 0, first = -1;
    for (int64_t i = 0; i < tensor.numel(); ++i) {
        const ByteState* states = memory.states() + i * element_bytes;
        bool written = true;
        for (int64_t byte = 0; byte < element_bytes; ++byte) written &= states[byte] == ByteState::written;
        if (!written && unwritten++ == 0) first = i;
    }
    if (unwritten > 0) {
        throw EmulatorError(std::to_string(unwritten) + " of " + std::to_string(tensor.numel()) +
                            " elements were never written, the first is element " + std::to_string(first));
    }
    py::array array(carrier(tensor.dtype()), tensor.sizes());
    if (memory.size() > 0) memcpy(array.mutable_data(), memory.bytes(), memory.size());
    return array;
}

}  // namespace

PYBIND11_MODULE(narrowgauge_emulator, m) {
    m.doc() = "narrowgauge's CUDA kernels on the CPU, for tests";
    py::register_exception<EmulatorError>(m, "EmulatorError", PyExc_RuntimeError);

    py::class_<Tensor>(m, "Tensor")
        .def(py::init(&from_numpy), py::arg("array"), py::arg("dtype"), py::arg("offset") = 0)
        .def_static("empty",
                    [](const std::vector<int64_t>& shape, const std::string& dtype) {
                        return Tensor::empty(shape, parse_dtype(dtype));
                    })
        .def("numpy", &to_numpy)
        .def_property_readonly("shape", [](const Tensor& t) { return py::tuple(py::cast(t.sizes())); })
        .def_property_readonly("dtype", [](const Tensor& t) { return name_of(t.dtype()); });

    m.def("set_schedule", &set_schedule, py::arg("seed"));
    m.def("barrier_sites", &barrier_sites);
    m.def(
        "disable_barrier", [](const std::optional<std::string>& site) { disable_barrier(site.value_or("")); },
        py::arg("site"));
    if (const char* site = std::getenv("NARROWGAUGE_EMULATOR_DISABLE")) disable_barrier(site);

    Library operators(m.def_submodule("ops"));
    for (const auto& register_operators : Registration::all()) register_operators(operators);
    Library faults(m.def_submodule("self_test"));
    register_self_test(faults);
}

}  // namespace narrowgauge::emulator
