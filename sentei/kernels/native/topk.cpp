// Attention over the best keys of each query: a tile of scores at a time, held against the best each row has so far.
//
// A row's candidates are a list with the keys in order. What is above the row's threshold is appended; a list that is
// full is cut to about as many as are wanted, and the threshold rises. So nearly all scores cost one comparison.
#include "call.h"

// Strides are in elements; the last dimension of every tensor is contiguous.
struct TopK {
  const float *query, *key, *value;  // [B, Tq, H, D], [B, Tk, G, D], [B, Tk, G, Dv]
  float *output, *lse;               // [B, Tq, H, Dv] and [B, Tq, H], contiguous
  int32_t* ids;                      // [B, Tq, H, slots], contiguous
  const int64_t* lengths;            // [B, 2] or null
  int64_t query_stride[3], key_stride[3], value_stride[3];
  int64_t batch, queries, keys, heads, groups, width, value_width, causal, threads, machine;
  int64_t best, window, slots;  // how many keys; how many before a query are always among them, -1 without; room for them
  float scale;
};

// Beside the call itself, whose `ids` are read.
struct TopKBackward {
  TopK call;
  const float *gradient, *lse_gradient;  // [B, Tq, H, Dv] and [B, Tq, H], contiguous
  float *query, *key, *value;            // the results, contiguous
};

namespace {

constexpr int kQueryBlock = 48, kKeyBlock = 128;  // of the tiles; 48 is whole micro-kernels
constexpr int kGroup = 32;                        // scores that are held against the threshold at once
constexpr int kSteps = 24;                        // of a bisection, after which ties are likely
constexpr int64_t kChunk = 512;                   // keys whose gradients are summed at once: they stay in cache
constexpr float kInfinite = std::numeric_limits<float>::infinity();

Problem problem_of(const TopK& t) {
  Problem p{};
  p.query = t.query, p.key = t.key, p.value = t.value;
  std::copy_n(t.query_stride, 3, p.query_stride);
  std::copy_n(t.key_stride, 3, p.key_stride);
  std::copy_n(t.value_stride, 3, p.value_stride);
  p.batch = t.batch, p.queries = t.queries, p.keys = t.keys, p.heads = t.heads, p.groups = t.groups;
  p.width = t.width, p.value_width = t.value_width, p.query_block = kQueryBlock, p.key_block = kKeyBlock;
  p.threads = t.threads;
  return p;
}

// The permitted keys of a query are first … end - 1. Always kept are `sink` of them, 0 or 1, and all from `near` on;
// `wanted` more are chosen from between.
struct Range {
  INLINE Range(const TopK& t, int64_t b, int64_t query) {
    const int64_t place = t.keys - t.queries + query;
    first = t.lengths ? std::clamp<int64_t>(t.lengths[2 * b], 0, t.keys) : 0;
    end = t.lengths ? std::min(t.lengths[2 * b + 1], t.keys) : t.keys;
    if (t.causal) end = std::min(end, place + 1);
    end = std::max(first, end);
    near = t.window < 0 ? end : std::min(std::max(first, place - t.window), end);
    sink = t.window >= 0 && first < near;
    wanted = int(std::max<int64_t>(t.best - sink - (end - near), 0));
  }
  int64_t first, near, end;
  int sink, wanted;
};

// A row's candidates, and the scores of what it always keeps.
struct Row {
  Range range;
  float *scores, *near;
  int32_t* ids;
  int count;
  float threshold, sink;  // later candidates must be above it
  bool broken;            // a NaN or an infinity is among the scores
};

template <int L>
struct Pick {
  using S = Simd<L>;
  using Vec = typename S::Vec;
  using Ints = typename S::Ints;

  // One number from whole numbers, by halves.
  template <class Join>
  static INLINE int32_t fold(Ints v, Join join) {
    if constexpr (L == 4) {
      int32_t part[4];
      std::memcpy(part, &v, sizeof part);
      return join(join(part[0], part[1]), join(part[2], part[3]));
    } else {
      typename Simd<L / 2>::Ints low, high;
      std::memcpy(&low, &v, sizeof low);
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Pick<L / 2>::fold(join(low, high), join);
    }
  }

