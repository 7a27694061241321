// The formats: loads, stores, and the roundings of numerics/rounding.py on float32 lanes; small integers; and the
// patterns of numerics/remainders.py.
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

// 16-bit patterns in the high halves of lanes, the low halves 0. A store ignores the low halves of a.
template <Order order> INLINE void load_high(const void *from, int64_t i, U &a, U &b) {
    const uint16_t *at = (const uint16_t *)from + i;
    if constexpr (order == interleaved) {
        U both = ::load<U>(at);
        a = both << 16;
        b = both & 0xffff0000u;
    } else {
        a = widen(::load<H>(at)) << 16;
        b = widen(::load<H>(at + W)) << 16;
    }
}
template <Order order> INLINE void store_high(void *to, int64_t i, U a, U b) {
    uint16_t *at = (uint16_t *)to + i;
    if constexpr (order == interleaved) {
        ::store(at, (a >> 16) | b);
    } else {
        ::store(at, narrow(a >> 16));
        ::store(at + W, narrow(b >> 16));
    }
}

// Unsigned integers of 16, 8 or 4 bits, two of the last in a byte.
template <int bits> struct Integers {
    static constexpr uint32_t mask = (1u << bits) - 1;

    INLINE uint32_t one(const void *from, int64_t i) {
        if constexpr (bits == 16) return ((const uint16_t *)from)[i];
        const uint8_t *bytes = (const uint8_t *)from;
        return bits == 8 ? bytes[i] : bytes[i / 2] >> i % 2 * 4 & 15;
    }

    // Of one vector's elements, in the low bits of lanes.
    template <Order order> INLINE void load(const void *from, int64_t i, U &a, U &b) {
        const uint8_t *at = (const uint8_t *)from + i * bits / 8;
        if constexpr (order == interleaved) {
            U both;
            if constexpr (bits == 16) both = ::load<U>(at);
            if constexpr (bits == 8) both = widen(::load<H>(at));
            if constexpr (bits == 4) both = widen(::load<B>(at));
            a = both & mask;
            b = both >> bits;
        } else if constexpr (bits == 16) {
            a = widen(::load<H>(at));
            b = widen(::load<H>(at + 2 * W));
        } else {
            B bytes[2];
            if constexpr (bits == 8) {
                memcpy(bytes, at, sizeof bytes);
            } else {
                H pairs = __builtin_convertvector(::load<B>(at), H);
                pairs = (pairs | pairs << 4) & 0x0f0f;
                memcpy(bytes, &pairs, sizeof bytes);
            }
            a = widen(bytes[0]);
            b = widen(bytes[1]);
        }
    }

    // Lanes without other bits.
    template <Order order> INLINE void store(void *to, int64_t i, U a, U b) {
        uint8_t *at = (uint8_t *)to + i * bits / 8;
        if constexpr (order == interleaved) {
            U both = a | b << bits;
            if constexpr (bits == 16) ::store(at, both);
            if constexpr (bits == 8) ::store(at, narrow(both));
            if constexpr (bits == 4) ::store(at, narrow_to_bytes(both));
        } else if constexpr (bits == 16) {
            ::store(at, narrow(a));
            ::store(at + 2 * W, narrow(b));
        } else {
            B bytes[2] = {narrow_to_bytes(a), narrow_to_bytes(b)};
            if constexpr (bits == 8) {
                memcpy(at, bytes, sizeof bytes);
            } else {
                H pairs;
                memcpy(&pairs, bytes, sizeof bytes);
                ::store(at, __builtin_convertvector((pairs | pairs >> 4) & 0xff, B));
            }
        }
    }
};

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
        U high_a, high_b;
        load_high<order>(from, i, high_a, high_b);
        a = as_float(high_a);
        b = as_float(high_b);
    }

    // The float32 of a remainder's pattern, and back: `pattern` of the magnitude x.
    INLINE F join(U pattern, U sign) { return as_float(pattern | sign); }
    template <int extra, bool careful> INLINE U pattern(U x, U bits) {
        if constexpr (careful) x = as_bits(select((I)x > 0x7f800000, as_float(splat(QUIET_NAN)), as_float(x)));
        return x + (bits >> extra);
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

    static constexpr uint32_t REBIAS = 112u << 23;

    INLINE F join(U pattern, U sign) {
        U normal = (pattern >> 3) + REBIAS;
        normal += (U)((I)pattern >= 0x7c000000) & REBIAS;
        F subnormal = __builtin_convertvector((I)pattern, F) * 0x1p-40f;
        return as_float(as_bits(select((I)pattern >= 0x04000000, as_float(normal), subnormal)) | sign);
    }
    template <int extra, bool careful> INLINE U pattern(U x, U bits) {
        // In the place that the pattern has in a float32; the next to the last line is its largest, infinity.
        I normal = (I)(x - REBIAS + (bits >> (3 + extra)));
        U large = as_bits(select(normal > 0x0f800000, as_float(splat(0x0f800000u)), (F)normal)) << 3;
        large = as_bits(select((I)x > 0x7f800000, as_float(splat(0x7e000000u)), as_float(large)));
        // Below the smallest normal number in units of the smallest step, of which the first 16 bits decide.
        F steps = as_float(x) * ((float)(1 << extra) * 0x1p24f);
        I whole = __builtin_convertvector(steps, I);
        I part = __builtin_convertvector((steps - __builtin_convertvector(whole, F)) * 65536.0f, I);
        U small = (U)(whole + ((part + (I)bits) >> 16)) << (16 - extra);
        return as_bits(select((I)x < 0x38800000, as_float(small), as_float(large)));
    }

    template <Order> INLINE void store(void *to, int64_t i, F a, F b) {
        ::store((Cell *)to + i, narrowed(a));
        ::store((Cell *)to + i + W, narrowed(b));
    }
    template <Order order, bool careful> INLINE void store_rounded(void *to, int64_t i, F a, F b) {
        store<order>(to, i, a, b);
    }
};

