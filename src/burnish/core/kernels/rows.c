/* Element-wise work of a transformer block, one pass over each row: norms, activations, the residual, rotations. */
#include <stdlib.h>

#include "parallel.h"
#include "vector.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* An item's rows: CHUNK of them, fewer at the end. */
#define ROWS_OF(item, total) for (long t = (item)*CHUNK; t < MIN(((item) + 1) * CHUNK, total); t++)
#define ITEMS(total) (((total) + CHUNK - 1) / CHUNK)

/* Defines name_f32 and name_bf16 from a body that takes `bf` as a constant. */
#define BOTH(name, body)                                                   \
  static void name##_f32(const void *job, long item) { body(job, item, 0); } \
  static void name##_bf16(const void *job, long item) { body(job, item, 1); }

/* ---- n = x / √(mean x² + eps) · w --------------------------------------------------------------------------- */

typedef struct {
  const float *x, *weight;
  void *out;
  float *rstd;
  long total, width;
  float eps;
} Norm;

INLINE void norm_rows(const void *given, long item, int bf) {
  const Norm *j = given;
  ROWS_OF(item, j->total) {
    const float *x = j->x + t * j->width;
    vec squares = {};
    EACH(i, w, j->width) {
      vec v = LOAD(x, i, w, 0);
      squares += v * v;
    }
    float rstd = 1.0f / sqrtf(sum_lanes(squares) / (float)j->width + j->eps);
    j->rstd[t] = rstd;
    void *out = out_row(j->out, t, j->width, bf);
    EACH(i, w, j->width) STORE(out, i, LOAD(x, i, w, 0) * rstd * LOAD(j->weight, i, w, 0), w, bf);
  }
}
BOTH(norm, norm_rows)

void burnish_norm(const float *x, const float *weight, void *out, float *rstd, long total, long width, float eps, long bf,
                  long threads) {
  Norm job = {x, weight, out, rstd, total, width, eps};
  run_items(bf ? norm_bf16 : norm_f32, &job, ITEMS(total), threads);
}

/* ---- its gradient, plus that of the residual ------------------------------------------------------------------ */

typedef struct {
  const void *grad;
  const float *x, *rstd, *weight, *residual;
  float *dx, *parts; /* parts: (items, width), the weight's gradient of each item's rows, or none */
  long total, width;
} NormBackward;

INLINE void norm_backward_rows(const void *given, long item, int bf) {
  const NormBackward *j = given;
  float *part = j->parts ? j->parts + item * j->width : 0;
  if (part) memset(part, 0, (size_t)j->width * 4);
  ROWS_OF(item, j->total) {
    const void *grad = row_of(j->grad, t, j->width, bf);
    const float *x = j->x + t * j->width, *more = j->residual ? j->residual + t * j->width : 0;
    float *dx = j->dx + t * j->width, rstd = j->rstd[t];
    vec dots = {};
    EACH(i, w, j->width) {
      vec pulled = LOAD(grad, i, w, bf) * (LOAD(x, i, w, 0) * rstd);
      if (part) STORE(part, i, LOAD(part, i, w, 0) + pulled, w, 0);
      dots += pulled * LOAD(j->weight, i, w, 0);
    }
    float share = sum_lanes(dots) / (float)j->width;
    EACH(i, w, j->width) {
      vec unit = LOAD(x, i, w, 0) * rstd;
      vec d = (LOAD(grad, i, w, bf) * LOAD(j->weight, i, w, 0) - unit * share) * rstd;
      STORE(dx, i, more ? d + LOAD(more, i, w, 0) : d, w, 0);
    }
  }
}
BOTH(norm_backward, norm_backward_rows)

void burnish_norm_backward(const void *grad, const float *x, const float *rstd, const float *weight, const float *residual,
                           float *dx, float *parts, long total, long width, long bf, long threads) {
  NormBackward job = {grad, x, rstd, weight, residual, dx, parts, total, width};
  run_items(bf ? norm_backward_bf16 : norm_backward_f32, &job, ITEMS(total), threads);
}

/* ---- silu(gate) · up ------------------------------------------------------------------------------------------ */

typedef struct {
  const void *gate, *up, *grad;
  void *out, *both;
  long total, width;
} Swiglu;

INLINE vec sigmoid(vec x) { return zero_below(x, -88.0f, reciprocal(1.0f + exponential(-x))); }

