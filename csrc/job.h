// What Python hands over for one step of many tensors (src/collage/kernels/native.py mirrors it field by field).
#pragma once

#include <cstdint>

extern "C" {

// Columns of Scalars, each a float32 that was rounded once from float64.
struct collage_scalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, inverse_bias_correction2_sqrt, eps, decay;
};

struct collage_job {
    int64_t count;               // tensors
    const int64_t *sizes;        // elements of each
    const uint64_t *firsts;      // index of each tensor's first element within the whole parameter
    const int64_t *ordinals;     // each parameter's place in the optimizer
    const int64_t *steps;        // each parameter's step, from 1, this one included
    const int64_t *scalar_rows;  // each tensor's row of `scalars`
    const collage_scalars *scalars;
    void *const *parts;          // [component][tensor]: param's components, then exp_avg's, then exp_avg_sq's
    const void *const *grads;    // [tensor]
    double *sums;                // [tensor][COLLAGE_SUMS], or null
    const int32_t *cells;        // [component], then the gradient: bytes of an entry
    const int32_t *elements;     // [component]: how many elements share an entry
    int64_t span;                // elements that are stepped together; every tensor is whole spans, but for the end of one
                                 // in tiles
    int64_t block;               // elements that share entries of moments are of one such block
    int64_t width, tile_rows;    // of parameters in tiles: elements of a row, rows of a tile (a block wide)
    double beta2;                // of the audit's definition
    uint64_t seed;
    float grad_scale;            // gradients are divided by it where `scaled`
    int32_t scaled;
    int32_t maximize;
    int32_t threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel of the pool in use, or null
};
}

constexpr int COLLAGE_SUMS = 8;
constexpr int COLLAGE_MAX_PARTS = 11;
// Of a block of 8-bit codes. The least is a unit of the widest vectors.
constexpr int COLLAGE_MIN_BLOCK = 32, COLLAGE_MAX_BLOCK = 128;
constexpr int COLLAGE_MAX_ROWS = 128;
