// The base's linears with their rows' adapters: y = gain (x w^T + (x a^T) b^T), for any number of rows and adapters.
//
// A row's sums run over the inputs in one order and are rounded at the same points in every batch: the row has the same
// bits alone and with any other rows.
//
// With few rows, memory bandwidth is the limit, so everything is read in the order in which it is stored: the base's
// matrix first, then one adapter after the other. With long runs of rows, arithmetic is the limit; then the adapter's
// part is added while a tile of y is still in the registers.
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "operations.h"
#include "threads.h"

typedef struct {
    const element *x;
    const matrix *w;  // null if y already holds the base's product
    atomic_bool *failed;  // memory is exhausted
    element *y, *h;
    const char *arena;
    const target *table;
    const int64_t *widths;
    const piece *pieces;
    int64_t ldx, ldy, ldh, rows, d_in, modules, stride, count;
    bool bytes;  // the adapters are of int8
} task;

// The elements of the base's panels, starting with a block of columns, and what is prefetched while they are read:
// `pace` bytes per step, starting at `next`.
typedef struct {
    const element *data;
    const char *next;
    int64_t pace;
} base;

// An adapter's part of a block of columns, which is added to the base's product.
typedef struct {
    const element *h;  // that of row 0
    const char *b;
    const float *gain;
    int64_t steps;
    bool bytes;
} delta;

#define MAX_RANK 256

// Rows of x per pass over the weights: few enough to stay in the second-level cache.
#define PASS (16 * ROWS)
// Number of steps that have a partial sum of their own: the error of a long sum grows with the length of its parts.
#define SPAN (PAIR * 256)
// Prefetch distance in bytes; an adapter's stream is short.
#define BASE_AHEAD 8192
#define AHEAD 4096

// A tile of the shrink: SHRINK_ROWS rows times four ranks.
#ifdef __AVX512F__
#define SHRINK_ROWS 6
#define EACH_SHRINK(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define SHRINK_ROWS 1
#define EACH_SHRINK(X) X(1)
#endif

INLINE int64_t quads(int64_t rank) { return (rank + 3) / 4; }
INLINE int64_t steps(int64_t d_in) { return (d_in + PAIR - 1) / PAIR; }
INLINE int64_t size_of(bool bytes) { return bytes ? 1 : (int64_t)sizeof(element); }

// An adapter's weights, of the element type or int8; int8 is supported with bfloat16 only.
INLINE chunk weights_chunk(const char *p, const bool bytes) {
#ifdef BFLOAT16
    if (bytes) return load_chunk8((const int8_t *)p);
#endif
    (void)bytes;
    return load_chunk((const element *)p);
}
INLINE panel weights_panel(const char *p, const bool bytes) {
#ifdef BFLOAT16
    if (bytes) return load_panel8((const int8_t *)p);
#endif
    (void)bytes;
    return load_panel((const element *)p);
}

// Converts `count` int8 weights, a multiple of LINE, to elements.
static const char *widened(const char *from, element *to, int64_t count) {
#ifdef BFLOAT16
    for (int64_t i = 0; i < count; i += CHUNK) {
        if (i % 64 == 0) _mm_prefetch(from + i + AHEAD, _MM_HINT_T0);
        store_chunk(to + i, load_chunk8((const int8_t *)from + i));
    }
#else
    (void)from, (void)count;
#endif
    return (const char *)to;
}

element *scratch(int use, int64_t elements) {
    static _Thread_local element *room[4];
    static _Thread_local int64_t size[4];
    if (elements > size[use]) {
        free(room[use]);
        room[use] = aligned_alloc(64, (size_t)(elements * (int64_t)sizeof(element) + 63) / 64 * 64);
        size[use] = room[use] ? elements : 0;
    }
    return room[use];
}

