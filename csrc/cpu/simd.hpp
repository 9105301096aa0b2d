// One vector of floats, as wide as the instruction set that the including file is compiled for.
// Everything has internal linkage, and nothing from the C++ library that emits code is used: of a function shared
// between files compiled for different instruction sets, the linker would keep one version for all.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr std::size_t lanes = 16;
#elif defined(__AVX2__)
constexpr std::size_t lanes = 8;
#else
constexpr std::size_t lanes = 4;
#endif

typedef float Vector __attribute__((vector_size(lanes * sizeof(float))));
typedef std::int32_t Ints __attribute__((vector_size(lanes * sizeof(std::int32_t))));

struct Half {
    std::uint16_t bits;
};

// Minus zero, unlike plus zero, changes no value: the compiler leaves it out.
inline Vector broadcast(float value) { return value - Vector{}; }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return reinterpret_cast<Vector>(
        vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
    return a * b + c;
#endif
}

inline float to_float(float value) { return value; }

inline float to_float(Half half) {
    // A multiplication shifts the exponent; it also renormalises subnormal halves.
    std::uint32_t bits = static_cast<std::uint32_t>(half.bits & 0x7fff) << 13;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    if (value >= 0x1p16f) {  // infinity or NaN
        __builtin_memcpy(&bits, &value, sizeof bits);
        bits |= 0x7f800000u;
        __builtin_memcpy(&value, &bits, sizeof value);
    }
    return (half.bits & 0x8000) ? -value : value;
}

inline Vector load(const float* source) {
    Vector vector;
    __builtin_memcpy(&vector, source, sizeof vector);
    return vector;
}

inline Vector load(const Half* source) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Vector vector;
    for (std::size_t lane = 0; lane < lanes; ++lane) vector[lane] = to_float(source[lane]);
    return vector;
#endif
}

inline void store(Vector vector, float* target) { __builtin_memcpy(target, &vector, sizeof vector); }

// The first `count` < lanes elements, then zeros.
#if defined(__AVX512F__)
inline Vector load_few(const float* source, std::size_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), source);
}

inline Vector load_few(const Half* source, std::size_t count) {
    const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), source);
    return _mm512_cvtph_ps(halves);
}
#else
template <class T>
inline Vector load_few(const T* source, std::size_t count) {
    Vector vector{};
    for (std::size_t lane = 0; lane < count; ++lane) vector[lane] = to_float(source[lane]);
    return vector;
}
#endif

// Only the first `count` < lanes elements.
inline void store_few(Vector vector, float* target, std::size_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), vector);
#else
    for (std::size_t lane = 0; lane < count; ++lane) target[lane] = vector[lane];
#endif
}

// A pointer past an array must not be formed, but any address may be prefetched: hence the integer.
inline const void* address_ahead(const float* from, std::size_t floats) {
    return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + floats * sizeof(float));
}

// Into the L1 cache, or the L2 cache.
inline void prefetch_near(const float* from, std::size_t floats) { __builtin_prefetch(address_ahead(from, floats), 0, 3); }
inline void prefetch_far(const float* from, std::size_t floats) { __builtin_prefetch(address_ahead(from, floats), 0, 2); }

// The elements of a row left over by its whole vectors, zeros in the other lanes. Reads only inside the row.
template <class T>
inline Vector load_rest(const T* row, std::size_t columns) {
    const std::size_t rest = columns % lanes;
    if (columns < lanes) return load_few(row, rest);
    Ints lane{};
    for (std::size_t i = 0; i < lanes; ++i) lane[i] = static_cast<std::int32_t>(i);
    const Ints wanted = lane >= static_cast<std::int32_t>(lanes - rest);
    const Vector last = load(row + columns - lanes);
    return reinterpret_cast<Vector>(reinterpret_cast<Ints>(last) & wanted);
}

inline float sum(Vector vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(vector);
#else
    float parts[lanes];
    store(vector, parts);
    for (std::size_t half = lanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
#endif
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }

template <class T>
inline T least(T a, T b) {
    return b < a ? b : a;
}

// The three components of a pixel and one to spare.
typedef std::int32_t Pixel __attribute__((vector_size(4 * sizeof(std::int32_t))));
typedef double ExactPixel __attribute__((vector_size(4 * sizeof(double))));

// Reads one byte past the pixel.
inline Pixel load_pixel(const std::uint8_t* source) {
#if defined(__AVX2__)
    std::int32_t bytes;
    __builtin_memcpy(&bytes, source, sizeof bytes);
    return reinterpret_cast<Pixel>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
#else
    return Pixel{source[0], source[1], source[2], 0};
#endif
}

// Components 0..255. Writes one byte past the pixel.
inline void store_pixel(Pixel pixel, std::uint8_t* target) {
#if defined(__AVX2__)
    const __m128i lowest_bytes = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const std::int32_t bytes = _mm_cvtsi128_si32(_mm_shuffle_epi8(reinterpret_cast<__m128i>(pixel), lowest_bytes));
    __builtin_memcpy(target, &bytes, sizeof bytes);
#else
    for (std::size_t c = 0; c < 3; ++c) target[c] = static_cast<std::uint8_t>(pixel[c]);
#endif
}

// As many bytes as there are lanes.
inline Ints load_bytes(const std::uint8_t* source) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
    Ints bytes;
    for (std::size_t lane = 0; lane < lanes; ++lane) bytes[lane] = source[lane];
    return bytes;
#endif
}

// Values 0..255.
inline void store_bytes(Ints values, std::uint8_t* target) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values)));
#elif defined(__AVX2__)
    const __m256i all = reinterpret_cast<__m256i>(values);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(words, words));
#else
    for (std::size_t lane = 0; lane < lanes; ++lane) target[lane] = static_cast<std::uint8_t>(values[lane]);
#endif
}

}  // namespace
