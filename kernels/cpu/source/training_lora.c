// The products of adapters in training with their own rows: y += scale (x a^T) b^T, and the gradients.
//
// An adapter's sums run over its own rows, inputs or outputs in one order, whatever the other adapters and the number
// of threads are. A matrix of a few columns or rows is turned into the order in which it is read: that takes about as
// many steps as it has elements, a product with it as many times more as there are rows.
#include <stdbool.h>

#include "operations.h"
#include "threads.h"

// One adapter's rows of a pass, which follow one another in x and y.
typedef struct {
    const element *x;          // [rows, d_in]
    const void *a, *b;         // [rank, d_in] and [d_out, rank], elements or, if `floats`, floats to be rounded
    element *y;                // [rows, d_out]: forward, the output; backward, its gradient
    element *h;                // [rows, padded rank]: scale x a^T
    element *dx;               // [rows, d_in], to which the adapter's part is added; null: not wanted
    const char *kept;          // [rows, d_in]: 1 where dropout keeps an input, else 0; null: everywhere
    float *da, *db;            // the gradients, with elements' precision; null: not wanted
    int64_t rows, ldx, ldy, lddx, rank, floats;
    double scale;
} trained;

// What is computed from one adapter on the way.
typedef struct {
    const element *a, *b;    // as elements
    element *a_room, *b_room;
    element *panels;         // forward, b; backward, a: in panels
    element *turned;         // b^T, [padded rank, d_out]
    element *dh;             // [rows, padded rank]
    element *h_of, *dh_of;   // h^T and dh^T, [rank, padded rows]
} kept_parts;

typedef struct {
    const trained *parts;
    kept_parts *of;
    int64_t count, d_in, d_out;
} pass;

// Rows of a unit of work, and columns.
#define UNIT_ROWS 24
#define UNIT_COLUMNS 192
#define WIDE (2 * LANES)

#ifdef __AVX512F__
#define DOT_ROWS 6
#define EACH_DOT(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define DOT_ROWS 1
#define EACH_DOT(X) X(1)
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t pad_rank(int64_t rank) { return padded(rank, 4); }

// h[rows][4] = scale x w^T for four rows of w.
INLINE void dot_tile(const int rows, const element *x, int64_t ldx, const element *const w[4], int64_t k, float scale,
                     element *h, int64_t ldh) {
    vec acc[DOT_ROWS][4];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int r = 0; r < 4; r++) acc[m][r] = zero();
    int64_t i = 0;
    for (; i + CHUNK <= k; i += CHUNK) {
        chunk now[4];
        UNROLL for (int r = 0; r < 4; r++) now[r] = load_chunk(w[r] + i);
        UNROLL for (int m = 0; m < rows; m++) {
            const chunk row = load_chunk(x + m * ldx + i);
            UNROLL for (int r = 0; r < 4; r++) acc[m][r] = fma_chunk(acc[m][r], now[r], row);
        }
    }
    if (i < k) {
        const int left = (int)(k - i);
        chunk now[4];
        UNROLL for (int r = 0; r < 4; r++) now[r] = load_chunk_first(left, w[r] + i);
        UNROLL for (int m = 0; m < rows; m++) {
            const chunk row = load_chunk_first(left, x + m * ldx + i);
            UNROLL for (int r = 0; r < 4; r++) acc[m][r] = fma_chunk(acc[m][r], now[r], row);
        }
    }
    UNROLL for (int m = 0; m < rows; m++)
        store4(h + m * ldh, _mm_mul_ps(sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]), _mm_set1_ps(scale)));
}

// h[rows][padded rank] = scale x w^T, for w [rank, k]; what is beyond the rank repeats its last column.
static void dot(int64_t rows, const element *x, int64_t ldx, const element *w, int64_t rank, int64_t k, float scale,
                element *h, int64_t ldh) {
    for (int64_t r = 0; r < rank; r += 4) {
        const element *each[4];
        for (int i = 0; i < 4; i++) each[i] = w + least(r + i, rank - 1) * k;
        for (int64_t top = 0; top < rows; top += DOT_ROWS) {
            const element *from = x + top * ldx;
            element *to = h + top * ldh + r;
#define CASE(n)                                              \
    case n:                                                  \
        dot_tile(n, from, ldx, each, k, scale, to, ldh);     \
        break;
            switch (least(rows - top, DOT_ROWS)) { EACH_DOT(CASE) }
#undef CASE
        }
    }
}

