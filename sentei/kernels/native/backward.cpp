// The gradients of attention over chosen tiles: scores are made again, once, tile by tile, and nothing is ever n x n.
//
// One pass over the key blocks: an item owns a block's keys and values, and their gradients stay with it. To the queries'
// gradients every item adds; they come in the order of the blocks, whoever is faster, so that sums are always the same.
#include "call.h"

// Beside the call itself, whose `softmax` is read.
struct Backward {
  Problem problem;
  const float *gradient, *delta;  // of the output, [B, Tq, H, Dv]; its product with the output, [B, Tq, H]
  float *query, *key, *value;     // the results, contiguous
};

namespace {

// A query block that keeps a key block, and how many of the key blocks before it that query block keeps.
struct Meeting {
  int32_t block, turn;
};

// What the problem's plan keeps, turned around: for every key block its query blocks.
class Turned {
 public:
  Turned(const Problem& p, const Sizes& s)
      : heads_(p.plan.full_count ? p.plan.heads : 1), blocks_(s.key_blocks), per_head_(p.heads / heads_),
        ends_(p.batch * heads_ * blocks_ + 1) {
    const auto walk = [&](auto visit) {
      for (int64_t list = 0; list < p.batch * heads_; ++list)
        for (int64_t i = 0; i < s.query_blocks; ++i) {
          const Kept kept(p, s, list / heads_, list % heads_ * per_head_, i);
          for (int32_t slot = 0; slot < kept.count; ++slot) visit(list * blocks_ + kept.block(slot), int32_t(i));
        }
    };
    walk([&](int64_t list, int32_t) { ++ends_[list + 1]; });
    for (size_t list = 1; list < ends_.size(); ++list) ends_[list] += ends_[list - 1];
    meetings_.resize(ends_.back());
    std::vector<int64_t> next(ends_.begin(), ends_.end() - 1);
    walk([&](int64_t list, int32_t block) { meetings_[next[list]++].block = block; });
    std::vector<int32_t> turns(s.query_blocks);
    for (int64_t list = 0; list + 1 < int64_t(ends_.size()); ++list) {
      if (list % blocks_ == 0) std::fill(turns.begin(), turns.end(), 0);
      for (int64_t at = ends_[list]; at < ends_[list + 1]; ++at)
        meetings_[at].turn = turns[meetings_[at].block]++;
    }
  }
  // The query blocks that head h keeps of a key block, from begin to end.
  std::pair<const Meeting*, const Meeting*> of(int64_t b, int64_t h, int64_t block) const {
    const int64_t list = (b * heads_ + h / per_head_) * blocks_ + block;
    return {meetings_.data() + ends_[list], meetings_.data() + ends_[list + 1]};
  }