// h[rows][4] = x a^T for four ranks of a, whose packs of LINE inputs are next to each other; each rank has a scale.
INLINE void shrink_tile(const int rows, const bool bytes, const element *x, int64_t ldx, const char *a, __m128 scale,
                        int64_t d_in, element *h, int64_t ldh) {
    const int64_t row_size = LINE * size_of(bytes);
    vec acc[SHRINK_ROWS][4];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int r = 0; r < 4; r++) acc[m][r] = zero();
    for (int64_t line = 0; line < d_in; line += LINE, a += 4 * row_size)
        UNROLL for (int part = 0; part < LINE; part += CHUNK) {
            const int64_t left = d_in - line - part;
            chunk now[4];
            UNROLL for (int r = 0; r < 4; r++) {
                if (!part && r * row_size % 64 == 0) _mm_prefetch(a + r * row_size + AHEAD, _MM_HINT_T0);
                now[r] = weights_chunk(a + r * row_size + part * size_of(bytes), bytes);
            }
            UNROLL for (int m = 0; m < rows; m++) {
                const element *from = x + m * ldx + line + part;
                const chunk row = left >= CHUNK ? load_chunk(from) : load_chunk_first(left > 0 ? (int)left : 0, from);
                UNROLL for (int r = 0; r < 4; r++) acc[m][r] = fma_chunk(acc[m][r], now[r], row);
            }
        }
    UNROLL for (int m = 0; m < rows; m++) {
        const __m128 sums = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
        store4(h + m * ldh, _mm_mul_ps(sums, scale));
    }
}

// h[to - from][rank] = x a^T for one module.
static void shrink(const task *t, const target *at, int64_t from, int64_t to, element *h) {
    const int64_t quad = (t->d_in + LINE - 1) / LINE * LINE * 4, tiles = (to - from + SHRINK_ROWS - 1) / SHRINK_ROWS;
    const char *a = t->arena + at->a;
    const float *scales = (const float *)(a - (at->rank * 4 + 63) / 64 * 64);
    // With many rows, the weights are widened once for all of them.
    element *wide = t->bytes && to - from > SHRINK_ROWS ? scratch(1, quad) : 0;
    for (int64_t q = 0; q < quads(at->rank); q++, a += quad * size_of(t->bytes), h += 4) {
        const __m128 scale = t->bytes ? _mm_loadu_ps(scales + 4 * q) : _mm_set1_ps(1.0f);
        const char *now = wide ? widened(a, wide, quad) : a;
        for (int64_t i = 0; i < tiles; i++) {  // tiles of nearly equal height
            const int64_t top = (to - from) * i / tiles, bottom = (to - from) * (i + 1) / tiles;
            const element *x = t->x + (from + top) * t->ldx;
            element *to_h = h + top * t->ldh;
#define CASE(n)                                                                                         \
    case n:                                                                                             \
        if (t->bytes && !wide) shrink_tile(n, true, x, t->ldx, now, scale, t->d_in, to_h, t->ldh);      \
        else shrink_tile(n, false, x, t->ldx, now, scale, t->d_in, to_h, t->ldh);                       \
        break;
            switch (bottom - top) { EACH_SHRINK(CASE) }
#undef CASE
        }
    }
}

// Shrinks the rows of pieces `from` to `to`; all modules of a row are next to each other in h.
static void shrink_all(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    for (const piece *p = t->pieces + from; p < t->pieces + to; p++) {
        element *h = t->h + p->from * t->ldh;
        for (int64_t m = 0; m < t->modules; m++) {
            const target *at = t->table + p->slot * t->stride + m;
            shrink(t, at, p->from, p->to, h);
            h += quads(at->rank) * 4;
        }
    }
}

// `cold`: b is read from memory, in one stream.
INLINE void add_delta(const int rows, const int panels, const bool bytes, const bool cold, const delta *d,
                      const element *h, int64_t ldh, vec acc[ROWS][PANELS]) {
    const char *b = d->b;
    _Pragma("GCC unroll 4") for (int64_t k = 0; k < d->steps; k++, b += STEP * size_of(bytes)) {
        panel now[PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            const char *at = b + p * PANEL * size_of(bytes);
            if (cold && (!p || !bytes)) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
            now[p] = weights_panel(at, bytes);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            const pair both = load_pair(h + m * ldh + k * PAIR);
            UNROLL for (int p = 0; p < panels; p++) acc[m][p] = fma_panel(acc[m][p], now[p], both);
        }
    }
}

