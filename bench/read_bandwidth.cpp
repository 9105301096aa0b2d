// The ceiling that bench/kernel.py compares with: reads every byte once with plain vector loads and only combines
// them by exclusive or, so that no load can be optimised away and no arithmetic slows it down.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef std::uint64_t Line __attribute__((vector_size(64)));

std::uint64_t fold(const unsigned char* data, std::size_t bytes, std::size_t prefetch_ahead) {
    constexpr std::size_t step = 4;
    Line folded[step] = {};
    for (std::size_t at = 0; at + step * sizeof(Line) <= bytes; at += step * sizeof(Line)) {
        for (std::size_t i = 0; i < step; ++i) {
            const unsigned char* source = data + at + i * sizeof(Line);
            if (prefetch_ahead) {
                __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(source) + prefetch_ahead));
            }
            Line line;
            std::memcpy(&line, source, sizeof line);
            folded[i] ^= line;
        }
    }
    const Line all = (folded[0] ^ folded[1]) ^ (folded[2] ^ folded[3]);
    std::uint64_t result = 0;
    for (std::size_t i = 0; i < 8; ++i) result ^= all[i];
    return result;
}

}  // namespace

// bytes: a multiple of 256 * threads.
extern "C" std::uint64_t fold_memory(const unsigned char* data, std::size_t bytes, std::size_t threads,
                                     std::size_t prefetch_ahead) {
    std::vector<std::uint64_t> results(threads);
    const std::size_t part = bytes / threads;
    std::vector<std::thread> helpers;
    for (std::size_t t = 1; t < threads; ++t) {
        helpers.emplace_back([&, t] { results[t] = fold(data + t * part, part, prefetch_ahead); });
    }
    results[0] = fold(data, part, prefetch_ahead);
    for (std::thread& helper : helpers) helper.join();
    std::uint64_t result = 0;
    for (const std::uint64_t partial : results) result ^= partial;
    return result;
}
