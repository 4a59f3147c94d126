// Attention over chosen tiles: one tiled online-softmax path, sums in fp32.
#include <chrono>

#include "pages.h"

namespace {

// A row's scores are weighed 2^(score - base), and its base is not the largest so far but within this of it: then a new
// largest score seldom means to weigh again what is there. The weights stay below 2^kSlack, far from overflow.
constexpr float kSlack = 8;

struct Scratch {
  Scratch(const Problem& p, const Sizes& s)
      : query(p.query_block * s.width), scores(p.query_block * s.columns), output(p.query_block * s.value_width),
        sum(p.query_block * kColumns), base(p.query_block), bound(p.query_block), top(p.query_block) {}
  Zeros query, scores, output;
  Zeros sum, base, bound;  // of each row: its sum in lanes, and what its scores may reach; minus infinity: none so far
  Zeros top;               // where there is a cut: the largest score of each row so far
};

// The scores of an item's rows against a block of keys, in powers of two; minus infinity where a pair is not permitted.
// Pairs hold the queries as they are, and the scores are scaled.
template <int L, bool Pairs>
INLINE void score(const Problem& p, const Sizes& s, const Item& item, int rows, int64_t block, bool partial,
                  const float* keys, Scratch& t) {
  const int depth = Pairs ? s.width / 2 : s.width;
  float* scores = t.scores.data();
  in_strips(p, item.b, item.first, rows, block, partial, [&](int r, int count, int begin, int end) INLINE_LAMBDA {
    Simd<L>::template product<Pairs ? kPaired : kRowMajor>(
        t.query.data() + r * depth, depth, keys + begin, s.columns, scores + r * s.columns + begin, s.columns, count,
        int(round_up(end - begin)), depth, false, Pairs ? p.scale * kLog2E : 1.0f);
  });
  if (p.softcap != 0.0f)
    for (int r = 0; r < rows; ++r) Simd<L>::soften_peaks(scores + r * s.columns, s.columns, p.softcap * kLog2E);
  if (partial) forbid(p, item.b, item.first, rows, 1, block, scores, s.columns);
}

// Whether any row's largest score reaches to within the cut of the largest it has seen, which it then may become; a NaN
// does.
template <int L>
INLINE bool matters(const Problem& p, const Sizes& s, int rows, Scratch& t) {
  bool some = false;
  for (int r = 0; r < rows; ++r) {
    const float largest = Simd<L>::largest(t.scores.data() + r * s.columns, s.columns);
    some |= !(largest < t.top[r] - p.cut);
    t.top[r] = std::max(t.top[r], largest);
  }
  return some;
}

// Makes the largest score of every row that has outgrown its bound its new base.
template <int L>
INLINE void raise(const Sizes& s, int rows, Scratch& t) {
  for (int r = 0; r < rows; ++r) {
    const float largest = Simd<L>::largest(t.scores.data() + r * s.columns, s.columns);
    if (!(largest > t.bound[r])) continue;
    const float before = std::exchange(t.base[r], largest), bound = std::exchange(t.bound[r], largest + kSlack);
    if (bound == kNone) continue;  // nothing is summed yet
    const float shrink = std::exp2(before - largest);
    float *sum = t.sum.data() + r * kColumns, *output = t.output.data() + r * s.value_width;
    Simd<L>::store(sum, Simd<L>::load(sum) * shrink);
    for (int d = 0; d < s.value_width; d += L) Simd<L>::store(output + d, Simd<L>::load(output + d) * shrink);
  }
}

// Writes a finished row.
template <int L>
INLINE void finish(const Problem& p, const Sizes& s, const Item& item, int r, const Scratch& t) {
  const int64_t where = (item.b * p.queries + item.first + r) * p.heads + item.h;
  const float sum = Simd<L>::total(Simd<L>::load(t.sum.data() + r * kColumns)), factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float* from = t.output.data() + r * s.value_width;
  if (p.bfloat16)
    for (int64_t d = 0; d < p.value_width; ++d)
      static_cast<uint16_t*>(p.output)[where * p.value_width + d] = narrow(from[d] * factor);
  else
    for (int64_t d = 0; d < p.value_width; ++d)
      static_cast<float*>(p.output)[where * p.value_width + d] = from[d] * factor;
  p.lse[where] = t.base[r] * kLn2 + std::log(sum);
  p.softmax[where] = t.base[r];
  p.softmax[p.batch * p.queries * p.heads + where] = factor;
}

// Every kept tile of an item, online softmax in powers of two.
template <int L, bool Pairs = false>
INLINE void attend_item(const Problem& p, const Sizes& s, int64_t number, const Blocks& keys, const Blocks& values,
                        Scratch& t) {
  const Item item(p, s, number);
  const int rows = int(std::min(p.query_block, p.queries - item.first));
  if constexpr (Pairs) {
    const Vectors query = queries_of(p).row(item.row);
    for (int r = 0; r < rows; ++r)
      query.copy(item.first + r, t.query.data() + r * (s.width / 2));
  } else {
    load_queries(p, item.row, item.first, rows, 1, t.query.data());
  }
  for (Zeros* numbers : {&t.output, &t.sum, &t.base}) std::fill(numbers->begin(), numbers->end(), 0.0f);
  for (Zeros* numbers : {&t.bound, &t.top}) std::fill(numbers->begin(), numbers->end(), kNone);
  const Kept kept(p, s, item.b, item.h, item.block);
  for (int32_t slot = 0; slot < kept.count; ++slot) {
    const int64_t j = kept.block(slot);
    const bool partial = kept.is_partial(j) || s.columns != p.key_block;
    float* scores = t.scores.data();
    score<L, Pairs>(p, s, item, rows, j, partial, keys.at(item.group, j), t);
    if (p.cut != 0.0f) {
      if (!matters<L>(p, s, rows, t)) continue;
      p.kept[number * s.key_blocks + j] = 1;
    }
    if (Simd<L>::any_above(scores, s.columns, rows, t.bound.data())) raise<L>(s, rows, t);
    for (int r = 0; r < rows; ++r) {
      auto sum = Simd<L>::load(t.sum.data() + r * kColumns);
      Simd<L>::template exponentiate<Pairs>(scores + r * s.columns, s.columns, t.base[r], sum);
      Simd<L>::store(t.sum.data() + r * kColumns, sum);
    }
    const float* value = values.at(item.group, j);
    in_strips(p, item.b, item.first, rows, j, partial, [&](int r, int count, int begin, int end) INLINE_LAMBDA {
      constexpr int together = Pairs ? 2 : 1;
      Simd<L>::template product<Pairs ? kPaired : kRowMajor>(
          scores + r * s.columns + begin / together, s.columns, value + begin / together * s.value_width,
          s.value_width, t.output.data() + r * s.value_width, s.value_width, count, s.value_width,
          (end - begin) / together, true);
    });
  }
  for (int r = 0; r < rows; ++r) finish<L>(p, s, item, r, t);
}
ON_EVERY_MACHINE(attend_item, (const Problem& p, const Sizes& s, int64_t number, const Blocks& keys,
                               const Blocks& values, Scratch& t), (p, s, number, keys, values, t))

AVX512_BF16 void attend_item_pairs(const Problem& p, const Sizes& s, int64_t number, const Blocks& keys,
                                   const Blocks& values, Scratch& t) {
  attend_item<kPairLanes, kPairs>(p, s, number, keys, values, t);
}

// Equally many products of floats and of pairs.
AVX512 void try_floats(float* room) {
  Simd<kPairLanes>::product(room, 64, room + 4096, 64, room + 8192, 64, 60, 64, 64, false);
}
AVX512_BF16 void try_pairs(float* room) {
  Simd<kPairLanes>::product<kPairs ? kPaired : kRowMajor>(room, 32, room + 4096, 64, room + 8192, 64, 60, 64, 32,
                                                          false);
}

// Whether pairs are the faster here: there are processors that take twice as long for them.
bool pairs_pay() {
  Zeros room(3 * 4096);
  const auto fastest = [&](void (*run)(float*)) {
    auto least = std::chrono::steady_clock::duration::max();
    for (int i = 0; i < 50; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run(room.data());
      least = std::min(least, std::chrono::steady_clock::now() - start);
    }
    return least;
  };
  return fastest(try_pairs) * 5 < fastest(try_floats) * 4;
}

}  // namespace

