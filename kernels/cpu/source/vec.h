// The vector operations that the kernels are written in, for one element type and one tier per compilation.
//
// A `vec` is 16 floats. A `panel` is PAIR neighboring inputs of each of 16 outputs, and is multiplied by one broadcast
// `pair` of x; a matrix is stored so that two panels, one cache line each, are one step along its inputs. Rows of x are
// read in `chunk`s of CHUNK elements.
//
//                     element  PAIR  CHUNK  registers of a vec
//   avx512, bfloat16  bf16     2     32     1 (vdpbf16ps multiplies pairs and adds in float32)
//   avx512f, bfloat16 bf16     2     32     1 (the halves of a pair are widened as they are multiplied)
//   both, float32     float    1     16     1
//   avx2, bfloat16    bf16     2     16     2 (widened to float32 on the fly)
//   avx2, float32     float    1     16     2
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef BFLOAT16
typedef uint16_t element;
#define PAIR 2
#else
typedef float element;
#define PAIR 1
#endif

#define LANES 16
#define PANEL (LANES * PAIR)
#define STEP (2 * PANEL)
#define LINE (64 / (int)sizeof(element))

INLINE float widen(element x) {
#ifdef BFLOAT16
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
#else
    return x;
#endif
}

// Rounds to the nearest, halves to even; a NaN stays a NaN.
INLINE element narrow(float x) {
#ifdef BFLOAT16
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (element)(bits >> 16 | 0x40);
    return (element)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return x;
#endif
}

// A tile fits into the registers: ROWS rows times PANELS panels. EACH_ROW_COUNT expands a macro for 1 to ROWS.
#ifdef __AVX512F__
#define ROWS 12
#define PANELS 2
#define EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#elif defined(BFLOAT16)
#define ROWS 4
#define PANELS 1
#define EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4)
#else
#define ROWS 6
#define PANELS 1
#define EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4) X(5) X(6)
#endif

#ifdef __AVX512F__

typedef __m512 vec;
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec madd(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec whole(vec a) { return _mm512_roundscale_ps(a, 0); }
INLINE vec times_power(vec a, vec n) { return _mm512_scalef_ps(a, n); }
INLINE vec load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec load_floats_first(int n, const float *p) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE vec load_floats_twice(const float *p) {  // eight of them, each in two neighboring lanes
    const __m512i from = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(from, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
INLINE vec load_bytes(const char *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
// Of the 32 bits in each lane's place, the n-th four say which of 16 floats it gets.
INLINE vec look_up(vec table, const char *p, const int n) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 4 * n), table);
}
INLINE void store_floats(float *p, vec a) { _mm512_storeu_ps(p, a); }
// The first n lanes of a, the others of b.
INLINE vec first(int n, vec a, vec b) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), b, a); }
INLINE float sum(vec a) { return _mm512_reduce_add_ps(a); }
INLINE float largest(vec a) { return _mm512_reduce_max_ps(a); }

INLINE __m128 sum_lanes(vec a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The sums of four vectors.
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    const vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    return sum_lanes(add((vec)low, (vec)high));
}

#ifdef BFLOAT16

#ifdef __AVX512BF16__
typedef __m512bh pairs;
INLINE pairs narrow32(vec high, vec low) { return _mm512_cvtne2ps_pbh(high, low); }
INLINE __m256i narrow16(vec a) { return (__m256i)_mm512_cvtneps_pbh(a); }
INLINE __m128i narrow4(__m128 a) { return (__m128i)_mm_cvtneps_pbh(a); }
INLINE vec fma_pairs(vec acc, pairs a, pairs b) { return _mm512_dpbf16_ps(acc, a, b); }
#else
typedef __m512i pairs;
INLINE __m256i narrow16(vec a) {
    const __m512i bits = (__m512i)a, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, near, quiet), 16));
}
INLINE pairs narrow32(vec high, vec low) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow16(low)), narrow16(high), 1);
}
INLINE __m128i narrow4(__m128 a) { return _mm256_castsi256_si128(narrow16(_mm512_castps128_ps512(a))); }
INLINE vec even(pairs a) { return (vec)_mm512_slli_epi32(a, 16); }
INLINE vec odd(pairs a) { return (vec)_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)); }
INLINE vec fma_pairs(vec acc, pairs a, pairs b) {
    return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), acc));
}
#endif