INLINE void swiglu_rows(const void *given, long item, int bf) {
  const Swiglu *j = given;
  ROWS_OF(item, j->total) {
    const void *gate = row_of(j->gate, t, j->width, bf), *up = row_of(j->up, t, j->width, bf);
    void *out = out_row(j->out, t, j->width, bf);
    EACH(i, w, j->width) {
      vec g = LOAD(gate, i, w, bf);
      STORE(out, i, g * sigmoid(g) * LOAD(up, i, w, bf), w, bf);
    }
  }
}
BOTH(swiglu, swiglu_rows)

void burnish_swiglu(const void *gate, const void *up, void *out, long total, long width, long bf, long threads) {
  Swiglu job = {gate, up, 0, out, 0, total, width};
  run_items(bf ? swiglu_bf16 : swiglu_f32, &job, ITEMS(total), threads);
}

/* grad (T, I) → both (T, 2I): of gate and up; out (T, I): the product again. */
INLINE void swiglu_backward_rows(const void *given, long item, int bf) {
  const Swiglu *j = given;
  ROWS_OF(item, j->total) {
    const void *gate = row_of(j->gate, t, j->width, bf), *up = row_of(j->up, t, j->width, bf);
    const void *grad = row_of(j->grad, t, j->width, bf);
    void *out = out_row(j->out, t, j->width, bf), *to_gate = out_row(j->both, t, 2 * j->width, bf);
    void *to_up = (char *)to_gate + j->width * (bf ? 2 : 4);
    EACH(i, w, j->width) {
      vec g = LOAD(gate, i, w, bf), u = LOAD(up, i, w, bf), d = LOAD(grad, i, w, bf);
      vec s = sigmoid(g), act = g * s;
      STORE(out, i, act * u, w, bf);
      STORE(to_up, i, d * act, w, bf);
      STORE(to_gate, i, d * u * (s + act * (1.0f - s)), w, bf);
    }
  }
}
BOTH(swiglu_backward, swiglu_backward_rows)

void burnish_swiglu_backward(const void *gate, const void *up, const void *grad, void *both, void *out, long total, long width,
                             long bf, long threads) {
  Swiglu job = {gate, up, grad, out, both, total, width};
  run_items(bf ? swiglu_backward_bf16 : swiglu_backward_f32, &job, ITEMS(total), threads);
}

/* ---- x + product ---------------------------------------------------------------------------------------------- */

typedef struct {
  const void *product;
  const float *x;
  const int64_t *rows;
  float *out;
  long total, width;
} Add;

INLINE void add_rows(const void *given, long item, int bf) {
  const Add *j = given;
  ROWS_OF(item, j->total) {
    const void *product = row_of(j->product, t, j->width, bf);
    const float *x = j->x + (j->rows ? j->rows[t] : t) * j->width;
    EACH(i, w, j->width) STORE(j->out + t * j->width, i, LOAD(x, i, w, 0) + LOAD(product, i, w, bf), w, 0);
  }
}
BOTH(add, add_rows)

void burnish_add(const void *product, const float *x, const int64_t *rows, float *out, long total, long width, long bf,
                 long threads) {
  Add job = {product, x, rows, out, total, width};
  run_items(bf ? add_bf16 : add_f32, &job, ITEMS(total), threads);
}

/* ---- queries and keys, normalised and rotated ------------------------------------------------------------------ */

typedef struct {
  const void *qkv;
  const float *q_norm, *k_norm, *cos, *sin, *grad;
  float *rows, *parts; /* parts: (items, 2, size) gradients of the norms, or none */
  void *out;
  long total, heads, kv_heads, size;
  float scale, eps;
} Turn;

#define LONGEST_HEAD 512

INLINE float head_rstd(const void *x, long size, float eps, int bf) {
  vec squares = {};
  EACH(i, w, size) {
    vec v = LOAD(x, i, w, bf);
    squares += v * v;
  }
  return 1.0f / sqrtf(sum_lanes(squares) / (float)size + eps);
}