INLINE void tile(const int rows, const int panels, const task *t, const element *x, const base *weights, element *y,
                 int64_t columns, const delta *d, const element *h) {
    const element *w = weights ? weights->data : 0;
    vec acc[ROWS][PANELS];
    UNROLL for (int p = 0; p < panels; p++) {
        const int left = columns - p * LANES < LANES ? (int)(columns - p * LANES) : LANES;
        UNROLL for (int m = 0; m < rows; m++) {
            const element *from = y + m * t->ldy + p * LANES;
            acc[m][p] = w ? zero() : left == LANES ? load(from) : load_first(left, from);
        }
    }
    const int64_t whole = w ? t->d_in / PAIR : 0;
    for (int64_t begin = 0; begin < whole; begin += SPAN) {
        const int64_t end = whole - begin < SPAN ? whole : begin + SPAN;
        vec part[ROWS][PANELS];
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int p = 0; p < panels; p++) part[m][p] = zero();
        for (int64_t k = begin; k < end; k++) {
            panel now[PANELS];
            UNROLL for (int p = 0; p < panels; p++) {
                _mm_prefetch(weights->next + k * weights->pace + p * (weights->pace / 2), _MM_HINT_T0);
                now[p] = load_panel(w + k * STEP + p * PANEL);
            }
            UNROLL for (int m = 0; m < rows; m++) {
                const pair both = load_pair(x + m * t->ldx + k * PAIR);
                UNROLL for (int p = 0; p < panels; p++) part[m][p] = fma_panel(part[m][p], now[p], both);
            }
        }
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int p = 0; p < panels; p++) acc[m][p] = add(acc[m][p], part[m][p]);
    }
    if (w && whole * PAIR < t->d_in)
        UNROLL for (int p = 0; p < panels; p++) {
            const panel last = load_panel(w + whole * STEP + p * PANEL);
            UNROLL for (int m = 0; m < rows; m++)
                acc[m][p] = fma_panel(acc[m][p], last, load_half_pair(x + m * t->ldx + t->d_in - 1));
        }
    // The same bits as if y had been stored and loaded again: a row must not depend on its neighbors.
    if (w && d->steps)
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int p = 0; p < panels; p++) acc[m][p] = rounded(acc[m][p]);
    if (d->bytes) add_delta(rows, panels, true, true, d, h, t->ldh, acc);
    else if (w) add_delta(rows, panels, false, false, d, h, t->ldh, acc);
    else add_delta(rows, panels, false, true, d, h, t->ldh, acc);
    UNROLL for (int p = 0; p < panels; p++) {
        const int left = columns - p * LANES < LANES ? (int)(columns - p * LANES) : LANES;
        if (d->gain) UNROLL for (int m = 0; m < rows; m++) acc[m][p] = mul(acc[m][p], load_floats(d->gain + p * LANES));
        UNROLL for (int m = 0; m < rows; m++) {
            if (left == LANES) store(y + m * t->ldy + p * LANES, acc[m][p]);
            else store_first(left, y + m * t->ldy + p * LANES, acc[m][p]);
        }
    }
}

static void any_tile(int64_t rows, int64_t top, const task *t, const base *w, int64_t column, int64_t columns,
                     const delta *d) {
    const element *x = t->x + top * t->ldx;
    const element *h = d->h + top * t->ldh;
    element *y = t->y + top * t->ldy + column;
#define CASE(n)                                                                          \
    case n:                                                                              \
        if (columns > LANES) tile(n, PANELS, t, x, w, y, columns, d, h);                 \
        else tile(n, 1, t, x, w, y, columns, d, h);                                      \
        break;
    switch (rows) { EACH_ROW_COUNT(CASE) }
#undef CASE
}

// A block of columns, at most two panels, of one module.
typedef struct {
    int64_t module, within, column, columns;  // `within`: relative to the module's first column
} block;

// An adapter's part of a module's first block; `before`: number of ranks before the module's in a row of h.
static delta delta_of(const task *t, const target *its, int64_t before) {
    if (!its->rank) return (delta){0};
    return (delta){
        .h = t->h + before,
        .b = t->arena + its->b,
        .gain = its->gain < 0 ? 0 : (const float *)(t->arena + its->gain),
        .steps = steps(its->rank),
        .bytes = t->bytes,
    };
}

// The same for the block that begins `within` columns after the module's first column.
static delta at_block(delta d, int64_t within) {
    const int64_t half = within / LANES;
    d.b += (half / 2 * d.steps * STEP + half % 2 * PANEL) * size_of(d.bytes);
    if (d.gain) d.gain += within;
    return d;
}

