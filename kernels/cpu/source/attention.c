// Attention over paged keys and values: a tile of queries against TILE positions at a time, with the softmax's maximum
// and sum updated along the way (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// keys    [blocks][kv_heads][block_size / 16][head_dim / PAIR][16][PAIR]: a panel is PAIR columns of 16 positions.
// values  [blocks][kv_heads][block_size / PAIR][head_dim, a multiple of 16][PAIR]: a panel is 16 columns of PAIR
//         positions.
//
// So both products are those of linear.c, and nothing is summed across lanes. The positions of a block after its
// sequence's length may hold another sequence's data or NaN: their scores are replaced, and their values never read.
//
// The tiles of positions begin at multiples of TILE, and a query's sums run over them in one order in every batch: a
// row has the same bits however its sequence was divided into steps.
#include <math.h>
#include <stdbool.h>

#include "operations.h"
#include "threads.h"

#define MAX_HEAD 256
// Queries (rows times heads of one KV head) that share a pass over the keys and values.
#define QUERIES 48
#define GROUPS 4  // of 16 positions
#define TILE (GROUPS * LANES)
// Cache lines of the next keys that are prefetched during the softmax of a row.
#define SOON 16

typedef struct {
    const element *q, *keys, *values;
    element *y;
    const int32_t *blocks;
    const span *spans;
    const unit *units;
    int64_t ldq, heads, kv_heads, head_dim, block_size, window;
    float scale, cap;  // cap: 0 for none
} task;

// The arguments of a unit of work at one KV head.
typedef struct {
    const span *of;
    int64_t head, from, to, group;  // `group`: query heads per KV head
    int64_t low, stop;              // the positions that at least one of its queries sees
} work;

// The addresses of a tile's groups of 16 positions; a group after the last one has the address of the last.
typedef struct {
    const element *keys[GROUPS], *values[GROUPS];
} place;

// A tile of queries in registers: up to ROWS rows; the fewer rows, the more columns.
#define WIDE (2 * PANELS)
#define FEW (ROWS / 2)

INLINE int64_t padded(int64_t head_dim) { return (head_dim + LANES - 1) / LANES * LANES; }

static work part_of(const task *t, int64_t part) {
    const unit *u = t->units + part / t->kv_heads;
    const span *s = t->spans + u->span;
    const int64_t group = t->heads / t->kv_heads, first = s->start + u->from / group;
    const int64_t low = first + 1 > t->window ? first + 1 - t->window : 0;
    return (work){s, part % t->kv_heads, u->from, u->to, group, low, s->start + (u->to - 1) / group + 1};
}

static void locate(const task *t, const work *w, int64_t position, place *p) {
    const int64_t last = (w->stop - 1) / LANES, per_block = t->block_size / LANES, width = padded(t->head_dim);
    for (int64_t i = 0; i < GROUPS; i++) {
        const int64_t g = position / LANES + i < last ? position / LANES + i : last;
        const int64_t block = t->blocks[w->of->first_block + g / per_block];
        const int64_t first = (block * t->kv_heads + w->head) * t->block_size + g % per_block * LANES;
        p->keys[i] = t->keys + first * t->head_dim;
        p->values[i] = t->values + first * width;
    }
}

// s[rows][groups of 16] = scale * q k^T. Prefetches the values of the same positions.
INLINE void score_tile(const int rows, const int groups, const element *q, const place *p, int at, int64_t head_dim,
                       float scale, float *s) {
    vec acc[ROWS][WIDE];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int g = 0; g < groups; g++) acc[m][g] = zero();
    for (int64_t k = 0; k < head_dim / PAIR; k++) {
        panel now[WIDE];
        UNROLL for (int g = 0; g < groups; g++) {
            _mm_prefetch((const char *)(p->values[at + g] + k * PANEL), _MM_HINT_T0);
            now[g] = load_panel(p->keys[at + g] + k * PANEL);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            const pair both = load_pair(q + m * head_dim + k * PAIR);
            UNROLL for (int g = 0; g < groups; g++) acc[m][g] = fma_panel(acc[m][g], now[g], both);
        }
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int g = 0; g < groups; g++)
            store_floats(s + m * TILE + (at + g) * LANES, mul(acc[m][g], splat(scale)));
}

static void scores(int rows, int groups, const element *q, const place *p, int64_t head_dim, float scale, float *s) {
#define CASE(n)                                                                                          \
    case n:                                                                                              \
        if (n <= FEW)                                                                                    \
            for (int g = 0; g < groups; g += WIDE) score_tile(n, WIDE, q, p, g, head_dim, scale, s);     \
        else                                                                                             \
            for (int g = 0; g < groups; g += PANELS) score_tile(n, PANELS, q, p, g, head_dim, scale, s); \
        break;
    switch (rows) { EACH_ROW_COUNT(CASE) }
#undef CASE
}

