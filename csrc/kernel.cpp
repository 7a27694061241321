// The step over one range of a tensor, compiled once for each instruction set. kernels/eager.py is the definition.
#include "kernel.h"

#include "storages.h"

#ifndef COLLAGE_ISA
#error "COLLAGE_ISA names the instruction set"
#endif

namespace {

// numerics/counter.py: the word of each element from the low half of its index and the stream's two keys.
INLINE U random_words(U index, const uint32_t key[2]) {
    U x = index ^ key[0];
    x ^= x >> 17;
    x *= 0xed5ad4bbu;
    x ^= x >> 11;
    x += key[1];
    x *= 0xac4c1b51u;
    x ^= x >> 15;
    x *= 0x31848babu;
    x ^= x >> 14;
    return x;
}

// Elements of a unit, and the units of a block.
constexpr int UNIT = 2 * W, UNITS = 16;

template <Order order> INLINE U lanes_from(uint32_t first, bool second) {
    U index;
    for (int i = 0; i < W; i++)
        index[i] = first + (uint32_t)(order == interleaved ? 2 * i + second : i + (second ? W : 0));
    return index;
}

// Whether a storage's `store` has a plain form beside the careful one.
template <class Storage> constexpr bool has_plain() {
    if constexpr (Storage::blocked || Storage::tiled)
        return Storage::has_plain;
    else
        return Storage::guarded;
}

// P, M, V: storages of the parameter and its moments; G: the gradient's format.
template <class Low, class P, class M, class V, class G> struct Step {
    static constexpr int parts = P::parts + M::parts + V::parts;
    static constexpr bool guarded = P::guarded || M::guarded || V::guarded;
    static constexpr bool two_forms = has_plain<P>() || has_plain<M>() || has_plain<V>();
    // Whether a moment's new values must be looked at: to the plain form of one number only nan is unusual, and the new
    // parameter is nan where a moment is.
    template <class Moment> static constexpr bool sees() { return Moment::guarded && (Moment::parts > 1 || !P::guarded); }
    static constexpr int square = P::parts + M::parts;  // where the components of v begin
    static constexpr bool all_interleaved = P::order == interleaved && M::order == interleaved &&
                                            V::order == interleaved && G::order == interleaved;
    static constexpr Order order = all_interleaved ? interleaved : sequential;
    // Whether moments are in blocks of codes. A pass is then over one such block.
    static constexpr bool blocked = M::blocked || V::blocked;
    static constexpr int max_units = blocked ? COLLAGE_MAX_BLOCK / UNIT : UNITS + 1;

    INLINE void gradient(const collage_range &r, int64_t i, F &a, F &b) {
        G::template load<order>(r.grad, i, a, b);
        if (__builtin_expect(r.special, 0)) {
            if (r.scaled) a = a / splat(r.grad_scale), b = b / splat(r.grad_scale);
            if (r.maximize) a = -a, b = -b;
        }
    }

    // The rule on one vector: m and v become the new values, of which root is v's.
    INLINE void moments(const collage_scalars &k, F g, F &m, F &v, F &root) {
        m = m * k.beta1 + g * k.one_minus_beta1;
        v = v * k.beta2 + g * g * k.one_minus_beta2;
        root = square_root(v);
    }
    // p becomes the new value. Returns the update.
    INLINE F move(const collage_scalars &k, bool decays, F m, F root, F &p) {
        F divisor = root * k.inverse_bias_correction2_sqrt + k.eps;
        F update = m * k.step_size / divisor;
        if (decays) update = update - p * k.decay;
        p = p + update;
        return update;
    }

    // New values of some units, on their way from the rule to the stores. One loop that loads, computes, rounds and stores a
    // unit is one long chain of operations, of which a processor has too few at a time in work to fill the waits. Three
    // loops over a block, of moments, parameters and stores, are three short ones; with 32 registers all fit one loop, in
    // which the divisions of a block hide behind the roundings of the block before it. AVX2, Zen 3, measured: two loops (all
    // values, stores) take .79 of the time of one, three .82 to .87 of that of two, the block ahead .9 of one. AVX-512 only
    // estimated (llvm-mca, Ice Lake): 88 cycles a unit in one loop, 81 with the block ahead.
    static constexpr bool ahead = W == 16;
    struct Block {
        Pair p[max_units], m[max_units], v[max_units], root[max_units], update[max_units];
        Shared m_shared, v_shared;
    };

    // Of the sizes of new values.
    struct Largest {
        U m{}, v{};
    };

    // Where unit j of the pass from element i on begins. The last one of a block of codes, or of a range, begins early
    // enough to be a whole one: some elements are computed and stored twice, alike, since all loads of a pass come before
    // its stores.
    INLINE int64_t place(const collage_range &r, int64_t i, int j) {
        int64_t at = i + (int64_t)j * UNIT, last = (blocked ? i + r.block : r.count) - UNIT;
        return at < last ? at : last;
    }
    INLINE int units_of_block(const collage_range &r) { return (int)((r.block + UNIT - 1) / UNIT); }

    INLINE void compute_moments(const collage_range &r, const collage_scalars &k, void *const *part, int64_t i, int j,
                                Block &x, Usual<Low> &usual, Largest &largest) {
        Pair g, m, v, root, hi, lo;
        gradient(r, i, g.a, g.b);
        M::template load<order>(part + P::parts, i, m.a, m.b, hi, lo);
        V::template load<order>(part + square, i, v.a, v.b, hi, lo);
        moments(k, g.a, m.a, v.a, root.a);
        moments(k, g.b, m.b, v.b, root.b);
        if constexpr (sees<M>()) usual.see(m.a), usual.see(m.b);
        if constexpr (sees<V>()) usual.see(v.a), usual.see(v.b);
        x.m[j] = m, x.v[j] = v, x.root[j] = root;
        if constexpr (M::blocked) largest.m = max_bits(largest.m, max_bits(M::size(m.a, F{}), M::size(m.b, F{})));
        if constexpr (V::blocked) largest.v = max_bits(largest.v, max_bits(V::size(v.a, root.a), V::size(v.b, root.b)));
    }
    INLINE void compute_param(const collage_scalars &k, void *const *part, int64_t i, int j, Block &x, Usual<Low> &usual) {
        const bool decays = k.decay != 0.0f;
        Pair p, update, hi, lo;
        P::template load<order>(part, i, p.a, p.b, hi, lo);
        update.a = move(k, decays, x.m[j].a, x.root[j].a, p.a);
        update.b = move(k, decays, x.m[j].b, x.root[j].b, p.b);
        if constexpr (P::guarded) usual.see(p.a), usual.see(p.b);
        x.p[j] = p, x.update[j] = update;
    }

    // `index`: of the unit's elements, the low 32 bits.
    template <bool careful>
    INLINE void store_unit(const collage_range &r, void *const *part, int64_t i, int j, Draws index, const Block &x) {
        Beside p{}, m{}, v{};
        Draws p_bits{}, m_bits{}, v_bits{};
        if constexpr (P::draws || V::draws) {
            U a = random_words(index.a, r.key[0]), b = random_words(index.b, r.key[0]);
            p_bits = {a & 0xffffu, b & 0xffffu};
            v_bits = {a >> 16, b >> 16};
        }
        if constexpr (M::draws)
            m_bits = {random_words(index.a, r.key[1]) & 0xffffu, random_words(index.b, r.key[1]) & 0xffffu};
        if constexpr (P::adds) {
            F a, b;
            P::template load<order>(part, i, a, b, p.hi, p.lo);
            p.update = x.update[j];
        }
        if constexpr (M::blocked) m.shared = x.m_shared;
        if constexpr (V::blocked) v.shared = x.v_shared, v.root = x.root[j];
        M::template store<order, careful>(part + P::parts, i, x.m[j].a, x.m[j].b, m, m_bits);
        V::template store<order, careful>(part + square, i, x.v[j].a, x.v[j].b, v, v_bits);
        // A tile is stored when all of its new values are known.
        if constexpr (!P::tiled) P::template store<order, careful>(part, i, x.p[j].a, x.p[j].b, p, p_bits);
    }

    // Makes the scales of a block. Returns whether all new values are usual to them, no new v having a sign.
    INLINE bool settle(void *const *part, int units, const Largest &largest, Block &x) {
        bool usual = true;
        if constexpr (M::blocked) usual = M::settle(part + P::parts, largest_of(largest.m), x.m_shared);
        if constexpr (V::blocked) {
            uint32_t v = largest_of(largest.v);
            if (__builtin_expect(v >> 31, 0)) {
                U all{};
                for (int j = 0; j < units; j++)
                    all = max_bits(all, max_bits(as_bits(magnitude(x.v[j].a)), as_bits(magnitude(x.v[j].b))));
                v = largest_of(all);
                usual = false;
            }
            usual = V::settle(part + square, v, x.v_shared) && usual;
        }
        return usual;
    }

    // Whether all of the units' new values are usual.
    static bool compute(const collage_range &r, void *const *part, int64_t i, int units, Block &x) {
        const collage_scalars k = *r.scalars;
        Usual<Low> usual;
        Largest largest;
        // The second loop's memory is on its way during the first. What has few entries is fetched over and over.
        int64_t cell[P::parts];
        for (int c = 0; c < P::parts; c++) cell[c] = r.elements[c] == 1 ? r.cell[c] : 0;
        for (int j = 0; j < units; j++) {
            const int64_t at = place(r, i, j);
            for (int c = 0; c < P::parts; c++) __builtin_prefetch((const char *)part[c] + at * cell[c]);
            compute_moments(r, k, part, at, j, x, usual, largest);
        }
        for (int j = 0; j < units; j++) compute_param(k, part, place(r, i, j), j, x, usual);
        bool settled = settle(part, units, largest, x);
        return (guarded || blocked) && usual.all() && settled;
    }

    // `index`: of the range's first elements.
    template <bool careful>
    INLINE void store_units(const collage_range &r, void *const *part, int64_t i, int units, Draws index, const Block &x) {
        for (int j = 0; j < units; j++) {
            const int64_t at = place(r, i, j);
            store_unit<careful>(r, part, at, j, ahead_of(index, at), x);
        }
    }

    INLINE Draws ahead_of(Draws index, int64_t count) { return {index.a + (uint32_t)count, index.b + (uint32_t)count}; }

    static void store(const collage_range &r, void *const *part, int64_t i, int units, Draws index, const Block &x,
                      bool usual) {
        if (usual && two_forms)
            store_units<false>(r, part, i, units, index, x);
        else
            store_units<true>(r, part, i, units, index, x);
    }

    // Stores a full block and computes the next full one.
    template <bool careful>
    static bool store_and_compute(const collage_range &r, void *const *part, int64_t i, Draws index, const Block &x,
                                  Block &next) {
        const collage_scalars k = *r.scalars;
        Usual<Low> usual;
        Largest largest;
        for (int j = 0; j < UNITS; j++) {
            compute_moments(r, k, part, i + (UNITS + j) * UNIT, j, next, usual, largest);
            compute_param(k, part, i + (UNITS + j) * UNIT, j, next, usual);
            store_unit<careful>(r, part, i + j * UNIT, j, ahead_of(index, i + j * UNIT), x);
        }
        return guarded && usual.all();
    }

    INLINE Draws indices_from(uint32_t first) { return {lanes_from<order>(first, false), lanes_from<order>(first, true)}; }

    // Room for the elements of a unit or of a block of codes, and the bytes of so many entries.
    static constexpr int span = blocked ? COLLAGE_MAX_BLOCK : UNIT;
    INLINE int64_t bytes(const collage_range &r, int c, int64_t count) {
        return blocked ? count / r.elements[c] * r.cell[c] : count * r.cell[c];
    }

    // Elements that fill no unit, or a block of codes, on copies.
    template <class Do> static void padded(const collage_range &r, int64_t i, int64_t count, Do &&act) {
        alignas(64) char cells[parts + 1][4 * span] = {};
        void *copies[parts];
        for (int c = 0; c < parts; c++) {
            copies[c] = cells[c];
            memcpy(cells[c], (char *)r.part[c] + bytes(r, c, i), bytes(r, c, count));
        }
        memcpy(cells[parts], (const char *)r.grad + i * sizeof(typename G::Cell), count * sizeof(typename G::Cell));
        collage_range copy = r;
        copy.grad = cells[parts];
        copy.count = span;
        copy.index = r.index + (uint32_t)i;
        act(copy, (void *const *)copies);
        for (int c = 0; c < parts; c++) memcpy((char *)r.part[c] + bytes(r, c, i), cells[c], bytes(r, c, count));
    }

    // Lets the parts of scales begin with that of the range's block of this number.
    INLINE void begin_with(const collage_range &r, void **part, int64_t block) {
        constexpr int m = square - 1, v = parts - 1;
        if constexpr (M::blocked) part[m] = (typename M::Scale *)r.part[m] + block;
        if constexpr (V::blocked) part[v] = (typename V::Scale *)r.part[v] + block;
    }

    // A block is stored after the next one is computed: by then its scales are there, which take a chain of roots.
    static void run_blocks(const collage_range &r) {
        Block blocks[2];
        void *part[parts];
        for (int c = 0; c < parts; c++) part[c] = r.part[c];
        Draws index = indices_from(r.index);
        const int units = units_of_block(r);
        int current = 0;
        bool usual = compute(r, part, 0, units, blocks[0]);
        for (int64_t i = 0, block = 1; i < r.count; i += r.block, block++) {
            bool next = false;
            if (i + r.block < r.count) {
                begin_with(r, part, block);
                next = compute(r, part, i + r.block, units, blocks[1 - current]);
            }
            store(r, part, i, units, index, blocks[current], usual);
            usual = next;
            current = 1 - current;
        }
    }

    static void run(const collage_range &r) {
        if constexpr (blocked) return run_blocks(r);
        Block blocks[2];
        void *part[parts];
        for (int c = 0; c < parts; c++) part[c] = r.part[c];
        Draws index = indices_from(r.index);
        // A last unit that begins early is never alone: the one that it overlaps is loaded with it. A storage that adds
        // to what it holds when it stores must not do so twice.
        const int64_t rest = r.count % UNIT, early = !P::adds && rest && r.count > UNIT;
        const int64_t all = r.count / UNIT + early;
        auto next_units = [&](int64_t left) { return (int)(left <= UNITS + early ? left : UNITS); };
        int64_t unit = 0;
        int current = 0, units = next_units(all);
        bool usual = compute(r, part, 0, units, blocks[0]);
        while (unit < all) {
            int64_t left = all - unit - units;
            Block &x = blocks[current], &next = blocks[1 - current];
            if (ahead && units == UNITS && left >= UNITS + 2 * early) {
                usual = usual && two_forms ? store_and_compute<false>(r, part, unit * UNIT, index, x, next)
                                           : store_and_compute<true>(r, part, unit * UNIT, index, x, next);
                unit += UNITS;
            } else {
                store(r, part, unit * UNIT, units, index, x, usual);
                unit += units;
                units = next_units(left);
                if (units) usual = compute(r, part, unit * UNIT, units, next);
            }
            current = 1 - current;
        }
        if (rest && !early)
            padded(r, r.count - rest, rest, [&](const collage_range &copy, void *const *copies) {
                Draws last = indices_from(copy.index);
                bool is_usual = compute(copy, copies, 0, 1, blocks[0]);
                store(copy, copies, 0, 1, last, blocks[0], is_usual);
            });
    }

    // The same, and the sums of kernels/contract.py from the values that the very step has.
    static void audit(const collage_range &r) {
        Block block;
        const int step = blocked ? (int)r.block : UNIT, units = blocked ? units_of_block(r) : 1;
        for (int64_t i = 0; i < r.count; i += step) {
            int count = (int)(r.count - i < step ? r.count - i : step);
            padded(r, i, count, [&](const collage_range &copy, void *const *part) {
                alignas(64) char before[parts][4 * span];
                const void *then[parts];
                for (int c = 0; c < parts; c++) then[c] = memcpy(before[c], part[c], sizeof before[c]);
                Draws index = indices_from(copy.index);
                bool usual = compute(copy, part, 0, units, block);
                store(copy, part, 0, units, index, block, usual);
                for (int j = 0; j < units; j++) {
                    const int begin = (int)place(copy, 0, j);
                    Pair g, u = block.update[j];
                    gradient(copy, begin, g.a, g.b);
                    for (int k = j * UNIT; k < count && k < (j + 1) * UNIT; k++) {
                        int n = k - begin;
                        bool in_b = order == interleaved ? n % 2 : n >= W;
                        int lane = order == interleaved ? n / 2 : n % W;
                        add_sums(r, part, then, k, (in_b ? u.b : u.a)[lane], (in_b ? g.b : g.a)[lane]);
                    }
                }
            });
        }
    }

    static void add_sums(const collage_range &r, const void *const *now, const void *const *then, int i, double u,
                         double g) {
        add_moves(r, P::moved(now, then, i), Low::number(now[0], i) - Low::number(then[0], i), u);
        add_decay(r, now + square, then + square, i, g);
    }
    // `now` and `then`: the components of v.
    static void add_decay(const collage_range &r, const void *const *now, const void *const *then, int64_t i, double g) {
        double v = V::exact(then, i), moved_v = V::moved(now, then, i);
        double decay = r.beta2 * v + (1.0 - r.beta2) * (g * g) - v;
        bool decaying = v > 0.0 && (decay > 0.0 || decay < 0.0);
        r.sums[6] += decaying;
        r.sums[7] += decaying && moved_v == 0.0;
    }
    static void add_moves(const collage_range &r, double moved, double moved_hi, double u) {
        double *sums = r.sums;
        sums[0] += moved * u;
        sums[1] += moved_hi * u;
        sums[2] += u * u;
        sums[3] += u != 0.0;
        sums[4] += u != 0.0 && moved == 0.0;
        sums[5] += u != 0.0 && moved_hi == 0.0;
    }

    // ---- parameters in tiles, with moments in blocks that are as wide

    // A tile's new values, and what an audit wants of it from before its store: its parameter, and the updates.
    struct Tile {
        Pair fresh[COLLAGE_MAX_ROWS][max_units];
    };
    struct Before {
        uint8_t cells[P::parts][COLLAGE_MAX_ROWS * COLLAGE_MAX_BLOCK];
        float update[COLLAGE_MAX_ROWS][COLLAGE_MAX_BLOCK];
    };

    // Lane k of the units that begin at place(r, 0, j).
    INLINE float lane(const collage_range &r, const Pair *units, int k) {
        const int j = k / UNIT, n = k - (int)place(r, 0, j);
        const bool in_b = order == interleaved ? n % 2 : n >= W;
        return (in_b ? units[j].b : units[j].a)[order == interleaved ? n / 2 : n % W];
    }

    // Processors follow no streams that jump from row to row. AVX2, Zen, measured: .7 to .8 of the time without.
    static constexpr int ROWS_AHEAD = 4;
    INLINE void fetch_row(const collage_range &r, int64_t i) {
        for (int c = 0; c < parts; c++)
            if (r.elements[c] == 1) fetch((const char *)r.part[c] + i, r.block);
        fetch((const typename G::Cell *)r.grad + i, r.block * (int64_t)sizeof(typename G::Cell));
    }

    template <bool audited> static void run_tiles(const collage_range &r) {
        const int64_t rows = r.count / r.width, across = r.width / r.block;
        Tile tile;
        Before before;
        for (int64_t top = 0; top < rows; top += r.tile_rows)
            for (int64_t c = 0; c < across; c++) {
                void *part[parts];
                for (int k = 0; k < parts; k++) part[k] = r.part[k];
                part[P::parts - 1] = (uint8_t *)part[P::parts - 1] + top / r.tile_rows * across + c;
                const int height = (int)(rows - top < r.tile_rows ? rows - top : r.tile_rows);
                const int64_t begin = top * r.width + c * r.block;
                U largest{};
                for (int row = 0; row < height; row++) {
                    if (row + ROWS_AHEAD < height) fetch_row(r, begin + (row + ROWS_AHEAD) * r.width);
                    compute_row<audited>(r, part, begin + row * r.width, tile.fresh[row], largest, before, row);
                }
                if constexpr (audited) before.cells[P::parts - 1][0] = *(const typename P::Scale *)part[P::parts - 1];
                Beside beside{};
                P::settle(part, largest_of(largest), beside.shared);
                for (int row = 0; row < height; row++) store_row(r, part, begin + row * r.width, tile.fresh[row], beside);
                if constexpr (audited) add_moves_of_tile(r, part, begin, height, before);
            }
    }

    static void add_moves_of_tile(const collage_range &r, const void *const *now, int64_t begin, int height,
                                  const Before &before) {
        const void *then[P::parts];
        for (int c = 0; c < P::parts; c++) then[c] = before.cells[c];
        for (int row = 0; row < height; row++)
            for (int k = 0; k < r.block; k++) {
                const int64_t i = begin + row * r.width + k, old = row * COLLAGE_MAX_BLOCK + k;
                const double moved_hi = P::seen(now, i) - P::seen(then, old);
                add_moves(r, P::exact(now, i) - P::exact(then, old), moved_hi, before.update[row][k]);
            }
    }

    // Computes a tile's row and stores its moments.
    template <bool audited>
    static void compute_row(const collage_range &r, void **part, int64_t i, Pair *fresh, U &largest, Before &before, int row) {
        const int units = units_of_block(r);
        begin_with(r, part, i / r.block);
        Block x;
        // Components of v as they were.
        uint8_t cells[V::parts - 1][COLLAGE_MAX_BLOCK];
        const typename V::Scale scale = *(const typename V::Scale *)part[parts - 1];
        if constexpr (audited) {
            for (int c = 0; c < V::parts - 1; c++) memcpy(cells[c], (uint8_t *)part[square + c] + i, r.block);
            for (int c = 0; c < P::parts - 1; c++)
                memcpy(before.cells[c] + row * COLLAGE_MAX_BLOCK, (uint8_t *)part[c] + i, r.block);
        }
        const bool usual = compute(r, part, i, units, x);
        store(r, part, i, units, indices_from(r.index), x, usual);
        for (int j = 0; j < units; j++) {
            fresh[j] = x.p[j];
            largest = max_bits(largest, max_bits(P::size(x.p[j].a, F{}), P::size(x.p[j].b, F{})));
        }
        if constexpr (audited) {
            Pair g[max_units];
            for (int j = 0; j < units; j++) gradient(r, place(r, i, j), g[j].a, g[j].b);
            const void *now[V::parts], *then[V::parts];
            for (int c = 0; c < V::parts - 1; c++) now[c] = (uint8_t *)part[square + c] + i, then[c] = cells[c];
            now[V::parts - 1] = part[parts - 1], then[V::parts - 1] = &scale;
            for (int k = 0; k < r.block; k++) {
                before.update[row][k] = lane(r, x.update, k);
                add_decay(r, now, then, k, lane(r, g, k));
            }
        }
    }

    INLINE void store_row(const collage_range &r, void *const *part, int64_t i, const Pair *fresh, const Beside &beside) {
        const int units = units_of_block(r);
        const Draws index = indices_from(r.index + (uint32_t)i);
        for (int j = 0; j < units; j++) {
            const uint32_t at = (uint32_t)place(r, 0, j);
            Draws bits{};
            if constexpr (P::draws)
                bits = {random_words(index.a + at, r.key[0]) & 0xffffu, random_words(index.b + at, r.key[0]) & 0xffffu};
            P::template store<order, true>(part, i + at, fresh[j].a, fresh[j].b, beside, bits);
        }
    }
};

template <class Low, class G, class P, class M, class V> constexpr collage_kernel entry(const char *name) {
    typedef Step<Low, P, M, V, G> S;
    constexpr int words = M::draws ? 2 : P::draws || V::draws;
    if constexpr (P::tiled)
        return {name, S::parts, words, S::template run_tiles<false>, S::template run_tiles<true>};
    else
        return {name, S::parts, words, S::run, S::audit};
}

// One row per layout: the storages of param, exp_avg, exp_avg_sq.
#define LAYOUTS(LOW, GRAD, low, grad)                                                                              \
    ROW(LOW, GRAD, low "/nearest/nearest/nearest/" grad, RN(LOW), RN(LOW), RN(LOW)),                               \
    ROW(LOW, GRAD, low "/stochastic/nearest/nearest/" grad, SR(LOW), RN(LOW), RN(LOW)),                            \
    ROW(LOW, GRAD, low "/kahan/nearest/nearest/" grad, KH(LOW), RN(LOW), RN(LOW)),                                 \
    ROW(LOW, GRAD, low "/expansion/nearest/nearest/" grad, EN(LOW), RN(LOW), RN(LOW)),                             \
    ROW(LOW, GRAD, low "/expansion/nearest/expansion/" grad, EN(LOW), RN(LOW), EN(LOW)),                           \
    ROW(LOW, GRAD, low "/expansion-stochastic/nearest/nearest/" grad, ES(LOW), RN(LOW), RN(LOW)),                  \
    ROW(LOW, GRAD, low "/expansion-stochastic/nearest/expansion-stochastic/" grad, ES(LOW), RN(LOW), ES(LOW)),     \
    ROW(LOW, GRAD, low "/nearest/fp32/fp32/" grad, RN(LOW), RN(Fp32), RN(Fp32)),                                   \
    ROW(LOW, GRAD, low "/master/fp32/fp32/" grad, MS(LOW), RN(Fp32), RN(Fp32)),                                    \
    ROW(LOW, GRAD, low "/nearest/softsign/root4/" grad, RN(LOW), Q(Softsign, false), Q(Root4, false)),             \
    ROW(LOW, GRAD, low "/remainder4-stochastic/softsign-stochastic/root4-stochastic/" grad,                        \
        REM(LOW, 4, true), Q(Softsign, true), Q(Root4, true)),                                                     \
    ROW(LOW, GRAD, low "/remainder8-stochastic/softsign-stochastic/root4-stochastic/" grad,                        \
        REM(LOW, 8, true), Q(Softsign, true), Q(Root4, true))
#define BF16_LAYOUTS(GRAD, grad)                                                                                   \
    ROW(Bf16, GRAD, "bf16/expansion-stochastic/fp32/fp32/" grad, ES(Bf16), RN(Fp32), RN(Fp32)),                    \
    ROW(Bf16, GRAD, "bf16/remainder16/fp32/fp32/" grad, REM(Bf16, 16, false), RN(Fp32), RN(Fp32)),                 \
    ROW(Bf16, GRAD, "bf16/remainder16/nearest/expansion-stochastic/" grad,                                         \
        REM(Bf16, 16, false), RN(Bf16), ES(Bf16)),                                                                 \
    ROW(Bf16, GRAD, "bf16/tiled-e4m3fn-remainder8-stochastic/softsign-stochastic/root4-stochastic/" grad,          \
        TILES(REM8), Q(Softsign, true), Q(Root4, true)),                                                           \
    ROW(Bf16, GRAD, "bf16/tiled-e4m3fn-expansion-scaled-stochastic/tiled-e4m3fn/tiled-e4m3fn-stochastic-root/" grad, \
        TILES(EX8(2, true)), TILED_ROWS(RN(E4m3)), TILED_ROOTS(SR(E4m3))),                                         \
    ROW(Bf16, GRAD, "bf16/tiled-e4m3fn-expansion3-scaled/tiled-e4m3fn-expansion-scaled/"                           \
        "tiled-e4m3fn-expansion3-scaled-root/" grad,                                                               \
        TILES(EX8(3, false)), TILED_ROWS(EX8(2, false)), TILED_ROOTS(EX8(3, false))),                              \
    ROW(Bf16, GRAD, "bf16/tiled-e4m3fn/tiled-e4m3fn/tiled-e4m3fn-root/" grad,                                      \
        TILES(RN(E4m3)), TILED_ROWS(RN(E4m3)), TILED_ROOTS(RN(E4m3)))
#define FP16_LAYOUTS(GRAD, grad)                                                                                   \
    ROW(Fp16, GRAD, "fp16/expansion-scaled-stochastic/fp32/fp32/" grad, SCALED, RN(Fp32), RN(Fp32)),               \
    ROW(Fp16, GRAD, "fp16/expansion-scaled-stochastic/bf16/bf16-expansion-stochastic/" grad,                       \
        SCALED, RN(Bf16), ES(Bf16))
#define ROW(LOW, GRAD, name, ...) entry<LOW, GRAD, __VA_ARGS__>(name)
#define RN(X) Rounded<X, false>
#define SR(X) Rounded<X, true>
#define KH(X) Kahan<X>
#define EN(X) Expansion<X, false>
#define ES(X) Expansion<X, true>
#define MS(X) Master<X>
#define SCALED Expansion<Fp16, true, 2048>
#define REM(X, ...) Remainder<X, __VA_ARGS__>
#define Q(...) Blockwise<__VA_ARGS__>
#define REM8 E4m3Remainder
#define EX8(N, STOCHASTIC) Expansion<E4m3, STOCHASTIC, 16, N>
#define TILES(...) Tiled<__VA_ARGS__, false>
#define TILED_ROWS(...) Tiled<__VA_ARGS__, true>
#define TILED_ROOTS(...) Tiled<__VA_ARGS__, true, true>

const collage_kernel KERNELS[] = {
    LAYOUTS(Bf16, Bf16, "bf16", "own"),
    LAYOUTS(Bf16, Fp32, "bf16", "fp32"),
    LAYOUTS(Fp16, Fp16, "fp16", "own"),
    LAYOUTS(Fp16, Fp32, "fp16", "fp32"),
    BF16_LAYOUTS(Bf16, "own"),
    BF16_LAYOUTS(Fp32, "fp32"),
    FP16_LAYOUTS(Fp16, "own"),
    FP16_LAYOUTS(Fp32, "fp32"),
    ROW(Fp32, Fp32, "fp32/nearest/nearest/nearest/own", RN(Fp32), RN(Fp32), RN(Fp32)),
};

}  // namespace

