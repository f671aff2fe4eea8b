#include "attention_kernel.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <limits>

#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: of intrinsics that leave lanes undefined
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "exponential.h"

// Attention by tiles, after FlashAttention-2 (Dao, arXiv:2307.08691). A block of queries meets the keys a tile at a
// time: the scores of a tile stay in cache, the softmax is corrected when a later tile has a larger score, and backward
// makes the probabilities again from q, k and the logarithm of each row's sum. All five products are c (+)= a b whose
// columns are the lanes of vectors; what is to be b and lies the wrong way round (k and v for scores) is transposed
// once. An element's terms are added in order whatever the tile, so no bit depends on where the tiles are cut but for
// kKeys.
//
// A function per instruction set, not a file: an inline function of a header, compiled for AVX-512 here, could be the
// copy that the linker keeps for everybody.
#define LOCKSTEP_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

namespace lockstep::nn {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kQueries = 64;          // of a block
constexpr int64_t kKeys = 256;            // of a tile
constexpr int64_t kRow = kKeys + kLanes;  // of scores: room for zeros behind the last, and rows in different cache sets
constexpr int kTileRows = 8, kTileVectors = 2;  // 16 sums in registers: 4 cycles' latency x 1 a cycle, four times over
constexpr int64_t kPanel = kTileVectors * kLanes;
static_assert(kKeys % kQueries == 0, "each row of a causal block sees a key of each tile that the block sees");
static_assert(kQueries % kTileRows == 0, "a causal block begins where rows of keys do");
static_assert(kTileRows <= kLanes, "zeros behind a row reach as far as the rows of its register tile see");

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[kRows x 16 kVectors] (+)= a b over `depth` terms; element (i, p) of a is a[i * kRowStep + p * a_step].
template <int kRows, int kVectors, int64_t kRowStep>
LOCKSTEP_AVX512 LOCKSTEP_INLINE void multiply_in_registers(int64_t depth, const float* a, int64_t a_step,
                                                           const float* b, int64_t b_step, float* c, int64_t c_step,
                                                           bool add) {
  __m512 sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = add ? _mm512_loadu_ps(c + i * c_step + j * kLanes) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < depth; ++p, a += a_step, b += b_step) {
    __m512 row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = _mm512_loadu_ps(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const __m512 factor = _mm512_set1_ps(a[i * kRowStep]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_fmadd_ps(factor, row[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + i * c_step + j * kLanes, sums[i][j]);
  }
}

// The same on 1 to kTileRows rows and any multiple of 16 columns.
template <int64_t kRowStep, int kRows = kTileRows>
LOCKSTEP_AVX512 void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_step,
                              const float* b, int64_t b_step, float* c, int64_t c_step, bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply<kRowStep, kRows - 1>(rows, columns, depth, a, a_step, b, b_step, c, c_step, add);
  }
  int64_t j = 0;
  for (; j + kPanel <= columns; j += kPanel)
    multiply_in_registers<kRows, kTileVectors, kRowStep>(depth, a, a_step, b + j, b_step, c + j, c_step, add);
  for (; j < columns; j += kLanes)
    multiply_in_registers<kRows, 1, kRowStep>(depth, a, a_step, b + j, b_step, c + j, c_step, add);
}

// to[d * to_step + i] = from[i * step + d] for 16 x 16 values, zeros from `rows` on.
LOCKSTEP_AVX512 void transpose(const float* from, int64_t step, int64_t rows, float* to, int64_t to_step) {
  __m512 x[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) x[i] = i < rows ? _mm512_loadu_ps(from + i * step) : _mm512_setzero_ps();
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i second = _mm512_set1_epi32(kLanes);  // makes an index one into the second operand
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {  // swaps the off-diagonal quarters of squares of 2 half
    const __m512i bit = _mm512_set1_epi32(half);
    const __mmask16 is_right = _mm512_test_epi32_mask(lane, bit);
    const __m512i upper = _mm512_mask_add_epi32(lane, is_right, _mm512_sub_epi32(lane, bit), second);
    const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), is_right, lane, second);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & half) != 0) continue;
      const __m512 a = x[i], b = x[i + half];
      x[i] = _mm512_permutex2var_ps(a, upper, b);
      x[i + half] = _mm512_permutex2var_ps(a, lower, b);
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) _mm512_storeu_ps(to + i * to_step, x[i]);
}

