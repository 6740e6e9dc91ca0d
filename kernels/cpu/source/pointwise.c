// The operations between the products: norms, SwiGLU, and rotary embedding, which writes keys and values to their
// pages.
#include <math.h>

#include "operations.h"
#include "threads.h"

#define MAX_HEAD 256

INLINE int lanes(int64_t left) { return left < LANES ? (int)left : LANES; }

// Rows are in `groups` of `members`, such as the heads of a token.
typedef struct {
    const element *x, *weight;
    element *residual, *y;
    int64_t members, ld_group, ld_member, ld_residual, d;
    float eps;
} norm_task;

// y = row / sqrt(mean(row^2) + eps) * weight, given the row's sum of squares.
INLINE void normed(const element *row, float squares, const norm_task *t, element *y) {
    const vec by = splat(1.0f / sqrtf(squares / (float)t->d + t->eps));
    int64_t k = 0;
    for (; k + LANES <= t->d; k += LANES) store(y + k, mul(mul(load(row + k), by), load(t->weight + k)));
    if (k < t->d) {
        const int n = (int)(t->d - k);
        store_first(n, y + k, mul(mul(load_first(n, row + k), by), load_first(n, t->weight + k)));
    }
}

static void norm_rows(const void *arguments, int64_t from, int64_t to) {
    const norm_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *row = t->x + i / t->members * t->ld_group + i % t->members * t->ld_member;
        vec squares = zero();
        for (int64_t k = 0; k < t->d; k += LANES) {
            const int n = lanes(t->d - k);
            const vec now = n == LANES ? load(row + k) : load_first(n, row + k);
            squares = madd(now, now, squares);
        }
        normed(row, sum(squares), t, t->y + i * t->d);
    }
}

void rms_norm(const element *x, int64_t groups, int64_t members, int64_t ld_group, int64_t ld_member,
              const element *weight, element *y, int64_t d, float eps) {
    const norm_task t = {x, weight, 0, y, members, ld_group, ld_member, 0, d, eps};
    share(norm_rows, &t, groups * members, 2 * d);
}

static void add_norm_rows(const void *arguments, int64_t from, int64_t to) {
    const norm_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *x = t->x + i * t->ld_group;
        element *row = t->residual + i * t->ld_residual;
        vec squares = zero();
        int64_t k = 0;
        for (; k + LANES <= t->d; k += LANES) {
            store(row + k, add(load(row + k), load(x + k)));
            const vec now = load(row + k);  // after rounding
            squares = madd(now, now, squares);
        }
        if (k < t->d) {
            const int n = (int)(t->d - k);
            store_first(n, row + k, add(load_first(n, row + k), load_first(n, x + k)));
            const vec now = load_first(n, row + k);
            squares = madd(now, now, squares);
        }
        normed(row, sum(squares), t, t->y + i * t->d);
    }
}

void add_rms_norm(element *residual, int64_t ld_residual, const element *x, int64_t ldx, const element *weight,
                  element *y, int64_t rows, int64_t d, float eps) {
    const norm_task t = {x, weight, residual, y, 1, ldx, 0, ld_residual, d, eps};
    share(add_norm_rows, &t, rows, 3 * d);
}

// Rows of a matrix in panels; for their layout see linear.c.
void take_rows(const int64_t *indices, int64_t count, const element *panels, int64_t d_in, element *y) {
    const int64_t steps = (d_in + PAIR - 1) / PAIR;
    for (int64_t i = 0; i < count; i++, y += d_in) {
        const element *from = panels + indices[i] / (2 * LANES) * steps * STEP + indices[i] % (2 * LANES) * PAIR;
        for (int64_t k = 0; k < d_in; k++) y[k] = from[k / PAIR * STEP + k % PAIR];
    }
}

// Adds a row to each row of y.
void add_rows(element *y, const element *bias, int64_t rows, int64_t d) {
    for (int64_t i = 0; i < rows; i++, y += d) {
        int64_t k = 0;
        for (; k + LANES <= d; k += LANES) store(y + k, add(load(y + k), load(bias + k)));
        if (k < d) {
            const int n = (int)(d - k);
            store_first(n, y + k, add(load_first(n, y + k), load_first(n, bias + k)));
        }
    }
}