  // On AVX-512 the lanes of a mask move together in one instruction.
  static constexpr bool kPacks = kPairs && L == kPairLanes;

  // A bit for every lane that holds -1.
  static INLINE uint32_t lanes_of(Ints lanes) {
    uint16_t bits = 0;
    if constexpr (kPacks) asm("vpmovd2m %1, %0" : "=Yk"(bits) : "v"(lanes));
    return bits;
  }

  // Writes the lanes of both vectors that have a bit one after another, and L numbers in all; returns how many had one.
  static INLINE int pack(Vec scores, Ints ids, uint32_t bits, float* to, int32_t* ids_to) {
    const uint16_t mask = uint16_t(bits);
    if constexpr (kPacks) {
      asm("vcompressps %0, %0 %{%1%}%{z%}" : "+v"(scores) : "Yk"(mask));
      asm("vpcompressd %0, %0 %{%1%}%{z%}" : "+v"(ids) : "Yk"(mask));
    }
    S::store(to, scores);
    std::memcpy(ids_to, &ids, sizeof ids);
    return __builtin_popcount(mask);
  }

  static INLINE int at_least(const float* scores, int count, float bound) {
    Ints sum{};
    for (int j = 0; j < count; j += L) sum -= S::load(scores + j) >= bound;
    return fold(sum, [](auto a, auto b) INLINE_LAMBDA { return a + b; });
  }

  // A number that `wanted` to `most` of the scores reach; NaN where ties allow none, or it is not found soon. The
  // scores are followed by L minus infinities; `low` is below them all.
  static INLINE float between(const float* scores, int count, int wanted, int most, float low) {
    float high = S::largest(scores, count);
    for (int step = 0; step < kSteps; ++step) {
      const float middle = 0.5f * low + 0.5f * high;
      if (!(low < middle && middle < high)) break;
      const int reach = at_least(scores, count, middle);
      if (reach >= wanted && reach <= most) return middle;
      (reach < wanted ? high : low) = middle;
    }
    return kNan;
  }

  // Cuts the candidates to the best, `wanted` to `most` of them; the order stays, and so ties go to the lower key.
  static INLINE void cut(Row& row, int wanted, int most, float* spare) {
    if (row.count <= most) return;
    float* scores = row.scores;
    int32_t* ids = row.ids;
    const int count = row.count;
    std::fill_n(scores + count, L, kNone);
    float low = row.threshold;
    if (low == kNone) low = *std::min_element(scores, scores + count);
    float bound = between(scores, count, wanted, most, low);
    int kept = 0;
    if (kPacks && bound == bound) {
      for (int j = 0; j < count; j += L) {
        const Vec part = S::load(scores + j);
        Ints part_ids;
        std::memcpy(&part_ids, ids + j, sizeof part_ids);
        kept += pack(part, part_ids, lanes_of(part >= bound), scores + kept, ids + kept);
      }
    } else if (bound == bound) {
      for (int j = 0; j < count; ++j) {
        const float score = scores[j];
        scores[kept] = score;
        ids[kept] = ids[j];
        kept += score >= bound;
      }
    } else {
      std::copy_n(scores, count, spare);
      std::nth_element(spare, spare + wanted - 1, spare + count, [](float a, float b) { return a > b; });
      bound = spare[wanted - 1];
      int tied = wanted - int(std::count_if(scores, scores + count, [=](float s) { return s > bound; }));
      for (int j = 0; j < count; ++j) {
        if (scores[j] < bound || (scores[j] == bound && tied-- <= 0)) continue;
        scores[kept] = scores[j];
        ids[kept++] = ids[j];
      }
    }
    row.count = kept;
    row.threshold = bound;
  }

