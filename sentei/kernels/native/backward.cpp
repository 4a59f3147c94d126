// The gradients of attention over chosen tiles: scores are made again, tile by tile, and nothing is ever n x n.
//
// Two passes, each of which writes what is its own, so that the result does not depend on who was faster: over query
// blocks for the queries' gradients, over key blocks for those of keys and values.
#include "call.h"

// Beside the call itself, whose `softmax` is read.
struct Backward {
  Problem problem;
  const float *gradient, *delta;  // of the output, [B, Tq, H, Dv]; its product with the output, [B, Tq, H]
  float *query, *key, *value;     // the results, contiguous
};

namespace {

// What the problem's plan keeps, turned around: for every key block its query blocks, partial ones first.
class Turned {
 public:
  Turned(const Problem& p, const Sizes& s)
      : heads_(p.plan.full_count ? p.plan.heads : 1), blocks_(s.key_blocks), per_head_(p.heads / heads_),
        ends_(p.batch * heads_ * blocks_ + 1) {
    const auto walk = [&](auto visit) {
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < heads_; ++h)
          for (int64_t i = 0; i < s.query_blocks; ++i) {
            const Kept kept(p, s, b, h * per_head_, i);
            for (int32_t slot = 0; slot < kept.count; ++slot)
              visit((b * heads_ + h) * blocks_ + kept.block(slot), int32_t(i));
          }
    };
    walk([&](int64_t list, int32_t) { ++ends_[list + 1]; });
    for (size_t list = 1; list < ends_.size(); ++list) ends_[list] += ends_[list - 1];
    ids_.resize(ends_.back());
    std::vector<int64_t> next(ends_.begin(), ends_.end() - 1);
    walk([&](int64_t list, int32_t id) { ids_[next[list]++] = id; });
  }
  // The query blocks that head h keeps of a key block, from begin to end.
  std::pair<const int32_t*, const int32_t*> kept(int64_t b, int64_t h, int64_t block) const {
    const int64_t list = (b * heads_ + h / per_head_) * blocks_ + block;
    return {ids_.data() + ends_[list], ids_.data() + ends_[list + 1]};
  }

 private:
  int64_t heads_, blocks_, per_head_;
  std::vector<int64_t> ends_;  // where the list before ends
  std::vector<int32_t> ids_;
};

// Queries and gradients for keys, in both layouts; `scaled` is what scores are made of.
struct Sources {
  Blocks keys, key_rows, values, scaled, query_rows, gradient_rows, gradients;
};

struct Scratch {
  Zeros scores, gradients, left, right, first, second, top, inverse, delta, slopes;
};

// dQ of a block: Σ over its tiles of dS K, with dS = P (dO Vᵀ - delta).
template <int L>
INLINE void query_item(const Backward& w, const Sizes& s, int64_t number, const Sources& from, Scratch& t) {
  const Problem& p = w.problem;
  const Item item(p, s, number);
  const int rows = int(std::min(p.query_block, p.queries - item.first)), width = from.key_rows.line;
  const float *top = p.softmax, *inverse = top + p.batch * p.queries * p.heads, cap = p.softcap * kLog2E;
  float* slopes = cap != 0.0f ? t.slopes.data() : nullptr;
  load_queries(p, item.row, item.first, rows, 1, t.left.data());
  std::fill(t.first.begin(), t.first.end(), 0.0f);
  const Kept kept(p, s, item.b, item.h, item.block);
  for (int32_t slot = 0; slot < kept.count; ++slot) {
    const int64_t j = kept.block(slot);
    float *scores = t.scores.data(), *gradients = t.gradients.data();
    Simd<L>::product(t.left.data(), int(p.width), from.keys.at(item.group, j), s.columns, scores, s.columns, rows,
                     s.columns, int(p.width), false);
    for (int r = 0; slopes && r < rows; ++r)
      Simd<L>::soften_peaks(scores + r * s.columns, s.columns, cap, slopes + r * s.columns);
    if (kept.is_partial(j) || s.columns != p.key_block)
      forbid(p, item.b, item.first, rows, 1, j, scores, s.columns);
    Simd<L>::product(from.gradient_rows.at(item.row, item.block), from.gradient_rows.line,
                     from.values.at(item.group, j), s.columns, gradients, s.columns, rows, s.columns,
                     int(p.value_width), false);
    for (int r = 0; r < rows; ++r) {
      const int64_t where = (item.b * p.queries + item.first + r) * p.heads + item.h;
      Simd<L>::soften(scores + r * s.columns, gradients + r * s.columns, s.columns, top[where], inverse[where],
                      w.delta[where], slopes ? slopes + r * s.columns : nullptr);
    }
    Simd<L>::product(gradients, s.columns, from.key_rows.at(item.group, j), width, t.first.data(), width, rows, width,
                     int(p.key_block), true);
  }
  for (int r = 0; r < rows; ++r) {
    float* to = w.query + ((item.b * p.queries + item.first + r) * p.heads + item.h) * p.width;
    for (int64_t d = 0; d < p.width; ++d) to[d] = t.first[r * width + d] * p.scale;
  }
}
ON_EVERY_MACHINE(query_item, (const Backward& w, const Sizes& s, int64_t number, const Sources& from, Scratch& t),
                 (w, s, number, from, t))