static delta delta_at(const task *t, const piece *p, const block *at) {
    const target *targets = t->table + p->slot * t->stride;
    int64_t before = 0;
    for (int64_t m = 0; m < at->module; m++) before += quads(targets[m].rank) * 4;
    return at_block(delta_of(t, targets + at->module, before), at->within);
}

// Processes all rows of a pass, `begin` to `end`, for one block.
static void rows_of_block(const task *t, const base *w, const block *at, int64_t begin, int64_t end) {
    const int64_t tiles = (end - begin + ROWS - 1) / ROWS;
    const piece *p = t->pieces, *last = t->pieces + t->count, *known = 0;
    element wide[MAX_RANK * PANELS * LANES + STEP];
    const delta nothing = {0};
    delta d = nothing;
    for (int64_t i = 0; i < tiles; i++) {  // tiles of nearly equal height
        const int64_t top = begin + (end - begin) * i / tiles, bottom = begin + (end - begin) * (i + 1) / tiles;
        while (p < last && p->to <= top) p++;
        if (p < last && p->from <= top && p->to >= bottom) {
            if (known != p) {
                known = p;
                d = delta_at(t, p, at);
                const int64_t size = d.steps * STEP * size_of(d.bytes);
                for (int64_t line = 0; line < size; line += 64) _mm_prefetch(d.b + size + line, _MM_HINT_T0);
                // With several tiles, the weights are widened once for all of them.
                if (d.bytes && PANELS == 2) d.b = widened(d.b, wide, d.steps * STEP), d.bytes = false;
            }
            any_tile(bottom - top, top, t, w, at->column, at->columns, &d);
            continue;
        }
        any_tile(bottom - top, top, t, w, at->column, at->columns, &nothing);
        for (const piece *q = p; q < last && q->from < bottom; q++) {  // each thread continues with its own rows
            const int64_t from = q->from > top ? q->from : top, to = q->to < bottom ? q->to : bottom;
            const delta its = delta_at(t, q, at);
            if (its.steps) any_tile(to - from, from, t, 0, at->column, at->columns, &its);
        }
    }
}

static block block_at(const task *t, int64_t index) {
    int64_t module = 0, column = 0, blocks;
    for (; index >= (blocks = (t->widths[module] + PANELS * LANES - 1) / (PANELS * LANES)); module++) {
        index -= blocks;
        column += t->widths[module];
    }
    const int64_t within = index * PANELS * LANES, left = t->widths[module] - within;
    return (block){module, within, column + within, left < PANELS * LANES ? left : PANELS * LANES};
}

// Codes are stored by four inputs of 32 outputs: eight vectors of 16, in the order of the elements.
#define FOUR (4 * 2 * LANES)

INLINE int64_t fours(int64_t d_in) { return (d_in + 3) / 4; }

// Decodes a block's panels into elements, in the layout of a matrix of elements.
INLINE void decode(const bool bytes, const matrix *w, int64_t d_in, int64_t column, element *to) {
    const int64_t wide = 2 * LANES, index = column / wide, size = bytes ? FOUR : FOUR / 2;
    const int first = (int)(column % wide / LANES) * PAIR;  // the vector within a step
    const float *scales = w->scales + index * (d_in / w->group) * wide;
    const char *codes = w->data + index * fours(d_in) * size;
    const vec levels = bytes ? zero() : load_floats(w->levels);
    for (int64_t begin = 0; begin < d_in; begin += w->group, scales += wide) {
        vec scale[PANELS * PAIR];
        UNROLL for (int v = 0; v < PANELS * PAIR; v++)
            scale[v] = PAIR == 2 ? load_floats_twice(scales + (first + v) * 8) : load_floats(scales + (first + v) * 16);
        for (int64_t i = begin; i < begin + w->group; i += 4, codes += size, to += FOUR) {
            for (int64_t line = 0; line < size; line += 64) _mm_prefetch(codes + line + AHEAD, _MM_HINT_T0);
            UNROLL for (int step = 0; step < 8; step += 2 * PAIR) UNROLL for (int p = 0; p < PANELS; p++) {
                vec parts[PAIR];
                const int top = step + first + p * PAIR;
                UNROLL for (int v = 0; v < PAIR; v++) {
                    const vec plain = bytes ? load_bytes(codes + (top + v) * LANES) : look_up(levels, codes, top + v);
                    parts[v] = mul(plain, scale[p * PAIR + v]);
                }
                store_panel(to + top * LANES, parts);
            }
        }
    }
}