  // A bit for every one of kGroup scores that is above the threshold or a NaN; `scaled` gets the scores.
  static INLINE uint32_t above(const float* scores, float scale, float threshold, float* scaled) {
    Ints bits{}, bit;
    for (int l = 0; l < L; ++l) bit[l] = int32_t(1u << l);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; j += L) {
      const Vec part = S::load(scores + j) * scale;
      S::store(scaled + j, part);
      bits |= ~(part <= threshold) & (bit << j);
    }
    return uint32_t(fold(bits, [](auto a, auto b) INLINE_LAMBDA { return a | b; }));
  }

  // Takes the candidates among the scores from … to - 1 of a tile whose first key is `base`; up to kGroup - 1 numbers
  // beyond are read.
  static INLINE void scan(Row& row, const float* scores, int from, int to, float scale, int64_t base, int wanted,
                          int room, float* spare) {
    Ints lane;
    for (int l = 0; l < L; ++l) lane[l] = l;
    for (int j = from; j < to; j += kGroup) {
      float scaled[kGroup];
      const float threshold = row.threshold;
      uint32_t bits = above(scores + j, scale, threshold, scaled);
      if (to - j < kGroup) bits &= (1u << (to - j)) - 1;
      if (!bits) continue;
      float* list = row.scores;
      int32_t* ids = row.ids;
      int count = row.count;
      bool broken = false;
      const auto take = [&](int c) INLINE_LAMBDA {
        const float score = scaled[c] + 0.0f;  // -0 and 0 are a tie
        list[count] = score;
        ids[count] = int32_t(base + j + c);
        count += score > threshold;
        broken |= !(score < kInfinite);
      };
      if (kPacks)
        for (int c = 0; c < kGroup; c += L) {
          const Vec part = S::load(scaled + c) + 0.0f;
          const uint32_t some = bits >> c & ((1u << L) - 1), sound = lanes_of(part < kInfinite);
          count += pack(part, lane + int32_t(base + j + c), some & sound, list + count, ids + count);
          broken |= some & ~sound;
        }
      else if (threshold == kNone)  // as a rule all of them
        for (int c = 0; c < std::min(kGroup, to - j); ++c) take(c);
      else
        for (; bits; bits &= bits - 1) take(__builtin_ctz(bits));
      row.count = count;
      row.broken |= broken;
      if (count > room - 2 * kGroup) cut(row, wanted, wanted + wanted / 4, spare);
    }
  }

  // Whether a NaN or an infinity is among the scores from … to - 1 of a tile.
  static INLINE bool is_broken(const float* scores, int from, int to, float scale) {
    int broken = 0;
    for (int j = from; j < to; ++j) broken |= !(scores[j] * scale < kInfinite);
    return broken;
  }

  static INLINE float dot(const float* a, const float* b, int64_t width) {
    Vec sum{};
    int64_t d = 0;
    for (; d + L <= width; d += L) sum += S::load(a + d) * S::load(b + d);
    float all = S::fold(sum, [](auto x, auto y) INLINE_LAMBDA { return x + y; });
    for (; d < width; ++d) all += a[d] * b[d];
    return all;
  }

  // to += factor · from
  static INLINE void add(float* to, const float* from, float factor, int64_t width) {
    int64_t d = 0;
    for (; d + L <= width; d += L) S::store(to + d, S::load(to + d) + S::load(from + d) * factor);
    for (; d < width; ++d) to[d] += from[d] * factor;
  }

