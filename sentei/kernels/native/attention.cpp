// Attention over chosen tiles, and the estimate that chooses them: fp32, one tiled online-softmax path.
//
// One micro-kernel, 6 rows by 16 columns in vector registers, serves both products. Keys are packed once,
// transposed by block; values once, by block. Vector types are the compiler's own, so the same source is AVX2 or
// portable code: the loader picks the clone for the machine.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_MACHINE __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EVERY_MACHINE
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8, kRows = 6;
constexpr float kNone = -std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

INLINE Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
INLINE Vec all(float value) { return Vec{} + value; }

// 2^(x log2 e): split at the nearest integer, a polynomial of degree 6 on [-1/2, 1/2]. Below -87 the result is 0.
INLINE Vec exponential(Vec x) {
  const Vec t = x * 1.44269504088896341f;
  const Vec clamped = t < -126.0f ? all(-126.0f) : t;
  const Vec shifted = clamped + (clamped < 0.0f ? all(-0.5f) : all(0.5f));
  const Ints n = __builtin_convertvector(shifted, Ints);
  const Vec f = (clamped - __builtin_convertvector(n, Vec)) * 0.69314718055994531f;
  Vec p = f * (1.0f / 720) + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const Ints bits = (n + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vec{} : p * power;
}

// C[rows x 8 V] = (add ? C : 0) + A[rows x depth] B[depth x 8 V], all row-major.
template <int R, int V>
INLINE void product_tile(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth, bool add) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * ldc + v * kLanes) : Vec{};
  for (int d = 0; d < depth; ++d) {
    Vec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + d * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * lda + d] * row[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
}

template <int V>
INLINE void product_columns(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int depth,
                            bool add) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows) product_tile<kRows, V>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r + 2 <= rows; r += 2) product_tile<2, V>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r < rows; ++r) product_tile<1, V>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
}

// The same for any number of columns that 16 divides: 6 x 16 fills the sixteen registers of AVX2.
INLINE void product(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int columns,
                    int depth, bool add) {
  for (int j = 0; j < columns; j += 16) product_columns<2>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
}

int round_up(int value) { return (value + 15) / 16 * 16; }

// Hands out 0 … count - 1 to `threads` threads, in order; to fewer where the system gives no more.
// Throws bad_alloc when any of them ran out of memory, after all have ended.
template <class Work>
void in_parallel(int64_t count, int threads, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto run = [&] {
    try {
      for (int64_t i; !failed && (i = next.fetch_add(1)) < count;) work(i);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int t = 1; t < threads; ++t) others.emplace_back(run);
  } catch (const std::system_error&) {
  }
  run();
  for (auto& other : others) other.join();
  if (failed) throw std::bad_alloc();
}

}  // namespace

// What one call works on. Strides are in elements; the last dimension of every tensor is contiguous.
struct Problem {
  const float *query, *key, *value;  // [B, Tq, H, D], [B, Tk, G, D], [B, Tk, G, Dv]
  float *output, *lse;               // [B, Tq, H, Dv] contiguous, [B, Tq, H] contiguous or null
  int64_t query_stride[3], key_stride[3], value_stride[3];
  const int32_t *full_count, *full_ids, *partial_count, *partial_ids;  // [B, P, QB], [B, P, QB, slots]; P = H or G
  const int64_t* lengths;                                              // [B, 2] or null
  const int64_t* order;                                                // [B · H · QB]: items, longest first
  int64_t batch, queries, keys, heads, groups, plan_heads, width, value_width;
  int64_t query_block, key_block, full_slots, partial_slots, causal, threads;
  int64_t first, stride;  // the estimate's rows of a query block
  float scale;
  float* shares;  // [B, H, QB, KB]: the estimate's result
};