 private:
  int64_t heads_, blocks_, per_head_;
  std::vector<int64_t> ends_;  // where the list before ends
  std::vector<Meeting> meetings_;
};

// How many items have added to each query block [B, H, QB].
using Added = std::vector<std::atomic<int32_t>>;

struct Scratch {
  Scratch(const Problem& p, const Sizes& s)
      : keys(s.columns * p.width), key_rows(s.columns * s.even_width), values(s.columns * p.value_width),
        room(s.columns * std::max(p.width, p.value_width)), queries(p.query_block * s.even_width),
        outputs(p.query_block * s.value_width), scores(p.query_block * s.columns),
        gradients(p.query_block * s.columns),
        slopes(p.softcap != 0.0f ? p.query_block * s.columns : 0), query(p.query_block * s.even_width),
        key(p.key_block * s.even_width), value(p.key_block * s.value_width) {}
  Zeros keys, key_rows, values;   // of the item's block: keys and values turned, and keys times the scale in rows
  Zeros room;                     // for turning
  Zeros queries, outputs;         // a query block's rows, scaled as in the forward, and the gradients of its outputs
  Zeros scores, gradients, slopes;
  Zeros query, key, value;        // the results
};

// An item's keys and values, zeros beyond the end.
INLINE void load_keys(const Problem& p, const Sizes& s, int64_t group, int64_t first, int keys, Scratch& t) {
  if (keys < s.columns)
    for (Zeros* numbers : {&t.keys, &t.key_rows, &t.values}) std::fill(numbers->begin(), numbers->end(), 0.0f);
  const Vectors key = keys_of(p).row(group);
  read_turned(key, first, keys, 1.0f, t.keys.data(), s.columns, t.room.data());
  read_turned(values_of(p).row(group), first, keys, 1.0f, t.values.data(), s.columns, t.room.data());
  for (int j = 0; j < keys; ++j) key.read(first + j, t.key_rows.data() + j * s.even_width, p.scale);
}

// Scores of a tile become weights, and the gradients of the weights those of the scores.
template <int L>
INLINE void soften(const Backward& w, const Sizes& s, const Item& item, int rows, int64_t block, Scratch& t) {
  const Problem& p = w.problem;
  const float *top = p.softmax, *inverse = top + p.batch * p.queries * p.heads;
  for (int r = 0; p.softcap != 0.0f && r < rows; ++r)
    Simd<L>::soften_peaks(t.scores.data() + r * s.columns, s.columns, p.softcap * kLog2E,
                          t.slopes.data() + r * s.columns);
  if (Reach(p, item.b, item.block).is_partial(block) || s.columns != p.key_block)
    forbid(p, item.b, item.first, rows, 1, block, t.scores.data(), s.columns);
  for (int r = 0; r < rows; ++r) {
    const int64_t where = (item.b * p.queries + item.first + r) * p.heads + item.h;
    Simd<L>::soften(t.scores.data() + r * s.columns, t.gradients.data() + r * s.columns, s.columns, top[where],
                    inverse[where], w.delta[where], p.softcap != 0.0f ? t.slopes.data() + r * s.columns : nullptr);
  }
}

// Adds a tile's share to the gradients of its queries, when it is its turn. The items before it were begun before, and
// wait for none after them: every turn comes.
template <int L>
INLINE void add_queries(const Backward& w, const Sizes& s, const Item& item, int rows, int32_t turn, const Scratch& t,
                        std::atomic<int32_t>& added) {
  const Problem& p = w.problem;
  while (added.load(std::memory_order_acquire) != turn) std::this_thread::yield();
  for (int r = 0; r < rows; ++r) {
    float* to = w.query + ((item.b * p.queries + item.first + r) * p.heads + item.h) * p.width;
    for (int64_t d = 0; d < p.width; ++d) to[d] += t.query[r * s.even_width + d];
  }
  added.store(turn + 1, std::memory_order_release);
}

// A key block: over the heads of its group and their tiles, dV = Σ Pᵀ dO, dK = Σ dSᵀ Q and the share dS K of each dQ,
// with dS = P (dO Vᵀ - delta).
template <int L>
INLINE void key_item(const Backward& w, const Sizes& s, int64_t number, const Turned& turned, Added& added,
                     Scratch& t) {
  const Problem& p = w.problem;
  const int64_t block = number % s.key_blocks, group = number / s.key_blocks, first = block * p.key_block;
  const int keys = int(std::min(p.key_block, p.keys - first)), width = s.even_width;
  load_keys(p, s, group, first, keys, t);
  for (Zeros* numbers : {&t.key, &t.value}) std::fill(numbers->begin(), numbers->end(), 0.0f);
  const int64_t strides[] = {p.queries * p.heads * p.value_width, p.heads * p.value_width, p.value_width};
  const Tensor outputs{w.gradient, strides, p.queries, p.heads, p.value_width, false};
  for (int64_t row = group * s.per_group; row < (group + 1) * s.per_group; ++row) {
    const Vectors query = queries_of(p).row(row), output = outputs.row(row);
    const auto [begin, end] = turned.of(row / p.heads, row % p.heads, block);
    for (const Meeting* meeting = begin; meeting != end; ++meeting) {
      const Item item(p, s, row * s.query_blocks + meeting->block);
      const int rows = int(std::min(p.query_block, p.queries - item.first));
      for (int r = 0; r < rows; ++r) {
        query.read(item.first + r, t.queries.data() + r * width, p.scale * kLog2E);
        output.read(item.first + r, t.outputs.data() + r * s.value_width);
      }
      Simd<L>::product(t.queries.data(), width, t.keys.data(), s.columns, t.scores.data(), s.columns, rows, s.columns,
                       int(p.width), false);
      Simd<L>::product(t.outputs.data(), s.value_width, t.values.data(), s.columns, t.gradients.data(), s.columns,
                       rows, s.columns, int(p.value_width), false);
      soften<L>(w, s, item, rows, block, t);
      Simd<L>::template product<kTurned>(t.scores.data(), s.columns, t.outputs.data(), s.value_width, t.value.data(),
                                         s.value_width, keys, s.value_width, rows, true);
      Simd<L>::template product<kTurned>(t.gradients.data(), s.columns, t.queries.data(), width, t.key.data(), width,
                                         keys, width, rows, true);
      Simd<L>::product(t.gradients.data(), s.columns, t.key_rows.data(), width, t.query.data(), width, rows, width,
                       keys, false);
      add_queries<L>(w, s, item, rows, meeting->turn, t, added[row * s.query_blocks + meeting->block]);
    }
  }
  for (int j = 0; j < keys; ++j) {
    const int64_t where = (group / p.groups * p.keys + first + j) * p.groups + group % p.groups;
    for (int64_t d = 0; d < p.width; ++d) w.key[where * p.width + d] = t.key[j * width + d] * kLn2;
    std::copy_n(t.value.data() + j * s.value_width, p.value_width, w.value + where * p.value_width);
  }
}
ON_EVERY_MACHINE(key_item, (const Backward& w, const Sizes& s, int64_t number, const Turned& turned, Added& added,
                            Scratch& t), (w, s, number, turned, added, t))

}  // namespace

extern "C" {

int sentei_backward_size() { return int(sizeof(Backward)); }

// The queries' gradients are added to. Returns a Status; unless it is kDone the gradients are unfinished.
int sentei_backward(const Backward* backward) {
  return status_of([&] {
    const Problem& p = backward->problem;
    const Sizes s(p);
    check_plan(p, s);
    const Turned turned(p, s);
    Added added(p.batch * p.heads * s.query_blocks);
    in_parallel(p.batch * p.groups * s.key_blocks, p.threads, [&] { return Scratch(p, s); },
                [&](int64_t i, Scratch& t) { key_item_on[s.machine](*backward, s, i, turned, added, t); });
  });
}
}
