// The library's entry points: choice of the instruction set, and the work of a step cut up among threads.
#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef COLLAGE_X86
#include <cpuid.h>
#endif

#include "kernel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern const collage_kernels collage_kernels_portable;
#ifdef COLLAGE_X86
extern const collage_kernels collage_kernels_avx2, collage_kernels_avx512;
#endif

namespace {

#ifdef COLLAGE_X86
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Isa {
    const char *name;
    const collage_kernels *kernels;
    bool (*runs)();
};

// Best first.
const Isa ISAS[] = {
#ifdef COLLAGE_X86
    {"avx512", &collage_kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &collage_kernels_avx2, [] { return __builtin_cpu_supports("avx2") && has_f16c(); }},
#endif
    {"portable", &collage_kernels_portable, [] { return true; }},
};

// Elements per piece of work, less what is no whole span, or one span where that is more: some hundred microseconds, whose
// components fit the second-level cache.
constexpr int64_t PIECE = 1 << 15;

// numerics/counter.py: the finaliser of splitmix64.
uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void keys(uint32_t key[2], uint64_t seed, uint64_t ordinal, uint64_t step, uint64_t word, uint64_t high) {
    uint64_t state = mix(seed);
    const uint64_t parts[] = {ordinal, step, word, high};
    for (uint64_t part : parts) state = mix(state ^ part);
    state = mix(state);
    key[0] = (uint32_t)state;
    key[1] = (uint32_t)(state >> 32);
}

struct Work {
    const collage_kernel *kernel;
    const collage_job *job;
    int64_t piece;       // elements of each
    double *piece_sums;  // [piece][COLLAGE_SUMS], or null
    int64_t elements;
    std::atomic<int64_t> next;

    int64_t pieces_of(int64_t tensor) const { return (job->sizes[tensor] + piece - 1) / piece; }
};

void run_range(const Work &w, int64_t tensor, int64_t start, int64_t end, double *sums) {
    const collage_job &job = *w.job;
    collage_range r;
    r.scalars = &job.scalars[job.scalar_rows[tensor]];
    r.scaled = job.scaled;
    r.maximize = job.maximize;
    r.special = job.scaled || job.maximize;
    r.grad_scale = job.grad_scale;
    r.beta2 = job.beta2;
    r.sums = sums;
    r.cell = job.cells;
    r.elements = job.elements;
    r.block = job.block;
    r.width = job.width;
    r.tile_rows = job.tile_rows;
    const int grad_cell = job.cells[w.kernel->parts];
    while (start < end) {
        uint64_t index = job.firsts[tensor] + (uint64_t)start;
        uint64_t left = (1ull << 32) - (uint32_t)index;
        r.count = (uint64_t)(end - start) < left ? end - start : (int64_t)left;
        r.index = (uint32_t)index;
        for (uint64_t word = 0; word < (uint64_t)w.kernel->words; word++)
            keys(r.key[word], job.seed, (uint64_t)job.ordinals[tensor], (uint64_t)job.steps[tensor], word, index >> 32);
        for (int c = 0; c < w.kernel->parts; c++)
            r.part[c] = (char *)job.parts[c * job.count + tensor] + start / job.elements[c] * job.cells[c];
        r.grad = (const char *)job.grads[tensor] + start * grad_cell;
        (sums ? w.kernel->audit : w.kernel->run)(r);
        start += r.count;
    }
}

// Bytes that are fetched of a tensor before it is its turn, and the gap that memory may have and still follow on what is
// read before it: the processor fetches that unasked.
constexpr int64_t BEGINNING = 512;
constexpr uint64_t GAP = 64;

INLINE void fetch_beginning(const void *next, const void *end) {
    if ((uint64_t)next - (uint64_t)end > GAP) fetch(next, BEGINNING);
}

// The beginning of the next tensor and of its gradient. Their states are one memory where they are many.
INLINE void fetch_after(const Work &w, int64_t tensor) {
    const collage_job &job = *w.job;
    const int64_t count = job.sizes[tensor], next = tensor + 1;
    if (next == job.count) return;
    fetch_beginning(job.parts[next], (const char *)job.parts[tensor] + count / job.elements[0] * job.cells[0]);
    fetch_beginning(job.grads[next], (const char *)job.grads[tensor] + count * job.cells[w.kernel->parts]);
}

// What each thread does: of all tensors laid end to end it takes as many as a piece has, until none are left, and does the
// pieces that begin there: one of a large tensor, a run of small ones. Threads that took turns at small tensors would
// fetch each other's: their states are neighbours in memory.
void take_pieces(void *data) {
    Work &w = *(Work *)data;
    const collage_job &job = *w.job;
    int64_t tensor = 0, start = 0, at = 0, piece = 0;  // the piece to look at next, and where it begins in all
    for (;;) {
        int64_t from = w.next.fetch_add(w.piece, std::memory_order_relaxed);
        if (from >= w.elements) return;
        while (tensor < job.count && at < from + w.piece) {
            int64_t left = job.sizes[tensor] - start, count = left < w.piece ? left : w.piece;
            double *sums = w.piece_sums ? w.piece_sums + piece * COLLAGE_SUMS : nullptr;
            if (at >= from) {
                if (count == left) fetch_after(w, tensor);
                run_range(w, tensor, start, start + count, sums);
            }
            piece += count > 0;
            at += count;
            start += count;
            if (count == left) tensor++, start = 0;
        }
    }
}

void add_up(const Work &w) {
    const double *piece = w.piece_sums;
    for (int64_t tensor = 0; tensor < w.job->count; tensor++) {
        double *sums = w.job->sums + tensor * COLLAGE_SUMS;
        for (int k = 0; k < COLLAGE_SUMS; k++) sums[k] = 0.0;
        for (int64_t n = w.pieces_of(tensor); n > 0; n--, piece += COLLAGE_SUMS)
            for (int k = 0; k < COLLAGE_SUMS; k++) sums[k] += piece[k];
    }
}

struct NullWork {
    void (*null)(const collage_streams &, int64_t, int64_t);
    const collage_streams *streams;
    int64_t elements;
    std::atomic<int64_t> next;
};

void take_null_pieces(void *data) {
    NullWork &w = *(NullWork *)data;
    for (;;) {
        int64_t start = w.next.fetch_add(PIECE, std::memory_order_relaxed);
        if (start >= w.elements) return;
        w.null(*w.streams, start, start + PIECE < w.elements ? start + PIECE : w.elements);
    }
}

struct ReadWork {
    void (*read)(const collage_reading &, int64_t, int64_t);
    const collage_reading *reading;
    int64_t step;
    std::atomic<int64_t> next;
};

void take_rows(void *data) {
    ReadWork &w = *(ReadWork *)data;
    for (;;) {
        int64_t row = w.next.fetch_add(w.step, std::memory_order_relaxed), rows = w.reading->rows;
        if (row >= rows) return;
        w.read(*w.reading, row, row + w.step < rows ? row + w.step : rows);
    }
}

const collage_kernels *kernels_of(const char *isa_name) {
    for (const Isa &isa : ISAS)
        if (!strcmp(isa.name, isa_name)) return isa.kernels;
    return nullptr;
}

void run_on(int threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), void (*act)(void *), void *data) {
    if (parallel && threads > 1)
        parallel(act, data, (unsigned)threads, 0);
    else
        act(data);
}

}  // namespace