// packed[panel][dim][width] = the transpose of x [rows, dim], a panel for `width` rows, zeros behind the last.
LOCKSTEP_AVX512 void pack(const float* x, int64_t step, int64_t rows, int64_t dim, int64_t width, float* packed) {
  for (int64_t i = 0; i < round_up(rows, width); i += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes)
      transpose(x + i * step + d, step, rows - i, packed + (i / width * dim + d) * width + i % width, width);
  }
}

// A block of queries and a tile of keys.
struct Tile {
  int64_t query_begin, queries, key_begin, key_end;
  bool causal;

  // How many keys from `begin` on the block's row i sees.
  int64_t visible(int64_t i, int64_t begin) const {
    return (causal ? std::min(key_end, query_begin + i + 1) : key_end) - begin;
  }
  int64_t visible(int64_t i) const { return visible(i, key_begin); }
};

// scores[queries x keys] = x keys^T, both packed; pieces that no query sees stay as they are.
LOCKSTEP_AVX512 void score(const Tile& tile, int64_t dim, const float* packed_x, const float* packed_keys,
                           float* scores) {
  for (int64_t j = tile.key_begin; j < tile.key_end; j += kPanel) {
    for (int64_t i = 0; i < tile.queries; i += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, tile.queries - i);
      if (tile.visible(i + rows - 1, j) <= 0) continue;
      multiply<1>(rows, kPanel, dim, packed_x + i, kQueries, packed_keys + j * dim, kPanel,
                  scores + i * kRow + (j - tile.key_begin), kRow, /*add=*/false);
    }
  }
}

// y[queries x dim] = weights x over the keys; added to what the tiles before gave.
LOCKSTEP_AVX512 void weigh_keys(const Tile& tile, int64_t dim, const float* weights, Heads<const float> x, float* y,
                                int64_t y_step) {
  for (int64_t i = 0; i < tile.queries; i += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, tile.queries - i);
    multiply<kRow>(rows, dim, tile.visible(i + rows - 1), weights + i * kRow, 1, x.row(tile.key_begin, 0), x.token_step,
                   y + i * y_step, y_step, /*add=*/tile.key_begin > 0);
  }
}

// y[keys x dim] = weights^T x over the queries; added to what the blocks and heads before gave.
LOCKSTEP_AVX512 void weigh_queries(const Tile& tile, int64_t dim, const float* weights, Heads<const float> x,
                                   int64_t head, Heads<float> y) {
  for (int64_t j = tile.key_begin; j < tile.key_end; j += kTileRows) {
    const int64_t first = tile.causal ? std::max<int64_t>(0, j - tile.query_begin) : 0;
    const bool is_new = head == 0 && (tile.causal ? j >= tile.query_begin : tile.query_begin == 0);
    multiply<1>(std::min<int64_t>(kTileRows, tile.key_end - j), dim, tile.queries - first,
                weights + first * kRow + (j - tile.key_begin), kRow, x.row(tile.query_begin + first, head),
                x.token_step, y.row(j, 0), y.token_step, !is_new);
  }
}

LOCKSTEP_AVX512 void fill_lanes(float* x, float value) { _mm512_storeu_ps(x, _mm512_set1_ps(value)); }

LOCKSTEP_AVX512 float largest_of(const float* x, int64_t n) {  // n a multiple of kLanes, here and below
  __m512 lanes = _mm512_loadu_ps(x);
  for (int64_t j = kLanes; j < n; j += kLanes) lanes = _mm512_max_ps(lanes, _mm512_loadu_ps(x + j));
  return _mm512_reduce_max_ps(lanes);
}

LOCKSTEP_AVX512 float sum_of(const float* x, int64_t n) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += kLanes) sums = _mm512_add_ps(sums, _mm512_loadu_ps(x + j));
  return _mm512_reduce_add_ps(sums);
}