namespace {

struct Sizes {
  explicit Sizes(const Problem& p)
      : query_blocks((p.queries + p.query_block - 1) / p.query_block),
        key_blocks((p.keys + p.key_block - 1) / p.key_block),
        columns(round_up(p.key_block)), width(p.width), value_width(round_up(p.value_width)) {}
  int64_t query_blocks, key_blocks;
  int columns, width, value_width;
  int64_t packed_key() const { return int64_t(width) * columns; }
  int64_t packed_value() const { return int64_t(columns) * value_width; }
};

// Calls put(place in the block, its data) for every token of a block of keys or values; row is b · G + g.
template <class Put>
void each_token(const Problem& p, const float* tensor, const int64_t* stride, int64_t row, int64_t block, Put put) {
  const int64_t first = block * p.key_block, last = std::min(first + p.key_block, p.keys);
  for (int64_t j = first; j < last; ++j)
    put(j - first, tensor + row / p.groups * stride[0] + j * stride[1] + row % p.groups * stride[2]);
}

// A block of keys as [D][columns], zeros beyond the end.
void pack_key(const Problem& p, const Sizes& s, int64_t row, int64_t block, float* to) {
  std::fill(to, to + s.packed_key(), 0.0f);
  each_token(p, p.key, p.key_stride, row, block, [&](int64_t place, const float* from) {
    for (int d = 0; d < s.width; ++d) to[d * s.columns + place] = from[d];
  });
}

// A block of values as [columns][Dv], zeros beyond the end.
void pack_value(const Problem& p, const Sizes& s, int64_t row, int64_t block, float* to) {
  std::fill(to, to + s.packed_value(), 0.0f);
  each_token(p, p.value, p.value_stride, row, block, [&](int64_t place, const float* from) {
    std::copy(from, from + p.value_width, to + place * s.value_width);
  });
}

// Minus infinity where row i of the tile may not see a column.
INLINE void forbid(const Problem& p, int64_t b, int64_t first_row, int rows, int row_step, int64_t block, float* scores,
                   int columns) {
  const int64_t start = p.lengths ? p.lengths[2 * b] : 0;
  const int64_t stop = std::min(p.lengths ? p.lengths[2 * b + 1] : p.keys, std::min(p.keys, (block + 1) * p.key_block));
  const int64_t base = block * p.key_block;
  for (int r = 0; r < rows; ++r) {
    const int64_t position = p.keys - p.queries + first_row + int64_t(r) * row_step;
    const int64_t end = p.causal ? std::min(stop, position + 1) : stop;
    for (int j = 0; j < columns; ++j)
      if (base + j < start || base + j >= end) scores[r * columns + j] = kNone;
  }
}

INLINE float largest(const float* row, int columns) {
  Vec most = load(row);
  for (int j = kLanes; j < columns; j += kLanes) {
    const Vec next = load(row + j);
    most = next > most ? next : most;
  }
  float result = most[0];
  for (int l = 1; l < kLanes; ++l) result = std::max(result, most[l]);
  return result;
}

INLINE bool has_nan(const float* row, int columns) {
  for (int j = 0; j < columns; ++j)
    if (row[j] != row[j]) return true;
  return false;
}

// Replaces a row of scores by exp(score - top) and returns the sum.
INLINE float exponentiate(float* row, int columns, float top) {
  Vec sum{};
  for (int j = 0; j < columns; j += kLanes) {
    const Vec share = exponential(load(row + j) - top);
    store(row + j, share);
    sum += share;
  }
  float result = 0;
  for (int l = 0; l < kLanes; ++l) result += sum[l];
  return result;
}

struct Scratch {
  std::vector<float> query, scores, output, top, sum;
};

// One (batch, head, query block): every kept tile, online softmax.
EVERY_MACHINE void attend_item(const Problem& p, const Sizes& s, int64_t item, const float* keys, const float* values,
                               Scratch& t) {
  const int64_t block = item % s.query_blocks, h = item / s.query_blocks % p.heads, b = item / s.query_blocks / p.heads;
  const int64_t g = h / (p.heads / p.groups), first = block * p.query_block;
  const int rows = int(std::min(p.query_block, p.queries - first));
  for (int r = 0; r < rows; ++r) {
    const float* from = p.query + b * p.query_stride[0] + (first + r) * p.query_stride[1] + h * p.query_stride[2];
    for (int d = 0; d < s.width; ++d) t.query[r * s.width + d] = from[d] * p.scale;
  }
  std::fill(t.output.begin(), t.output.end(), 0.0f);
  std::fill(t.top.begin(), t.top.end(), kNone);
  std::fill(t.sum.begin(), t.sum.end(), 0.0f);
  const int64_t place = (b * p.plan_heads + h * p.plan_heads / p.heads) * s.query_blocks + block;
  const int32_t partial = p.partial_count[place], full = p.full_count[place];
  for (int32_t slot = 0; slot < partial + full; ++slot) {
    const bool is_partial = slot < partial;
    const int64_t j = is_partial ? p.partial_ids[place * p.partial_slots + slot]
                                 : p.full_ids[place * p.full_slots + slot - partial];
    const int64_t at = (b * p.groups + g) * s.key_blocks + j;
    product(t.query.data(), s.width, keys + at * s.packed_key(), s.columns, t.scores.data(), s.columns, rows, s.columns,
            s.width, false);
    if (is_partial || s.columns != p.key_block) forbid(p, b, first, rows, 1, j, t.scores.data(), s.columns);
    for (int r = 0; r < rows; ++r) {
      float* row = t.scores.data() + r * s.columns;
      const float top = std::max(t.top[r], largest(row, s.columns));
      if (top == kNone) {  // nothing permitted so far, or nothing but NaN
        if (has_nan(row, s.columns)) t.sum[r] = kNan;
        std::fill(row, row + s.columns, 0.0f);
        continue;
      }
      if (top != t.top[r]) {
        const float shrink = std::exp(t.top[r] - top);
        t.top[r] = top;
        t.sum[r] *= shrink;
        for (int d = 0; d < s.value_width; d += kLanes) {
          float* out = t.output.data() + r * s.value_width + d;
          store(out, load(out) * shrink);
        }
      }
      t.sum[r] += exponentiate(row, s.columns, top);
    }
    product(t.scores.data(), s.columns, values + at * s.packed_value(), s.value_width, t.output.data(), s.value_width,
            rows, s.value_width, s.columns, true);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t where = (b * p.queries + first + r) * p.heads + h;
    const float factor = t.sum[r] == 0.0f ? 0.0f : 1.0f / t.sum[r];
    for (int64_t d = 0; d < p.value_width; ++d)
      p.output[where * p.value_width + d] = t.output[r * s.value_width + d] * factor;
    if (p.lse) p.lse[where] = t.top[r] + std::log(t.sum[r]);
  }
}

// One (batch, head, query block): log Σ exp of every permitted tile for the sampled rows; then shares, and over the
// rows their mean and their root mean square.
EVERY_MACHINE void share_item(const Problem& p, const Sizes& s, int64_t item, const float* keys, Scratch& t,
                              std::vector<float>& mass) {
  const int64_t block = item % s.query_blocks, h = item / s.query_blocks % p.heads, b = item / s.query_blocks / p.heads;
  const int64_t g = h / (p.heads / p.groups), first = block * p.query_block;
  const int skip = int(p.first), step = int(p.stride);
  const int rows = (int(p.query_block) - skip + step - 1) / step;
  for (int r = 0; r < rows; ++r) {
    const int64_t i = first + skip + int64_t(r) * step;
    const float* from = p.query + b * p.query_stride[0] + i * p.query_stride[1] + h * p.query_stride[2];
    for (int d = 0; d < s.width; ++d) t.query[r * s.width + d] = i < p.queries ? from[d] * p.scale : 0.0f;
  }
  const int64_t offset = p.keys - p.queries;
  const int64_t last = offset + std::min(first + p.query_block, p.queries) - 1;
  const int64_t blocks = p.causal ? std::min(s.key_blocks, last / p.key_block + 1) : s.key_blocks;
  for (int64_t j = 0; j < blocks; ++j) {
    product(t.query.data(), s.width, keys + ((b * p.groups + g) * s.key_blocks + j) * s.packed_key(), s.columns,
            t.scores.data(), s.columns, rows, s.columns, s.width, false);
    forbid(p, b, first + skip, rows, step, j, t.scores.data(), s.columns);
    for (int r = 0; r < rows; ++r) {
      float* row = t.scores.data() + r * s.columns;
      const float top = largest(row, s.columns);
      // A NaN makes the sum one; only where nothing else is in the row must it be looked for.
      const bool empty = top == kNone && !has_nan(row, s.columns);
      mass[r * s.key_blocks + j] = empty ? kNone : top + std::log(exponentiate(row, s.columns, top));
    }
  }
  float* mean = p.shares + item * s.key_blocks;
  float* square = mean + p.batch * p.heads * s.query_blocks * s.key_blocks;
  std::fill(mean, mean + s.key_blocks, 0.0f);
  std::fill(square, square + s.key_blocks, 0.0f);
  for (int r = 0; r < rows; ++r) {
    float* row = mass.data() + r * s.key_blocks;
    const float top = *std::max_element(row, row + blocks);
    if (top == kNone && !has_nan(row, int(blocks))) continue;
    float sum = 0;
    for (int64_t j = 0; j < blocks; ++j) sum += row[j] = std::exp(row[j] - top);
    for (int64_t j = 0; j < blocks; ++j) {
      const float share = row[j] / sum;
      mean[j] += share / rows;
      square[j] += share * share / rows;
    }
  }
}

Scratch scratch(const Problem& p, const Sizes& s) {
  const size_t rows = p.query_block;
  return {std::vector<float>(rows * s.width), std::vector<float>(rows * s.columns),
          std::vector<float>(rows * s.value_width), std::vector<float>(rows), std::vector<float>(rows)};
}

}  // namespace