  // V vectors of Σ weight · row over `count` rows, `stride` apart.
  template <int V>
  static INLINE void gather(const float* from, int64_t stride, const int32_t* ids, const float* weights, int count,
                            float* to) {
    Vec sum[V]{};
    for (int c = 0; c < count; ++c) {
      const float* row = from + ids[c] * stride;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] += S::load(row + v * L) * weights[c];
    }
    for (int v = 0; v < V; ++v) S::store(to + v * L, sum[v]);
  }

  static INLINE void gather_all(const Vectors& vectors, const int32_t* ids, const float* weights, int count,
                                float* to) {
    const float* from = vectors.at(0);
    const int64_t stride = vectors.stride;
    int64_t d = 0;
    for (; d + 8 * L <= vectors.width; d += 8 * L) gather<8>(from + d, stride, ids, weights, count, to + d);
    for (; d + L <= vectors.width; d += L) gather<1>(from + d, stride, ids, weights, count, to + d);
    for (; d < vectors.width; ++d) {
      float sum = 0;
      for (int c = 0; c < count; ++c) sum += from[ids[c] * stride + d] * weights[c];
      to[d] = sum;
    }
  }

  // Turns scores into weights that add up to 1 and returns the log-sum-exp; there is room for kColumns more.
  static INLINE float soften(float* scores, int count) {
    const float top = *std::max_element(scores, scores + count);
    for (int c = 0; c < count; ++c) scores[c] = (scores[c] - top) * kLog2E;
    std::fill_n(scores + count, kColumns, kNone);
    const float sum = S::exponentiate(scores, int(round_up(count)), 0.0f);
    for (int c = 0; c < count; ++c) scores[c] *= 1.0f / sum;
    return top + std::log(sum);
  }
};

struct Scratch {
  Scratch(const TopK& t, int room)
      : query(kQueryBlock * t.width), tile(kQueryBlock * kKeyBlock + kGroup), scores(kQueryBlock * room),
        near(kQueryBlock * (t.window + 1)), spare(room), weights(t.slots + kColumns), ids(kQueryBlock * room) {}
  Zeros query, tile, scores, near, spare, weights;
  std::vector<int32_t> ids;
  std::vector<Row> rows;
};

// How many candidates a row has room for.
int room_of(const TopK& t) {
  return int(std::min<int64_t>(std::max<int64_t>(2 * t.best, 64), round_up(t.keys)) + 2 * kGroup);
}

// The weights, the keys in order, the output and the lse of a row whose tiles have all been seen.
template <int L>
INLINE void end_row(const TopK& t, const Vectors& values, Row& row, int64_t where, Scratch& s) {
  const Range& range = row.range;
  int32_t* ids = t.ids + where * t.slots;
  float *weights = s.weights.data(), *output = t.output + where * t.value_width;
  int count = 0;
  const auto keep = [&](int64_t id, float score) INLINE_LAMBDA {
    ids[count] = int32_t(id);
    weights[count] = score;
    row.broken |= !(score < kInfinite);
    count += score > kNone;
  };
  if (range.sink) keep(range.first, row.sink);
  if (range.wanted) Pick<L>::cut(row, range.wanted, range.wanted, s.spare.data());
  for (int c = 0; c < row.count; ++c) keep(row.ids[c], row.scores[c]);
  for (int64_t j = range.near; j < range.end; ++j) keep(j, row.near[j - range.near]);
  if (row.broken) count = 0;
  std::fill(ids + count, ids + t.slots, -1);
  if (count) {
    t.lse[where] = Pick<L>::soften(weights, count);
    Pick<L>::gather_all(values, ids, weights, count, output);
  } else {
    t.lse[where] = row.broken ? kNan : kNone;
    std::fill_n(output, t.value_width, row.broken ? kNan : 0.0f);
  }
}