typedef pairs panel, pair, chunk;
#define CHUNK 32
INLINE vec load(const element *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE vec load_first(int n, const element *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), 16);
}
INLINE void store(element *p, vec a) { _mm256_storeu_si256((__m256i *)p, narrow16(a)); }
INLINE void store_first(int n, element *p, vec a) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), narrow16(a));
}
INLINE void store4(element *p, __m128 a) { _mm_storel_epi64((__m128i *)p, narrow4(a)); }
INLINE void store_panel(element *p, const vec *parts) {
    _mm512_storeu_si512(p, (__m512i)narrow32(parts[1], parts[0]));
}
INLINE panel load_panel(const element *p) { return (panel)_mm512_loadu_si512(p); }
// A panel with zeros as the second halves of its pairs.
INLINE panel load_half_panel(const element *p) {
    return (panel)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff));
}
INLINE pair load_pair(const element *p) {
    int32_t both;
    memcpy(&both, p, 4);
    return (pair)_mm512_set1_epi32(both);
}
INLINE pair load_half_pair(const element *p) { return (pair)_mm512_set1_epi32(*p); }
INLINE pairs widen32(__m256i a) {
    const vec low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(a)));
    return narrow32(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(a, 1))), low);
}
INLINE panel load_panel8(const int8_t *p) { return widen32(_mm256_loadu_si256((const __m256i *)p)); }
// A panel of 16 outputs whose inputs are two rows; in float32, the first alone.
INLINE panel panel_of_rows(const element *p, const element *q) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)q));
    return (panel)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}
