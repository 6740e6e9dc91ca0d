// y += x a^T b^T for each piece of a batch, with the piece's own adapter.
#include "threads.h"
#include "vec.h"

// Rows of one adapter, at most PIECE: the caller cuts longer runs.
typedef struct {
    int32_t slot, from, to;
} piece;
#define PIECE 96
#define MAX_RANK 256

// Where an adapter has the matrices of one module, in bytes from the arena's start; no gain: -1; no target: rank 0.
typedef struct {
    int64_t a, b, gain, rank;
} target;

typedef struct {
    const element *x;
    element *y;
    const char *arena;
    const target *table;
    const int64_t *widths;
    const piece *pieces;
    int64_t ldx, ldy, d_in, modules, stride;
} task;

// A tile of the shrink: SHRINK_ROWS rows times four ranks.
#ifdef __AVX512F__
#define SHRINK_ROWS 6
#define EACH_SHRINK(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define SHRINK_ROWS 1
#define EACH_SHRINK(X) X(1)
#endif
#define AHEAD 4096

// h[rows][4] = x a^T for four ranks of a, which lie a cache line of each side by side.
INLINE void shrink_tile(const int rows, const element *x, int64_t ldx, const element *a, int64_t d_in, element *h) {
    vec acc[SHRINK_ROWS][4];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int r = 0; r < 4; r++) acc[m][r] = zero();
    for (int64_t line = 0; line < d_in; line += LINE, a += 4 * LINE)
        UNROLL for (int part = 0; part < LINE; part += CHUNK) {
            const int64_t left = d_in - line - part;
            chunk now[4];
            UNROLL for (int r = 0; r < 4; r++) {
                if (!part) _mm_prefetch((const char *)(a + r * LINE) + AHEAD, _MM_HINT_T0);
                now[r] = load_chunk(a + r * LINE + part);
            }
            UNROLL for (int m = 0; m < rows; m++) {
                const element *from = x + m * ldx + line + part;
                const chunk row = left >= CHUNK ? load_chunk(from) : load_chunk_first(left > 0 ? (int)left : 0, from);
                UNROLL for (int r = 0; r < 4; r++) acc[m][r] = fma_chunk(acc[m][r], now[r], row);
            }
        }
    UNROLL for (int m = 0; m < rows; m++) store4(h + m * MAX_RANK, sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
}

static void shrink(int rows, const element *x, int64_t ldx, const element *a, int64_t rank, int64_t d_in, element *h) {
    const int64_t quad = (d_in + LINE - 1) / LINE * LINE * 4;
    for (int64_t r = 0; r < rank; r += 4)
        for (int m = 0; m < rows; m += SHRINK_ROWS) {
#define CASE(n) \
    case n: shrink_tile(n, x + m * ldx, ldx, a + r / 4 * quad, d_in, h + m * MAX_RANK + r); break;
            switch (rows - m < SHRINK_ROWS ? rows - m : SHRINK_ROWS) { EACH_SHRINK(CASE) }
#undef CASE
        }
}

INLINE void expand_tile(const int rows, const int panels, const element *h, const element *b, int64_t rank, element *y,
                        int64_t ldy, int64_t columns, const float *gain) {
    const int64_t steps = (rank + PAIR - 1) / PAIR;
    vec acc[ROWS][PANELS];
    UNROLL for (int p = 0; p < panels; p++) {
        const int left = columns - p * LANES < LANES ? (int)(columns - p * LANES) : LANES;
        UNROLL for (int m = 0; m < rows; m++)
            acc[m][p] = left == LANES ? load(y + m * ldy + p * LANES) : load_first(left, y + m * ldy + p * LANES);
    }
    for (int64_t k = 0; k < steps; k++) {
        panel now[PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            _mm_prefetch((const char *)(b + k * STEP + p * PANEL) + AHEAD, _MM_HINT_T0);
            now[p] = load_panel(b + k * STEP + p * PANEL);
        }
        UNROLL for (int m = 0; m < rows; m++) {
            const pair both = load_pair(h + m * MAX_RANK + k * PAIR);
            UNROLL for (int p = 0; p < panels; p++) acc[m][p] = fma_panel(acc[m][p], now[p], both);
        }
    }
    UNROLL for (int p = 0; p < panels; p++) {
        const int left = columns - p * LANES < LANES ? (int)(columns - p * LANES) : LANES;
        if (gain) UNROLL for (int m = 0; m < rows; m++) acc[m][p] = mul(acc[m][p], load_floats(gain + p * LANES));
        UNROLL for (int m = 0; m < rows; m++) {
            if (left == LANES) store(y + m * ldy + p * LANES, acc[m][p]);
            else store_first(left, y + m * ldy + p * LANES, acc[m][p]);
        }
    }
}

static void expand(int rows, const element *h, const element *b, int64_t rank, element *y, int64_t ldy, int64_t width,
                   const float *gain) {
    const int64_t block = (rank + PAIR - 1) / PAIR * STEP;
    const int tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t p = 0; p * LANES < width; p += PANELS)
        for (int i = 0; i < tiles; i++) {  // of nearly equal height
            const int top = rows * i / tiles, bottom = rows * (i + 1) / tiles;
            const element *from = h + top * MAX_RANK, *with = b + p / 2 * block + p % 2 * PANEL;
            const float *scale = gain ? gain + p * LANES : 0;
            const int64_t left = width - p * LANES;
            element *to = y + top * ldy + p * LANES;
#define CASE(n)                                                                       \
    case n:                                                                           \
        if (left > LANES) expand_tile(n, PANELS, from, with, rank, to, ldy, left, scale); \
        else expand_tile(n, 1, from, with, rank, to, ldy, left, scale);               \
        break;
            switch (bottom - top) { EACH_ROW_COUNT(CASE) }
#undef CASE
        }
}

static void run(const void *arguments, int64_t from, int64_t to) {
    const task *t = arguments;
    element h[PIECE * MAX_RANK] __attribute__((aligned(64)));
    for (int64_t i = from; i < to; i++) {
        const piece *p = t->pieces + i;
        const int rows = p->to - p->from;
        const element *x = t->x + p->from * t->ldx;
        element *y = t->y + p->from * t->ldy;
        for (int64_t m = 0; m < t->modules; y += t->widths[m++]) {
            const target *at = t->table + p->slot * t->stride + m;
            if (!at->rank) continue;
            shrink(rows, x, t->ldx, (const element *)(t->arena + at->a), at->rank, t->d_in, h);
            expand(rows, h, (const element *)(t->arena + at->b), at->rank, y, t->ldy, t->widths[m],
                   at->gain < 0 ? 0 : (const float *)(t->arena + at->gain));
        }
    }
}

void lora(const element *x, int64_t ldx, element *y, int64_t ldy, int64_t d_in, int64_t modules, const int64_t *widths,
          const char *arena, const target *table, int64_t stride, const piece *pieces, int64_t count) {
    const task t = {x, y, arena, table, widths, pieces, ldx, ldy, d_in, modules, stride};
    int64_t cost = 0;
    for (int64_t m = 0; m < modules; m++)
        cost += (pieces->to - pieces->from) * table[pieces->slot * stride + m].rank * (d_in + widths[m]);
    share(run, &t, count, cost);
}