INLINE void turn_rows(const void *given, long item, int bf) {
  const Turn *j = given;
  const long size = j->size, half = size / 2, turned = j->heads + j->kv_heads, width = (turned + j->kv_heads) * size;
  const long bytes = bf ? 2 : 4;
  ROWS_OF(item, j->total) {
    const float *cos = j->cos + t * size, *sin = j->sin + t * size;
    const char *x = row_of(j->qkv, t, width, bf);
    float *out = j->rows + t * width;
    for (long n = 0; n < turned; n++, x += size * bytes, out += size) {
      const float *norm = n < j->heads ? j->q_norm : j->k_norm;
      const float scale = (n < j->heads ? j->scale : 1.0f) * (norm ? head_rstd(x, size, j->eps, bf) : 1.0f);
      EACH(i, w, half) {
        vec a = LOAD(x, i, w, bf) * scale, b = LOAD(x, half + i, w, bf) * scale;
        if (norm) {
          a *= LOAD(norm, i, w, 0);
          b *= LOAD(norm, half + i, w, 0);
        }
        STORE(out, i, a * LOAD(cos, i, w, 0) - b * LOAD(sin, i, w, 0), w, 0);
        STORE(out, half + i, b * LOAD(cos, half + i, w, 0) + a * LOAD(sin, half + i, w, 0), w, 0);
      }
    }
    EACH(i, w, j->kv_heads * size) STORE(out, i, LOAD(x, i, w, bf), w, 0);
  }
}
BOTH(turn, turn_rows)

void burnish_rotate(const void *qkv, const float *q_norm, const float *k_norm, const float *cos, const float *sin, float *rows,
                    long total, long heads, long kv_heads, long size, float scale, float eps, long bf, long threads) {
  Turn job = {qkv, q_norm, k_norm, cos, sin, 0, rows, 0, 0, total, heads, kv_heads, size, scale, eps};
  run_items(bf ? turn_bf16 : turn_f32, &job, ITEMS(total), threads);
}

INLINE void unturn_rows(const void *given, long item, int bf) {
  const Turn *j = given;
  const long size = j->size, half = size / 2, turned = j->heads + j->kv_heads, width = (turned + j->kv_heads) * size;
  const long bytes = bf ? 2 : 4;
  float g[LONGEST_HEAD];
  float *parts = j->parts ? j->parts + item * 2 * size : 0;
  if (parts) memset(parts, 0, (size_t)size * 8);
  ROWS_OF(item, j->total) {
    const float *cos = j->cos + t * size, *sin = j->sin + t * size, *d = j->grad + t * width;
    const char *x = row_of(j->qkv, t, width, bf);
    char *out = out_row(j->out, t, width, bf);
    for (long n = 0; n < turned; n++, x += size * bytes, out += size * bytes, d += size) {
      const float *norm = n < j->heads ? j->q_norm : j->k_norm;
      const float scale = n < j->heads ? j->scale : 1.0f;
      EACH(i, w, half) {
        vec a = LOAD(d, i, w, 0) * scale, b = LOAD(d, half + i, w, 0) * scale;
        STORE(g, i, a * LOAD(cos, i, w, 0) + b * LOAD(sin, half + i, w, 0), w, 0);
        STORE(g, half + i, b * LOAD(cos, half + i, w, 0) - a * LOAD(sin, i, w, 0), w, 0);
      }
      float rstd = 1.0f, share = 0.0f;
      if (norm) {
        float *part = parts + (n < j->heads ? 0 : size);
        vec dots = {};
        rstd = head_rstd(x, size, j->eps, bf);
        EACH(i, w, size) {
          vec pulled = LOAD(g, i, w, 0) * (LOAD(x, i, w, bf) * rstd), weight = LOAD(norm, i, w, 0);
          STORE(part, i, LOAD(part, i, w, 0) + pulled, w, 0);
          dots += pulled * weight;
          STORE(g, i, LOAD(g, i, w, 0) * weight, w, 0);
        }
        share = sum_lanes(dots) / (float)size * rstd;
      }
      EACH(i, w, size) {
        vec v = LOAD(g, i, w, 0);
        STORE(out, i, norm ? (v - LOAD(x, i, w, bf) * share) * rstd : v, w, bf);
      }
    }
    EACH(i, w, j->kv_heads * size) STORE(out, i, LOAD(d, i, w, 0), w, bf);
  }
}
BOTH(unturn, unturn_rows)

void burnish_rotate_backward(const float *grad, const void *qkv, const float *q_norm, const float *k_norm, const float *cos,
                             const float *sin, void *out, float *parts, long total, long heads, long kv_heads, long size,
                             float scale, float eps, long bf, long threads) {
  Turn job = {qkv, q_norm, k_norm, cos, sin, grad, 0, parts, out, total, heads, kv_heads, size, scale, eps};
  run_items(bf ? unturn_bf16 : unturn_f32, &job, ITEMS(total), threads);
}
