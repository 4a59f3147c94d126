// The estimates that choose tiles (their definition is kernels/attention/select.py), and the choice itself.
//
// Rows of queries lie across the lanes of a vector, so that a tile's largest score and its sum are taken for many rows
// at once, and keys are read where they are. Scores are powers of two.
#include "call.h"
#include "rules.h"

// What stands for the keys of a tile: themselves, their mean, their bounds, or their folds of `stride`.
enum EstimateKind : int64_t { kExact = 0, kPooled = 1, kBounds = 2, kFolded = 3 };

struct Estimate {
  Problem problem;  // of float32, or of kExact bfloat16 where `takes_pairs`, of even width and strides; first and stride
                    // are the rows of kExact; stride is the fold of kFolded
  int64_t kind, square;  // square: the root of the rows' mean square, not their mean
};

// Everything is contiguous: scores [B, P, QB, KB], masks [mask_batch, QB, KB], a parameter a head, and the plan's
// counts [B, P, QB] and ids [B, P, QB, KB].
struct Choice {
  const float* scores;
  const uint8_t *forced, *full;
  const double* parameters;
  int32_t *full_count, *full_ids, *partial_count, *partial_ids;
  int64_t batch, heads, query_blocks, key_blocks, mask_batch, kind, threads;
};

namespace {

constexpr int kLanes = 96;     // rows that an item has at least, where there are so many: keys are then read less often
constexpr int kMostLanes = 512;  // rows of several heads in an item: its scratch stays in the cache
constexpr int kUnits = 64;     // products of a row that are held at once
constexpr int kBadScores = 2;  // of sentei_keep: NaN or plus infinity

// How the work is cut: an item is some heads of a KV group and a run of query blocks; its lanes are [block][head][row].
struct Cut {
  explicit Cut(const Estimate& e, const Sizes& s)
      : first(e.kind == kExact ? e.problem.first : 0), step(e.kind == kExact ? int(e.problem.stride) : 1),
        fold(e.kind == kFolded ? int(e.problem.stride) : 1), parts(e.kind == kBounds ? 2 : fold),
        units(e.kind == kExact || e.kind == kFolded ? int(e.problem.key_block) / fold : 1),
        exact_rows(int((e.problem.query_block - first + step - 1) / step)), rows(exact_rows / fold),
        heads(heads_of(e.problem.heads / e.problem.groups, exact_rows)),
        run(int(e.problem.window ? 1 : std::min<int64_t>(std::max(1, kLanes / (heads * rows)), s.query_blocks))),
        runs((s.query_blocks + run - 1) / run), lanes(int(round_up(run * heads * rows))),
        exact_lanes(int(round_up(run * heads * exact_rows)) + kColumns), tiles(std::max(1, kUnits / units)),
        weight(e.kind == kFolded ? fold : e.kind == kExact ? 1 : e.problem.key_block) {}
  // Heads of a group that go together: as many as divide them evenly and do not have too many rows.
  static int heads_of(int64_t group, int64_t rows) {
    int64_t heads = group;
    while (heads > 1 && (group % heads || heads * rows > kMostLanes)) --heads;
    return int(heads);
  }
  int64_t first;
  int step, fold, parts, units, exact_rows, rows, heads, run;
  int64_t runs;
  int lanes, exact_lanes, tiles;
  float weight;  // how many keys a unit stands for
};

// The mean of the keys of a tile, or the highest and the lowest of their numbers; a NaN is taken, and stays.
template <int L>
INLINE void join(int64_t kind, const float* token, int64_t stride, int count, int width, float* high, float* low) {
  std::copy_n(token, width, high);
  if (kind == kBounds) std::copy_n(token, width, low);
  for (int j = 1; j < count; ++j) {
    token += stride;
    for (int d = 0; kind == kPooled && d < width; ++d) high[d] += token[d];
    for (int d = 0; kind == kBounds && d < width; ++d) {
      const float x = token[d], most = high[d], least = low[d];
      high[d] = x > most || x != x ? x : most;
      low[d] = x < least || x != x ? x : least;
    }
  }
  for (int d = 0; kind == kPooled && d < width; ++d) high[d] /= float(count);
}
ON_EVERY_MACHINE(join, (int64_t kind, const float* token, int64_t stride, int count, int width, float* high, float* low),
                 (kind, token, stride, count, width, high, low))

// What stands for the keys of full tiles, [B, G, part, unit, width]: their mean, their highest and lowest numbers, or
// the keys themselves ÷ fold, those of a fold apart, so that a part's are neighbours.
Zeros joined_keys(const Estimate& e, const Cut& cut, int machine) {
  const Problem& p = e.problem;
  const Tensor keys = keys_of(p);
  const int64_t units = p.keys / p.key_block * cut.units, size = units * p.width, span = p.key_block / cut.units;
  Zeros joined(p.batch * p.groups * cut.parts * size);
  in_parallel(p.batch * p.groups * units, p.threads, [] { return 0; }, [&](int64_t i, int) {
    const int64_t row = i / units, first = i % units * span;
    const Vectors key = keys.row(row);
    float* high = joined.data() + row * cut.parts * size + i % units * p.width;
    float* low = high + (cut.parts - 1) * size;  // of kBounds
    if (e.kind == kFolded) {
      for (int j = 0; j < cut.fold; ++j) key.read(first + j, high + j * size, 1.0f / float(cut.fold));
      return;
    }
    join_on[machine](e.kind, key.at(first), p.key_stride[1], int(span), int(p.width), high, low);
  });
  return joined;
}

// The keys of one KV head from a token on, in floats, or pairs in the place of floats, as they lie in memory.
template <bool Pairs>
INLINE const float* keys_from(const Problem& p, int64_t row, int64_t token) {
  if constexpr (Pairs) return reinterpret_cast<const float*>(keys_of(p).row(row).halves(token));
  return keys_of(p).row(row).at(token);
}

// How many floats a pair, or a float, has of a vector's numbers, and what the products of pairs are still to be times.
template <bool Pairs>
constexpr int kUnit = Pairs ? 2 : 1;
template <bool Pairs>
INLINE float factor_of(const Problem& p) { return Pairs ? p.scale * kLog2E : 1.0f; }

// What stands for the keys of one KV head: part j of unit u.
struct Units {
  Units(const Estimate& e, const Cut& cut, const Zeros& joined, const float* keys, int64_t next, int64_t row) {
    const Problem& p = e.problem;
    unit = joined.empty() ? next : p.width;
    part = p.keys / p.key_block * cut.units * unit;
    data = joined.empty() ? keys : joined.data() + row * cut.parts * part;
  }
  const float* data;
  int64_t part, unit;
};

// Numbers from a row to the next in scratch: not a power of two, so that rows a fold apart do not share lines of the cache.
INLINE int64_t line_of(const Problem& p) { return p.width + kColumns; }

struct EstimateScratch {
  EstimateScratch(const Problem& p, const Sizes& s, const Cut& cut)
      : rows(line_of(p) * cut.run * cut.heads * cut.exact_rows),
        query(p.width * cut.exact_lanes),
        columns(cut.parts > 1 ? cut.parts * p.width * cut.lanes : 0),
        scores(std::max(cut.tiles * cut.units * int64_t(cut.lanes),
                        p.key_block * round_up(cut.heads * cut.exact_rows))),
        top(s.key_blocks * cut.lanes), sum(top.size()), exact_top(cut.exact_lanes), exact_sum(cut.exact_lanes),
        first(cut.exact_lanes), number(cut.exact_lanes) {}
  Zeros rows;        // [block][head][exact row][line_of]
  Zeros query;       // [width][exact lanes]: every row whose exact scores are wanted
  Zeros columns;     // [part][width][lanes]: what `Units` are multiplied with, where that is another
  Zeros scores;      // [unit][lanes]
  Zeros top, sum;    // [tile][lanes]: a row's mass on a tile is sum · 2^top
  Zeros exact_top, exact_sum;
  std::vector<uint32_t> first, number;  // [exact lanes]: the keys that a row sees of a tile
};

// The rows' largest score (minus infinity where there is none) and weight · Σ 2^(score - largest).
template <int L>
INLINE void reduce(const float* scores, int line, int units, int lanes, float weight, float* top, float* sum) {
  typedef typename Simd<L>::Vec Vec;
  for (int lane = 0; lane < lanes; lane += L) {
    Vec most = Vec{} + kNone;
    for (int u = 0; u < units; ++u) {
      const Vec next = Simd<L>::load(scores + u * line + lane);
      most = next > most ? next : most;
    }
    const Vec from = most == kNone ? Vec{} : most;  // a NaN makes the sum one, and minus infinity adds nothing
    Vec total{};
    for (int u = 0; u < units; ++u) total += Simd<L>::exp2(Simd<L>::load(scores + u * line + lane) - from);
    Simd<L>::store(top + lane, most);
    Simd<L>::store(sum + lane, total * weight);
  }
}

// The rows of an item as columns, in folds also those of each part, and for bounds by sign; zeros beyond the end. Pairs
// are taken as they are.
template <int L, bool Pairs>
INLINE void load_rows(const Estimate& e, const Cut& cut, int64_t row, int64_t block, EstimateScratch& t) {
  const Problem& p = e.problem;
  const int width = int(p.width), lanes = cut.run * cut.heads * cut.rows;
  const int64_t line = line_of(p);
  float* to = t.rows.data();
  for (int64_t s = block; s < block + cut.run; ++s)
    for (int64_t h = 0; h < cut.heads; ++h) {
      const Vectors query = queries_of(p).row(row + h);
      for (int64_t r = 0; r < cut.exact_rows; ++r, to += line) {
        const int64_t i = s * p.query_block + cut.first + r * cut.step;
        if (i >= p.queries) std::fill_n(to, width, 0.0f);
        else if (Pairs) query.copy(i, to);
        else query.read(i, to, p.scale * kLog2E);
      }
    }
  turn<L>(t.rows.data(), line, lanes * cut.fold, width / kUnit<Pairs>, t.query.data(), cut.exact_lanes);
  for (int j = 0; e.kind == kFolded && cut.parts > 1 && j < cut.fold; ++j)
    turn<L>(t.rows.data() + (cut.fold - 1 - j) * line, cut.fold * line, lanes, width,
            t.columns.data() + j * width * cut.lanes, cut.lanes);
  for (int d = 0; e.kind == kBounds && d < width; ++d) {
    const float* rows = t.query.data() + d * cut.exact_lanes;
    float *positive = t.columns.data() + d * cut.lanes, *negative = positive + width * cut.lanes;
    for (int i = 0; i < lanes; ++i) {  // a NaN has no sign, and is in both
      positive[i] = rows[i] < 0 ? 0.0f : rows[i];
      negative[i] = rows[i] > 0 ? 0.0f : rows[i];
    }
  }
}

// The mass of full tiles, as the estimate has it.
template <int L, bool Pairs>
INLINE void full_tiles(const Estimate& e, const Cut& cut, const Units& units, int64_t first, int64_t end,
                       EstimateScratch& t) {
  const int width = int(e.problem.width) / kUnit<Pairs>, line = cut.parts > 1 ? cut.lanes : cut.exact_lanes;
  const float* columns = cut.parts > 1 ? t.columns.data() : t.query.data();
  for (int64_t tile = first; tile < end; tile += cut.tiles) {
    const int count = int(std::min<int64_t>(cut.tiles, end - tile));
    float* top = t.top.data() + tile * cut.lanes;
    float* sum = t.sum.data() + tile * cut.lanes;
    float* scores = cut.units == 1 ? top : t.scores.data();
    for (int j = 0; j < cut.parts; ++j)
      Simd<L>::template product<Pairs ? kPaired : kRowMajor>(
          units.data + tile * cut.units * units.unit + j * units.part, units.unit, columns + j * width * line, line,
          scores, cut.lanes, count * cut.units, cut.lanes, width, j > 0, factor_of<Pairs>(e.problem));
    if (cut.units == 1) {
      std::fill(sum, sum + count * cut.lanes, cut.weight);
      continue;
    }
    for (int i = 0; i < count; ++i)
      reduce<L>(scores + i * cut.units * cut.lanes, cut.lanes, cut.units, cut.lanes, cut.weight, top + i * cut.lanes,
                sum + i * cut.lanes);
  }
}

// Minus infinity for the rows that do not see key j of a tile: those see `number` keys from `first`.
template <int L>
INLINE void hide(uint32_t j, const uint32_t* first, const uint32_t* number, float* scores) {
  typedef uint32_t Numbers __attribute__((vector_size(4 * L)));
  Numbers from, seen;
  std::memcpy(&from, first, sizeof from);
  std::memcpy(&seen, number, sizeof seen);
  // One comparison, where compilers take many for two: before the first key the difference is huge.
  Simd<L>::store(scores, Numbers{} + j - from < seen ? Simd<L>::load(scores) : typename Simd<L>::Vec{} + kNone);
}

// The mass of a tile on the edge of what is permitted, exactly, for the `at`-th block of a run.
template <int L, bool Pairs>
INLINE void edge_tile(const Estimate& e, const Cut& cut, int64_t b, int64_t group, int64_t block, int at, int64_t tile,
                      EstimateScratch& t) {
  const Problem& p = e.problem;
  const int rows = cut.heads * cut.exact_rows, lanes = int(round_up(rows));
  const int64_t base = tile * p.key_block;
  const int count = int(std::min(p.key_block, p.keys - base));
  Simd<L>::template product<Pairs ? kPaired : kRowMajor>(
      keys_from<Pairs>(p, b * p.groups + group, base), p.key_stride[1] / kUnit<Pairs>, t.query.data() + at * rows,
      cut.exact_lanes, t.scores.data(), lanes, count, lanes, int(p.width) / kUnit<Pairs>, false, factor_of<Pairs>(p));
  for (int row = 0; row < rows; ++row) {
    const Span span = seen_in(p, b, block * p.query_block + cut.first + row % cut.exact_rows * cut.step, tile);
    t.first[row] = uint32_t(std::max<int64_t>(span.first, 0));
    t.number[row] = uint32_t(std::max<int64_t>(span.end - t.first[row], 0));
  }
  for (int j = 0; j < count; ++j)
    for (int row = 0; row < lanes; row += L)
      hide<L>(j, t.first.data() + row, t.number.data() + row, t.scores.data() + j * lanes + row);
  reduce<L>(t.scores.data(), lanes, count, lanes, 1.0f, t.exact_top.data(), t.exact_sum.data());
  float* top = t.top.data() + tile * cut.lanes + at * cut.heads * cut.rows;
  float* sum = t.sum.data() + tile * cut.lanes + at * cut.heads * cut.rows;
  for (int lane = 0; lane < cut.heads * cut.rows; ++lane) {  // one lane for the rows of a fold
    const float* tops = t.exact_top.data() + lane * cut.fold;
    const float most = *std::max_element(tops, tops + cut.fold), from = most == kNone ? 0.0f : most;
    float total = 0;
    for (int i = 0; i < cut.fold; ++i) total += t.exact_sum[lane * cut.fold + i] * std::exp2(tops[i] - from);
    top[lane] = most;
    sum[lane] = total / cut.fold;
  }
}

// From mass to shares, in `sum`; a row that sees nothing has none.
template <int L>
INLINE void shares_of(const Cut& cut, int64_t first, int64_t end, EstimateScratch& t) {
  typedef typename Simd<L>::Vec Vec;
  for (int lane = 0; lane < cut.lanes; lane += L) {
    Vec most = Vec{} + kNone, total{};
    for (int64_t j = first; j < end; ++j) {
      const Vec next = Simd<L>::load(t.top.data() + j * cut.lanes + lane);
      most = next > most ? next : most;
    }
    most = most == kNone ? Vec{} : most;
    for (int64_t j = first; j < end; ++j) {
      float* sum = t.sum.data() + j * cut.lanes + lane;
      const Vec mass = Simd<L>::load(sum) * Simd<L>::exp2(Simd<L>::load(t.top.data() + j * cut.lanes + lane) - most);
      Simd<L>::store(sum, mass);
      total += mass;
    }
    const Vec factor = total == 0.0f ? Vec{} : 1.0f / total;
    for (int64_t j = first; j < end; ++j) {
      float* sum = t.sum.data() + j * cut.lanes + lane;
      Simd<L>::store(sum, Simd<L>::load(sum) * factor);
    }
  }
}

// The logarithm of the rows' mean share or of its root mean square; no share is told as less than the smallest number.
template <int L>
INLINE float pooled(const float* shares, int rows, bool square) {
  typename Simd<L>::Vec lanes{};
  int r = 0;
  for (; r + L <= rows; r += L) {
    const auto share = Simd<L>::load(shares + r);
    lanes += square ? share * share : share;
  }
  float sum = Simd<L>::total(lanes);
  for (; r < rows; ++r) sum += square ? shares[r] * shares[r] : shares[r];
  const float mean = sum / rows, share = square ? std::sqrt(mean) : mean;
  return std::log(share < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : share);
}

template <int L, bool Pairs = false>
INLINE void estimate_item(const Estimate& e, const Sizes& s, const Cut& cut, const Zeros& joined,
                          int64_t number, EstimateScratch& t) {
  const Problem& p = e.problem;
  const int64_t sets = p.batch * p.heads / cut.heads, row = number % sets * cut.heads;  // b · heads + the first head
  const int64_t b = row / p.heads, group = row % p.heads / (p.heads / p.groups);
  const int64_t block = (cut.runs - 1 - number / sets) * cut.run;  // the longest first
  const int64_t blocks = std::min<int64_t>(cut.run, s.query_blocks - block);
  const Reach whole(p, b, block + blocks - 1);  // the last block of a run sees most
  load_rows<L, Pairs>(e, cut, row, block, t);
  const int64_t keys = b * p.groups + group;
  const Units units(e, cut, joined, keys_from<Pairs>(p, keys, 0), p.key_stride[1] / kUnit<Pairs>, keys);
  full_tiles<L, Pairs>(e, cut, units, whole.full.first, whole.full.end, t);
  const int lanes = cut.heads * cut.rows;
  for (int64_t at = 0; at < blocks; ++at) {
    const Reach reach(p, b, block + at);
    for (int64_t j = whole.permitted.first; j < whole.permitted.end; ++j) {
      if (!reach.is_partial(j)) continue;
      std::fill_n(t.top.data() + j * cut.lanes + at * lanes, lanes, kNone);
      std::fill_n(t.sum.data() + j * cut.lanes + at * lanes, lanes, 0.0f);
      if (reach.has(j)) edge_tile<L, Pairs>(e, cut, b, group, block + at, int(at), j, t);
    }
  }
  shares_of<L>(cut, whole.permitted.first, whole.permitted.end, t);
  for (int64_t at = 0; at < blocks; ++at) {
    const Reach reach(p, b, block + at);
    for (int64_t h = 0; h < cut.heads; ++h) {
      float* to = p.shares + ((row + h) * s.query_blocks + block + at) * s.key_blocks;
      const float* shares = t.sum.data() + at * lanes + h * cut.rows;
      std::fill_n(to, s.key_blocks, kNone);
      for (int64_t j = reach.permitted.first; j < reach.permitted.end; ++j)
        to[j] = pooled<L>(shares + j * cut.lanes, cut.rows, e.square);
    }
  }
}
ON_EVERY_MACHINE(estimate_item, (const Estimate& e, const Sizes& s, const Cut& cut, const Zeros& joined,
                                 int64_t number, EstimateScratch& t), (e, s, cut, joined, number, t))
AVX512_BF16 void estimate_item_pairs(const Estimate& e, const Sizes& s, const Cut& cut, const Zeros& joined,
                                     int64_t number, EstimateScratch& t) {
  estimate_item<kPairLanes, kPairs>(e, s, cut, joined, number, t);
}

struct ChoiceScratch {
  RuleScratch rule;
  std::vector<uint8_t> kept;
};

// The tiles one query block keeps, full and partial ones apart; false where its scores are bad.
bool choose_item(const Choice& c, int64_t number, ChoiceScratch& t) {
  const int64_t head = number / c.query_blocks % c.heads, b = number / c.query_blocks / c.heads;
  const int64_t mask = (b % c.mask_batch * c.query_blocks + number % c.query_blocks) * c.key_blocks;
  const float* scores = c.scores + number * c.key_blocks;
  const auto kind = RuleKind(c.kind);
  if (keep(kind, c.parameters[head], scores, c.forced + mask, c.key_blocks, t.kept.data(), t.rule) < 0) return false;
  int32_t* full = c.full_ids + number * c.key_blocks;
  int32_t* partial = c.partial_ids + number * c.key_blocks;
  std::fill_n(full, c.key_blocks, -1);
  std::fill_n(partial, c.key_blocks, -1);
  int32_t fulls = 0, partials = 0;
  for (int64_t j = 0; j < c.key_blocks; ++j)
    if (t.kept[j]) (c.full[mask + j] ? full[fulls++] : partial[partials++]) = int32_t(j);
  c.full_count[number] = fulls;
  c.partial_count[number] = partials;
  return true;
}

}  // namespace