LOCKSTEP_AVX512 float dot(const float* x, const float* y, int64_t n) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += kLanes) sums = _mm512_fmadd_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j), sums);
  return _mm512_reduce_add_ps(sums);
}

LOCKSTEP_AVX512 void scale_row(float* x, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

// Of the tiles seen so far, for each row of a block: the largest score, and the sum of exp(scale (score - largest)).
struct Softmax {
  float largest[kQueries], sum[kQueries];
};

// Scores become exponentials, with zeros behind the last that a row sees; out is scaled to the new largest score.
LOCKSTEP_AVX512 void softmax_forward(const Tile& tile, float scale, float* scores, Softmax& softmax, float* out,
                                     int64_t out_step, int64_t dim) {
  for (int64_t i = 0; i < tile.queries; ++i) {
    const int64_t seen = tile.visible(i), n = round_up(seen, kLanes);
    float* row = scores + i * kRow;
    fill_lanes(row + seen, -std::numeric_limits<float>::infinity());
    float largest = largest_of(row, n);
    if (tile.key_begin > 0) largest = std::max(softmax.largest[i], largest);
    const float offset = -largest * scale;
    for (int64_t j = 0; j < n; ++j) row[j] = exponential(__builtin_fmaf(row[j], scale, offset));
    float sum = sum_of(row, n);  // those of -infinity, 2^-126, are lost in a sum that is 1 or more in the end
    fill_lanes(row + seen, 0.0f);
    if (tile.key_begin > 0) {
      const float shrink = exponential((softmax.largest[i] - largest) * scale);
      scale_row(out + i * out_step, dim, shrink);
      sum = __builtin_fmaf(softmax.sum[i], shrink, sum);
    }
    softmax.largest[i] = largest;
    softmax.sum[i] = sum;
  }
}

// Scores become probabilities, and the gradients of probabilities those of q k^T.
LOCKSTEP_AVX512 void softmax_backward(const Tile& tile, float scale, const float* log_sums, const float* deltas,
                                      float* scores, float* grads) {
  for (int64_t i = 0; i < tile.queries; ++i) {
    const int64_t seen = tile.visible(i), n = round_up(seen, kLanes);
    float *p = scores + i * kRow, *g = grads + i * kRow;
    const float log_sum = log_sums[i], delta = deltas[i];
    for (int64_t j = 0; j < n; ++j) {
      p[j] = exponential(__builtin_fmaf(p[j], scale, -log_sum));
      g[j] = p[j] * ((g[j] - delta) * scale);
    }
    fill_lanes(p + seen, 0.0f);
    fill_lanes(g + seen, 0.0f);
  }
}

// The tiles of keys that the block of queries at `begin` sees, in order.
struct Tiles {
  Tile tile;
  int64_t end;

  Tiles(const AttentionShape& shape, int64_t begin)
      : tile{begin, std::min(kQueries, shape.queries - begin), 0, shape.keys, shape.causal},
        end(tile.visible(tile.queries - 1)) {
    tile.key_end = std::min(kKeys, end);
  }
  bool is_done() const { return tile.key_begin >= end; }
  void next() {
    tile.key_begin += kKeys;
    tile.key_end = std::min(tile.key_begin + kKeys, end);
  }
};

}  // namespace

bool has_attention_kernel(int64_t dim) {
  static const bool is_cpu = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
                             __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
                             __builtin_cpu_supports("fma") != 0;
  return is_cpu && dim > 0 && dim % kLanes == 0 && dim <= 256;
}

int64_t attention_scratch_elements(const AttentionShape& shape) {
  return 2 * (round_up(shape.keys, kPanel) * shape.dim + kQueries * shape.dim + kQueries * kRow);
}

