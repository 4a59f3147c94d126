// Attention over chosen tiles, and the estimate that chooses them: fp32, one tiled online-softmax path.
#include "call.h"

namespace {

INLINE bool has_nan(const float* row, int columns) {
  for (int j = 0; j < columns; ++j)
    if (row[j] != row[j]) return true;
  return false;
}

struct Scratch {
  std::vector<float> query, scores, output, top, sum;
};

// Every kept tile of an item, online softmax in powers of two.
template <int L>
INLINE void attend_item(const Problem& p, const Sizes& s, int64_t number, const Blocks& keys, const Blocks& values,
                        Scratch& t) {
  const Item item(p, s, number);
  const int rows = int(std::min(p.query_block, p.queries - item.first));
  load_queries(p, item.row, item.first, rows, 1, t.query.data());
  std::fill(t.output.begin(), t.output.end(), 0.0f);
  std::fill(t.top.begin(), t.top.end(), kNone);
  std::fill(t.sum.begin(), t.sum.end(), 0.0f);
  const Kept kept(p, p.plan, item.b, item.h, item.block, s.query_blocks);
  for (int32_t slot = 0; slot < kept.count; ++slot) {
    const int64_t j = kept.block(slot);
    Simd<L>::product(t.query.data(), s.width, keys.at(item.group, j), s.columns, t.scores.data(), s.columns, rows,
                     s.columns, s.width, false);
    if (kept.is_partial(slot) || s.columns != p.key_block)
      forbid(p, item.b, item.first, rows, 1, j, t.scores.data(), s.columns);
    for (int r = 0; r < rows; ++r) {
      float* row = t.scores.data() + r * s.columns;
      const float top = std::max(t.top[r], Simd<L>::largest(row, s.columns));
      if (top == kNone) {  // nothing permitted so far, or nothing but NaN
        if (has_nan(row, s.columns)) t.sum[r] = kNan;
        std::fill(row, row + s.columns, 0.0f);
        continue;
      }
      if (top != t.top[r]) {
        const float shrink = std::exp2(t.top[r] - top);
        t.top[r] = top;
        t.sum[r] *= shrink;
        for (int d = 0; d < s.value_width; d += L) {
          float* out = t.output.data() + r * s.value_width + d;
          Simd<L>::store(out, Simd<L>::load(out) * shrink);
        }
      }
      t.sum[r] += Simd<L>::exponentiate(row, s.columns, top);
    }
    Simd<L>::product(t.scores.data(), s.columns, values.at(item.group, j), s.value_width, t.output.data(),
                     s.value_width, rows, s.value_width, int(p.key_block), true);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t where = (item.b * p.queries + item.first + r) * p.heads + item.h;
    const float factor = t.sum[r] == 0.0f ? 0.0f : 1.0f / t.sum[r];
    for (int64_t d = 0; d < p.value_width; ++d)
      p.output[where * p.value_width + d] = t.output[r * s.value_width + d] * factor;
    p.lse[where] = t.top[r] * kLn2 + std::log(t.sum[r]);
    p.softmax[where] = t.top[r] == kNone ? 0.0f : t.top[r];
    p.softmax[p.batch * p.queries * p.heads + where] = factor;
  }
}
ON_EVERY_MACHINE(attend_item, (const Problem& p, const Sizes& s, int64_t number, const Blocks& keys,
                               const Blocks& values, Scratch& t), (p, s, number, keys, values, t))

// log2 Σ exp of every permitted tile for the sampled rows of an item; then shares, and over the rows their mean and
// their mean square.
template <int L>
INLINE void share_item(const Problem& p, const Sizes& s, int64_t number, const Blocks& keys, Scratch& t) {
  const Item item(p, s, number);
  const int step = int(p.stride), rows = int((p.query_block - p.first + step - 1) / step);
  const int64_t first = item.first + p.first;
  load_queries(p, item.row, first, rows, step, t.query.data());
  const int64_t last = p.keys - p.queries + std::min(item.first + p.query_block, p.queries) - 1;
  const int64_t blocks = p.causal ? std::min(s.key_blocks, last / p.key_block + 1) : s.key_blocks;
  float* mass = t.output.data();  // [rows][key blocks]
  for (int64_t j = 0; j < blocks; ++j) {
    Simd<L>::product(t.query.data(), s.width, keys.at(item.group, j), s.columns, t.scores.data(), s.columns, rows,
                     s.columns, s.width, false);
    forbid(p, item.b, first, rows, step, j, t.scores.data(), s.columns);
    for (int r = 0; r < rows; ++r) {
      float* row = t.scores.data() + r * s.columns;
      const float top = Simd<L>::largest(row, s.columns);
      // A NaN makes the sum one; only where nothing else is in the row must it be looked for.
      const bool empty = top == kNone && !has_nan(row, s.columns);
      mass[r * s.key_blocks + j] = empty ? kNone : top + std::log2(Simd<L>::exponentiate(row, s.columns, top));
    }
  }
  float* mean = p.shares + number * s.key_blocks;
  float* square = mean + p.batch * p.heads * s.query_blocks * s.key_blocks;
  std::fill(mean, mean + s.key_blocks, 0.0f);
  std::fill(square, square + s.key_blocks, 0.0f);
  for (int r = 0; r < rows; ++r) {
    float* row = mass + r * s.key_blocks;
    const float top = *std::max_element(row, row + blocks);
    if (top == kNone && !has_nan(row, int(blocks))) continue;
    float sum = 0;
    for (int64_t j = 0; j < blocks; ++j) sum += row[j] = std::exp2(row[j] - top);
    for (int64_t j = 0; j < blocks; ++j) {
      const float share = row[j] / sum;
      mean[j] += share / rows;
      square[j] += share * share / rows;
    }
  }
}
ON_EVERY_MACHINE(share_item, (const Problem& p, const Sizes& s, int64_t number, const Blocks& keys, Scratch& t),
                 (p, s, number, keys, t))

}  // namespace

extern "C" {

// Changes whenever `Problem`, `Backward` or a function does; compared when the library is loaded.
int sentei_abi() { return 6; }
int sentei_problem_size() { return int(sizeof(Problem)); }
int sentei_machines() { return machines(); }

// Both return 0, or 1 when memory ran out; the output is then unfinished.
int sentei_attend(const Problem* problem) {
  return status_of([&] {
    const Problem& p = *problem;
    const Sizes s(p);
    const Blocks keys(p, keys_of(p), p.key_block, true), values(p, values_of(p), p.key_block, false);
    const size_t rows = p.query_block;
    in_parallel(p.batch * p.heads * s.query_blocks, p.threads, [&] {
      return Scratch{std::vector<float>(rows * s.width), std::vector<float>(rows * s.columns),
                     std::vector<float>(rows * s.value_width), std::vector<float>(rows), std::vector<float>(rows)};
    }, [&](int64_t i, Scratch& t) { attend_item_on[s.machine](p, s, p.plan.order[i], keys, values, t); });
  });
}

int sentei_shares(const Problem* problem) {
  return status_of([&] {
    const Problem& p = *problem;
    const Sizes s(p);
    const Blocks keys(p, keys_of(p), p.key_block, true);
    const int64_t items = p.batch * p.heads * s.query_blocks;
    const size_t rows = p.query_block;
    in_parallel(items, p.threads, [&] {
      return Scratch{std::vector<float>(rows * s.width), std::vector<float>(rows * s.columns),
                     std::vector<float>(rows * s.key_blocks), {}, {}};
    }, [&](int64_t i, Scratch& t) { share_item_on[s.machine](p, s, items - 1 - i, keys, t); });
  });
}
}
