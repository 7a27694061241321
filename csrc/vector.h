// Vectors of the width that the target has, in the compilers' own vector extension: +, -, *, / and comparisons work
// lane by lane and are rounded separately (-ffp-contract=off). What the extension lacks stands here per target.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && !defined(COLLAGE_LANES)
#define COLLAGE_LANES 16
#elif defined(__AVX2__) && !defined(COLLAGE_LANES)
#define COLLAGE_LANES 8
#elif !defined(COLLAGE_LANES)
#define COLLAGE_LANES 4
#endif

namespace {

constexpr int W = COLLAGE_LANES;
typedef float F __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int16_t S __attribute__((vector_size(2 * W)));
typedef uint8_t B __attribute__((vector_size(W)));

INLINE F splat(float x) { return x - F{}; }
INLINE U splat(uint32_t x) { return x - U{}; }
INLINE F as_float(U x) { return (F)x; }
INLINE U as_bits(F x) { return (U)x; }
// Lanes of `mask` are all ones or all zeros.
INLINE F select(I mask, F yes, F no) {
#if COLLAGE_LANES == 8 && defined(__AVX2__)
    return (F)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return as_float(((U)mask & as_bits(yes)) | (~(U)mask & as_bits(no)));
#endif
}
INLINE F where(I mask, F yes) { return as_float((U)mask & as_bits(yes)); }
INLINE F magnitude(F x) { return as_float(as_bits(x) & 0x7fffffffu); }

template <class V, class T> INLINE V load(const T *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T> INLINE void store(T *to, V v) { memcpy(to, &v, sizeof v); }

INLINE U widen(H x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (U)_mm512_cvtepu16_epi32((__m256i)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, U);
#endif
}

INLINE U widen(B x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (U)_mm512_cvtepu8_epi32((__m128i)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&x));
#else
    return __builtin_convertvector(x, U);
#endif
}

// The low halves of 32-bit lanes whose high halves are zero.
INLINE H narrow(U x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (H)_mm512_cvtepi32_epi16((__m512i)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    __m256i v = (__m256i)x;
    return (H)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
    return __builtin_convertvector(x, H);
#endif
}

// The low bytes of 32-bit lanes whose other bytes are zero.
INLINE B narrow_to_bytes(U x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (B)_mm512_cvtepi32_epi8((__m512i)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    __m128i half = (__m128i)narrow(x);
    half = _mm_packus_epi16(half, half);
    return load<B>(&half);
#else
    return __builtin_convertvector(x, B);
#endif
}

INLINE U max_bits(U a, U b) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (U)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    return (U)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    U m = (U)(a > b);
    return (m & a) | (~m & b);
#endif
}

// The largest lane, as unsigned numbers.
INLINE uint32_t largest_of(U x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_epu32((__m512i)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    __m256i v = (__m256i)x;
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)));
#else
    uint32_t found = 0;
    for (int i = 0; i < W; i++) found = x[i] > found ? x[i] : found;
    return found;
#endif
}

// Whether any lane is at least `bound`, as unsigned numbers.
INLINE bool any_from(U x, uint32_t bound) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return _mm512_cmpge_epu32_mask((__m512i)x, _mm512_set1_epi32((int)bound)) != 0;
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(x >= bound)) != 0;
#elif COLLAGE_LANES == 4 && defined(__SSE2__)
    return _mm_movemask_ps((__m128)(x >= bound)) != 0;
#else
    I mask = x >= bound;
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= mask[i];
    return found != 0;
#endif
}

// Correctly rounded, as IEEE 754 asks of the instruction.
INLINE F square_root(F x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif COLLAGE_LANES == 8 && defined(__AVX2__)
    return (F)_mm256_sqrt_ps((__m256)x);
#elif COLLAGE_LANES == 4 && defined(__SSE2__)
    return (F)_mm_sqrt_ps((__m128)x);
#else
    F root;
    for (int i = 0; i < W; i++) root[i] = __builtin_sqrtf(x[i]);
    return root;
#endif
}

}  // namespace
