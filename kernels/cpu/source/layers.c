// All layers of a Llama-like decoder's step in one call: with one row, a call from Python per operation would cost a
// tenth of the step.
#include <stdbool.h>

#include "operations.h"

// A linear, or several fused ones, and the site of its adapters.
typedef struct {
    matrix weight;
    const element *bias;  // [d_out] or null
    const target *table;
    const int64_t *widths;
    int64_t modules, d_in, d_out, in_blocks;
} linear;

typedef struct {
    const element *input_norm, *q_norm, *k_norm, *post_norm, *next_norm;  // q and k norms may be null
    linear qkv, o, gate_up, down;
    element *keys, *values;
    int64_t window;
} layer;

typedef struct {
    element *x, *h, *qkv, *heads, *gate_up, *inner;  // x: the residual; h: the normed rows; the rest is scratch memory
    const float *cos, *sin;
    const int32_t *slots, *blocks;
    const span *spans;
    const unit *units;
    int64_t rows, hidden, queries, kv_heads, head_dim, intermediate, block_size, unit_count, score_cost;
    const char *arena;
    int64_t slots_stride, piece_count, bytes;
    const piece *pieces;
    double eps, scale;
} step;

// y = gain (x w^T + (x a^T) b^T) + bias; the adapter's gain does not scale the bias.
static int apply(const linear *l, const step *s, const element *x, element *y) {
    const bool apart = s->piece_count && !l->in_blocks;
    const int64_t count = apart ? 0 : s->piece_count;
    int failed = adapted_linear(x, l->d_in, &l->weight, y, l->d_out, s->rows, l->d_in, count ? l->modules : 1,
                                count ? l->widths : &l->d_out, s->arena, l->table, s->slots_stride, s->pieces, count,
                                s->bytes);
    if (apart)
        failed |= adapted_linear(x, l->d_in, 0, y, l->d_out, s->rows, l->d_in, l->modules, l->widths, s->arena, l->table,
                                 s->slots_stride, s->pieces, s->piece_count, s->bytes);
    if (l->bias) add_rows(y, l->bias, s->rows, l->d_out);
    return failed;
}

// Normalizes `heads` neighboring heads of each row.
static void norm_heads(const step *s, element *first, int64_t heads, int64_t ld, const element *weight) {
    element *room = s->heads;
    rms_norm(first, s->rows, heads, ld, s->head_dim, weight, room, s->head_dim, (float)s->eps);
    const int64_t size = heads * s->head_dim;
    for (int64_t i = 0; i < s->rows; i++) memcpy(first + i * ld, room + i * size, (size_t)size * sizeof(element));
}

// Writes the normalized output to h. Returns 0, or another number if memory is exhausted.
int run_layers(const layer *layers, int64_t count, const step *s) {
    const int64_t ld = (s->queries + 2 * s->kv_heads) * s->head_dim;
    const float eps = (float)s->eps;
    int failed = 0;
    rms_norm(s->x, s->rows, 1, s->hidden, 0, layers->input_norm, s->h, s->hidden, eps);
    for (const layer *l = layers; l < layers + count && !failed; l++) {
        failed |= apply(&l->qkv, s, s->h, s->qkv);
        if (l->q_norm) {
            norm_heads(s, s->qkv, s->queries, ld, l->q_norm);
            norm_heads(s, s->qkv + s->queries * s->head_dim, s->kv_heads, ld, l->k_norm);
        }
        rope_write(s->qkv, ld, s->rows, s->queries, s->kv_heads, s->head_dim, s->cos, s->sin, l->keys, l->values,
                   s->slots, s->block_size);
        attention(s->qkv, ld, s->heads, l->keys, l->values, s->blocks, s->spans, s->units, s->unit_count, s->queries,
                  s->kv_heads, s->head_dim, s->block_size, l->window, (float)s->scale, 0, s->score_cost);
        failed |= apply(&l->o, s, s->heads, s->h);
        add_rms_norm(s->x, s->hidden, s->h, s->hidden, l->post_norm, s->inner, s->rows, s->hidden, eps);
        failed |= apply(&l->gate_up, s, s->inner, s->gate_up);
        silu_mul(s->gate_up, 2 * s->intermediate, s->inner, s->rows, s->intermediate);
        failed |= apply(&l->down, s, s->inner, s->qkv);
        add_rms_norm(s->x, s->hidden, s->qkv, s->hidden, l->next_norm, s->h, s->rows, s->hidden, eps);
    }
    return failed;
}