// s = cap * tanh(s / cap), as cap - 2 cap / (exp(2 s / cap) + 1).
static void cap_scores(int rows, int groups, float cap, float *s) {
    const vec by = splat(2.0f / cap), most = splat(cap), twice = splat(2.0f * cap), one = splat(1.0f);
    for (int m = 0; m < rows; m++)
        for (int g = 0; g < groups; g++) {
            float *at = s + m * TILE + g * LANES;
            store_floats(at, sub(most, quotient(twice, add(exponential(mul(load_floats(at), by)), one))));
        }
}

// Lanes `from` to `to` of a, the others of b.
INLINE vec between(int64_t from, int64_t to, vec a, vec b) {
    const int low = from < 0 ? 0 : from > LANES ? LANES : (int)from, high = to < 0 ? 0 : to > LANES ? LANES : (int)to;
    return first(high, first(low, b, a), b);
}

// Turns scores `from` to `to` of s into the probabilities p, and all others into 0. Returns the factor for earlier
// sums.
INLINE float soften(float *s, element *p, int groups, int64_t from, int64_t to, float *most, float *total) {
    const bool all = from <= 0 && to >= groups * LANES;
    vec peak = splat(-INFINITY);
    for (int g = 0; g < groups; g++) {
        vec now = load_floats(s + g * LANES);
        if (!all) now = between(from - g * LANES, to - g * LANES, now, splat(-INFINITY));
        peak = larger(now, peak);
    }
    const float before = *most, top = largest(peak);
    *most = top > before ? top : before;
    vec sums = zero();
    for (int g = 0; g < groups; g++) {
        vec now = exponential(sub(load_floats(s + g * LANES), splat(*most)));
        if (!all) now = between(from - g * LANES, to - g * LANES, now, zero());
        sums = add(sums, now);
        store(p + g * LANES, now);
    }
    float factor = 1.0f;
    if (*most != before) {
        float lanes[LANES];
        store_floats(lanes, exponential(splat(before - *most)));
        factor = lanes[0];
    }
    *total = *total * factor + sum(sums);
    return factor;
}

// out[rows][panels of 16] = factor * out + p v over `positions`. Prefetches the keys of the next tile.
INLINE void value_tile(const int rows, const int panels, const element *p, const place *now_at, const place *next,
                       int64_t positions, int64_t column, int64_t width, const float *factor, float *out) {
    vec acc[ROWS][WIDE];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int c = 0; c < panels; c++)
            acc[m][c] = mul(load_floats(out + m * width + column + c * LANES), splat(factor[m]));
    for (int64_t g = 0; g * LANES < positions; g++) {
        const int64_t left = positions - g * LANES, steps = (left < LANES ? left : LANES) / PAIR;
        const element *v = now_at->values[g] + column * PAIR, *soon = next->keys[g] + column * PAIR;
        const element *chance = p + g * LANES;
        for (int64_t k = 0; k < steps; k++, v += width * PAIR, soon += width * PAIR, chance += PAIR) {
            panel now[WIDE];
            UNROLL for (int c = 0; c < panels; c++) {
                _mm_prefetch((const char *)(soon + c * PANEL), _MM_HINT_T0);
                now[c] = load_panel(v + c * PANEL);
            }
            UNROLL for (int m = 0; m < rows; m++) {
                const pair both = load_pair(chance + m * TILE);
                UNROLL for (int c = 0; c < panels; c++) acc[m][c] = fma_panel(acc[m][c], now[c], both);
            }
        }
        if (left < LANES && left % PAIR)
            UNROLL for (int c = 0; c < panels; c++) {
                const panel last = load_half_panel(v + c * PANEL);
                UNROLL for (int m = 0; m < rows; m++)
                    acc[m][c] = fma_panel(acc[m][c], last, load_half_pair(chance + m * TILE));
            }
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int c = 0; c < panels; c++) store_floats(out + m * width + column + c * LANES, acc[m][c]);
}

static void add_values(int rows, const element *p, const place *now, const place *next, int64_t positions,
                       int64_t width, const float *factor, float *out) {
    int64_t column = 0;
#define COLUMNS(n, panels)                                       \
    for (; column + panels * LANES <= width; column += panels * LANES) \
        value_tile(n, panels, p, now, next, positions, column, width, factor, out);
#define CASE(n)                           \
    case n:                               \
        if (n <= FEW) { COLUMNS(n, WIDE) }  \
        COLUMNS(n, PANELS)                \
        if (PANELS > 1) { COLUMNS(n, 1) }   \
        break;
    switch (rows) { EACH_ROW_COUNT(CASE) }
#undef CASE
#undef COLUMNS
}

