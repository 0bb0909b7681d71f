/* Causal attention of packed groups, exact: no score is computed for a key that a query does not see, except within a vector.

   An item is one group and one key head. Its segments are taken one after the other: queries [start, stop) see the keys
   [prompt, prompt_stop) and, causally, [start, stop). Four queries at a time meet all their keys: scores, softmax and the
   weighted sum of values stay in the first-level cache. Backward computes the probabilities again from the log-sum-exp. */
#include <stdlib.h>

#include "parallel.h"
#include "vector.h"

#define QUERIES 4

typedef struct {
  const float *rows;       /* (T, H + 2N, D): scaled queries, keys, values of each token */
  const int64_t *offsets;  /* of each group's segments, and their number at the end */
  const int64_t *segments; /* (·, 4): start, stop, prompt, prompt_stop */
  void *out;               /* forward: (T, H, D) */
  float *lse;              /* (T, H), or none */
  const void *grad;        /* backward: (T, H, D) */
  float *d_rows;           /* backward: as rows */
  long heads, kv_heads, size;
  int *failed; /* set where an item finds no memory */
} Attention;

/* Room of one item, grown as needed and kept by each thread; none where memory has run out. */
static __thread float *room;
static __thread size_t room_size;

static float *take_room(size_t count) {
  if (count > room_size) {
    free(room);
    room = aligned_alloc(64, round_up((long)count, LANES) * sizeof(float));
    room_size = room ? count : 0;
  }
  return room;
}

/* Where the keys of a segment lie: those of the prompt, then its own. */
typedef struct {
  long start, own, prompt, before, count, padded; /* before: keys of the prompt; padded: count, rounded up to two vectors */
} Segment;

static Segment read_segment(const int64_t *s) {
  Segment g = {s[0], s[1] - s[0], s[2], s[3] - s[2], 0, 0};
  g.count = g.before + g.own;
  g.padded = round_up(g.count, 2 * LANES);
  return g;
}

INLINE long key_token(const Segment *g, long j) { return j < g->before ? g->prompt + j : g->start + j - g->before; }

/* (size, padded): number d of each key or value, the keys side by side; zeros behind them. */
static void transpose(const float *rows, const Segment *g, long width, long size, float *out) {
  for (long j = 0; j < g->padded; j += LANES) {
    const float *from[LANES];
    static const float none[1] = {0};
    long step[LANES];
    for (long i = 0; i < LANES; i++) {
      int real = j + i < g->count;
      from[i] = real ? rows + key_token(g, j + i) * width : none;
      step[i] = real;
    }
    for (long d = 0; d < size; d++) {
      float lanes[LANES];
      for (long i = 0; i < LANES; i++) lanes[i] = from[i][d * step[i]];
      memcpy(out + d * g->padded + j, lanes, sizeof lanes);
    }
  }
}

/* Rows of `size`, zeros up to the next multiple of LANES. */
static void copy_padded(const float *from, float *to, long size, long padded) {
  memcpy(to, from, (size_t)size * 4);
  for (long d = size; d < padded; d++) to[d] = 0;
}

/* out (QUERIES, padded) = x (QUERIES, wide) · keys (size, padded), the first `upto` columns. */
static void products(const float *x, const float *keys, float *out, long size, long wide, long padded, long upto) {
  for (long j = 0; j < upto; j += 2 * LANES) {
    vec a[QUERIES][2] = {};
    const float *k = keys + j;
    for (long d = 0; d < size; d++, k += padded) {
      vec left = load(k, 0, 0), right = load(k, LANES, 0);
      for (int r = 0; r < QUERIES; r++) {
        a[r][0] += left * x[r * wide + d];
        a[r][1] += right * x[r * wide + d];
      }
    }
    for (int r = 0; r < QUERIES; r++) {
      store(out + r * padded, j, a[r][0], 0);
      store(out + r * padded, j + LANES, a[r][1], 0);
    }
  }
}

