#pragma once

#include <cstddef>

namespace fastcam {

struct Size {
    std::size_t height;
    std::size_t width;
    std::size_t area() const { return height * width; }
};

}  // namespace fastcam