// dK and dV of a block: Σ over the heads of its group and their tiles of dSᵀ Q and Pᵀ dO; a row here is a key.
template <int L>
INLINE void key_item(const Backward& w, const Sizes& s, int64_t number, const Turned& turned, const Sources& from,
                     Scratch& t) {
  const Problem& p = w.problem;
  const int64_t block = number % s.key_blocks, group = number / s.key_blocks, b = group / p.groups;
  const int64_t first = block * p.key_block;
  const int keys = int(std::min(p.key_block, p.keys - first)), width = from.query_rows.line;
  const float *top = p.softmax, *inverse = top + p.batch * p.queries * p.heads, cap = p.softcap * kLog2E;
  float* slopes = cap != 0.0f ? t.slopes.data() : nullptr;
  for (int r = 0; r < keys; ++r) {
    keys_of(p).read(group, first + r, t.left.data() + r * p.width);
    values_of(p).read(group, first + r, t.right.data() + r * p.value_width);
  }
  std::fill(t.first.begin(), t.first.end(), 0.0f);
  std::fill(t.second.begin(), t.second.end(), 0.0f);
  for (int64_t row = group * s.per_group; row < (group + 1) * s.per_group; ++row) {
    const int64_t h = row % p.heads;
    const auto [ids, ids_end] = turned.kept(b, h, block);
    for (const int32_t* id = ids; id != ids_end; ++id) {
      const int64_t i = *id;
      const int64_t start = i * p.query_block, rows = std::min(p.query_block, p.queries - start);
      float *scores = t.scores.data(), *gradients = t.gradients.data();
      Simd<L>::product(t.left.data(), int(p.width), from.scaled.at(row, i), s.rows, scores, s.rows, keys, s.rows,
                       int(p.width), false);
      for (int r = 0; slopes && r < keys; ++r)
        Simd<L>::soften_peaks(scores + r * s.rows, s.rows, cap, slopes + r * s.rows);
      Simd<L>::product(t.right.data(), int(p.value_width), from.gradients.at(row, i), s.rows, gradients, s.rows, keys,
                       s.rows, int(p.value_width), false);
      for (int64_t r = 0; r < s.rows; ++r) {  // a column beyond the end weighs nothing
        const int64_t where = (b * p.queries + start + r) * p.heads + h;
        t.top[r] = r < rows ? top[where] : 0.0f;
        t.inverse[r] = r < rows ? inverse[where] : 0.0f;
        t.delta[r] = r < rows ? w.delta[where] : 0.0f;
      }
      if (Kept(p, s, b, h, i).is_partial(block))
        for (int64_t c = 0; c < rows; ++c) {
          const Span span = seen_in(p, b, start + c, block);
          for (int r = 0; r < keys; ++r)
            if (r < span.first || r >= span.end) scores[r * s.rows + c] = kNone;
        }
      for (int r = 0; r < keys; ++r)
        Simd<L>::soften(scores + r * s.rows, gradients + r * s.rows, s.rows, t.top.data(), t.inverse.data(),
                        t.delta.data(), slopes ? slopes + r * s.rows : nullptr);
      Simd<L>::product(scores, s.rows, from.gradient_rows.at(row, i), s.value_width, t.second.data(), s.value_width,
                       keys, s.value_width, int(p.query_block), true);
      Simd<L>::product(gradients, s.rows, from.query_rows.at(row, i), width, t.first.data(), width, keys, width,
                       int(p.query_block), true);
    }
  }
  for (int r = 0; r < keys; ++r) {
    const int64_t where = (b * p.keys + first + r) * p.groups + group % p.groups;
    std::copy_n(t.first.data() + r * width, p.width, w.key + where * p.width);
    std::copy_n(t.second.data() + r * s.value_width, p.value_width, w.value + where * p.value_width);
  }
}
ON_EVERY_MACHINE(key_item, (const Backward& w, const Sizes& s, int64_t number, const Turned& turned,
                            const Sources& from, Scratch& t), (w, s, number, turned, from, t))

}  // namespace