typedef struct {
    const element *x;
    element *y;
    int64_t ldx, d;
} silu_task;

INLINE vec silu_times(vec gate, vec up) {
    return mul(quotient(gate, add(splat(1.0f), exponential(sub(zero(), gate)))), up);
}

static void silu_rows(const void *arguments, int64_t from, int64_t to) {
    const silu_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *gate = t->x + i * t->ldx, *up = gate + t->d;
        element *y = t->y + i * t->d;
        int64_t k = 0;
        for (; k + LANES <= t->d; k += LANES) store(y + k, silu_times(load(gate + k), load(up + k)));
        if (k < t->d) {
            const int n = (int)(t->d - k);
            store_first(n, y + k, silu_times(load_first(n, gate + k), load_first(n, up + k)));
        }
    }
}

void silu_mul(const element *gate_up, int64_t ldx, element *y, int64_t rows, int64_t d) {
    const silu_task t = {gate_up, y, ldx, d};
    share(silu_rows, &t, rows, 10 * d);
}

typedef struct {
    element *qkv, *keys, *values;
    const float *cos, *sin;
    const int32_t *slots;
    int64_t ldq, heads, kv_heads, head_dim, block_size;
} rope_task;

INLINE void turn(const int n, const element *x, const float *cos, const float *sin, int64_t half, element *y) {
    const vec c = n == LANES ? load_floats(cos) : load_floats_first(n, cos);
    const vec s = n == LANES ? load_floats(sin) : load_floats_first(n, sin);
    const vec a = n == LANES ? load(x) : load_first(n, x), b = n == LANES ? load(x + half) : load_first(n, x + half);
    const vec left = sub(mul(a, c), mul(b, s)), right = madd(b, c, mul(a, s));
    if (n == LANES) store(y, left), store(y + half, right);
    else store_first(n, y, left), store_first(n, y + half, right);
}

INLINE void turn_head(const element *x, const float *cos, const float *sin, int64_t half, element *y) {
    int64_t k = 0;
    for (; k + LANES <= half; k += LANES) turn(LANES, x + k, cos + k, sin + k, half, y + k);
    if (k < half) turn((int)(half - k), x + k, cos + k, sin + k, half, y + k);
}

// The layout of the pages is described in attention.c.
static void rope_rows(const void *arguments, int64_t from, int64_t to) {
    const rope_task *t = arguments;
    const int64_t half = t->head_dim / 2, steps = t->head_dim / PAIR;
    const int64_t width = (t->head_dim + LANES - 1) / LANES * LANES;
    element turned[MAX_HEAD];
    for (int64_t i = from; i < to; i++) {
        element *row = t->qkv + i * t->ldq;
        const float *cos = t->cos + i * half, *sin = t->sin + i * half;
        for (int64_t h = 0; h < t->heads; h++, row += t->head_dim) turn_head(row, cos, sin, half, row);
        const int64_t block = t->slots[i] / t->block_size, place = t->slots[i] % t->block_size;
        for (int64_t h = 0; h < t->kv_heads; h++, row += t->head_dim) {
            const int64_t first = (block * t->kv_heads + h) * t->block_size;
            turn_head(row, cos, sin, half, turned);
            element *key = t->keys + (first + place / LANES * LANES) * t->head_dim + place % LANES * PAIR;
            for (int64_t k = 0; k < steps; k++) memcpy(key + k * PANEL, turned + k * PAIR, sizeof(element) * PAIR);
            const element *from_value = row + t->kv_heads * t->head_dim;
            element *value = t->values + (first + place / PAIR * PAIR) * width + place % PAIR;
            for (int64_t k = 0; k < t->head_dim; k++) value[k * PAIR] = from_value[k];
        }
    }
}

void rope_write(element *qkv, int64_t ldq, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                const float *cos, const float *sin, element *keys, element *values, const int32_t *slots,
                int64_t block_size) {
    const rope_task t = {qkv, keys, values, cos, sin, slots, ldq, heads, kv_heads, head_dim, block_size};
    share(rope_rows, &t, rows, (heads + 3 * kv_heads) * head_dim);
}