bool takes_pairs(int64_t machine) {
  if (machines() <= kPairMachine) return false;
  if (machine >= 0) return machine == kPairMachine;
  static const bool pay = pairs_pay();
  return pay;
}

extern "C" {

// Changes whenever `Problem`, `Backward` or a function does; compared when the library is loaded.
int sentei_abi() { return 19; }
int sentei_problem_size() { return int(sizeof(Problem)); }
int sentei_machines() { return machines(); }

// All return a Status; unless it is kDone the output is unfinished.
int sentei_attend(const Problem* problem) {
  return status_of([&] {
    const Problem& p = *problem;
    const Sizes s(p);
    check_plan(p, s);
    const bool pairs = p.bfloat16 && p.width % 2 == 0 && p.key_block % 2 == 0 && takes_pairs(p.machine);
    const auto attend_one = pairs ? attend_item_pairs : attend_item_on[s.machine];
    const int64_t packed = (pairs ? 2 : 4) * s.key_blocks * (int64_t(s.columns) * s.width + p.key_block * s.value_width);
    by_rows(p, packed, [&](int64_t begin, int64_t end) {
      const Blocks keys(p, keys_of(p), begin, end, p.key_block, true, 1.0f, pairs);
      const Blocks values(p, values_of(p), begin, end, p.key_block, false, 1.0f, pairs);
      const int64_t per_row = s.per_group * s.query_blocks;
      const auto order = longest_first(begin * per_row, end * per_row, [&](int64_t number) {
        const Item item(p, s, number);
        return Kept(p, s, item.b, item.h, item.block).count;
      });
      in_parallel(int64_t(order.size()), p.threads, [&] { return Scratch(p, s); },
                  [&](int64_t i, Scratch& t) { attend_one(p, s, order[i], keys, values, t); });
    });
  });
}

// A few rows over every key they may see, read where it lies: packing the keys would be most of the work. There is no
// plan, window, cap or cut, and neither lse nor softmax is written.
int sentei_attend_rows(const Problem* problem) {
  return status_of([&] {
    const Problem& p = *problem;
    constexpr int64_t page = 16;
    std::vector<uint8_t> kept(p.batch * p.groups * p.queries * ((p.keys + page - 1) / page), 1);
    Paged rows{p.query, p.key, p.value, nullptr, p.lengths, p.output, nullptr, kept.data()};
    std::copy_n(p.query_stride, 3, rows.query_stride);
    std::copy_n(p.key_stride, 3, rows.key_stride);
    std::copy_n(p.value_stride, 3, rows.value_stride);
    rows.batch = p.batch, rows.rows = p.queries, rows.keys = p.keys, rows.heads = p.heads, rows.groups = p.groups;
    rows.width = p.width, rows.value_width = p.value_width, rows.page = page, rows.causal = p.causal;
    rows.is_half = rows.is_query_half = p.bfloat16, rows.task = kAttendToKept;
    rows.threads = p.threads, rows.machine = p.machine, rows.scale = p.scale;
    read_pages(rows);
  });
}
}
