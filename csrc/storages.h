// The storages: how a logical value is loaded from its components and stored back. src/collage/storage is the
// definition; operations and their order are those that it writes down.
//
// Each has
//   parts       how many components
//   draws       whether a store takes random bits
//   adds        whether a store wants the components as they were, and the update, in place of the new value
//   guarded     whether `store` has a plain form for usual values beside the careful one for any
//   order       in which its components are best loaded
//   load        the values of 2 W elements, and their components
//   store       stores new values
//   exact, moved   one element in float64, for audits
#pragma once

#include "formats.h"

namespace {

// What belongs to the two vectors of a unit: values or random bits.
struct Pair {
    F a, b;
};
struct Draws {
    U a, b;
};

// Collects whether all values are usual: finite, and of a magnitude at which no component, residual or sum that a
// storage makes of them overflows. Units with unusual ones take the careful path.
template <class Format> struct Usual {
    U largest{};

    __attribute__((always_inline)) void see(F x) { largest = max_bits(largest, as_bits(x) << 1); }
    __attribute__((always_inline)) bool all() const { return !any_from(largest, Format::too_large << 1); }
};

template <class Format, bool stochastic> struct Rounded {
    static constexpr int parts = 1;
    static constexpr bool draws = stochastic, adds = false;
    static constexpr bool guarded = !stochastic && Format::guarded;
    static constexpr Order order = Format::order;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Format::template load<order>(part[0], i, a, b);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, Pair, Pair, Pair, Draws bits) {
        if constexpr (stochastic)
            Format::template store<order>(part[0], i, Format::template round_stochastic<true>(a, bits.a),
                                          Format::template round_stochastic<true>(b, bits.b));
        else
            Format::template store_rounded<order, careful>(part[0], i, a, b);
    }
    INLINE double exact(const void *const *part, int64_t i) { return Format::number(part[0], i); }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
};

template <class Format, bool stochastic> struct Expansion {
    static constexpr int parts = 2;
    static constexpr bool draws = stochastic, adds = false;
    static constexpr bool guarded = true;
    static constexpr Order order = Format::order;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &hi, Pair &lo) {
        Format::template load<order>(part[0], i, hi.a, hi.b);
        Format::template load<order>(part[1], i, lo.a, lo.b);
        a = lo.a + hi.a;
        b = lo.b + hi.b;
    }
    template <bool careful> INLINE void split(F x, U bits, F &hi, F &lo) {
        hi = Format::template round<careful>(x);
        F rest = x - hi;
        if constexpr (careful) rest = finite_or_zero(rest);
        if constexpr (stochastic)
            lo = Format::template round_stochastic<careful>(rest, bits);
        else
            lo = Format::template round<careful>(rest);
        // Splitting the rounded sum again settles the ties of hi that rounding lo made.
        F total = lo + hi;
        hi = Format::template round<careful>(total);
        lo = total - hi;
        if constexpr (careful) lo = finite_or_zero(lo);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, Pair, Pair, Pair, Draws bits) {
        F hi_a, lo_a, hi_b, lo_b;
        split<careful>(a, bits.a, hi_a, lo_a);
        split<careful>(b, bits.b, hi_b, lo_b);
        Format::template store<order>(part[0], i, hi_a, hi_b);
        Format::template store<order>(part[1], i, lo_a, lo_b);
    }
    INLINE double exact(const void *const *part, int64_t i) {
        return Format::number(part[1], i) + Format::number(part[0], i);
    }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        double low = Format::number(now[1], i) - Format::number(then[1], i);
        return low + (Format::number(now[0], i) - Format::number(then[0], i));
    }
};

template <class Format> struct Kahan {
    typedef Expansion<Format, false> Sum;
    static constexpr int parts = 2;
    static constexpr bool draws = false, adds = true;
    static constexpr bool guarded = false;
    static constexpr Order order = Format::order;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &hi, Pair &lo) {
        Sum::template load<order>(part, i, a, b, hi, lo);
    }
    INLINE void add(F &hi, F &lo, F update) {
        F c = Format::template round<true>(update + lo);
        F sum = Format::template round<true>(c + hi);
        lo = c - Format::template round<true>(sum - hi);
        hi = sum;
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F, F, Pair hi, Pair lo, Pair update, Draws) {
        add(hi.a, lo.a, update.a);
        add(hi.b, lo.b, update.b);
        Format::template store<order>(part[0], i, hi.a, hi.b);
        Format::template store_rounded<order, true>(part[1], i, lo.a, lo.b);
    }
    INLINE double exact(const void *const *part, int64_t i) { return Sum::exact(part, i); }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return Sum::moved(now, then, i);
    }
};

template <class Format> struct Master {
    static constexpr int parts = 2;
    static constexpr bool draws = false, adds = false;
    static constexpr bool guarded = Format::guarded;
    static constexpr Order order = sequential;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Fp32::load<order>(part[1], i, a, b);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, Pair, Pair, Pair, Draws) {
        Fp32::store<order>(part[1], i, a, b);
        Format::template store_rounded<order, careful>(part[0], i, a, b);
    }
    INLINE double exact(const void *const *part, int64_t i) { return Fp32::number(part[1], i); }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
};

}  // namespace