// y[rows][columns] += h w for w in panels, `steps` of them; `kept` masks what is added.
INLINE void add_tile(const int rows, const int panels, const element *h, int64_t ldh, const element *w, int64_t steps,
                     const char *kept, int64_t ld_kept, element *y, int64_t ldy, int64_t columns) {
    vec acc[ROWS][PANELS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int p = 0; p < panels; p++) acc[m][p] = zero();
    for (int64_t k = 0; k < steps; k++) {
        panel now[PANELS];
        UNROLL for (int p = 0; p < panels; p++) now[p] = load_panel(w + k * STEP + p * PANEL);
        UNROLL for (int m = 0; m < rows; m++) {
            const pair both = load_pair(h + m * ldh + k * PAIR);
            UNROLL for (int p = 0; p < panels; p++) acc[m][p] = fma_panel(acc[m][p], now[p], both);
        }
    }
    UNROLL for (int p = 0; p < panels; p++) {
        const int n = (int)least(columns - p * LANES, LANES);
        UNROLL for (int m = 0; m < rows; m++) {
            element *to = y + m * ldy + p * LANES;
            if (kept) {
                char bytes[LANES] = {0};
                memcpy(bytes, kept + m * ld_kept + p * LANES, (size_t)n);
                acc[m][p] = mul(acc[m][p], load_bytes(bytes));
            }
            if (n == LANES) store(to, add(load(to), acc[m][p]));
            else store_first(n, to, add(load_first(n, to), acc[m][p]));
        }
    }
}

// y[rows][columns] += h w, for w [rank, columns] in panels.
static void add_product(int64_t rows, const element *h, int64_t ldh, const element *w, const char *kept, element *y,
                        int64_t ldy, int64_t columns) {
    const int64_t steps = ldh / PAIR;
    for (int64_t column = 0; column < columns; column += PANELS * LANES) {
        const element *block = w + column / WIDE * steps * STEP + column / LANES % 2 * PANEL;
        const int64_t left = columns - column;
        for (int64_t top = 0; top < rows; top += ROWS) {
            const element *from = h + top * ldh;
            const char *mask = kept ? kept + top * columns + column : 0;
            element *to = y + top * ldy + column;
#define CASE(n)                                                                                            \
    case n:                                                                                                \
        if (left > LANES) add_tile(n, PANELS, from, ldh, block, steps, mask, columns, to, ldy, left);      \
        else add_tile(n, 1, from, ldh, block, steps, mask, columns, to, ldy, left);                        \
        break;
            switch (least(rows - top, ROWS)) { EACH_ROW_COUNT(CASE) }
#undef CASE
        }
    }
}

// sums[ranks][16] = h^T x for 16 columns of x, of which `columns` exist; h_of is h^T, its rows padded with zeros.
INLINE void outer_tile(const int ranks, const element *h_of, int64_t ldh, const element *x, int64_t ldx, int64_t rows,
                       int columns, float *sums) {
    vec acc[ROWS];
    UNROLL for (int r = 0; r < ranks; r++) acc[r] = zero();
    const element nothing[LANES] = {0};
    element first[2][LANES] = {0};
    for (int64_t k = 0; k < rows; k += PAIR) {
        const element *p = x + k * ldx, *q = k + 1 < rows ? p + ldx : nothing;
        if (columns < LANES) {
            memcpy(first[0], p, (size_t)columns * sizeof(element));
            memcpy(first[1], q, (size_t)columns * sizeof(element));
            p = first[0], q = first[1];
        }
        const panel now = panel_of_rows(p, q);
        UNROLL for (int r = 0; r < ranks; r++) acc[r] = fma_panel(acc[r], now, load_pair(h_of + r * ldh + k));
    }
    UNROLL for (int r = 0; r < ranks; r++) store_floats(sums + r * LANES, rounded(acc[r]));
}

