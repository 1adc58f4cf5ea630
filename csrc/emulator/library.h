// How a binding's operators reach Python in the emulator: NG_OPERATORS (common/binding.h) makes a
// Registration, and the module runs them all when it is imported.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "emulator/tensor.h"

namespace narrowgauge::emulator {

class Library {
  public:
    explicit Library(pybind11::module_ ops) : ops_(std::move(ops)) {}
    template <class F>
    void impl(const char* name, F* function) {
        ops_.def(name, function);
    }

  private:
    pybind11::module_ ops_;
};

class Registration {
  public:
    using Register = void (*)(Library&);
    explicit Registration(Register function) { all().push_back(function); }
    static std::vector<Register>& all() {
        static std::vector<Register> functions;
        return functions;
    }
};

}  // namespace narrowgauge::emulator