typedef struct {
    element q[QUERIES * MAX_HEAD];
    float out[QUERIES * MAX_HEAD];
    float most[QUERIES], total[QUERIES];
} state;

static void begin(const task *t, const work *w, state *now) {
    const int64_t width = padded(t->head_dim);
    for (int64_t i = 0; i < w->to - w->from; i++) {
        const int64_t row = w->of->row + (w->from + i) / w->group, head = w->head * w->group + (w->from + i) % w->group;
        memcpy(now->q + i * t->head_dim, t->q + row * t->ldq + head * t->head_dim, sizeof(element) * (size_t)t->head_dim);
        memset(now->out + i * width, 0, sizeof(float) * (size_t)width);
        now->most[i] = -INFINITY, now->total[i] = 0;
    }
}

// Processes one tile of positions for all queries of the unit.
static void tile(const task *t, const work *w, int64_t position, const place *here, const place *next, state *now) {
    const int64_t positions = w->stop - position < TILE ? w->stop - position : TILE, width = padded(t->head_dim);
    const int count = (int)(w->to - w->from), pieces = (count + ROWS - 1) / ROWS;
    const int groups = (int)((positions + LANES - 1) / LANES);
    float s[ROWS * TILE], factor[ROWS];
    element p[ROWS * TILE];
    for (int i = 0; i < pieces; i++) {  // tiles of nearly equal height
        const int top = count * i / pieces, rows = count * (i + 1) / pieces - top;
        scores(rows, groups, now->q + top * t->head_dim, here, t->head_dim, t->scale, s);
        if (t->cap > 0) cap_scores(rows, groups, t->cap, s);
        for (int m = 0; m < rows; m++) {
            // Without this prefetch, memory would be idle during the softmax.
            for (int64_t line = 0; i == 0 && line < SOON && line < t->head_dim / PAIR; line++)
                _mm_prefetch((const char *)(next->keys[m % GROUPS] + line * PANEL), _MM_HINT_T0);
            const int64_t stop = w->of->start + (w->from + top + m) / w->group + 1 - position;
            factor[m] = soften(s + m * TILE, p + m * TILE, groups, stop - t->window, stop, now->most + top + m,
                               now->total + top + m);
        }
        add_values(rows, p, here, next, positions, width, factor, now->out + top * width);
    }
}

static void finish(const task *t, const work *w, const state *now) {
    const int64_t width = padded(t->head_dim), d = t->head_dim;
    for (int64_t i = 0; i < w->to - w->from; i++) {
        const int64_t row = w->of->row + (w->from + i) / w->group, head = w->head * w->group + (w->from + i) % w->group;
        const vec total = splat(now->total[i]);
        element *y = t->y + (row * t->heads + head) * d;
        for (int64_t k = 0; k < d; k += LANES) {
            const vec value = quotient(load_floats(now->out + i * width + k), total);
            if (d - k >= LANES) store(y + k, value);
            else store_first((int)(d - k), y + k, value);
        }
    }
}

static void run(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    state now;
    place places[2];
    int at = 0;
    for (int64_t i = from; i < to; i++) {
        const work w = part_of(t, i);
        const int64_t first = w.low / TILE * TILE;
        if (i == from) locate(t, &w, first, places + at);
        begin(t, &w, &now);
        for (int64_t position = first; position < w.stop; position += TILE, at = !at) {
            place *next = places + !at;
            if (position + TILE < w.stop) {
                locate(t, &w, position + TILE, next);
            } else if (i + 1 < to) {
                const work follower = part_of(t, i + 1);
                locate(t, &follower, follower.low / TILE * TILE, next);
            } else {
                *next = places[at];
            }
            tile(t, &w, position, places + at, next, &now);
        }
        finish(t, &w, &now);
    }
}

void attention(const element *q, int64_t ldq, element *y, const element *keys, const element *values,
               const int32_t *blocks, const span *spans, const unit *units, int64_t count, int64_t heads,
               int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t window, float scale, float cap,
               int64_t cost) {
    const task t = {q,   keys,  values,   y,        blocks,     spans,  units, ldq,
                    heads, kv_heads, head_dim, block_size, window, scale, cap};
    share(run, &t, count * kv_heads, cost);
}