// gradient[rank][columns] = h^T x for columns `from` to `to`, or its transpose [columns][rank].
static void outer(int64_t rank, const element *h_of, int64_t ldh, const element *x, int64_t ldx, int64_t rows,
                  int64_t from, int64_t to, int64_t ld, bool transposed, float *gradient) {
    float sums[ROWS * LANES];
    for (int64_t column = from; column < to; column += LANES)
        for (int64_t r = 0; r < rank; r += ROWS) {
            const int columns = (int)least(to - column, LANES), ranks = (int)least(rank - r, ROWS);
            const element *of = h_of + r * ldh, *at = x + column;
#define CASE(n)                                                     \
    case n:                                                         \
        outer_tile(n, of, ldh, at, ldx, rows, columns, sums);       \
        break;
            switch (ranks) { EACH_ROW_COUNT(CASE) }
#undef CASE
            for (int i = 0; i < ranks; i++) {
                if (!transposed) memcpy(gradient + (r + i) * ld + column, sums + i * LANES, (size_t)columns * 4);
                else
                    for (int j = 0; j < columns; j++) gradient[(column + j) * ld + r + i] = sums[i * LANES + j];
            }
        }
}

// a [rank, columns] in panels.
static void lay_rows(const element *a, int64_t rank, int64_t columns, element *to) {
    for (int64_t column = 0; column < columns; column += WIDE) {
        const int64_t n = least(columns - column, WIDE);
        for (int64_t r = 0; r < pad_rank(rank); r += PAIR, to += STEP) {
            element rows[PAIR][WIDE] = {0};
            for (int64_t part = 0; part < PAIR && r + part < rank; part++)
                memcpy(rows[part], a + (r + part) * columns + column, (size_t)n * sizeof(element));
            for (int i = 0; i < WIDE; i++)
                for (int part = 0; part < PAIR; part++) to[i * PAIR + part] = rows[part][i];
        }
    }
}

// b [rows, rank], transposed, in panels.
static void lay_columns(const element *b, int64_t rank, int64_t rows, element *to) {
    const int64_t steps = pad_rank(rank) / PAIR;
    for (int64_t row = 0; row < padded(rows, WIDE); row++) {
        element *at = to + row / WIDE * steps * STEP + row % WIDE * PAIR;
        for (int64_t k = 0; k < steps; k++, at += STEP) {
            const int64_t left = row < rows ? rank - k * PAIR : 0;
            if (left >= PAIR) memcpy(at, b + row * rank + k * PAIR, PAIR * sizeof(element));
            else
                for (int64_t part = 0; part < PAIR; part++) at[part] = part < left ? b[row * rank + k * PAIR + part] : 0;
        }
    }
}

// from [rows, columns] to its transpose [columns, ld].
static void turn(const element *from, int64_t rows, int64_t columns, int64_t ld_from, element *to, int64_t ld) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column++) to[column * ld + row] = from[row * ld_from + column];
}

// A matrix as elements: itself, or rounded into `room`.
static const element *as_elements(const void *matrix, bool floats, int64_t count, element *room) {
    if (!floats || sizeof(element) == sizeof(float)) return matrix;
    const float *from = matrix;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(room + k, load_floats(from + k));
    for (; k < count; k++) room[k] = narrow(from[k]);
    return room;
}

INLINE int64_t units(int64_t extent, int64_t size) { return (extent + size - 1) / size; }

// The adapter of a unit; the unit's index is then relative to the adapter's first one.
static int64_t part_of(const pass *t, int64_t *unit, int64_t (*count)(const pass *, const trained *)) {
    int64_t part = 0;
    for (int64_t own; *unit >= (own = count(t, t->parts + part)); part++) *unit -= own;
    return part;
}

