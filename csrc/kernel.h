// Between the driver, which cuts work up, and the kernels, which each instruction set has of its own.
#pragma once

#include "job.h"

#define INLINE static inline __attribute__((always_inline))

// Asks the processor for memory before its turn. (GCC drops a function that does nothing else unless it is inlined.)
INLINE void fetch(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

// A range of one tensor, in which element indices do not pass a multiple of 2^32.
struct collage_range {
    void *part[COLLAGE_MAX_PARTS];
    const int32_t *cell, *elements;  // of each part: bytes of an entry, and elements that share one
    int64_t block, width, tile_rows;
    const void *grad;
    int64_t count;
    uint32_t index;   // of the first element, low half
    uint32_t key[2][2];  // of the random words of param and exp_avg_sq, and of exp_avg
    const collage_scalars *scalars;
    bool special;  // scaled or maximize
    bool scaled, maximize;
    float grad_scale;
    double beta2;
    double *sums;
};

struct collage_kernel {
    const char *name;
    int parts;
    int words;  // 32-bit random words of an element
    void (*run)(const collage_range &);
    void (*audit)(const collage_range &);
};

// Elements [start, end) of streams that are all read, the first `written` of them written back unchanged.
struct collage_streams {
    char *const *stream;
    const int32_t *cell;  // bytes of an element of each
    int written, count;
    uint64_t zero;  // 0, which the compiler does not know
};

// A parameter in tiles that is read: into bfloat16 of the same shape.
struct collage_reading {
    void *part[COLLAGE_MAX_PARTS];  // the numbers that are read, then the scales
    void *out;
    int64_t rows, width, tile_rows, block;
};

struct collage_reader {
    const char *name;
    void (*read)(const collage_reading &, int64_t first_row, int64_t end);
};

struct collage_kernels {
    const collage_kernel *table;
    int count;
    void (*null)(const collage_streams &, int64_t start, int64_t end);
    const collage_reader *readers;
    int reader_count;
};