extern "C" {

// Changes whenever `Problem` or a function below does; compared when the library is loaded.
int sentei_abi() { return 3; }
int sentei_problem_size() { return int(sizeof(Problem)); }

// Both return 0, or 1 when memory ran out; the output is then unfinished.
int sentei_attend(const Problem* problem) try {
  const Problem& p = *problem;
  const Sizes s(p);
  const int64_t blocks = p.batch * p.groups * s.key_blocks;
  std::vector<float> keys(blocks * s.packed_key()), values(blocks * s.packed_value());
  in_parallel(blocks, int(p.threads), [&](int64_t i) {
    pack_key(p, s, i / s.key_blocks, i % s.key_blocks, keys.data() + i * s.packed_key());
    pack_value(p, s, i / s.key_blocks, i % s.key_blocks, values.data() + i * s.packed_value());
  });
  in_parallel(p.batch * p.heads * s.query_blocks, int(p.threads), [&](int64_t i) {
    static thread_local Scratch t;
    if (t.query.size() < size_t(p.query_block * s.width) || t.scores.size() < size_t(p.query_block * s.columns) ||
        t.output.size() < size_t(p.query_block * s.value_width) || t.top.size() < size_t(p.query_block))
      t = scratch(p, s);
    attend_item(p, s, p.order[i], keys.data(), values.data(), t);
  });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
} catch (const std::length_error&) {
  return 1;
}

int sentei_shares(const Problem* problem) try {
  const Problem& p = *problem;
  const Sizes s(p);
  const int64_t blocks = p.batch * p.groups * s.key_blocks;
  std::vector<float> keys(blocks * s.packed_key());
  in_parallel(blocks, int(p.threads), [&](int64_t i) {
    pack_key(p, s, i / s.key_blocks, i % s.key_blocks, keys.data() + i * s.packed_key());
  });
  const int64_t items = p.batch * p.heads * s.query_blocks;
  in_parallel(items, int(p.threads), [&](int64_t i) {
    Scratch t = scratch(p, s);
    std::vector<float> mass(size_t(p.query_block) * s.key_blocks);
    share_item(p, s, items - 1 - i, keys.data(), t, mass);
  });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
} catch (const std::length_error&) {
  return 1;
}
}