INLINE vec fma_panel(vec acc, panel w, pair x) { return fma_pairs(acc, w, x); }
INLINE chunk load_chunk(const element *p) { return (chunk)_mm512_loadu_si512(p); }
INLINE chunk load_chunk_first(int n, const element *p) {
    return (chunk)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
INLINE chunk load_chunk8(const int8_t *p) { return load_panel8(p); }
INLINE void store_chunk(element *p, chunk a) { _mm512_storeu_si512(p, (__m512i)a); }
INLINE vec fma_chunk(vec acc, chunk a, chunk b) { return fma_pairs(acc, a, b); }

#else

typedef __m512 panel, pair, chunk;
#define CHUNK 16
INLINE vec load(const element *p) { return _mm512_loadu_ps(p); }
INLINE vec load_first(int n, const element *p) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void store(element *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE void store_first(int n, element *p, vec a) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
INLINE void store4(element *p, __m128 a) { _mm_storeu_ps(p, a); }
INLINE void store_panel(element *p, const vec *parts) { store(p, *parts); }
INLINE panel load_panel(const element *p) { return _mm512_loadu_ps(p); }
INLINE panel load_half_panel(const element *p) { return load_panel(p); }
INLINE pair load_pair(const element *p) { return _mm512_set1_ps(*p); }
INLINE pair load_half_pair(const element *p) { return load_pair(p); }
INLINE panel panel_of_rows(const element *p, const element *q) { return (void)q, load(p); }
INLINE vec fma_panel(vec acc, panel w, pair x) { return _mm512_fmadd_ps(w, x, acc); }
INLINE chunk load_chunk(const element *p) { return load(p); }
INLINE chunk load_chunk_first(int n, const element *p) { return load_first(n, p); }
INLINE vec fma_chunk(vec acc, chunk a, chunk b) { return _mm512_fmadd_ps(a, b, acc); }

#endif
#else // AVX2

typedef struct { __m256 lo, hi; } vec;
#define BOTH(expression_lo, expression_hi) ((vec){(expression_lo), (expression_hi)})
INLINE vec zero(void) { return BOTH(_mm256_setzero_ps(), _mm256_setzero_ps()); }
INLINE vec splat(float x) { return BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE vec add(vec a, vec b) { return BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)); }
INLINE vec sub(vec a, vec b) { return BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)); }
INLINE vec mul(vec a, vec b) { return BOTH(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)); }
INLINE vec quotient(vec a, vec b) { return BOTH(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)); }
INLINE vec madd(vec a, vec b, vec c) {
    return BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
INLINE vec larger(vec a, vec b) { return BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)); }
INLINE vec smaller(vec a, vec b) { return BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)); }
INLINE vec whole(vec a) { return BOTH(_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)); }
INLINE __m256 power(__m256 n) {
    return (__m256)_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
}
INLINE vec times_power(vec a, vec n) { return BOTH(_mm256_mul_ps(a.lo, power(n.lo)), _mm256_mul_ps(a.hi, power(n.hi))); }
INLINE vec load_floats(const float *p) { return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE vec load_floats_twice(const float *p) {  // eight of them, each in two neighboring lanes
    const __m256 all = _mm256_loadu_ps(p);
    return BOTH(_mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
                _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)));
}
INLINE vec load_bytes(const char *p) {
    const __m128i all = _mm_loadu_si128((const __m128i *)p);
    return BOTH(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))));
}
INLINE __m256 look_up8(vec table, const char *p, const int n) {
    const __m256i index = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)p), 4 * n);
    const __m256 low = _mm256_permutevar8x32_ps(table.lo, index), high = _mm256_permutevar8x32_ps(table.hi, index);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(index, 28));
}
// Of the 32 bits in each lane's place, the n-th four say which of 16 floats it gets.
INLINE vec look_up(vec table, const char *p, const int n) {
    return BOTH(look_up8(table, p, n), look_up8(table, p + 32, n));
}
INLINE void store_floats(float *p, vec a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
// The first n lanes of a, the others of b.
INLINE vec first(int n, vec a, vec b) {
    const __m256i count = _mm256_set1_epi32(n), low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return BOTH(_mm256_blendv_ps(b.lo, a.lo, (__m256)_mm256_cmpgt_epi32(count, low)),
                _mm256_blendv_ps(b.hi, a.hi, (__m256)_mm256_cmpgt_epi32(count, high)));
}
INLINE __m128 halves(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi));
    const __m256 cd = _mm256_hadd_ps(_mm256_add_ps(c.lo, c.hi), _mm256_add_ps(d.lo, d.hi));
    return halves(_mm256_hadd_ps(ab, cd));
}
INLINE float sum(vec a) {
    const __m128 four = halves(_mm256_add_ps(a.lo, a.hi)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest(vec a) {
    const __m256 m = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#define CHUNK 16
#ifdef BFLOAT16

typedef struct { __m256 lo[2], hi[2]; } panel;
typedef struct { __m256 half[2]; } pair;
INLINE __m256 widen8(__m128i a) { return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16); }
INLINE vec load(const element *p) {
    return BOTH(widen8(_mm_loadu_si128((const __m128i *)p)), widen8(_mm_loadu_si128((const __m128i *)(p + 8))));
}
INLINE __m128i narrow8(__m256 a) {
    const __m256i bits = (__m256i)a, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    const __m256i high = _mm256_srli_epi32((__m256i)_mm256_blendv_ps((__m256)near, (__m256)quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
INLINE void store(element *p, vec a) {
    _mm_storeu_si128((__m128i *)p, narrow8(a.lo));
    _mm_storeu_si128((__m128i *)(p + 8), narrow8(a.hi));
}
INLINE void store4(element *p, __m128 a) { _mm_storel_epi64((__m128i *)p, narrow8(_mm256_castps128_ps256(a))); }
INLINE void store_panel(element *p, const vec *parts) {
    store(p, parts[0]);
    store(p + LANES, parts[1]);
}
INLINE __m256 even(__m256i pairs) { return (__m256)_mm256_slli_epi32(pairs, 16); }
INLINE __m256 odd(__m256i pairs) { return (__m256)_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)); }
INLINE panel load_panel(const element *p) {
    const __m256i lo = _mm256_loadu_si256((const __m256i *)p), hi = _mm256_loadu_si256((const __m256i *)(p + 16));
    return (panel){{even(lo), odd(lo)}, {even(hi), odd(hi)}};
}
INLINE panel load_half_panel(const element *p) {
    const panel all = load_panel(p);
    return (panel){{all.lo[0], _mm256_setzero_ps()}, {all.hi[0], _mm256_setzero_ps()}};
}
INLINE pair load_pair(const element *p) {
    int32_t both;
    memcpy(&both, p, 4);
    const __m256i all = _mm256_set1_epi32(both);
    return (pair){{even(all), odd(all)}};
}
INLINE pair load_half_pair(const element *p) { return (pair){{_mm256_set1_ps(widen(*p)), _mm256_setzero_ps()}}; }
INLINE __m256 even8(__m256i pairs) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16)); }
INLINE __m256 odd8(__m256i pairs) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 16)); }
INLINE panel load_panel8(const int8_t *p) {
    const __m256i lo = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    const __m256i hi = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p + 16)));
    return (panel){{even8(lo), odd8(lo)}, {even8(hi), odd8(hi)}};
}
INLINE panel panel_of_rows(const element *p, const element *q) {
    const vec even = load(p), odd = load(q);
    return (panel){{even.lo, odd.lo}, {even.hi, odd.hi}};
}
INLINE vec fma_panel(vec acc, panel w, pair x) {
    acc.lo = _mm256_fmadd_ps(w.lo[0], x.half[0], acc.lo);
    acc.hi = _mm256_fmadd_ps(w.hi[0], x.half[0], acc.hi);
    acc.lo = _mm256_fmadd_ps(w.lo[1], x.half[1], acc.lo);
    acc.hi = _mm256_fmadd_ps(w.hi[1], x.half[1], acc.hi);
    return acc;
}