/* out (QUERIES, wide) += p (QUERIES, padded) · rows of `stride`, keys [from, to); n vectors of each row. */
INLINE void weigh(const float *p, const float *rows, float *out, long stride, long wide, long padded, long from, long to, int n) {
  vec a[QUERIES][ACROSS];
  for (int r = 0; r < QUERIES; r++)
    for (int i = 0; i < n; i++) a[r][i] = load(out + r * wide, i * LANES, 0);
  for (long j = from; j < to; j++) {
    const float *row = rows + (j - from) * stride;
    vec v[ACROSS];
    for (int i = 0; i < n; i++) v[i] = load(row, i * LANES, 0);
    for (int r = 0; r < QUERIES; r++)
      for (int i = 0; i < n; i++) a[r][i] += v[i] * p[r * padded + j];
  }
  for (int r = 0; r < QUERIES; r++)
    for (int i = 0; i < n; i++) store(out + r * wide, i * LANES, a[r][i], 0);
}

static void weigh_rows(const float *p, const float *rows, float *out, long stride, long wide, long padded, long from, long to) {
  for (long d = 0; d < wide; d += ACROSS * LANES) {
    long n = (wide - d) / LANES;
    if (n >= ACROSS)
      weigh(p, rows + d, out + d, stride, wide, padded, from, to, ACROSS);
    else if (ACROSS > 3 && n == 3)
      weigh(p, rows + d, out + d, stride, wide, padded, from, to, 3);
    else if (ACROSS > 2 && n == 2)
      weigh(p, rows + d, out + d, stride, wide, padded, from, to, 2);
    else
      weigh(p, rows + d, out + d, stride, wide, padded, from, to, 1);
  }
}

/* rows [from, to) of `wide` += pᵀ · x: what each key is owed by these queries; n vectors of each row. */
INLINE void owe(const float *p, const float *x, float *rows, long wide, long padded, long from, long to, int n) {
  vec q[QUERIES][ACROSS];
  for (int r = 0; r < QUERIES; r++)
    for (int i = 0; i < n; i++) q[r][i] = load(x + r * wide, i * LANES, 0);
  for (long j = from; j < to; j++) {
    float *row = rows + (j - from) * wide;
    for (int i = 0; i < n; i++) {
      vec v = load(row, i * LANES, 0);
      for (int r = 0; r < QUERIES; r++) v += q[r][i] * p[r * padded + j];
      store(row, i * LANES, v, 0);
    }
  }
}

static void owe_rows(const float *p, const float *x, float *rows, long wide, long padded, long from, long to) {
  for (long d = 0; d < wide; d += ACROSS * LANES) {
    long n = (wide - d) / LANES;
    if (n >= ACROSS)
      owe(p, x + d, rows + d, wide, padded, from, to, ACROSS);
    else if (ACROSS > 3 && n == 3)
      owe(p, x + d, rows + d, wide, padded, from, to, 3);
    else if (ACROSS > 2 && n == 2)
      owe(p, x + d, rows + d, wide, padded, from, to, 2);
    else
      owe(p, x + d, rows + d, wide, padded, from, to, 1);
  }
}

/* ---- forward ---------------------------------------------------------------------------------------------------- */