template <int L>
INLINE void topk_item(const TopK& t, const Problem& p, int64_t number, const Blocks& keys, Scratch& s) {
  const int64_t blocks = (t.queries + kQueryBlock - 1) / kQueryBlock, row = number / blocks;
  const int64_t b = row / t.heads, h = row % t.heads, group = b * t.groups + h / (t.heads / t.groups);
  const int64_t start = number % blocks * kQueryBlock;
  const int rows = int(std::min<int64_t>(kQueryBlock, t.queries - start)), room = room_of(t);
  constexpr int panel = Simd<L>::kVectors * L;
  std::vector<Row>& state = s.rows;
  state.clear();
  const Vectors query = queries_of(p).row(row);
  int64_t first = t.keys, end = 0;
  for (int r = 0; r < rows; ++r) {
    const Range range(t, b, start + r);
    state.push_back({range, s.scores.data() + r * room, s.near.data() + r * (t.window + 1), s.ids.data() + r * room, 0,
                     kNone, 0, false});
    std::copy_n(query.at(start + r), t.width, s.query.data() + r * t.width);
    first = std::min(first, range.first);
    end = std::max(end, range.end);
  }
  for (int64_t base = first / kKeyBlock * kKeyBlock; base < end; base += kKeyBlock) {
    for (int64_t j = base; j < std::min(base + kKeyBlock, end); j += panel)
      Simd<L>::product(s.query.data(), int(t.width), keys.at(group, j / panel), panel, s.tile.data() + j - base,
                       kKeyBlock, rows, panel, int(t.width), false);
    for (int r = 0; r < rows; ++r) {
      const Range& range = state[r].range;
      const float* scores = s.tile.data() + r * kKeyBlock;
      if (range.sink && range.first >= base && range.first < base + kKeyBlock)
        state[r].sink = scores[range.first - base] * t.scale;
      for (int64_t j = std::max(range.near, base); j < std::min(range.end, base + kKeyBlock); ++j)
        state[r].near[j - range.near] = scores[j - base] * t.scale;
      const int from = int(std::max(range.first + range.sink - base, int64_t{0}));
      const int to = int(std::min<int64_t>(range.near - base, kKeyBlock));
      if (range.wanted) Pick<L>::scan(state[r], scores, from, to, t.scale, base, range.wanted, room, s.spare.data());
      else state[r].broken |= Pick<L>::is_broken(scores, from, to, t.scale);
    }
  }
  const Vectors value = values_of(p).row(group);
  for (int r = 0; r < rows; ++r)
    end_row<L>(t, value, state[r], (b * t.queries + start + r) * t.heads + h, s);
}
ON_EVERY_MACHINE(topk_item, (const TopK& t, const Problem& p, int64_t number, const Blocks& keys, Scratch& s),
                 (t, p, number, keys, s))

// Throws BadPlan unless every query names keys there are, ascending, and -1 after them.
void check_ids(const TopK& t) {
  const int64_t rows = t.batch * t.queries * t.heads;
  for (int64_t where = 0; where < rows; ++where) {
    const int32_t* ids = t.ids + where * t.slots;
    const int32_t count = int32_t(std::find(ids, ids + t.slots, -1) - ids);
    check_lists(&count, ids, 1, t.slots, t.keys);
  }
}

// How many keys a query kept: they come first, then -1.
INLINE int kept_of(const TopK& t, int64_t where) {
  const int32_t* ids = t.ids + where * t.slots;
  return int(std::find(ids, ids + t.slots, -1) - ids);
}

// The weights of a query's keys, the gradients of their scores, and the query's own gradient.
template <int L>
INLINE void topk_query(const TopKBackward& w, const Problem& p, int64_t where, float* weights, float* scores) {
  const TopK& t = w.call;
  const int64_t h = where % t.heads, i = where / t.heads % t.queries, b = where / t.heads / t.queries;
  const int64_t group = b * t.groups + h / (t.heads / t.groups);
  const int32_t* ids = t.ids + where * t.slots;
  const int count = kept_of(t, where);
  if (!count) return;
  const Vectors key = keys_of(p).row(group), value = values_of(p).row(group);
  const float *query = queries_of(p).row(b * t.heads + h).at(i), *gradient = w.gradient + where * t.value_width;
  for (int c = 0; c < count; ++c) weights[c] = t.scale * Pick<L>::dot(query, key.at(ids[c]), t.width);
  Pick<L>::soften(weights, count);
  float delta = -w.lse_gradient[where];
  for (int c = 0; c < count; ++c) {
    scores[c] = Pick<L>::dot(gradient, value.at(ids[c]), t.value_width);
    delta += weights[c] * scores[c];
  }
  for (int c = 0; c < count; ++c) scores[c] = t.scale * weights[c] * (scores[c] - delta);
  Pick<L>::gather_all(key, ids, scores, count, w.query + where * t.width);
}
ON_EVERY_MACHINE(topk_query, (const TopKBackward& w, const Problem& p, int64_t where, float* weights, float* scores),
                 (w, p, where, weights, scores))

