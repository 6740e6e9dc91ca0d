// The operations of a training pass between its products, forward and backward, in one reading of their inputs each:
// norms, SwiGLU, rotary positions, and the cross-entropy of logits. Each row is computed by itself.
#include <math.h>

#include "operations.h"
#include "threads.h"

INLINE int lanes(int64_t left) { return left < LANES ? (int)left : LANES; }
INLINE vec load_lanes(int n, const element *p) { return n == LANES ? load(p) : load_first(n, p); }
INLINE void store_lanes(int n, element *p, vec a) {
    if (n == LANES) store(p, a);
    else store_first(n, p, a);
}

typedef struct {
    const element *x, *weight, *dy;
    element *y;
    float *factors;
    int64_t d;
    float offset, eps;
} norm_task;

INLINE vec norm_weight(const norm_task *t, int n, int64_t k) {
    return add(load_lanes(n, t->weight + k), splat(t->offset));
}

// With w = weight + offset: y = x f w, with f = 1 / sqrt(mean(x^2) + eps), which is kept.
static void norm_forward(const void *arguments, int64_t from, int64_t to) {
    const norm_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *x = t->x + i * t->d;
        vec squares = zero();
        for (int64_t k = 0; k < t->d; k += LANES) {
            const vec now = load_lanes(lanes(t->d - k), x + k);
            squares = madd(now, now, squares);
        }
        t->factors[i] = 1.0f / sqrtf(sum(squares) / (float)t->d + t->eps);
        const vec factor = splat(t->factors[i]);
        for (int64_t k = 0; k < t->d; k += LANES) {
            const int n = lanes(t->d - k);
            store_lanes(n, t->y + i * t->d + k, mul(mul(load_lanes(n, x + k), factor), norm_weight(t, n, k)));
        }
    }
}

// With g = dy w and n = x f: dx = f (g - n mean(g n)).
static void norm_backward(const void *arguments, int64_t from, int64_t to) {
    const norm_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *x = t->x + i * t->d, *dy = t->dy + i * t->d;
        const vec factor = splat(t->factors[i]);
        vec along = zero();
        for (int64_t k = 0; k < t->d; k += LANES) {
            const int n = lanes(t->d - k);
            along = madd(mul(load_lanes(n, dy + k), norm_weight(t, n, k)), load_lanes(n, x + k), along);
        }
        const vec mean = splat(sum(along) * t->factors[i] * t->factors[i] / (float)t->d);
        for (int64_t k = 0; k < t->d; k += LANES) {
            const int n = lanes(t->d - k);
            const vec g = mul(load_lanes(n, dy + k), norm_weight(t, n, k));
            store_lanes(n, t->y + i * t->d + k, mul(factor, sub(g, mul(load_lanes(n, x + k), mean))));
        }
    }
}

void train_norm_forward(const element *x, const element *weight, element *y, float *factors, int64_t rows, int64_t d,
                        float offset, float eps) {
    const norm_task t = {x, weight, 0, y, factors, d, offset, eps};
    share(norm_forward, &t, rows, 4 * d);
}

void train_norm_backward(const element *dy, const element *x, const element *weight, float *factors, element *dx,
                         int64_t rows, int64_t d, float offset) {
    const norm_task t = {x, weight, dy, dx, factors, d, offset, 0};
    share(norm_backward, &t, rows, 8 * d);
}

// Elements of a unit of elementwise work: a multiple of LANES.
#define UNIT 4096

typedef struct {
    const element *gate, *up, *dy;
    element *y, *d_gate, *d_up;
    int64_t count;
} gated_task;

INLINE vec sigmoid(vec x) { return quotient(splat(1.0f), add(splat(1.0f), exponential(sub(zero(), x)))); }

static void gated_forward(const void *arguments, int64_t from, int64_t to) {
    const gated_task *t = arguments;
    const int64_t end = to * UNIT < t->count ? to * UNIT : t->count;
    for (int64_t k = from * UNIT; k < end; k += LANES) {
        const int n = lanes(end - k);
        const vec gate = load_lanes(n, t->gate + k);
        store_lanes(n, t->y + k, mul(mul(gate, sigmoid(gate)), load_lanes(n, t->up + k)));
    }
}

// With s = sigmoid(gate): d_up = dy gate s, and d_gate = dy up s (1 + gate (1 - s)).
static void gated_backward(const void *arguments, int64_t from, int64_t to) {
    const gated_task *t = arguments;
    const int64_t end = to * UNIT < t->count ? to * UNIT : t->count;
    for (int64_t k = from * UNIT; k < end; k += LANES) {
        const int n = lanes(end - k);
        const vec gate = load_lanes(n, t->gate + k), up = load_lanes(n, t->up + k), dy = load_lanes(n, t->dy + k);
        const vec s = sigmoid(gate), slope = mul(s, madd(gate, sub(splat(1.0f), s), splat(1.0f)));
        store_lanes(n, t->d_up + k, mul(dy, mul(gate, s)));
        store_lanes(n, t->d_gate + k, mul(mul(dy, up), slope));
    }
}

