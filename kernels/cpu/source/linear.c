// y = x w^T: the base's linears, for any number of rows.
#include "threads.h"
#include "vec.h"

// Rows of x that one pass over the weights takes: few enough to stay in the second-level cache.
#define PASS (16 * ROWS)
// How far ahead of its use a panel is asked for, in bytes.
#define AHEAD 4096

typedef struct {
    const element *x, *w;
    element *y;
    int64_t ldx, ldy, rows, d_in, d_out;
} task;

INLINE void tile(const int rows, const int panels, const element *x, int64_t ldx, const element *w, int64_t d_in,
                 element *y, int64_t ldy, int64_t columns) {
    const int64_t steps = d_in / PAIR;
    vec acc[ROWS][PANELS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int p = 0; p < panels; p++) acc[m][p] = zero();
    for (int64_t k = 0; k < steps; k++) {
        panel now[PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            _mm_prefetch((const char *)(w + k * STEP + p * PANEL) + AHEAD, _MM_HINT_T0);
            now[p] = load_panel(w + k * STEP + p * PANEL);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            const pair both = load_pair(x + m * ldx + k * PAIR);
            UNROLL for (int p = 0; p < panels; p++) acc[m][p] = fma_panel(acc[m][p], now[p], both);
        }
    }
    if (steps * PAIR < d_in)
        UNROLL for (int p = 0; p < panels; p++) {
            const panel last = load_panel(w + steps * STEP + p * PANEL);
            UNROLL for (int m = 0; m < rows; m++) acc[m][p] = fma_panel(acc[m][p], last, load_half_pair(x + m * ldx + d_in - 1));
        }
    UNROLL for (int p = 0; p < panels; p++) {
        const int64_t left = columns - p * LANES;
        UNROLL for (int m = 0; m < rows; m++) {
            if (left >= LANES) store(y + m * ldy + p * LANES, acc[m][p]);
            else store_first((int)left, y + m * ldy + p * LANES, acc[m][p]);
        }
    }
}

static void any_tile(int rows, int panels, const element *x, int64_t ldx, const element *w, int64_t d_in, element *y,
                     int64_t ldy, int64_t columns) {
#define CASE(n)                                                              \
    case n:                                                                  \
        if (panels > 1) tile(n, PANELS, x, ldx, w, d_in, y, ldy, columns);   \
        else tile(n, 1, x, ldx, w, d_in, y, ldy, columns);                   \
        break;
    switch (rows) { EACH_ROW_COUNT(CASE) }
#undef CASE
}

// Blocks `from` to `to` of PANELS panels.
static void run(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    const int64_t block = (t->d_in + PAIR - 1) / PAIR * STEP;  // elements of two panels
    for (int64_t begin = 0; begin < t->rows; begin += PASS) {
        const int64_t rows = t->rows - begin < PASS ? t->rows - begin : PASS, tiles = (rows + ROWS - 1) / ROWS;
        for (int64_t g = from; g < to; g++) {
            const int64_t p = g * PANELS, column = p * LANES, left = t->d_out - column;
            const element *w = t->w + p / 2 * block + p % 2 * PANEL;
            for (int64_t i = 0; i < tiles; i++) {  // of nearly equal height
                const int64_t top = begin + rows * i / tiles, bottom = begin + rows * (i + 1) / tiles;
                any_tile((int)(bottom - top), left > LANES ? PANELS : 1, t->x + top * t->ldx, t->ldx, w, t->d_in,
                         t->y + top * t->ldy + column, t->ldy, left);
            }
        }
    }
}

void linear(const element *x, int64_t ldx, const element *w, element *y, int64_t ldy, int64_t rows, int64_t d_in,
            int64_t d_out) {
    const task t = {x, w, y, ldx, ldy, rows, d_in, d_out};
    const int64_t groups = (d_out + PANELS * LANES - 1) / (PANELS * LANES);
    share(run, &t, groups, rows * d_in * PANELS * LANES);
}
