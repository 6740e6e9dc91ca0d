// The exported operations and their arguments.
#pragma once
#include "vec.h"

// The base's matrix [d_out, d_in] in panels of elements or of codes, whose values are rounded to elements before they
// are multiplied by x. A code is an int8 number or, if there are levels, four bits that select one of 16 levels.
typedef struct {
    const char *data;
    const float *scales;  // [ceil(d_out / 32), d_in / group, 32]: factors of the codes; null: the data are elements
    const float *levels;
    int64_t group;  // number of inputs that share a scale: a multiple of four, or all
} matrix;

// Offsets of an adapter's matrices of one module, in bytes from the arena's start. Without a gain, its offset is -1; a
// module that is not a target has rank 0.
typedef struct {
    int64_t a, b, gain, rank;
} target;

// A run of neighboring rows of one adapter.
typedef struct {
    int32_t slot, from, to;
} piece;

// The new rows of one sequence, whose blocks begin at blocks[first_block].
typedef struct {
    int32_t row, count, start, first_block;
} span;

// Queries `from` to `to` of a span, counted row by row and, within it, over the heads that share one KV head.
typedef struct {
    int32_t span, from, to;
} unit;

// Scratch memory for `elements`, one per thread and for each of four uses; null if memory is exhausted.
element *scratch(int use, int64_t elements);

int adapted_linear(const element *x, int64_t ldx, const matrix *w, element *y, int64_t ldy, int64_t rows, int64_t d_in,
                   int64_t modules, const int64_t *widths, const char *arena, const target *table, int64_t stride,
                   const piece *pieces, int64_t count, int64_t bytes);
void add_rows(element *y, const element *bias, int64_t rows, int64_t d);
void rms_norm(const element *x, int64_t groups, int64_t members, int64_t ld_group, int64_t ld_member,
              const element *weight, element *y, int64_t d, float eps);
void add_rms_norm(element *residual, int64_t ld_residual, const element *x, int64_t ldx, const element *weight,
                  element *y, int64_t rows, int64_t d, float eps);
void silu_mul(const element *gate_up, int64_t ldx, element *y, int64_t rows, int64_t d);
void rope_write(element *qkv, int64_t ldq, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                const float *cos, const float *sin, element *keys, element *values, const int32_t *slots,
                int64_t block_size);
void attention(const element *q, int64_t ldq, element *y, const element *keys, const element *values,
               const int32_t *blocks, const span *spans, const unit *units, int64_t count, int64_t heads,
               int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t window, float scale, float cap, int64_t cost);
