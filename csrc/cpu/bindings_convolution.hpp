#pragma once

#include <pybind11/pybind11.h>

namespace fastcam {

// Adds the convolutions and the op that runs them to the module.
void bind_convolutions(pybind11::module_& module);

}  // namespace fastcam