LOCKSTEP_AVX512 void attention_forward(Heads<const float> q, Heads<const float> k, Heads<const float> v,
                                       Heads<float> out, float* log_sums, const AttentionShape& shape, float* scratch) {
  const int64_t dim = shape.dim;
  float* packed_k = scratch;
  float* packed_q = packed_k + round_up(shape.keys, kPanel) * dim;
  float* scores = packed_q + kQueries * dim;
  pack(k.data, k.token_step, shape.keys, dim, kPanel, packed_k);
  for (int64_t head = 0; head < shape.heads; ++head, log_sums += shape.queries) {
    for (int64_t begin = 0; begin < shape.queries; begin += kQueries) {
      Tiles tiles(shape, begin);
      const Tile& tile = tiles.tile;
      float* block_out = out.row(begin, head);
      Softmax softmax;
      pack(q.row(begin, head), q.token_step, tile.queries, dim, kQueries, packed_q);
      for (; !tiles.is_done(); tiles.next()) {
        score(tile, dim, packed_q, packed_k, scores);
        softmax_forward(tile, shape.scale, scores, softmax, block_out, out.token_step, dim);
        weigh_keys(tile, dim, scores, v, block_out, out.token_step);
      }
      for (int64_t i = 0; i < tile.queries; ++i) {
        scale_row(block_out + i * out.token_step, dim, 1.0f / softmax.sum[i]);
        log_sums[begin + i] = __builtin_fmaf(softmax.largest[i], shape.scale, std::log(softmax.sum[i]));
      }
    }
  }
}

// With p the probabilities: v_grad = p^T grad; that of p is grad v^T; that of q k^T is
// scale p (grad v^T - delta), delta = sum(grad out) of a row; q_grad and k_grad are its products with k and q.
LOCKSTEP_AVX512 void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k,
                                        Heads<const float> v, Heads<const float> out, const float* log_sums,
                                        AttentionGrads grads, const AttentionShape& shape, float* scratch) {
  const int64_t dim = shape.dim, packed_keys = round_up(shape.keys, kPanel) * dim;
  float* packed_k = scratch;
  float* packed_v = packed_k + packed_keys;
  float* packed_q = packed_v + packed_keys;
  float* packed_grad = packed_q + kQueries * dim;
  float* scores = packed_grad + kQueries * dim;
  float* score_grads = scores + kQueries * kRow;
  float deltas[kQueries];
  pack(k.data, k.token_step, shape.keys, dim, kPanel, packed_k);
  pack(v.data, v.token_step, shape.keys, dim, kPanel, packed_v);
  for (int64_t head = 0; head < shape.heads; ++head, log_sums += shape.queries) {
    for (int64_t begin = 0; begin < shape.queries; begin += kQueries) {
      Tiles tiles(shape, begin);
      const Tile& tile = tiles.tile;
      pack(q.row(begin, head), q.token_step, tile.queries, dim, kQueries, packed_q);
      pack(grad.row(begin, head), grad.token_step, tile.queries, dim, kQueries, packed_grad);
      for (int64_t i = 0; i < tile.queries; ++i)
        deltas[i] = dot(grad.row(begin + i, head), out.row(begin + i, head), dim);
      for (; !tiles.is_done(); tiles.next()) {
        score(tile, dim, packed_q, packed_k, scores);
        score(tile, dim, packed_grad, packed_v, score_grads);
        softmax_backward(tile, shape.scale, log_sums + begin, deltas, scores, score_grads);
        weigh_queries(tile, dim, scores, grad, head, grads.v);
        weigh_queries(tile, dim, score_grads, q, head, grads.k);
        weigh_keys(tile, dim, score_grads, k, grads.q.row(begin, head), grads.q.token_step);
      }
    }
  }
  for (int64_t j = shape.causal ? std::min(shape.queries, shape.keys) : shape.keys; j < shape.keys; ++j) {  // unseen
    std::fill_n(grads.k.row(j, 0), dim, 0.0f);
    std::fill_n(grads.v.row(j, 0), dim, 0.0f);
  }
}

}  // namespace lockstep::nn

#else

namespace lockstep::nn {

bool has_attention_kernel(int64_t) { return false; }
int64_t attention_scratch_elements(const AttentionShape&) { return 0; }
void attention_forward(Heads<const float>, Heads<const float>, Heads<const float>, Heads<float>, float*,
                       const AttentionShape&, float*) {}
void attention_backward(Heads<const float>, Heads<const float>, Heads<const float>, Heads<const float>,
                        Heads<const float>, const float*, AttentionGrads, const AttentionShape&, float*) {}

}  // namespace lockstep::nn

#endif