INLINE void forward_item(const void *given, long item, int bf) {
  const Attention *a = given;
  const long size = a->size, wide = round_up(size, LANES), width = (a->heads + 2 * a->kv_heads) * size;
  const long group = item / a->kv_heads, kv = item % a->kv_heads, each = a->heads / a->kv_heads;
  const float *keys = a->rows + (a->heads + kv) * size, *values = keys + a->kv_heads * size;
  for (long s = a->offsets[group]; s < a->offsets[group + 1]; s++) {
    const Segment g = read_segment(a->segments + 4 * s);
    float *turned = take_room((size_t)(g.padded * (size + wide + QUERIES) + 2 * QUERIES * wide)); /* (size, padded) */
    float *plain = turned + g.padded * size, *scores = plain + g.padded * wide, *q = scores + QUERIES * g.padded;
    float *sums = q + QUERIES * wide;
    if (!turned) {
      __atomic_store_n(a->failed, 1, __ATOMIC_RELAXED);
      return;
    }
    transpose(keys, &g, width, size, turned);
    for (long j = 0; j < g.count; j++) copy_padded(values + key_token(&g, j) * width, plain + j * wide, size, wide);
    memset(q, 0, (size_t)(QUERIES * wide) * 4);
    for (long h = kv * each; h < (kv + 1) * each; h++)
      for (long first = 0; first < g.own; first += QUERIES) {
        const long n = g.own - first < QUERIES ? g.own - first : QUERIES, last = g.before + first + n;
        for (long r = 0; r < n; r++) copy_padded(a->rows + (g.start + first + r) * width + h * size, q + r * wide, size, wide);
        products(q, turned, scores, size, wide, g.padded, last);
        float inverse[QUERIES];
        for (long r = 0; r < QUERIES; r++) {
          float *row = scores + r * g.padded;
          const long limit = r < n ? g.before + first + r + 1 : 0;
          vec tops = splat(-INFINITY), sum = {};
          for (long j = 0; j < limit; j += LANES) tops = largest(keep_first(limit - j, load(row, j, 0), tops), tops);
          const float top = max_lanes(tops);
          for (long j = 0; j < limit; j += LANES) {
            vec e = keep_first(limit - j, exponential(load(row, j, 0) - top), splat(0));
            store(row, j, e, 0);
            sum += e;
          }
          for (long j = round_up(limit, LANES); j < last; j += LANES) store(row, j, splat(0), 0);
          const float total = sum_lanes(sum);
          inverse[r] = 1.0f / total;
          if (a->lse && r < n) a->lse[(g.start + first + r) * a->heads + h] = top + logf(total);
        }
        memset(sums, 0, (size_t)(QUERIES * wide) * 4);
        weigh_rows(scores, plain, sums, wide, wide, g.padded, 0, last);
        for (long r = 0; r < n; r++) {
          void *out = out_row(a->out, (g.start + first + r) * a->heads + h, size, bf);
          EACH(d, w, size) STORE(out, d, load(sums + r * wide, d, 0) * inverse[r], w, bf);
        }
      }
  }
}

static void forward_f32(const void *job, long item) { forward_item(job, item, 0); }
static void forward_bf16(const void *job, long item) { forward_item(job, item, 1); }

/* Whether memory has run out. */
long burnish_attend(const float *rows, const int64_t *offsets, const int64_t *segments, void *out, float *lse, long groups,
                    long heads, long kv_heads, long size, long bf, long threads) {
  int failed = 0;
  Attention job = {rows, offsets, segments, out, lse, 0, 0, heads, kv_heads, size, &failed};
  run_items(bf ? forward_bf16 : forward_f32, &job, groups * kv_heads, threads);
  return failed;
}

/* ---- backward --------------------------------------------------------------------------------------------------- */

/* scores → probabilities p, and dp → the gradient of the scores, for one query that sees `limit` keys. */
INLINE void softmax_backward(float *p, float *dp, float lse, long limit, long last) {
  vec sum = {};
  for (long j = 0; j < limit; j += LANES) {
    vec e = keep_first(limit - j, exponential(load(p, j, 0) - lse), splat(0));
    vec d = keep_first(limit - j, load(dp, j, 0), splat(0));
    store(p, j, e, 0);
    store(dp, j, d, 0);
    sum += e * d;
  }
  const float mean = sum_lanes(sum);
  for (long j = 0; j < limit; j += LANES) store(dp, j, load(p, j, 0) * (load(dp, j, 0) - mean), 0);
  for (long j = round_up(limit, LANES); j < last; j += LANES) {
    store(p, j, splat(0), 0);
    store(dp, j, splat(0), 0);
  }
}