// Number of instruction sets that run here, best first; `names` receives them.
EXPORT int collage_isas(const char **names, int room) {
    int found = 0;
    for (const Isa &isa : ISAS)
        if (isa.runs() && found < room) names[found++] = isa.name;
    return found;
}

// The place of a kernel in an instruction set's table, or -1.
EXPORT int collage_find(const char *isa, const char *name) {
    const collage_kernels *kernels = kernels_of(isa);
    for (int k = 0; kernels && k < kernels->count; k++)
        if (!strcmp(kernels->table[k].name, name)) return k;
    return -1;
}

// One step. Returns 0, or 1 where no memory was left for an audit's sums; nothing has changed then.
EXPORT int collage_step(const char *isa, int kernel, const collage_job *job) {
    const int64_t piece = job->span < PIECE ? PIECE - PIECE % job->span : job->span;
    Work work{&kernels_of(isa)->table[kernel], job, piece, nullptr, 0, {0}};
    int64_t pieces = 0;
    for (int64_t tensor = 0; tensor < job->count; tensor++) {
        work.elements += job->sizes[tensor];
        pieces += work.pieces_of(tensor);
    }
    if (job->sums) {
        work.piece_sums = (double *)calloc(pieces * COLLAGE_SUMS + 1, sizeof(double));
        if (!work.piece_sums) return 1;
    }
    run_on(work.elements > work.piece ? job->threads : 1, job->parallel, take_pieces, &work);
    if (job->sums) add_up(work);
    free(work.piece_sums);
    return 0;
}

// Writes what a model reads of a parameter in tiles into `out`, bfloat16. `name`: of what the tiles keep; `parts`: the
// addresses of its numbers, then of the scales. Returns 0, or 1 where none of the readers has the name; nothing is
// written then.
EXPORT int collage_read(const char *isa, const char *name, void *const *parts, int count, void *out, int64_t rows,
                        int64_t width, int64_t tile_rows, int64_t block, int threads,
                        void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    collage_reading reading{{}, out, rows, width, tile_rows, block};
    for (int c = 0; c < count; c++) reading.part[c] = parts[c];
    const collage_kernels *kernels = kernels_of(isa);
    for (int k = 0; k < kernels->reader_count; k++) {
        if (strcmp(kernels->readers[k].name, name)) continue;
        ReadWork work{kernels->readers[k].read, &reading, PIECE / width + 1, {0}};
        run_on(rows * width > PIECE ? threads : 1, parallel, take_rows, &work);
        return 0;
    }
    return 1;
}

// Reads `count` streams of `elements` each and writes the first `written` back unchanged. `zero` is 0.
EXPORT void collage_null(const char *isa, char *const *streams, const int32_t *cells, int written, int count,
                         int64_t elements, uint64_t zero, int threads,
                         void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    collage_streams all{streams, cells, written, count, zero};
    NullWork work{kernels_of(isa)->null, &all, elements, {0}};
    run_on(threads, parallel, take_null_pieces, &work);
}
