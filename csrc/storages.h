// The storages: how a logical value is loaded from its components and stored back. src/collage/storage is the
// definition; operations and their order are those that it writes down.
//
// Each has
//   parts       how many components
//   draws       whether a store takes random bits
//   adds        whether a store wants the components as they were, and the update, in place of the new value
//   blocked     whether elements share a scale, block by block: then `settle` makes it from the largest `size` of the new
//               values, before the first of them is stored, and says whether all are usual
//   tiled       the same of a parameter's elements, tile by tile: of several rows
//   guarded     whether `store` has a plain form for usual values beside the careful one for any; of a storage that is
//               blocked `has_plain` says so
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
// What a block of 8-bit codes has in common; of a tile `factor` alone, the inverse of the scale.
struct Shared {
    F scale, factor;
};
// What a store may want beside the new values.
struct Beside {
    Pair hi, lo, update;  // of a storage that adds
    Pair root;            // the new values' square roots, for a blocked exp_avg_sq where they are not below 0
    Shared shared;
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
    static constexpr bool draws = stochastic, adds = false, blocked = false, tiled = false;
    static constexpr bool guarded = !stochastic && Format::guarded;
    static constexpr Order order = Format::order;
    static constexpr float smallest() { return Format::smallest; }

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Format::template load<order>(part[0], i, a, b);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &, Draws bits) {
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

// Of n numbers, each kept times `factor`, a power of two, against the one before it.
template <class Format, bool stochastic, int factor = 1, int n = 2> struct Expansion {
    static constexpr int parts = n;
    static constexpr bool draws = stochastic, adds = false, blocked = false, tiled = false;
    static constexpr bool guarded = true;
    static constexpr Order order = Format::order;
    // The smallest positive value.
    static constexpr float smallest() {
        float found = Format::smallest;
        for (int k = 1; k < n; k++) found /= factor;
        return found;
    }

    // hi and lo: the first and the last number.
    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &hi, Pair &lo) {
        Format::template load<order>(part[n - 1], i, lo.a, lo.b);
        a = lo.a, b = lo.b;
        for (int k = n - 2; k >= 0; k--) {
            Format::template load<order>(part[k], i, hi.a, hi.b);
            a = unscaled(a) + hi.a;
            b = unscaled(b) + hi.b;
        }
    }
    INLINE F scaled(F x) { return factor == 1 ? x : x * (float)factor; }
    INLINE F unscaled(F x) { return factor == 1 ? x : x * (1.0f / factor); }
    enum Last { as_it_is, to_nearest, by_draw };
    // Rounds x, and what each number leaves of it, from the k-th number on.
    template <bool careful, Last last, int k = 0> INLINE void cut(F x, U bits, F *to) {
        if constexpr (k < n - 1) {
            to[k] = Format::template round<careful>(x);
            F rest = x - to[k];
            if constexpr (careful) rest = finite_or_zero(rest);
            cut<careful, last, k + 1>(scaled(rest), bits, to);
        } else if constexpr (last == by_draw) {
            to[k] = Format::template round_stochastic<careful>(x, bits);
        } else {
            to[k] = last == to_nearest ? Format::template round<careful>(x) : x;
        }
    }
    template <bool careful> INLINE void split(F x, U bits, F *to) {
        cut<careful, stochastic ? by_draw : to_nearest>(x, bits, to);
        // Splitting the rounded sum again settles the ties of hi that rounding lo made.
        F total = to[n - 1];
        for (int k = n - 2; k >= 0; k--) total = unscaled(total) + to[k];
        cut<careful, as_it_is>(total, bits, to);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &, Draws bits) {
        F to_a[n], to_b[n];
        split<careful>(a, bits.a, to_a);
        split<careful>(b, bits.b, to_b);
        for (int k = 0; k < n; k++) Format::template store<order>(part[k], i, to_a[k], to_b[k]);
    }
    INLINE double exact(const void *const *part, int64_t i) {
        double total = Format::number(part[n - 1], i);
        for (int k = n - 2; k >= 0; k--) total = total / factor + Format::number(part[k], i);
        return total;
    }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        double total = Format::number(now[n - 1], i) - Format::number(then[n - 1], i);
        for (int k = n - 2; k >= 0; k--)
            total = total / factor + (Format::number(now[k], i) - Format::number(then[k], i));
        return total;
    }
};

template <class Format> struct Kahan {
    typedef Expansion<Format, false> Sum;
    static constexpr int parts = 2;
    static constexpr bool draws = false, adds = true, blocked = false, tiled = false;
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
    INLINE void store(void *const *part, int64_t i, F, F, const Beside &beside, Draws) {
        Pair hi = beside.hi, lo = beside.lo;
        add(hi.a, lo.a, beside.update.a);
        add(hi.b, lo.b, beside.update.b);
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
    static constexpr bool draws = false, adds = false, blocked = false, tiled = false;
    static constexpr bool guarded = Format::guarded;
    static constexpr Order order = sequential;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Fp32::load<order>(part[1], i, a, b);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &, Draws) {
        Fp32::store<order>(part[1], i, a, b);
        Format::template store_rounded<order, careful>(part[0], i, a, b);
    }
    INLINE double exact(const void *const *part, int64_t i) { return Fp32::number(part[1], i); }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
};

