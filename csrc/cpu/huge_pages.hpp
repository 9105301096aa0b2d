// A hint to the system, on Linux: back memory that is traversed in large strides with a few large pages. Under
// virtualisation this halves the time of a convolution.
#pragma once

#include <cstddef>

namespace fastcam {

constexpr std::size_t huge_page = std::size_t{1} << 21;

// For memory that has not been written to yet; does nothing for less than half a page. May include neighbouring memory
// up to the next page boundaries, which is harmless: contents don't change.
void prefer_huge_pages(void* memory, std::size_t bytes);

}  // namespace fastcam