// float8_e4m3fn, of numbers up to its largest, 448: those of a tile are no larger. An infinity is stored as nan.
struct E4m3 {
    typedef uint8_t Cell;
    static constexpr Order order = interleaved;
    static constexpr bool guarded = false;
    static constexpr uint32_t REBIAS = 120u << 23, NUMBERS = 0x7f;
    static constexpr float largest = 448.0f, smallest = 0x1p-9f;

    // A byte in the high half of a 16-bit lane, whose low half is 0, and its number. With its exponent in the place of that
    // of float16, subnormals included, the number is 2^8 times smaller.
    INLINE F widened(H high) {
        H half = (H)((S)high >> 1) & 0xbf80;
        F x = Fp16::widened(half) * 0x1p8f;
        return select(magnitude(x) <= largest, x, as_float(splat(QUIET_NAN)));
    }
    INLINE H narrowed(F x) {
        // What follows the largest number is nan.
        x = select(magnitude(x) <= largest, x, splat(480.0f));
        H half = Fp16::narrowed(x * 0x1p-8f);
        return half + (half & 0x7fff);
    }

    INLINE double number(const void *from, int64_t i) {
        H one{};
        one[0] = (uint16_t)(((const Cell *)from)[i] << 8);
        return widened(one)[0];
    }
    template <Order order> INLINE void load(const void *from, int64_t i, F &a, F &b) {
        const Cell *at = (const Cell *)from + i;
        if constexpr (order == interleaved) {
            H both = ::load<H>(at);
            a = widened(both << 8);
            b = widened(both & 0xff00);
        } else {
            a = widened(__builtin_convertvector(::load<B>(at), H) << 8);
            b = widened(__builtin_convertvector(::load<B>(at + W), H) << 8);
        }
    }
    // Stores numbers of the format, nan and infinities.
    template <Order order> INLINE void store(void *to, int64_t i, F a, F b) {
        Cell *at = (Cell *)to + i;
        H high_a = narrowed(a), high_b = narrowed(b);
        if constexpr (order == interleaved) {
            ::store(at, high_a >> 8 | high_b);
        } else {
            ::store(at, __builtin_convertvector(high_a >> 8, B));
            ::store(at + W, __builtin_convertvector(high_b >> 8, B));
        }
    }
    template <Order order, bool careful> INLINE void store_rounded(void *to, int64_t i, F a, F b) {
        store<order>(to, i, round<careful>(a), round<careful>(b));
    }

    template <bool careful> INLINE F round(F x) {
        // 1.5 times the power of two whose last bit is that of the format's numbers around x.
        U exponent = max_bits(as_bits(x) & 0x7f800000u, splat(121u << 23));
        F shift = as_float(exponent + (20u << 23 | 0x400000u));
        return as_float(as_bits(x + shift - shift) | (as_bits(x) & 0x80000000u));
    }
    template <bool careful> INLINE F round_stochastic(F x, U bits) {
        U u = as_bits(x);
        F normal = as_float((u + (bits << 4)) & 0xfff00000u);
        // Below, the spacing is 2^-9 and the first 16 bits of the fraction decide.
        I parts = __builtin_convertvector(magnitude(x) * 0x1p25f, I);
        F steps = __builtin_convertvector((parts + (I)bits) >> 16, F);
        F subnormal = as_float(as_bits(steps * 0x1p-9f) | (u & 0x80000000u));
        F chosen = select((I)((u & 0x7fffffffu) < 0x3c800000u), subnormal, normal);
        return select(x == x, chosen, x);
    }

    // The number with 8 bits behind it. `hi` and `rest`: bytes in the low bits of lanes.
    INLINE F join(U hi, U rest) {
        I size = (I)((hi & NUMBERS) << 8) + (I)((rest ^ 0x80u) - 0x80u), below = size >> 31;
        U sign = (hi << 24 ^ (U)size) & 0x80000000u;
        size = (size ^ below) - below;
        F small = __builtin_convertvector(size, F) * 0x1p-17f;
        F found = select(size >= 0x800, as_float(((U)size << 12) + REBIAS), small);
        found = as_float(as_bits(found) | sign);
        return select((I)((hi & NUMBERS) == NUMBERS), as_float(splat(QUIET_NAN)), found);
    }
    // Rounded by a draw; what is beyond 448 is 448, what is not finite is nan.
    INLINE void split(F x, U bits, U &hi, U &rest) {
        U size = as_bits(magnitude(x));
        I normal = (I)(size - REBIAS + (bits >> 4)) >> 12;
        F large = select(normal > 0x7e00, as_float(splat(0x7e00u)), (F)normal);
        large = select((I)size >= 0x7f800000, as_float(splat(0x7f00u)), large);
        F steps = as_float(size) * 0x1p17f;
        I whole = __builtin_convertvector(steps, I);
        I part = __builtin_convertvector((steps - __builtin_convertvector(whole, F)) * 65536.0f, I);
        I small = whole + ((part + (I)bits) >> 16);
        U pattern = as_bits(select((I)size < 0x3c800000, (F)small, large));
        hi = (pattern + 0x80u) >> 8;
        rest = (pattern - (hi << 8)) & 0xffu;
        hi |= as_bits(x) >> 24 & 0x80u;
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