// The pattern of a number with `extra` more bits than the format has; the format's own part of it, rounded to nearest,
// and the bits behind it, which count from that part and so are an integer of both signs.
template <class Format, int extra, bool stochastic> struct Remainder {
    typedef Integers<extra> Rest;
    static constexpr int parts = 2;
    static constexpr bool draws = stochastic, adds = false, blocked = false, tiled = false;
    static constexpr bool guarded = Format::guarded;
    static constexpr Order order = Format::order;

    // hi in the high half.
    INLINE F join(U hi, U rest) {
        I pattern = (I)((hi & 0x7fff0000u) + ((rest << (16 - extra) ^ 0x8000u) - 0x8000u)), below = pattern >> 31;
        return Format::join((U)((pattern ^ below) - below), (hi ^ (U)pattern) & 0x80000000u);
    }
    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Draws hi, rest;
        load_high<order>(part[0], i, hi.a, hi.b);
        Rest::template load<order>(part[1], i, rest.a, rest.b);
        a = join(hi.a, rest.a);
        b = join(hi.b, rest.b);
    }
    template <bool careful> INLINE void split(F x, U bits, U &hi, U &rest) {
        if constexpr (!stochastic) bits = U{};
        U pattern = Format::template pattern<extra, careful>(as_bits(magnitude(x)), bits);
        hi = ((pattern + 0x8000u) & 0xffff0000u) | (as_bits(x) & 0x80000000u);
        rest = pattern >> (16 - extra) & Rest::mask;
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &, Draws bits) {
        Draws hi, rest;
        split<careful>(a, bits.a, hi.a, rest.a);
        split<careful>(b, bits.b, hi.b, rest.b);
        store_high<order>(part[0], i, hi.a, hi.b);
        Rest::template store<order>(part[1], i, rest.a, rest.b);
    }
    INLINE double exact(const void *const *part, int64_t i) {
        return join(splat((uint32_t)((const uint16_t *)part[0])[i] << 16), splat(Rest::one(part[1], i)))[0];
    }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
};

// The two spacings of 8-bit codes. `place`: of a magnitude among the codes.
struct Softsign {
    static constexpr float smallest = 0x1p-118f;
    static constexpr uint32_t too_large = TWO_TO_127;

    INLINE U size(F x) { return as_bits(magnitude(x)); }
    INLINE F decode(U code) {
        // Codes and 254 times 2^24, which spares a shift.
        F x = __builtin_convertvector((I)(code << 24), F);
        return x / (0x1.fcp31f - magnitude(x));
    }
    INLINE Shared shared(float scale) { return {splat(scale), F{}}; }
    template <bool> INLINE F place(F x, F, const Shared &shared) {
        F size = magnitude(x);
        return size / (size + shared.scale) * 254.0f;
    }
    // With the number's sign.
    INLINE F finish(F code, F x) { return as_float(as_bits(code) | (as_bits(x) & 0x80000000u)); }
};

struct Root4 {
    static constexpr float smallest = 0x1p-94f;
    static constexpr uint32_t too_large = 0x7f800000u;

    // Of numbers that should have no sign.
    INLINE U size(F x) { return as_bits(x); }
    INLINE F decode(U code) {
        F x = __builtin_convertvector((I)code, F) * 0x1.010102p-8f;
        x = x * x;
        return x * x;
    }
    INLINE Shared shared(float scale) {
        return {splat(scale), splat(255.0f) / square_root(square_root(splat(scale)))};
    }
    template <bool careful> INLINE F place(F x, F root, const Shared &shared) {
        if constexpr (careful) root = square_root(magnitude(x));
        return square_root(root) * shared.factor;
    }
    // No positive number has the code 0.
    INLINE F finish(F code, F x) { return as_float(max_bits(as_bits(code), as_bits(where(x > 0.0f, splat(1.0f))))); }
};

