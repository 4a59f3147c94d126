// Attention over chosen tiles: fp32, one tiled online-softmax path.
#include "call.h"

namespace {

INLINE bool has_nan(const float* row, int columns) {
  for (int j = 0; j < columns; ++j)
    if (row[j] != row[j]) return true;
  return false;
}

struct Scratch {
  std::vector<float> query, scores, output, top, sum, largest;
};

// The scores of some query rows against a block of keys, in powers of two; minus infinity where a pair is not permitted.
template <int L>
INLINE void score(const Problem& p, const Sizes& s, const float* query, const float* keys, int rows, float* scores) {
  Simd<L>::product(query, s.width, keys, s.columns, scores, s.columns, rows, s.columns, s.width, false);
  if (p.softcap != 0.0f)
    for (int r = 0; r < rows; ++r) Simd<L>::soften_peaks(scores + r * s.columns, s.columns, p.softcap * kLog2E);
}

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
  const Kept kept(p, s, item.b, item.h, item.block);
  for (int32_t slot = 0; slot < kept.count; ++slot) {
    const int64_t j = kept.block(slot);
    score<L>(p, s, t.query.data(), keys.at(item.group, j), rows, t.scores.data());
    if (kept.is_partial(j) || s.columns != p.key_block)
      forbid(p, item.b, item.first, rows, 1, j, t.scores.data(), s.columns);
    bool matters = p.cut == 0.0f;
    for (int r = 0; r < rows; ++r) {
      t.largest[r] = Simd<L>::largest(t.scores.data() + r * s.columns, s.columns);
      matters |= !(t.largest[r] < t.top[r] - p.cut);  // a NaN does
    }
    if (!matters) continue;
    if (p.kept) p.kept[number * s.key_blocks + j] = 1;
    for (int r = 0; r < rows; ++r) {
      float* row = t.scores.data() + r * s.columns;
      const float top = std::max(t.top[r], t.largest[r]);
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
    const float* from = t.output.data() + r * s.value_width;
    if (p.bfloat16)
      for (int64_t d = 0; d < p.value_width; ++d)
        static_cast<uint16_t*>(p.output)[where * p.value_width + d] = narrow(from[d] * factor);
    else
      for (int64_t d = 0; d < p.value_width; ++d)
        static_cast<float*>(p.output)[where * p.value_width + d] = from[d] * factor;
    p.lse[where] = t.top[r] * kLn2 + std::log(t.sum[r]);
    p.softmax[where] = t.top[r] == kNone ? 0.0f : t.top[r];
    p.softmax[p.batch * p.queries * p.heads + where] = factor;
  }
}
ON_EVERY_MACHINE(attend_item, (const Problem& p, const Sizes& s, int64_t number, const Blocks& keys,
                               const Blocks& values, Scratch& t), (p, s, number, keys, values, t))

}  // namespace

extern "C" {

// Changes whenever `Problem`, `Backward` or a function does; compared when the library is loaded.
int sentei_abi() { return 10; }
int sentei_problem_size() { return int(sizeof(Problem)); }
int sentei_machines() { return machines(); }

// All return a Status; unless it is kDone the output is unfinished.
int sentei_attend(const Problem* problem) {
  return status_of([&] {
    const Problem& p = *problem;
    const Sizes s(p);
    check_plan(p, s);
    const int64_t packed = 4 * s.key_blocks * (int64_t(s.columns) * s.width + p.key_block * s.value_width);
    by_rows(p, packed, [&](int64_t begin, int64_t end) {
      const Blocks keys(p, keys_of(p), begin, end, p.key_block, true);
      const Blocks values(p, values_of(p), begin, end, p.key_block, false);
      const int64_t per_row = s.per_group * s.query_blocks;
      const auto order = longest_first(begin * per_row, end * per_row, [&](int64_t number) {
        const Item item(p, s, number);
        return Kept(p, s, item.b, item.h, item.block).count;
      });
      const size_t rows = p.query_block;
      in_parallel(int64_t(order.size()), p.threads, [&] {
        return Scratch{std::vector<float>(rows * s.width), std::vector<float>(rows * s.columns),
                       std::vector<float>(rows * s.value_width), std::vector<float>(rows), std::vector<float>(rows),
                       std::vector<float>(rows)};
      }, [&](int64_t i, Scratch& t) { attend_item_on[s.machine](p, s, order[i], keys, values, t); });
    });
  });
}
}