// The base's panels, starting with a column; without data if memory is exhausted.
static base base_at(const matrix *w, int64_t d_in, int64_t column) {
    const int64_t index = column / (2 * LANES), within = column / LANES % 2 * PANEL;
    if (!w->scales) {
        const element *data = (const element *)w->data + index * steps(d_in) * STEP + within;
        return (base){data, (const char *)data + BASE_AHEAD, STEP * sizeof(element)};
    }
    element *to = scratch(2, fours(d_in) * FOUR);
    if (!to) return (base){0};
    if (w->levels) decode(false, w, d_in, column, to);
    else decode(true, w, d_in, column, to);
    // Without this prefetch, the processor would wait for the next block's codes when it decodes them.
    const int64_t size = w->levels ? FOUR / 2 : FOUR;
    return (base){to + within, w->data + (index + 1) * fours(d_in) * size, size * PAIR / 4};
}

// Blocks `from` to `to`.
static void run(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    for (int64_t begin = 0; begin < t->rows; begin += PASS)
        for (int64_t g = from; g < to; g++) {
            const block at = block_at(t, g);
            const base w = base_at(t->w, t->d_in, at.column);
            if (!w.data) {
                *t->failed = true;
                return;
            }
            rows_of_block(t, &w, &at, begin, t->rows - begin < PASS ? t->rows : begin + PASS);
        }
}

// Adds the adapters of pieces `from` to `to`, one after the other.
static void adapt(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    for (const piece *p = t->pieces + from, *end = t->pieces + to; p < end; p++) {
        const target *its = t->table + p->slot * t->stride;
        for (int64_t m = 0, column = 0; m < t->modules; column += t->widths[m++]) {
            if (!its[m].rank) continue;
            const delta whole = delta_of(t, its + m, 0);
            shrink(t, its + m, p->from, p->to, t->h + p->from * t->ldh);
            if (p + 1 < end && m + 1 == t->modules) {  // the next adapter is elsewhere in memory
                const char *next = t->arena + t->table[p[1].slot * t->stride].a;
                for (int64_t line = 0; line < AHEAD; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
            }
            for (int64_t within = 0; within < t->widths[m]; within += PANELS * LANES) {
                const delta d = at_block(whole, within);
                const int64_t columns = t->widths[m] - within;
                for (int64_t row = p->from; row < p->to; row += ROWS)
                    any_tile(p->to - row < ROWS ? p->to - row : ROWS, row, t, 0, column + within, columns, &d);
            }
        }
    }
}

// Returns 0, or -1 if memory is exhausted. Blocks of a module must begin with a block of w: the widths of all modules
// but the last are multiples of 32, or w is null.
int adapted_linear(const element *x, int64_t ldx, const matrix *w, element *y, int64_t ldy, int64_t rows, int64_t d_in,
                   int64_t modules, const int64_t *widths, const char *arena, const target *table, int64_t stride,
                   const piece *pieces, int64_t count, int64_t bytes) {
    atomic_bool failed = false;
    task t = {x,   w,   &failed, y,    0,    arena,   table,  widths, pieces,
              ldx, ldy, 0,       rows, d_in, modules, stride, count,  bytes != 0};
    int64_t blocks = 0, ranks = 0, d_out = 0;
    for (int64_t m = 0; m < modules; m++) {
        d_out += widths[m];
        blocks += (widths[m] + PANELS * LANES - 1) / (PANELS * LANES);
    }
    for (const piece *p = pieces; p < pieces + count; p++) {
        int64_t wide = 0;
        for (int64_t m = 0; m < modules; m++) wide += quads(table[p->slot * stride + m].rank) * 4;
        if (wide > t.ldh) t.ldh = wide;
        ranks += wide * (p->to - p->from);
    }
    if (t.ldh && !(t.h = scratch(0, rows * t.ldh))) return -1;
    const bool together = w && ranks && rows >= count * ROWS;
    if (together) share(shrink_all, &t, count, ranks * d_in / count);
    if (!together) t.count = 0;
    if (w) share(run, &t, blocks, (rows * d_in + ranks) * PANELS * LANES);
    if (failed) return -1;
    t.count = count;
    if (!together && t.ldh) share(adapt, &t, count, ranks * (d_in + d_out) / count);
    return 0;
}