static int64_t row_units(const pass *t, const trained *p) {
    (void)t;
    return units(p->rows, UNIT_ROWS);
}
static int64_t column_units(const pass *t, const trained *p) {
    (void)p;
    return units(t->d_in, UNIT_COLUMNS) + units(t->d_out, UNIT_COLUMNS);
}

static int64_t sum_units(const pass *t, int64_t (*count)(const pass *, const trained *)) {
    int64_t all = 0;
    for (const trained *p = t->parts; p < t->parts + t->count; p++) all += count(t, p);
    return all;
}

static void prepare_forward(const void *arguments, int64_t from, int64_t to) {
    const pass *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const trained *p = t->parts + i;
        kept_parts *of = t->of + i;
        of->a = as_elements(p->a, p->floats, p->rank * t->d_in, of->a_room);
        of->b = as_elements(p->b, p->floats, p->rank * t->d_out, of->b_room);
        lay_columns(of->b, p->rank, t->d_out, of->panels);
    }
}

static void forward_rows(const void *arguments, int64_t from, int64_t to) {
    const pass *t = arguments;
    for (int64_t i = from; i < to; i++) {
        int64_t unit = i;
        const int64_t part = part_of(t, &unit, row_units);
        const trained *p = t->parts + part;
        const int64_t top = unit * UNIT_ROWS, rows = least(p->rows - top, UNIT_ROWS), ldh = pad_rank(p->rank);
        element *h = p->h + top * ldh;
        dot(rows, p->x + top * p->ldx, p->ldx, t->of[part].a, p->rank, t->d_in, (float)p->scale, h, ldh);
        add_product(rows, h, ldh, t->of[part].panels, 0, p->y + top * p->ldy, p->ldy, t->d_out);
    }
}

static void prepare_backward(const void *arguments, int64_t from, int64_t to) {
    const pass *t = arguments;
    for (int64_t i = from; i < to; i++) {
        const trained *p = t->parts + i;
        kept_parts *of = t->of + i;
        const int64_t ldh = pad_rank(p->rank), ld = padded(p->rows, 2);
        of->a = as_elements(p->a, p->floats, p->rank * t->d_in, of->a_room);
        of->b = as_elements(p->b, p->floats, p->rank * t->d_out, of->b_room);
        if (p->dx) lay_rows(of->a, p->rank, t->d_in, of->panels);
        if (p->dx || p->da) turn(of->b, t->d_out, p->rank, p->rank, of->turned, t->d_out);
        if (p->rows % 2)
            for (int64_t r = 0; r < p->rank; r++) of->h_of[r * ld + p->rows] = of->dh_of[r * ld + p->rows] = 0;
        if (p->db) turn(p->h, p->rows, p->rank, ldh, of->h_of, ld);
    }
}

static void backward_rows(const void *arguments, int64_t from, int64_t to) {
    const pass *t = arguments;
    for (int64_t i = from; i < to; i++) {
        int64_t unit = i;
        const int64_t part = part_of(t, &unit, row_units);
        const trained *p = t->parts + part;
        const kept_parts *of = t->of + part;
        const int64_t top = unit * UNIT_ROWS, rows = least(p->rows - top, UNIT_ROWS), ldh = pad_rank(p->rank);
        if (!p->dx && !p->da) continue;
        element *dh = of->dh + top * ldh;
        dot(rows, p->y + top * p->ldy, p->ldy, of->turned, p->rank, t->d_out, (float)p->scale, dh, ldh);
        if (p->da) turn(dh, rows, p->rank, ldh, of->dh_of + top, padded(p->rows, 2));
        const char *kept = p->kept ? p->kept + top * t->d_in : 0;
        if (p->dx) add_product(rows, dh, ldh, of->panels, kept, p->dx + top * p->lddx, p->lddx, t->d_in);
    }
}

