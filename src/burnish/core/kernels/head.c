/* Log-softmax over tiles of logits, read as the matrix product left them. */
#include "parallel.h"
#include "vector.h"

#define ROWS 8 /* of an item */

typedef struct {
  const void *z; /* (rows, columns) products */
  void *out;
  const int64_t *targets; /* of each row, in the whole vocabulary */
  const float *grad;
  float *lse, *picked;
  long rows, columns, first; /* first: the tile's first word */
  float factor;              /* logits = factor · products */
} Tile;

INLINE void read_tile_rows(const void *given, long item, int bf) {
  const Tile *j = given;
  for (long t = item * ROWS; t < (item + 1) * ROWS && t < j->rows; t++) {
    const void *z = row_of(j->z, t, j->columns, bf);
    vec tops = splat(-INFINITY), sums = {};
    long whole = j->columns / LANES * LANES, rest = j->columns - whole;
    for (long i = 0; i < whole; i += LANES) tops = largest(load(z, i, bf) * j->factor, tops);
    float top = max_lanes(tops);
    vec last = load_part(z, whole, rest, bf) * j->factor;
    for (long i = 0; i < rest; i++) top = last[i] > top ? last[i] : top;
    if (top == -INFINITY) top = 0; /* e^−∞ is 0; of NaN the sum tells */
    for (long i = 0; i < whole; i += LANES) sums += exponential(load(z, i, bf) * j->factor - top);
    last = exponential(last - top);
    float sum = sum_lanes(sums);
    for (long i = 0; i < rest; i++) sum += last[i];
    float here = top + logf(sum), before = j->lse[t];
    /* log(e^before + e^here); the first tile, and tiles of −∞ before it, add nothing */
    if (before == -INFINITY)
      j->lse[t] = here;
    else
      j->lse[t] = here > before ? here + log1pf(expf(before - here)) : before + log1pf(expf(here - before));
    long target = j->targets[t] - j->first;
    if (target >= 0 && target < j->columns) {
      vec one = load_part(z, target, 1, bf);
      j->picked[t] = one[0] * j->factor;
    }
  }
}

INLINE void gradient_tile_rows(const void *given, long item, int bf) {
  const Tile *j = given;
  for (long t = item * ROWS; t < (item + 1) * ROWS && t < j->rows; t++) {
    const void *z = row_of(j->z, t, j->columns, bf);
    void *out = out_row(j->out, t, j->columns, bf);
    float g = j->grad[t] * j->factor, lse = j->lse[t];
    long target = j->targets[t] - j->first;
    EACH(i, w, j->columns) {
      vec d = exponential(LOAD(z, i, w, bf) * j->factor - lse) * -g;
      if (target >= i && target < i + w) {
        float lanes[LANES];
        memcpy(lanes, &d, sizeof lanes);
        lanes[target - i] += g;
        memcpy(&d, lanes, sizeof lanes);
      }
      STORE(out, i, d, w, bf);
    }
  }
}

static void read_f32(const void *job, long item) { read_tile_rows(job, item, 0); }
static void read_bf16(const void *job, long item) { read_tile_rows(job, item, 1); }
static void gradient_f32(const void *job, long item) { gradient_tile_rows(job, item, 0); }
static void gradient_bf16(const void *job, long item) { gradient_tile_rows(job, item, 1); }

/* Adds a tile to the running log-sum-exp of its rows and picks the targets' logits that lie in it. */
void burnish_head(const void *z, const int64_t *targets, float *lse, float *picked, long rows, long columns, long first,
                  float factor, long bf, long threads) {
  Tile job = {z, 0, targets, 0, lse, picked, rows, columns, first, factor};
  run_items(bf ? read_bf16 : read_f32, &job, (rows + ROWS - 1) / ROWS, threads);
}

/* out = grad · d log-prob of the target / d products; may be z itself. */
void burnish_head_backward(const void *z, const int64_t *targets, const float *lse, const float *grad, void *out, long rows,
                           long columns, long first, float factor, long bf, long threads) {
  Tile job = {z, out, targets, grad, (float *)lse, 0, rows, columns, first, factor};
  run_items(bf ? gradient_bf16 : gradient_f32, &job, (rows + ROWS - 1) / ROWS, threads);
}
