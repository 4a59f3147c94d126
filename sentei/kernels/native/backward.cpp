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
  Plan turned;                    // the problem's plan, of key blocks; its items are of G heads
};

namespace {

// Queries and gradients for keys, in both layouts; `scaled` is what scores are made of.
struct Sources {
  Blocks keys, key_rows, values, scaled, query_rows, gradient_rows, gradients;
};

struct Scratch {
  std::vector<float> scores, gradients, left, right, first, second, top, inverse, delta;
};

// dQ of a block: Σ over its tiles of dS K, with dS = P (dO Vᵀ - delta).
template <int L>
INLINE void query_item(const Backward& w, const Sizes& s, int64_t number, const Sources& from, Scratch& t) {
  const Problem& p = w.problem;
  const Item item(p, s, number);
  const int rows = int(std::min(p.query_block, p.queries - item.first)), width = from.key_rows.line;
  const float *top = p.softmax, *inverse = top + p.batch * p.queries * p.heads;
  load_queries(p, item.row, item.first, rows, 1, t.left.data());
  std::fill(t.first.begin(), t.first.end(), 0.0f);
  const Kept kept(p, p.plan, item.b, item.h, item.block, s.query_blocks);
  for (int32_t slot = 0; slot < kept.count; ++slot) {
    const int64_t j = kept.block(slot);
    float *scores = t.scores.data(), *gradients = t.gradients.data();
    Simd<L>::product(t.left.data(), int(p.width), from.keys.at(item.group, j), s.columns, scores, s.columns, rows,
                     s.columns, int(p.width), false);
    if (kept.is_partial(slot) || s.columns != p.key_block)
      forbid(p, item.b, item.first, rows, 1, j, scores, s.columns);
    Simd<L>::product(from.gradient_rows.at(item.row, item.block), from.gradient_rows.line,
                     from.values.at(item.group, j), s.columns, gradients, s.columns, rows, s.columns,
                     int(p.value_width), false);
    for (int r = 0; r < rows; ++r) {
      const int64_t where = (item.b * p.queries + item.first + r) * p.heads + item.h;
      Simd<L>::soften(scores + r * s.columns, gradients + r * s.columns, s.columns, top[where], inverse[where],
                      w.delta[where]);
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
INLINE void key_item(const Backward& w, const Sizes& s, int64_t number, const Sources& from, Scratch& t) {
  const Problem& p = w.problem;
  const int64_t block = number % s.key_blocks, group = number / s.key_blocks, b = group / p.groups;
  const int64_t first = block * p.key_block, heads = p.heads / p.groups;
  const int keys = int(std::min(p.key_block, p.keys - first)), width = from.query_rows.line;
  const float *top = p.softmax, *inverse = top + p.batch * p.queries * p.heads;
  for (int r = 0; r < keys; ++r) {
    std::copy_n(keys_of(p).at(group, first + r), p.width, t.left.data() + r * p.width);
    std::copy_n(values_of(p).at(group, first + r), p.value_width, t.right.data() + r * p.value_width);
  }
  std::fill(t.first.begin(), t.first.end(), 0.0f);
  std::fill(t.second.begin(), t.second.end(), 0.0f);
  for (int64_t h = group % p.groups * heads; h < (group % p.groups + 1) * heads; ++h) {
    const Kept kept(p, w.turned, b, h, block, s.key_blocks);
    const int64_t row = b * p.heads + h;
    for (int32_t slot = 0; slot < kept.count; ++slot) {
      const int64_t i = kept.block(slot);
      const int64_t start = i * p.query_block, rows = std::min(p.query_block, p.queries - start);
      float *scores = t.scores.data(), *gradients = t.gradients.data();
      Simd<L>::product(t.left.data(), int(p.width), from.scaled.at(row, i), s.rows, scores, s.rows, keys, s.rows,
                       int(p.width), false);
      Simd<L>::product(t.right.data(), int(p.value_width), from.gradients.at(row, i), s.rows, gradients, s.rows, keys,
                       s.rows, int(p.value_width), false);
      for (int64_t r = 0; r < s.rows; ++r) {  // a column beyond the end weighs nothing
        const int64_t where = (b * p.queries + start + r) * p.heads + h;
        t.top[r] = r < rows ? top[where] : 0.0f;
        t.inverse[r] = r < rows ? inverse[where] : 0.0f;
        t.delta[r] = r < rows ? w.delta[where] : 0.0f;
      }
      if (kept.is_partial(slot))
        for (int64_t c = 0; c < rows; ++c) {
          const Seen seen(p, b, start + c, block);
          for (int r = 0; r < keys; ++r)
            if (r < seen.first || r >= seen.end) scores[r * s.rows + c] = kNone;
        }
      for (int r = 0; r < keys; ++r)
        Simd<L>::soften(scores + r * s.rows, gradients + r * s.rows, s.rows, t.top.data(), t.inverse.data(),
                        t.delta.data());
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
ON_EVERY_MACHINE(key_item, (const Backward& w, const Sizes& s, int64_t number, const Sources& from, Scratch& t),
                 (w, s, number, from, t))

}  // namespace

extern "C" {

int sentei_backward_size() { return int(sizeof(Backward)); }

// Returns 0, or 1 when memory ran out; the gradients are then unfinished.
int sentei_backward(const Backward* backward) {
  return status_of([&] {
    const Backward& w = *backward;
    const Problem& p = w.problem;
    const Sizes s(p);
    const int64_t stride[3] = {p.queries * p.heads * p.value_width, p.heads * p.value_width, p.value_width};
    const Tensor gradient{w.gradient, stride, p.queries, p.heads, p.value_width};
    const Sources from{{p, keys_of(p), p.key_block, true}, {p, keys_of(p), p.key_block, false},
                       {p, values_of(p), p.key_block, true}, {p, queries_of(p), p.query_block, true, p.scale * kLog2E},
                       {p, queries_of(p), p.query_block, false, p.scale}, {p, gradient, p.query_block, false},
                       {p, gradient, p.query_block, true}};
    const size_t tile = std::max(p.query_block * s.columns, p.key_block * s.rows);
    const size_t block = std::max(p.query_block, p.key_block), width = round_up(p.width);
    const auto scratch = [&] {
      return Scratch{std::vector<float>(tile), std::vector<float>(tile), std::vector<float>(block * p.width),
                     std::vector<float>(block * p.value_width), std::vector<float>(block * width),
                     std::vector<float>(block * s.value_width), std::vector<float>(s.rows), std::vector<float>(s.rows),
                     std::vector<float>(s.rows)};
    };
    in_parallel(p.batch * p.heads * s.query_blocks, p.threads, scratch,
                [&](int64_t i, Scratch& t) { query_item_on[s.machine](w, s, p.plan.order[i], from, t); });
    in_parallel(p.batch * p.groups * s.key_blocks, p.threads, scratch,
                [&](int64_t i, Scratch& t) { key_item_on[s.machine](w, s, w.turned.order[i], from, t); });
  });
}
}