// The gradients of kChunk keys and values: Σ over the queries that kept them, always in the same order.
template <int L>
INLINE void topk_keys(const TopKBackward& w, const Problem& p, int64_t number, const float* weights,
                      const float* scores) {
  const TopK& t = w.call;
  const int64_t chunks = (t.keys + kChunk - 1) / kChunk, group = number / chunks, b = group / t.groups;
  const int64_t first = number % chunks * kChunk, end = first + kChunk, heads = t.heads / t.groups;
  for (int64_t i = 0; i < t.queries; ++i)
    for (int64_t h = group % t.groups * heads; h < (group % t.groups + 1) * heads; ++h) {
      const int64_t where = (b * t.queries + i) * t.heads + h;
      const auto* ids = reinterpret_cast<const uint32_t*>(t.ids + where * t.slots);  // -1 is then the largest
      const float* query = queries_of(p).row(b * t.heads + h).at(i);
      for (int64_t c = std::lower_bound(ids, ids + t.slots, uint32_t(first)) - ids; c < t.slots && ids[c] < end; ++c) {
        const int64_t to = (b * t.keys + ids[c]) * t.groups + group % t.groups;
        Pick<L>::add(w.key + to * t.width, query, scores[where * t.slots + c], t.width);
        Pick<L>::add(w.value + to * t.value_width, w.gradient + where * t.value_width, weights[where * t.slots + c],
                     t.value_width);
      }
    }
}
ON_EVERY_MACHINE(topk_keys, (const TopKBackward& w, const Problem& p, int64_t number, const float* weights,
                             const float* scores), (w, p, number, weights, scores))

}  // namespace

extern "C" {

int sentei_topk_size() { return int(sizeof(TopK)); }
int sentei_topk_backward_size() { return int(sizeof(TopKBackward)); }

// Both return a Status; unless it is kDone the results are unfinished. Only the backward, whose ids are given, knows
// kBadPlan.
int sentei_topk(const TopK* call) {
  return status_of([&] {
    const TopK& t = *call;
    const Problem p = problem_of(t);
    // As many as a micro-kernel takes at once, so that it reads what lies together.
    const int panel = set_of(t.machine) == 2 ? Simd<16>::kVectors * 16 : kColumns;
    const Blocks keys(p, keys_of(p), 0, p.batch * p.groups, panel, true);
    const int64_t items = t.batch * t.heads * ((t.queries + kQueryBlock - 1) / kQueryBlock);
    in_parallel(items, t.threads, [&] { return Scratch(t, room_of(t)); },
                [&](int64_t i, Scratch& s) { topk_item_on[set_of(t.machine)](t, p, items - 1 - i, keys, s); });
  });
}

int sentei_topk_backward(const TopKBackward* backward) {
  return status_of([&] {
    const TopKBackward& w = *backward;
    const TopK& t = w.call;
    const Problem p = problem_of(t);
    const int64_t rows = t.batch * t.queries * t.heads;
    check_ids(t);
    Zeros weights(rows * t.slots), scores(rows * t.slots);
    in_parallel(rows, t.threads, [&] { return Zeros(t.slots + kColumns); },
                [&](int64_t i, Zeros& softened) {
      topk_query_on[set_of(t.machine)](w, p, i, softened.data(), scores.data() + i * t.slots);
      std::copy_n(softened.data(), t.slots, weights.data() + i * t.slots);
    });
    in_parallel(t.batch * t.groups * ((t.keys + kChunk - 1) / kChunk), t.threads, [] { return 0; },
                [&](int64_t i, int) { topk_keys_on[set_of(t.machine)](w, p, i, weights.data(), scores.data()); });
  });
}
}