static void backward_columns(const void *arguments, int64_t from, int64_t to) {
    const pass *t = arguments;
    const int64_t of_a = units(t->d_in, UNIT_COLUMNS);
    for (int64_t i = from; i < to; i++) {
        int64_t unit = i;
        const int64_t part = part_of(t, &unit, column_units);
        const trained *p = t->parts + part;
        const kept_parts *of = t->of + part;
        const int64_t ld = padded(p->rows, 2), first = (unit < of_a ? unit : unit - of_a) * UNIT_COLUMNS;
        if (unit < of_a && p->da)
            outer(p->rank, of->dh_of, ld, p->x, p->ldx, p->rows, first, least(first + UNIT_COLUMNS, t->d_in), t->d_in,
                  false, p->da);
        else if (unit >= of_a && p->db)
            outer(p->rank, of->h_of, ld, p->y, p->ldy, p->rows, first, least(first + UNIT_COLUMNS, t->d_out), p->rank,
                  true, p->db);
    }
}

// Elements of room: adapters that need more, as those of a head do, are computed one after another.
#define MOST_ROOM (8 << 20)

static int64_t room_of(const trained *p, int64_t in, int64_t out) {
    const int64_t most = in > out ? in : out;
    return pad_rank(p->rank) * (in + 2 * out + most + 3 * padded(p->rows, 16));
}

// Makes room for what is computed on the way, for as many adapters as may share it; false if memory is exhausted.
static bool make_room(pass *t) {
    const int64_t in = padded(t->d_in, WIDE), out = padded(t->d_out, WIDE), most = in > out ? in : out;
    int64_t count = 0, size = 0;
    while (count < t->count) {
        const int64_t more = room_of(t->parts + count, in, out);
        if (count && size + more > MOST_ROOM) break;
        size += more, count++;
    }
    const int64_t head = padded(count * (int64_t)sizeof(kept_parts), 64) / (int64_t)sizeof(element);
    element *next = scratch(3, head + size);
    if (!next) return false;
    t->of = (kept_parts *)next, t->count = count, next += head;
    for (int64_t i = 0; i < count; i++) {
        const int64_t rank = pad_rank(t->parts[i].rank), rows = padded(t->parts[i].rows, 16);
        element **const all[] = {&t->of[i].a_room, &t->of[i].b_room, &t->of[i].panels, &t->of[i].turned,
                                 &t->of[i].dh,     &t->of[i].h_of,   &t->of[i].dh_of};
        const int64_t sizes[] = {in, out, most, out, rows, rows, rows};
        for (int k = 0; k < 7; k++) *all[k] = next, next += rank * sizes[k];
    }
    return true;
}

// Multiplications of all products of one kind.
static int64_t cost_of(const pass *t) {
    int64_t all = 0;
    for (const trained *p = t->parts; p < t->parts + t->count; p++) all += p->rows * p->rank;
    return all * (t->d_in + t->d_out);
}

// Adds the adapters' outputs to y, and keeps h. Returns 0, or -1 if memory is exhausted.
int train_forward(const trained *parts, int64_t count, int64_t d_in, int64_t d_out) {
    for (const trained *end = parts + count; parts < end;) {
        pass t = {parts, 0, end - parts, d_in, d_out};
        if (!make_room(&t)) return -1;
        const int64_t cost = cost_of(&t), rows = sum_units(&t, row_units);
        share(prepare_forward, &t, t.count, cost / t.count / 16);
        if (rows) share(forward_rows, &t, rows, cost / rows);
        parts += t.count;
    }
    return 0;
}

// Computes the gradients that are wanted. Returns 0, or -1 if memory is exhausted.
int train_backward(const trained *parts, int64_t count, int64_t d_in, int64_t d_out) {
    for (const trained *end = parts + count; parts < end;) {
        pass t = {parts, 0, end - parts, d_in, d_out};
        if (!make_room(&t)) return -1;
        const int64_t cost = cost_of(&t), rows = sum_units(&t, row_units), columns = sum_units(&t, column_units);
        share(prepare_backward, &t, t.count, cost / t.count / 16);
        if (rows) share(backward_rows, &t, rows, cost / rows);
        share(backward_columns, &t, columns, cost / columns);
        parts += t.count;
    }
    return 0;
}