INLINE void backward_item(const void *given, long item, int bf) {
  const Attention *a = given;
  const long size = a->size, wide = round_up(size, LANES), width = (a->heads + 2 * a->kv_heads) * size;
  const long group = item / a->kv_heads, kv = item % a->kv_heads, each = a->heads / a->kv_heads;
  const float *keys = a->rows + (a->heads + kv) * size, *values = keys + a->kv_heads * size;
  long start = -1, end = 0, longest = 0; /* of the group, and of its segments' keys */
  for (long s = a->offsets[group]; s < a->offsets[group + 1]; s++) {
    const Segment g = read_segment(a->segments + 4 * s);
    start = start < 0 || g.start < start ? g.start : start;
    end = g.start + g.own > end ? g.start + g.own : end;
    longest = g.padded > longest ? g.padded : longest;
  }
  if (start < 0) return;
  const long tokens = end - start;
  float *plain = take_room((size_t)(3 * tokens * wide + longest * (2 * size + 2 * QUERIES) + 3 * QUERIES * wide));
  float *dk = plain + tokens * wide, *dv = dk + tokens * wide, *turned_keys = dv + tokens * wide;
  float *turned_values = turned_keys + longest * size, *p = turned_values + longest * size, *dp = p + QUERIES * longest;
  float *q = dp + QUERIES * longest, *out = q + QUERIES * wide, *dq = out + QUERIES * wide;
  if (!plain) {
    __atomic_store_n(a->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (long t = 0; t < tokens; t++) copy_padded(keys + (start + t) * width, plain + t * wide, size, wide);
  memset(dk, 0, (size_t)(2 * tokens * wide) * 4);
  for (long s = a->offsets[group]; s < a->offsets[group + 1]; s++) {
    const Segment g = read_segment(a->segments + 4 * s);
    transpose(keys, &g, width, size, turned_keys);
    transpose(values, &g, width, size, turned_values);
    const long near = g.before ? g.prompt - start : 0, far = g.start - start; /* first keys of the prompt and of the segment itself */
    for (long h = kv * each; h < (kv + 1) * each; h++)
      for (long first = 0; first < g.own; first += QUERIES) {
        const long n = g.own - first < QUERIES ? g.own - first : QUERIES, last = g.before + first + n;
        memset(q, 0, (size_t)(3 * QUERIES * wide) * 4);
        for (long r = 0; r < n; r++) {
          const long token = g.start + first + r;
          const void *grad = row_of(a->grad, token * a->heads + h, size, bf);
          copy_padded(a->rows + token * width + h * size, q + r * wide, size, wide);
          EACH(d, w, size) STORE(out + r * wide, d, LOAD(grad, d, w, bf), w, 0);
        }
        products(q, turned_keys, p, size, wide, g.padded, last);
        products(out, turned_values, dp, size, wide, g.padded, last);
        for (long r = 0; r < QUERIES; r++) {
          const long limit = r < n ? g.before + first + r + 1 : 0;
          const float lse = r < n ? a->lse[(g.start + first + r) * a->heads + h] : 0;
          softmax_backward(p + r * g.padded, dp + r * g.padded, lse, limit, last);
        }
        weigh_rows(dp, plain + near * wide, dq, wide, wide, g.padded, 0, g.before);
        weigh_rows(dp, plain + far * wide, dq, wide, wide, g.padded, g.before, last);
        owe_rows(dp, q, dk + near * wide, wide, g.padded, 0, g.before);
        owe_rows(dp, q, dk + far * wide, wide, g.padded, g.before, last);
        owe_rows(p, out, dv + near * wide, wide, g.padded, 0, g.before);
        owe_rows(p, out, dv + far * wide, wide, g.padded, g.before, last);
        for (long r = 0; r < n; r++)
          memcpy(a->d_rows + (g.start + first + r) * width + h * size, dq + r * wide, (size_t)size * 4);
      }
  }
  for (long t = 0; t < tokens; t++) {
    float *to = a->d_rows + (start + t) * width + (a->heads + kv) * size;
    memcpy(to, dk + t * wide, (size_t)size * 4);
    memcpy(to + a->kv_heads * size, dv + t * wide, (size_t)size * 4);
  }
}

static void backward_f32(const void *job, long item) { backward_item(job, item, 0); }
static void backward_bf16(const void *job, long item) { backward_item(job, item, 1); }

long burnish_attend_backward(const float *rows, const int64_t *offsets, const int64_t *segments, const void *grad,
                             const float *lse, float *d_rows, long groups, long heads, long kv_heads, long size, long bf,
                             long threads) {
  int failed = 0;
  Attention job = {rows, offsets, segments, 0, (float *)lse, grad, d_rows, heads, kv_heads, size, &failed};
  run_items(bf ? backward_bf16 : backward_f32, &job, groups * kv_heads, threads);
  return failed;
}