void train_gated_forward(const element *gate, const element *up, element *y, int64_t count) {
    const gated_task t = {gate, up, 0, y, 0, 0, count};
    share(gated_forward, &t, (count + UNIT - 1) / UNIT, 20 * UNIT);
}

void train_gated_backward(const element *dy, const element *gate, const element *up, element *d_gate, element *d_up,
                          int64_t count) {
    const gated_task t = {gate, up, dy, 0, d_gate, d_up, count};
    share(gated_backward, &t, (count + UNIT - 1) / UNIT, 30 * UNIT);
}

typedef struct {
    const element *x, *cos, *sin;
    element *y;
    int64_t heads, d, tokens;
    float sign;
} turn_task;

// Token by token: y = x cos + (-second half of x, first half of x) sin; with sign -1, the inverse.
static void turn_tokens(const void *arguments, int64_t from, int64_t to) {
    const turn_task *t = arguments;
    const int64_t half = t->d / 2;
    const vec sign = splat(t->sign);
    for (int64_t i = from; i < to; i++) {
        const element *cos = t->cos + i % t->tokens * t->d, *sin = t->sin + i % t->tokens * t->d;
        for (int64_t h = 0; h < t->heads; h++) {
            const element *x = t->x + (i * t->heads + h) * t->d;
            element *y = t->y + (i * t->heads + h) * t->d;
            for (int64_t k = 0; k < half; k += LANES) {
                const int n = lanes(half - k);
                const vec c = load_lanes(n, cos + k), s = mul(load_lanes(n, sin + k), sign);
                const vec a = load_lanes(n, x + k), b = load_lanes(n, x + half + k);
                store_lanes(n, y + k, sub(mul(a, c), mul(b, s)));
                store_lanes(n, y + half + k, madd(b, c, mul(a, s)));
            }
        }
    }
}

// x [rows, heads, d]; the angles of row i, [d], are those of token i modulo `tokens`.
void train_turn(const element *x, const element *cos, const element *sin, element *y, int64_t rows, int64_t heads,
                int64_t d, int64_t tokens, float sign) {
    const turn_task t = {x, cos, sin, y, heads, d, tokens, sign};
    share(turn_tokens, &t, rows, 4 * heads * d);
}

typedef struct {
    const element *logits;
    const int64_t *labels;
    const float *weights;
    element *gradient;
    float *losses, *hits;
    int64_t ld, d;
} loss_task;

// Whether a row's first largest logit is the label's.
INLINE int is_first(const element *row, int64_t label, float top) {
    if (widen(row[label]) != top) return 0;
    for (int64_t k = 0; k < label; k++)
        if (widen(row[k]) == top) return 0;
    return 1;
}

static void losses_of_rows(const void *arguments, int64_t from, int64_t to) {
    const loss_task *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const element *row = t->logits + i * t->ld;
        const int64_t label = t->labels[i], whole = t->d / LANES * LANES;
        const int left = (int)(t->d - whole);
        vec most = splat(-INFINITY);
        for (int64_t k = 0; k < whole; k += LANES) most = larger(load(row + k), most);
        if (left) most = first(left, larger(load_first(left, row + whole), most), most);
        const float top = largest(most);
        const vec at = splat(top);
        vec sums = zero();
        for (int64_t k = 0; k < whole; k += LANES) sums = add(sums, exponential(sub(load(row + k), at)));
        if (left) sums = add(sums, first(left, exponential(sub(load_first(left, row + whole), at)), zero()));
        const float all = sum(sums), weight = t->weights[i];
        t->losses[i] = (logf(all) + top - widen(row[label])) * weight;
        t->hits[i] = is_first(row, label, top) ? weight : 0;
        if (!t->gradient) continue;
        element *gradient = t->gradient + i * t->d;
        const vec share_of = splat(weight / all);
        const float own = expf(widen(row[label]) - top) * (weight / all) - weight;
        for (int64_t k = 0; k < t->d; k += LANES) {
            const int n = lanes(t->d - k);
            store_lanes(n, gradient + k, mul(exponential(sub(load_lanes(n, row + k), at)), share_of));
        }
        gradient[label] = narrow(own);
    }
}

// Per row, the weighted cross-entropy, the weight if the label has the first largest logit, and the gradient
// [rows, d] of the sum of the losses; null: not wanted.
void train_losses(const element *logits, int64_t ld, const int64_t *labels, const float *weights, float *losses,
                  float *hits, element *gradient, int64_t rows, int64_t d) {
    const loss_task t = {logits, labels, weights, gradient, losses, hits, ld, d};
    share(losses_of_rows, &t, rows, 40 * d);
}