// The floor of a step's time: its memory traffic and nothing else.
static void null_range(const collage_streams &s, int64_t start, int64_t end) {
    constexpr int64_t BLOCK = 256;
    U zero = splat((uint32_t)s.zero), seen = zero;
    for (int64_t from = start; from < end; from += BLOCK) {
        int64_t count = end - from < BLOCK ? end - from : BLOCK;
        for (int k = s.count - 1; k >= 0; k--) {
            char *at = s.stream[k] + from * s.cell[k];
            int64_t bytes = count * s.cell[k], i = 0;
            // The rest of a stream's last block is left out.
            for (; i + (int64_t)sizeof(U) <= bytes; i += sizeof(U)) {
                if (k < s.written)
                    store(at + i, load<U>(at + i) ^ (seen & zero));
                else
                    seen ^= load<U>(at + i);
            }
        }
    }
}

// What a model reads of rows of a parameter in tiles: bfloat16.
template <class P> static void read_rows(const collage_reading &x, int64_t row, int64_t end) {
    const int64_t across = x.width / x.block;
    void *part[P::parts];
    memcpy(part, x.part, sizeof part);
    for (; row < end; row++)
        for (int64_t c = 0; c < across; c++) {
            const int64_t i = row * x.width + c * x.block;
            part[P::parts - 1] = (typename P::Scale *)x.part[P::parts - 1] + row / x.tile_rows * across + c;
            for (int64_t k = 0; k < x.block; k += UNIT) {
                // The last unit begins early enough to be a whole one.
                const int64_t at = i + (k < x.block - UNIT ? k : x.block - UNIT);
                Pair value, hi, lo;
                P::template load<P::order>(part, at, value.a, value.b, hi, lo);
                Bf16::store_rounded<P::order, true>(x.out, at, value.a, value.b);
            }
        }
}

const collage_reader READERS[] = {
    {"e4m3fn", read_rows<TILES(RN(E4m3))>},
    {"e4m3fn-remainder8", read_rows<TILES(REM8)>},
    {"e4m3fn-expansion-scaled", read_rows<TILES(EX8(2, false))>},
    {"e4m3fn-expansion3-scaled", read_rows<TILES(EX8(3, false))>},
};

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
extern const collage_kernels JOIN(collage_kernels_, COLLAGE_ISA);
const collage_kernels JOIN(collage_kernels_, COLLAGE_ISA) = {KERNELS, (int)(sizeof KERNELS / sizeof *KERNELS), null_range,
                                                         READERS, (int)(sizeof READERS / sizeof *READERS)};
