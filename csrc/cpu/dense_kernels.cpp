// Compiled once per instruction set; FASTCAM_DENSE_KERNELS names the table that this compilation defines.
#include "dense_kernels.hpp"

#include "simd.hpp"

namespace fastcam {
namespace {

// Enough concurrent sums to hide the latency of a multiply-add. Named, not an array: GCC keeps arrays of vectors in
// memory.
#define FASTCAM_FOR_EACH_SUM(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
constexpr std::size_t columns_at_a_time = 8 * lanes;
static_assert(strip_columns % columns_at_a_time == 0, "a strip is cut evenly");

// How many rows ahead weights are fetched: rows are skipped, so the processor cannot predict the next one.
constexpr std::size_t rows_ahead = 8;
constexpr std::size_t line_floats = 16;

void accumulate(const float* strip, const std::uint32_t* rows, const float* values, std::size_t count, float* sums) {
    for (std::size_t column = 0; column < strip_columns; column += columns_at_a_time) {
#define FASTCAM_ZERO(n) Vector sum##n{};
        FASTCAM_FOR_EACH_SUM(FASTCAM_ZERO)
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t next = i + rows_ahead < count ? i + rows_ahead : count - 1;
            const float* const ahead = strip + rows[next] * strip_columns + column;
#pragma GCC unroll 8
            for (std::size_t line = 0; line < columns_at_a_time; line += line_floats) __builtin_prefetch(ahead + line);
            const float* const row = strip + rows[i] * strip_columns + column;
            const Vector value = broadcast(values[i]);
#define FASTCAM_ADD(n) sum##n = multiply_add(value, load(row + n * lanes), sum##n);
            FASTCAM_FOR_EACH_SUM(FASTCAM_ADD)
        }
#define FASTCAM_STORE(n) store(load(sums + column + n * lanes) + sum##n, sums + column + n * lanes);
        FASTCAM_FOR_EACH_SUM(FASTCAM_STORE)
    }
}

}  // namespace

extern const DenseKernels FASTCAM_DENSE_KERNELS;
const DenseKernels FASTCAM_DENSE_KERNELS = {accumulate};

}  // namespace fastcam