extern "C" {

int sentei_estimate_size() { return int(sizeof(Estimate)); }
int sentei_choice_size() { return int(sizeof(Choice)); }

// Whether `sentei_estimate` takes bfloat16 numbers, for kExact.
int sentei_takes_pairs(int64_t machine) { return takes_pairs(machine); }

// Returns a Status; unless it is kDone the shares are unfinished.
int sentei_estimate(const Estimate* estimate) {
  return status_of([&] {
    const Estimate& e = *estimate;
    const Problem& p = e.problem;
    const Sizes s(p);
    const Cut cut(e, s);
    const Zeros joined = e.kind == kExact ? Zeros() : joined_keys(e, cut, s.machine);
    const bool pairs = e.kind == kExact && takes_pairs(p.machine);
    if (p.bfloat16 && !pairs) throw BadPlan();
    const auto estimate_one = p.bfloat16 ? estimate_item_pairs : estimate_item_on[s.machine];
    in_parallel(p.batch * p.heads / cut.heads * cut.runs, p.threads, [&] { return EstimateScratch(p, s, cut); },
                [&](int64_t i, EstimateScratch& t) { estimate_one(e, s, cut, joined, i, t); });
  });
}

int sentei_keep(const Choice* choice) {
  std::atomic<bool> bad{false};
  const int status = status_of([&] {
    const Choice& c = *choice;
    in_parallel(c.batch * c.heads * c.query_blocks, c.threads,
                [&] { return ChoiceScratch{{}, std::vector<uint8_t>(c.key_blocks)}; },
                [&](int64_t i, ChoiceScratch& t) { if (!choose_item(c, i, t)) bad = true; });
  });
  return status ? status : bad ? kBadScores : 0;
}
}