extern "C" {

int sentei_backward_size() { return int(sizeof(Backward)); }

// Returns a Status; unless it is kDone the gradients are unfinished.
int sentei_backward(const Backward* backward) {
  return status_of([&] {
    const Backward& w = *backward;
    const Problem& p = w.problem;
    const Sizes s(p);
    check_plan(p, s);
    const Turned turned(p, s);
    const int64_t stride[3] = {p.queries * p.heads * p.value_width, p.heads * p.value_width, p.value_width};
    const Tensor gradient{w.gradient, stride, p.queries, p.heads, p.value_width, false};
    const size_t tile = std::max(p.query_block * s.columns, p.key_block * s.rows);
    const size_t block = std::max(p.query_block, p.key_block), width = round_up(p.width);
    const auto scratch = [&] {
      return Scratch{Zeros(tile), Zeros(tile), Zeros(block * p.width), Zeros(block * p.value_width),
                     Zeros(block * width), Zeros(block * s.value_width), Zeros(s.rows), Zeros(s.rows), Zeros(s.rows),
                     Zeros(p.softcap != 0.0f ? tile : 0)};
    };
    const int64_t wide = width + s.value_width;  // of a token in one layout; keys have three, queries four
    by_rows(p, 8 * wide * (p.keys + s.per_group * p.queries), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * s.per_group, last = end * s.per_group;
      const Sources from{{p, keys_of(p), begin, end, p.key_block, true},
                         {p, keys_of(p), begin, end, p.key_block, false},
                         {p, values_of(p), begin, end, p.key_block, true},
                         {p, queries_of(p), first, last, p.query_block, true, p.scale * kLog2E},
                         {p, queries_of(p), first, last, p.query_block, false, p.scale},
                         {p, gradient, first, last, p.query_block, false},
                         {p, gradient, first, last, p.query_block, true}};
      const auto queries = longest_first(first * s.query_blocks, last * s.query_blocks, [&](int64_t number) {
        const Item item(p, s, number);
        return Kept(p, s, item.b, item.h, item.block).count;
      });
      in_parallel(int64_t(queries.size()), p.threads, scratch,
                  [&](int64_t i, Scratch& t) { query_item_on[s.machine](w, s, queries[i], from, t); });
      const auto keys = longest_first(begin * s.key_blocks, end * s.key_blocks, [&](int64_t number) {
        const int64_t row = number / s.key_blocks;
        int64_t count = 0;
        for (int64_t h = row * s.per_group; h < (row + 1) * s.per_group; ++h) {
          const auto [ids, ids_end] = turned.kept(row / p.groups, h % p.heads, number % s.key_blocks);
          count += ids_end - ids;
        }
        return count;
      });
      in_parallel(int64_t(keys.size()), p.threads, scratch,
                  [&](int64_t i, Scratch& t) { key_item_on[s.machine](w, s, keys[i], turned, from, t); });
    });
  });
}
}