#else

typedef vec panel;
typedef __m256 pair;
INLINE vec load(const element *p) { return load_floats(p); }
INLINE void store(element *p, vec a) { store_floats(p, a); }
INLINE void store4(element *p, __m128 a) { _mm_storeu_ps(p, a); }
INLINE void store_panel(element *p, const vec *parts) { store(p, *parts); }
INLINE panel load_panel(const element *p) { return load_floats(p); }
INLINE panel load_half_panel(const element *p) { return load_panel(p); }
INLINE pair load_pair(const element *p) { return _mm256_set1_ps(*p); }
INLINE pair load_half_pair(const element *p) { return load_pair(p); }
INLINE panel panel_of_rows(const element *p, const element *q) { return (void)q, load(p); }
INLINE vec fma_panel(vec acc, panel w, pair x) {
    return BOTH(_mm256_fmadd_ps(w.lo, x, acc.lo), _mm256_fmadd_ps(w.hi, x, acc.hi));
}

#endif

typedef vec chunk;
INLINE vec load_floats_first(int n, const float *p) {
    float part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(float));
    return load_floats(part);
}
INLINE vec load_first(int n, const element *p) {
    element part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(element));
    return load(part);
}
INLINE void store_first(int n, element *p, vec a) {
    element part[LANES];
    store(part, a);
    memcpy(p, part, (size_t)n * sizeof(element));
}
INLINE chunk load_chunk(const element *p) { return load(p); }
INLINE chunk load_chunk_first(int n, const element *p) { return load_first(n, p); }
#ifdef BFLOAT16
INLINE chunk load_chunk8(const int8_t *p) { return load_bytes((const char *)p); }
INLINE void store_chunk(element *p, chunk a) { store(p, a); }
#endif
INLINE vec fma_chunk(vec acc, chunk a, chunk b) { return madd(a, b, acc); }

#endif

// Rounds a as a store and a load would.
INLINE vec rounded(vec a) {
#ifdef BFLOAT16
    element kept[LANES];
    store(kept, a);
    return load(kept);
#else
    return a;
#endif
}

// e to the x, with x limited to -87 to 88, within 2 units in the last place of float32 (Cephes' expf).
INLINE vec exponential(vec x) {
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));  // a NaN passes only as the second operand
    const vec n = whole(mul(x, splat(1.44269504088896341f)));
    const vec r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), x));
    vec p = splat(1.9875691500e-4f);
    p = madd(p, r, splat(1.3981999507e-3f));
    p = madd(p, r, splat(8.3334519073e-3f));
    p = madd(p, r, splat(4.1665795894e-2f));
    p = madd(p, r, splat(1.6666665459e-1f));
    p = madd(p, r, splat(5.0000001201e-1f));
    return times_power(madd(p, mul(r, r), add(r, splat(1.0f))), n);
}