// Codes and their block's scale. The part of the scales begins with that of the block at hand.
template <class Code, bool stochastic> struct Blockwise {
    typedef Integers<8> Codes;
    typedef float Scale;
    static constexpr int parts = 2;
    static constexpr bool draws = stochastic, adds = false, blocked = true, tiled = false;
    static constexpr bool guarded = false, has_plain = true;
    static constexpr Order order = interleaved;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        U code_a, code_b;
        Codes::template load<order>(part[0], i, code_a, code_b);
        F scale = splat(*(const float *)part[1]);
        a = Code::decode(code_a) * scale;
        b = Code::decode(code_b) * scale;
    }
    INLINE U size(F x, F) { return Code::size(x); }
    // Stores the scale for new values whose largest magnitude is that with these bits. Returns whether it is a number.
    INLINE bool settle(void *const *part, uint32_t largest, Shared &shared) {
        const uint32_t bits = largest >= Code::too_large ? QUIET_NAN : largest;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        if (scale < Code::smallest) scale = Code::smallest;
        *(float *)part[1] = scale;
        shared = Code::shared(scale);
        return largest < Code::too_large;
    }
    template <bool careful> INLINE U encode(F x, F root, const Shared &shared, U bits) {
        // At most 127 or 255, or a unit of the last bit more, which the snap takes away.
        F place = Code::template place<careful>(x, root, shared);
        // To nearest by a sum whose last bit is 1.
        F near = place + 0x1p23f - 0x1p23f, code = near;
        if constexpr (stochastic) {
            // What is no whole number is yet to be cut off.
            F drawn = place + (as_float(bits << 7 | 0x3f800000u) - 1.0f);
            code = select(magnitude(place - near) <= near * 0x1p-20f, near, drawn);
        }
        U found = (U)__builtin_convertvector(Code::finish(code, x), I) & 0xffu;
        if constexpr (careful) found &= (U)(place == place);
        return found;
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &beside, Draws bits) {
        Codes::template store<order>(part[0], i, encode<careful>(a, beside.root.a, beside.shared, bits.a),
                                     encode<careful>(b, beside.root.b, beside.shared, bits.b));
    }
    INLINE double exact(const void *const *part, int64_t i) {
        return Code::decode(splat(Codes::one(part[0], i)))[0] * *(const float *)part[1];
    }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
};

// e4m3 with 8 bits behind it.
struct E4m3Remainder {
    typedef Integers<8> Bytes;
    static constexpr int parts = 2;
    static constexpr bool draws = true;

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &, Pair &) {
        Draws hi, rest;
        Bytes::template load<order>(part[0], i, hi.a, hi.b);
        Bytes::template load<order>(part[1], i, rest.a, rest.b);
        a = E4m3::join(hi.a, rest.a);
        b = E4m3::join(hi.b, rest.b);
    }
    template <Order order, bool careful>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &, Draws bits) {
        Draws hi, rest;
        E4m3::split(a, bits.a, hi.a, rest.a);
        E4m3::split(b, bits.b, hi.b, rest.b);
        Bytes::template store<order>(part[0], i, hi.a, hi.b);
        Bytes::template store<order>(part[1], i, rest.a, rest.b);
    }
    INLINE double exact(const void *const *part, int64_t i) {
        return E4m3::join(splat(Bytes::one(part[0], i)), splat(Bytes::one(part[1], i)))[0];
    }
};

// Another storage of e4m3, of values that are divided by a power of two per tile: of one row, or of a parameter's rows. The
// part of the scales begins with that of the tile at hand.
template <class Of, bool one_row, bool root = false> struct Tiled {
    typedef uint8_t Scale;
    static constexpr int parts = Of::parts + 1;
    static constexpr bool draws = Of::draws, adds = false, blocked = one_row, tiled = !one_row;
    static constexpr bool guarded = false, has_plain = false;
    static constexpr Order order = interleaved;

    INLINE F power(uint32_t exponent) { return as_float(splat(exponent << 23)); }
    INLINE F scale(const void *const *part) { return power(*(const Scale *)part[parts - 1]); }

    template <Order order> INLINE void load(void *const *part, int64_t i, F &a, F &b, Pair &hi, Pair &lo) {
        Of::template load<order>(part, i, a, b, hi, lo);
        a = a * scale(part);
        b = b * scale(part);
        if constexpr (root) a = a * a, b = b * b;
    }
    // Bits of the magnitude of what is kept, 0 if it is not finite.
    INLINE U size(F x, F square_root_of_x) {
        F kept = magnitude(root ? square_root_of_x : x);
        return as_bits(where(kept < __builtin_inff(), kept));
    }
    INLINE bool settle(void *const *part, uint32_t largest, Shared &shared) {
        int32_t exponent = (int32_t)((largest + 0x1fffffu) >> 23) - 8;
        if (exponent < 1) exponent = 1;
        if (largest == 0) exponent = 127;
        *(Scale *)part[parts - 1] = (Scale)exponent;
        shared.factor = power(254u - (uint32_t)exponent);
        return true;
    }
    INLINE F quotient(F x, F square_root_of_x, F factor) {
        if constexpr (root) {
            // No positive number is kept as 0.
            F least = where(x > 0.0f, splat(Of::smallest()));
            return as_float(max_bits(as_bits(square_root_of_x * factor), as_bits(least)));
        }
        return x * factor;
    }
    template <Order order, bool>
    INLINE void store(void *const *part, int64_t i, F a, F b, const Beside &beside, Draws bits) {
        const F factor = beside.shared.factor;
        Of::template store<order, true>(part, i, quotient(a, beside.root.a, factor), quotient(b, beside.root.b, factor),
                                        beside, bits);
    }
    INLINE double exact(const void *const *part, int64_t i) {
        double x = Of::exact(part, i) * scale(part)[0];
        return root ? x * x : x;
    }
    INLINE double moved(const void *const *now, const void *const *then, int64_t i) {
        return exact(now, i) - exact(then, i);
    }
    // What a model reads.
    INLINE double seen(const void *const *part, int64_t i) {
        return Bf16::template round<true>(splat((float)Of::exact(part, i)) * scale(part))[0];
    }
};

}  // namespace
