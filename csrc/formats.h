// The three formats: loads, stores, and the roundings of numerics/rounding.py on float32 lanes.
//
// A step works on 2 W elements at a time, in two vectors a and b. In `sequential` order a holds the first W of them; in
// `interleaved` order a holds those of even place, which for 16-bit numbers costs a shift instead of a widening and a
// narrowing each.
//
// A function with a template argument `careful` has two forms. The plain one expects usual values (storages.h): finite
// and far from overflow. The careful one expects anything.
#pragma once

#include "vector.h"

namespace {

enum Order { sequential, interleaved };

constexpr uint32_t QUIET_NAN = 0x7fc00000u;

// Bits of the magnitude from which on a value is unusual.
constexpr uint32_t TWO_TO_127 = 0x7f000000u, TWO_TO_15 = 0x47000000u;

INLINE F finite_or_zero(F x) { return where(magnitude(x) < __builtin_inff(), x); }

struct Bf16 {
    typedef uint16_t Cell;
    static constexpr Order order = interleaved;
    static constexpr bool guarded = true;
    static constexpr uint32_t too_large = TWO_TO_127;

    INLINE double number(const void *from, int64_t i) {
        uint32_t bits = (uint32_t)((const Cell *)from)[i] << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }

    template <Order order> INLINE void load(const void *from, int64_t i, F &a, F &b) {
        const Cell *at = (const Cell *)from + i;
        if constexpr (order == interleaved) {
            U both = ::load<U>(at);
            a = as_float(both << 16);
            b = as_float(both & 0xffff0000u);
        } else {
            a = as_float(widen(::load<H>(at)) << 16);
            b = as_float(widen(::load<H>(at + W)) << 16);
        }
    }

    // Numbers of the format in the high halves of lanes; the low halves of b are 0.
    template <Order order> INLINE void store_high(void *to, int64_t i, U a, U b) {
        Cell *at = (Cell *)to + i;
        if constexpr (order == interleaved) {
            ::store(at, (a >> 16) | b);
        } else {
            ::store(at, narrow(a >> 16));
            ::store(at + W, narrow(b >> 16));
        }
    }

    // To nearest, in the high half.
    template <bool careful> INLINE U nearest(F x) {
        U u = as_bits(x), near = u + 0x7fffu + ((u >> 16) & 1u);
        return careful ? as_bits(select(x == x, as_float(near), as_float(splat(QUIET_NAN)))) : near;
    }

    template <bool careful> INLINE F round(F x) { return as_float(nearest<careful>(x) & 0xffff0000u); }

    // To one of the two neighbours; `bits` in [0, 2^16).
    template <bool careful> INLINE F round_stochastic(F x, U bits) {
        F chosen = as_float((as_bits(x) + bits) & 0xffff0000u);
        return careful ? select(x == x, chosen, as_float(splat(QUIET_NAN))) : chosen;
    }

    // Stores numbers of the format.
    template <Order order> INLINE void store(void *to, int64_t i, F a, F b) {
        store_high<order>(to, i, as_bits(a), as_bits(b));
    }

    template <Order order, bool careful> INLINE void store_rounded(void *to, int64_t i, F a, F b) {
        store_high<order>(to, i, nearest<careful>(a), nearest<careful>(b) & 0xffff0000u);
    }
};

struct Fp16 {
    typedef uint16_t Cell;
    static constexpr Order order = sequential;
    // Its roundings take anything; only an expansion's residuals ask for finite values.
    static constexpr bool guarded = false;
    static constexpr uint32_t too_large = TWO_TO_15;

    INLINE double number(const void *from, int64_t i) {
        H one{};
        one[0] = ((const Cell *)from)[i];
        return widened(one)[0];
    }

    INLINE F widened(H bits) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
        return (F)_mm512_cvtph_ps((__m256i)bits);
#elif COLLAGE_LANES == 8 && defined(__F16C__)
        return (F)_mm256_cvtph_ps((__m128i)bits);
#else
        U h = widen(bits), size = h & 0x7fffu;
        U normal = (size << 13) + (112u << 23);
        // The exponent of infinities and nans is the largest there, and must be so here.
        normal += (U)(size > 0x7bffu) & (112u << 23);
        F subnormal = __builtin_convertvector((I)size, F) * 0x1p-24f;
        F found = select((I)(size > 0x3ffu), as_float(normal), subnormal);
        return as_float(as_bits(found) | (h & 0x8000u) << 16);
#endif
    }
    template <Order> INLINE void load(const void *from, int64_t i, F &a, F &b) {
        a = widened(::load<H>((const Cell *)from + i));
        b = widened(::load<H>((const Cell *)from + i + W));
    }

    INLINE H narrowed(F x) {
#if COLLAGE_LANES == 16 && defined(__AVX512F__)
        return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif COLLAGE_LANES == 8 && defined(__F16C__)
        return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
        U u = as_bits(x), size = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
        U normal = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
        // Half a unit of 2^-24 is the last bit of a float32 in [1/2, 1): its addition rounds as is wanted.
        U subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
        U large = (U)(size >= 0x477ff000u), nan = (U)(size > 0x7f800000u), small = (U)(size < 0x38800000u);
        U found = (small & subnormal) | (~small & normal);
        found = (large & 0x7c00u) | (~large & found);
        return narrow(found | (nan & 0x7e00u) | sign);
#endif
    }

    template <bool careful> INLINE F round(F x) { return widened(narrowed(x)); }

    template <bool careful> INLINE F round_stochastic(F x, U bits) {
        U u = as_bits(x);
        // Normal numbers discard 13 bits: r / 8 of them.
        F normal = as_float((u + (bits >> 3)) & ~0x1fffu);
        // Below, the spacing is 2^-24 and the first 16 bits of the fraction decide.
        F scaled = magnitude(x) * 0x1p24f;
        F whole = __builtin_convertvector(__builtin_convertvector(scaled, I), F);
        I part = __builtin_convertvector((scaled - whole) * 65536.0f, I);
        whole += where((part + (I)bits) >= 65536, splat(1.0f));
        F subnormal = as_float(as_bits(whole * 0x1p-24f) | (u & 0x80000000u));
        // The comparison is false for nan, which then passes as it is.
        F chosen = select((I)((u & 0x7fffffffu) < 0x38800000u), subnormal, normal);
        return select(x == x, chosen, x);
    }

    template <Order> INLINE void store(void *to, int64_t i, F a, F b) {
        ::store((Cell *)to + i, narrowed(a));
        ::store((Cell *)to + i + W, narrowed(b));
    }
    template <Order order, bool careful> INLINE void store_rounded(void *to, int64_t i, F a, F b) {
        store<order>(to, i, a, b);
    }
};

struct Fp32 {
    typedef float Cell;
    static constexpr Order order = sequential;
    static constexpr bool guarded = false;
    static constexpr uint32_t too_large = TWO_TO_127;

    INLINE double number(const void *from, int64_t i) { return ((const Cell *)from)[i]; }

    template <Order> INLINE void load(const void *from, int64_t i, F &a, F &b) {
        a = ::load<F>((const Cell *)from + i);
        b = ::load<F>((const Cell *)from + i + W);
    }
    template <Order> INLINE void store(void *to, int64_t i, F a, F b) {
        ::store((Cell *)to + i, a);
        ::store((Cell *)to + i + W, b);
    }
    template <Order order, bool careful> INLINE void store_rounded(void *to, int64_t i, F a, F b) {
        store<order>(to, i, a, b);
    }
};

}  // namespace
