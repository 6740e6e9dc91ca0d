// Packs an adapter's matrices into the layout of the kernels; torch takes three times as long.
#include "operations.h"

#define MAX_RANK 256

// A matrix [rows, columns] of elements or of floats, and its destination: a, or b, which is multiplied by a scale.
typedef struct {
    const char *from;
    element *to;
    int64_t rows, columns, of_b, floats;
    double scale;
} laying;

// Loads `count` numbers, starting with the index-th, and multiplies them by a scale.
INLINE void take(const laying *l, int64_t index, int64_t count, vec scale, element *to) {
    const float *floats = (const float *)l->from + index;
    const element *elements = (const element *)l->from + index;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES)
        store(to + k, mul(l->floats ? load_floats(floats + k) : load(elements + k), scale));
    if (k < count) {
        const int n = (int)(count - k);
        store_first(n, to + k, mul(l->floats ? load_floats_first(n, floats + k) : load_first(n, elements + k), scale));
    }
}

// Packs LINE columns of four rows next to each other; rows are padded to a multiple of 4 and columns to one of LINE.
static void lay_a(const laying *l) {
    element *to = l->to;
    for (int64_t quad = 0; quad < l->rows; quad += 4)
        for (int64_t line = 0; line < l->columns; line += LINE)
            for (int64_t row = quad; row < quad + 4; row++, to += LINE) {
                const int64_t left = l->columns - line < LINE ? l->columns - line : LINE;
                const int64_t count = row < l->rows ? left : 0;
                take(l, row * l->columns + line, count, splat(1.0f), to);
                memset(to + count, 0, (size_t)(LINE - count) * sizeof(element));
            }
}

// Packs PAIR columns of 32 rows next to each other, padded with zeros.
static void lay_b(const laying *l) {
    const vec scale = splat((float)l->scale);
    const int64_t steps = (l->columns + PAIR - 1) / PAIR;
    element scaled[2 * LANES][MAX_RANK + LANES];
    element *to = l->to;
    for (int64_t block = 0; block < l->rows; block += 2 * LANES) {
        for (int64_t i = 0; i < 2 * LANES; i++) {
            const int64_t count = block + i < l->rows ? l->columns : 0;
            memset(scaled[i] + count, 0, (size_t)(steps * PAIR - count) * sizeof(element));
            take(l, (block + i) * l->columns, count, scale, scaled[i]);
        }
        for (int64_t k = 0; k < steps; k++)
            for (int64_t i = 0; i < 2 * LANES; i++, to += PAIR) memcpy(to, scaled[i] + k * PAIR, PAIR * sizeof(element));
    }
}

void lay_out(const laying *all, int64_t count) {
    for (const laying *l = all; l < all + count; l++) {
        if (l->of_b) lay_b(l);
        else lay_a(l);
    }
}
