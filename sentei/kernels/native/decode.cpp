// Attention of a few query rows, each over its own choice among pages of keys: bounds of the scores, the choice, and
// attention to what was chosen, in one call and with one start of the threads.
//
// Work comes in three kinds of items, handed out in this order, so that whoever waits for an item waits for a thread
// that runs: bounds (batch, group, run of pages), choices (batch, group, row), and attention (batch, group, row, run of
// kept pages), whose last one merges the runs. The runs do not depend on the threads, so neither do the bits.
#include <memory>

#include "pages.h"
#include "rules.h"

namespace {

constexpr int64_t kPagesOfBounds = 64, kPagesOfAttention = 16, kMostRuns = 32;

// log2 of a positive number, by its exponent and a series for the rest; relative error 2e-7.
template <int L>
INLINE typename Simd<L>::Vec log2_of(typename Simd<L>::Vec x) {
  typedef typename Simd<L>::Vec Vec;
  typedef typename Simd<L>::Ints Ints;
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest lies between sqrt(1/2) and sqrt(2)
  bits -= exponent << 23;
  Vec rest;
  std::memcpy(&rest, &bits, sizeof rest);
  const Vec t = (rest - 1.0f) / (rest + 1.0f), s = t * t;
  const Vec series = (((s * (1.0f / 9) + 1.0f / 7) * s + 1.0f / 5) * s + 1.0f / 3) * s + 1.0f;
  return __builtin_convertvector(exponent, Vec) + t * series * (2 * kLog2E);
}

// use(N, first) for runs of N heads, `Most` at most, 4 or 2, from head `first` on: what the registers hold.
template <int Most = 4, class Use>
INLINE void by_heads(int64_t heads, Use use) {
  int64_t h = 0;
  for (; h + Most <= heads; h += Most) use(std::integral_constant<int, Most>(), h);
  if constexpr (Most > 3)
    if (heads - h == 3) use(std::integral_constant<int, 3>(), h);
  if constexpr (Most > 2)
    if (heads - h == 2) use(std::integral_constant<int, 2>(), h);
  if (heads - h == 1) use(std::integral_constant<int, 1>(), h);
}

// sum[N] += the products of N rows, `apart` from one another, with one row of keys, lane by lane; whole vectors alone.
template <int L, int N, class T>
INLINE void add_products(const float* rows, int64_t apart, const T* key, int64_t width, typename Simd<L>::Vec* sum) {
  for (int64_t d = 0; d + L <= width; d += L) {
    const auto k = wide<L>(key + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] += Simd<L>::load(rows + n * apart + d) * k;
  }
}

// result[N] += what whole vectors leave of the products.
template <int L, int N, class T>
INLINE void add_rest(const float* rows, int64_t apart, const T* key, int64_t width, float* result) {
  for (int64_t d = width / L * L; d < width; ++d)
    for (int n = 0; n < N; ++n) result[n] += rows[n * apart + d] * wide_one(key + d);
}

// The sums of the lanes of N vectors, 4 at most: of all of them at once.
template <int L, int N>
INLINE Four totals(const typename Simd<L>::Vec* sum) {
  typename Simd<L>::Vec part[4]{};
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) part[n] = sum[n];
  return Simd<L>::quarter(folded<L, 2>(folded<L, 1>(part[0], part[1]), folded<L, 1>(part[2], part[3])));
}

// The scores of N heads and J keys, 4 at most of either: those of a head are neighbours, heads a line apart.
template <int L, int N, int J, class T>
INLINE void score_keys(const float* query, const T* key, int64_t next, int64_t width, float* scores, int64_t line) {
  typename Simd<L>::Vec sum[N][J]{};
  for (int64_t d = 0; d + L <= width; d += L) {
    typename Simd<L>::Vec keys[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) keys[j] = wide<L>(key + j * next + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const auto head = Simd<L>::load(query + n * width + d);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sum[n][j] += head * keys[j];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const Four found = totals<L, J>(sum[n]);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) scores[n * line + j] = found[j];
  }
  for (int64_t d = width / L * L; d < width; ++d)
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < J; ++j) scores[n * line + j] += query[n * width + d] * wide_one(key + j * next + d);
}

// What a row may see: keys start … stop - 1 of the whole sequence.
struct Seen {
  INLINE Seen(const Paged& p, int64_t b, int64_t row)
      : start(p.lengths ? std::clamp<int64_t>(p.lengths[2 * b], 0, p.keys) : 0),
        stop(p.lengths ? std::clamp<int64_t>(p.lengths[2 * b + 1], 0, p.keys) : p.keys) {
    if (p.causal) stop = std::min(stop, p.keys - p.rows + row + 1);
  }
  int64_t start, stop;
};

// And what of a page: keys first … end - 1.
struct Part {
  INLINE Part(const Paged& p, int64_t b, int64_t row, int64_t page) {
    const Seen seen(p, b, row);
    first = std::max(seen.start, page * p.page);
    end = std::min(seen.stop, (page + 1) * p.page);
  }
  INLINE bool is_whole(int64_t page) const { return end - first == page; }
  INLINE bool is_empty() const { return first >= end; }
  int64_t first, end;
};

// What the items share. Queries are scaled so that scores are powers of two, and split by sign: against the highest
// and the lowest key of a page they give the most that any key of it can score.
struct Work {
  explicit Work(const Paged& p)
      : p(p), per_group(p.heads / p.groups), pages((p.keys + p.page - 1) / p.page), line(round_up(pages)),
        runs(std::min(kMostRuns, (pages + kPagesOfAttention - 1) / kPagesOfAttention)),
        bound_runs((pages + kPagesOfBounds - 1) / kPagesOfBounds), choices(p.batch * p.groups * p.rows),
        block(per_group * p.width), machine(set_of(p.machine)), mass(std::log2(float(p.page))),
        query(new float[3 * choices * block]), raw(new float[choices * per_group * line]),
        partial(new float[choices * runs * per_group * (p.value_width + 2)]), ids(new int32_t[choices * pages]),
        count(new int64_t[choices]), bounded(new std::atomic<int64_t>[p.batch * p.groups]()),
        chosen(new std::atomic<bool>[choices]()), attended(new std::atomic<int64_t>[choices]()) {
    for (int64_t i = 0; i < choices * per_group; ++i) {
      const int64_t choice = i / per_group, group = choice / p.rows, h = i % per_group;
      const int64_t from = group / p.groups * p.query_stride[0] + choice % p.rows * p.query_stride[1] +
                           (group % p.groups * per_group + h) * p.query_stride[2];
      float* to = query_of(choice) + h * p.width;
      widen_row(at(p.query, p.is_query_half, from), p.is_query_half, p.width, to);
      for (int64_t d = 0; d < p.width; ++d) {
        const float scaled = to[d] * float(p.scale * kLog2E);
        to[d] = scaled;
        to[block + d] = scaled < 0 ? 0 : scaled;
        to[2 * block + d] = scaled < 0 ? scaled : 0;
      }
    }
  }
  float* query_of(int64_t choice) const { return query.get() + choice * 3 * block; }
  float* raw_of(int64_t choice, int64_t h) const { return raw.get() + (choice * per_group + h) * line; }
  float* partial_of(int64_t choice, int64_t run) const {
    return partial.get() + (choice * runs + run) * per_group * (p.value_width + 2);
  }
  // How many kept pages a run of attention has: as few as kMostRuns allows.
  int64_t pages_of_run(int64_t choice) const {
    return std::max(kPagesOfAttention, (count[choice] + runs - 1) / runs);
  }
  template <class T>
  const T* row_of(const void* data, const int64_t* stride, int64_t group, int64_t token) const {
    return static_cast<const T*>(data) + group / p.groups * stride[0] + token * stride[1] +
           group % p.groups * stride[2];
  }

  const Paged& p;
  const int64_t per_group, pages, line, runs, bound_runs, choices, block;
  const int machine;
  const float mass;                        // of a whole page, in powers of two
  const std::unique_ptr<float[]> query;    // [choices, 3, P, D]: whole, positive, negative
  const std::unique_ptr<float[]> raw;      // [choices, P, line]: bounds of the mass, in powers of two
  const std::unique_ptr<float[]> partial;  // [choices, runs, P, Dv + 2]: output, largest score, sum
  const std::unique_ptr<int32_t[]> ids;    // [choices, pages]
  const std::unique_ptr<int64_t[]> count;  // [choices]
  const std::unique_ptr<std::atomic<int64_t>[]> bounded;   // [B, G]: runs of bounds that are done
  const std::unique_ptr<std::atomic<bool>[]> chosen;       // [choices]
  const std::unique_ptr<std::atomic<int64_t>[]> attended;  // [choices]: runs of attention that are done
  std::atomic<bool> is_refused{false};                     // a rule met NaN or plus infinity
};

struct Scratch {
  Zeros low, high, scores, pages, output;  // of a page [D], of a run [P, keys], of a row [pages], of a head [Dv]
  std::vector<uint8_t> forced;
  RuleScratch rule;
};

template <int L, class T>
INLINE void bound_page(const Work& w, int64_t choice, const T* low, const T* high, int64_t keys, int64_t page) {
  by_heads(w.per_group, [&](auto heads, int64_t h) INLINE_LAMBDA {
    constexpr int N = decltype(heads)::value;
    typename Simd<L>::Vec sum[N]{};
    float most[N];
    const int64_t width = w.p.width;
    const float *positive = w.query_of(choice) + w.block + h * width, *negative = positive + w.block;
    add_products<L, N>(positive, width, high, width, sum);
    add_products<L, N>(negative, width, low, width, sum);
    const Four found = totals<L, N>(sum);
    for (int n = 0; n < N; ++n) most[n] = found[n];
    add_rest<L, N>(positive, width, high, width, most);
    add_rest<L, N>(negative, width, low, width, most);
    const float mass = keys == w.p.page ? w.mass : std::log2(float(keys));
    for (int n = 0; n < N; ++n) w.raw_of(choice, h + n)[page] = most[n] + mass;
  });
}

// For every row the bounds of some pages of a group. Those of whole pages are given, or made once for all rows; what a
// row sees a part of is bounded by that part.
template <int L, class T>
INLINE void bound_run(const Work& w, int64_t group, int64_t run, Scratch& t) {
  const Paged& p = w.p;
  const int64_t end = run + 1 == w.bound_runs ? w.line : (run + 1) * kPagesOfBounds;
  for (int64_t page = run * kPagesOfBounds; page < end; ++page) {
    const T* given = static_cast<const T*>(p.bounds);
    if (given)
      given += group / p.groups * p.bounds_stride[0] + group % p.groups * p.bounds_stride[1] +
               page * p.bounds_stride[2];
    bool is_made = false;
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t choice = group * p.rows + row;
      const Part part(p, group / p.groups, row, page);
      if (part.is_empty()) {
        for (int64_t h = 0; h < w.per_group; ++h) w.raw_of(choice, h)[page] = kNone;
      } else if (given && part.is_whole(p.page)) {
        bound_page<L, T>(w, choice, given, given + p.bounds_stride[3], p.page, page);
      } else {
        if (!is_made || !part.is_whole(p.page))
          bound_rows(w.row_of<T>(p.key, p.key_stride, group, part.first), p.key_stride[1], part.end - part.first,
                     p.width, t.low.data(), t.high.data());
        is_made = part.is_whole(p.page);
        bound_page<L, float>(w, choice, t.low.data(), t.high.data(), part.end - part.first, page);
      }
    }
  }
}
template <int L>
INLINE void bound_item(const Work& w, int64_t group, int64_t run, Scratch& t) {
  if (w.p.is_half) bound_run<L, uint16_t>(w, group, run, t);
  else bound_run<L, float>(w, group, run, t);
}
ON_EVERY_MACHINE(bound_item, (const Work& w, int64_t group, int64_t run, Scratch& t), (w, group, run, t))

// The scores of a row's pages: the logarithm of the mean, over the heads of the group, of each page's softmax share.
template <int L>
INLINE void score_item(const Work& w, int64_t choice, float* scores) {
  typedef typename Simd<L>::Vec Vec;
  bool is_nan = false;
  for (int64_t h = 0; h < w.per_group; ++h) {
    float* row = w.raw_of(choice, h);
    const float top = Simd<L>::largest(row, int(w.line));
    if (top == kNone) {  // the row sees nothing, or nothing but NaN
      for (int64_t c = 0; c < w.pages; ++c) is_nan |= row[c] != row[c];
      continue;
    }
    Vec sum{};
    for (int64_t c = 0; c < w.line; c += L) sum += Simd<L>::exp2(Simd<L>::load(row + c) - top);
    const float all = top + std::log2(Simd<L>::total(sum));
    is_nan |= all != all;
    for (int64_t c = 0; c < w.line; c += L) Simd<L>::store(row + c, Simd<L>::load(row + c) - all);
  }
  const float* row = w.raw_of(choice, 0);
  for (int64_t c = 0; c < w.pages; c += L) {
    Vec top = Vec{} + std::numeric_limits<float>::lowest(), sum{};
    for (int64_t h = 0; h < w.per_group; ++h) {
      const Vec next = Simd<L>::load(row + h * w.line + c);
      top = next > top ? next : top;
    }
    for (int64_t h = 0; h < w.per_group; ++h) sum += Simd<L>::exp2(Simd<L>::load(row + h * w.line + c) - top);
    float part[L];
    Simd<L>::store(part, (top + log2_of<L>(sum * (1.0f / w.per_group))) * kLn2);
    for (int64_t i = 0; i < std::min(int64_t(L), w.pages - c); ++i)
      scores[c + i] = row[c + i] == kNone ? kNone : is_nan ? kNan : part[i];
  }
}
ON_EVERY_MACHINE(score_item, (const Work& w, int64_t choice, float* scores), (w, choice, scores))

// Scores, rule and the list of what is kept, for one row.
void choose(Work& w, int64_t choice, Scratch& t) {
  const Paged& p = w.p;
  const int64_t b = choice / p.rows / p.groups, row = choice % p.rows;
  w.count[choice] = 0;
  if (p.task == kScoreOnly) return score_item_on[w.machine](w, choice, p.scores + choice * w.pages);
  uint8_t* kept = p.kept + choice * w.pages;
  if (p.task == kChooseAndAttend) {
    score_item_on[w.machine](w, choice, t.pages.data());
    // Always kept are the first page that is seen, those near the row, and what is seen in part.
    const Seen seen(p, b, row);
    const int64_t open = seen.start / p.page + 1, far = p.keys - p.rows + row - p.window;
    const int64_t last = std::max<int64_t>(std::min(seen.stop, far), 0) / p.page;
    std::fill(t.forced.begin(), t.forced.end(), 1);
    if (open < last) std::fill(t.forced.begin() + open, t.forced.begin() + last, 0);
    if (keep(RuleKind(p.rule), p.parameter, t.pages.data(), t.forced.data(), w.pages, kept, t.rule) < 0)
      w.is_refused = true;
  }
  int64_t count = 0;
  for (int64_t c = 0; c < w.pages; ++c)
    if (kept[c] && !Part(p, b, row, c).is_empty()) w.ids[choice * w.pages + count++] = int32_t(c);
  w.count[choice] = count;
}

// output[N, Dv] += weights[N, keys] value[keys, Dv]
template <int L, int N, class T>
INLINE void add_values(const float* weights, int64_t apart, const T* value, int64_t next, int64_t keys, int64_t width,
                       int64_t output_apart, float* output) {
  typedef typename Simd<L>::Vec Vec;
  int64_t d = 0;
  for (; d + 2 * L <= width; d += 2 * L) {
    Vec sum[N][2];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < 2; ++v) sum[n][v] = Simd<L>::load(output + n * output_apart + d + v * L);
    for (int64_t j = 0; j < keys; ++j) {
      const Vec low = wide<L>(value + j * next + d), high = wide<L>(value + j * next + d + L);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[n][0] += weights[n * apart + j] * low;
        sum[n][1] += weights[n * apart + j] * high;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      for (int v = 0; v < 2; ++v) Simd<L>::store(output + n * output_apart + d + v * L, sum[n][v]);
  }
  for (; d < width; ++d)
    for (int n = 0; n < N; ++n)
      for (int64_t j = 0; j < keys; ++j)
        output[n * output_apart + d] += weights[n * apart + j] * wide_one(value + j * next + d);
}

// Asks for a row of keys or values before it is needed: no processor guesses where the next kept page is.
template <class T>
INLINE void fetch(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Attention of a row's heads of one group to a run of its pages: not normalised, with the largest score and the sum.
template <int L, class T>
INLINE void attend_run(const Work& w, int64_t choice, int64_t run, Scratch& t) {
  const Paged& p = w.p;
  const int64_t group = choice / p.rows, b = group / p.groups, row = choice % p.rows, size = w.pages_of_run(choice);
  const int64_t first = run * size, last = std::min(first + size, w.count[choice]);
  const int32_t* ids = w.ids.get() + choice * w.pages;
  const int64_t cell = round_up(p.page), line = (last - first) * cell, wide_out = p.value_width + 2;
  std::fill(t.scores.begin(), t.scores.begin() + w.per_group * line, kNone);
  for (int64_t i = first; i < last; ++i) {
    const Part part(p, b, row, ids[i]);
    const int64_t place = (i - first) * cell + part.first - ids[i] * p.page;
    const T* key = w.row_of<T>(p.key, p.key_stride, group, part.first);
    const T* value = w.row_of<T>(p.value, p.value_stride, group, part.first);
    const int64_t after = std::min(ids[std::min(i + 1, last - 1)] * p.page, p.keys - (part.end - part.first));
    const T* next = w.row_of<T>(p.key, p.key_stride, group, after);
    by_heads<L == 16 ? 4 : 2>(w.per_group, [&](auto heads, int64_t h) INLINE_LAMBDA {
      const auto score = [&](auto keys, int64_t j) INLINE_LAMBDA {
        score_keys<L, decltype(heads)::value, decltype(keys)::value>(
            w.query_of(choice) + h * p.width, key + j * p.key_stride[1], p.key_stride[1], p.width,
            t.scores.data() + h * line + place + j, line);
        if (h == 0)
          for (int64_t i = j; i < j + keys; ++i) {
            fetch(next + i * p.key_stride[1], p.width);
            fetch(value + i * p.value_stride[1], p.value_width);
          }
      };
      int64_t j = 0;
      for (; j + 4 <= part.end - part.first; j += 4) score(std::integral_constant<int, 4>(), j);
      for (; j < part.end - part.first; ++j) score(std::integral_constant<int, 1>(), j);
    });
  }
  float* output = w.partial_of(choice, run);
  std::fill(output, output + w.per_group * wide_out, 0.0f);
  for (int64_t h = 0; h < w.per_group; ++h) {
    float* scores = t.scores.data() + h * line;
    const float top = Simd<L>::largest(scores, int(line));
    output[h * wide_out + p.value_width] = top;
    // Where every score overflowed to -inf a weight is 0, and a NaN among them stays one.
    output[h * wide_out + p.value_width + 1] = Simd<L>::exponentiate(scores, int(line), top == kNone ? 0.0f : top);
  }
  for (int64_t i = first; i < last; ++i) {
    const Part part(p, b, row, ids[i]);
    const int64_t place = (i - first) * cell + part.first - ids[i] * p.page;
    const T* value = w.row_of<T>(p.value, p.value_stride, group, part.first);
    by_heads(w.per_group, [&](auto heads, int64_t h) INLINE_LAMBDA {
      add_values<L, decltype(heads)::value>(t.scores.data() + h * line + place, line, value, p.value_stride[1],
                                            part.end - part.first, p.value_width, wide_out, output + h * wide_out);
    });
  }
}
template <int L>
INLINE void attend_pages(const Work& w, int64_t choice, int64_t run, Scratch& t) {
  if (w.p.is_half) attend_run<L, uint16_t>(w, choice, run, t);
  else attend_run<L, float>(w, choice, run, t);
}
ON_EVERY_MACHINE(attend_pages, (const Work& w, int64_t choice, int64_t run, Scratch& t), (w, choice, run, t))

// The runs of a row joined, in order; 0 where it sees nothing. `output` is room for a head's.
void merge_runs(const Work& w, int64_t choice, float* output) {
  const Paged& p = w.p;
  const int64_t size = w.pages_of_run(choice), runs = (w.count[choice] + size - 1) / size;
  const int64_t group = choice / p.rows, b = group / p.groups, row = choice % p.rows, wide_out = p.value_width + 2;
  for (int64_t h = 0; h < w.per_group; ++h) {
    std::fill(output, output + p.value_width, 0.0f);
    float top = kNone, sum = 0;
    for (int64_t run = 0; run < runs; ++run)
      top = std::max(top, w.partial_of(choice, run)[h * wide_out + p.value_width]);
    for (int64_t run = 0; run < runs; ++run) {
      const float* part = w.partial_of(choice, run) + h * wide_out;
      const float factor = std::exp2(part[p.value_width] - top);
      sum += factor * part[p.value_width + 1];
      for (int64_t d = 0; d < p.value_width; ++d) output[d] += factor * part[d];
    }
    if (runs)
      for (int64_t d = 0; d < p.value_width; ++d) output[d] /= sum;
    const int64_t head = (b * p.rows + row) * p.heads + group % p.groups * w.per_group + h;
    narrow_row(output, p.is_query_half, p.value_width, at(p.output, p.is_query_half, head * p.value_width));
  }
}

// Tells those who wait when it goes out of scope, also by an exception.
struct Announcement {
  ~Announcement() { done.store(true, std::memory_order_release); }
  std::atomic<bool>& done;
};

void do_item(Work& w, int64_t item, Scratch& t) {
  const Paged& p = w.p;
  const int64_t bounds = p.task == kAttendToKept ? 0 : p.batch * p.groups * w.bound_runs;
  if (item < bounds) {
    bound_item_on[w.machine](w, item / w.bound_runs, item % w.bound_runs, t);
    w.bounded[item / w.bound_runs].fetch_add(1, std::memory_order_release);
  } else if (item < bounds + w.choices) {
    const int64_t choice = item - bounds;
    const Announcement announcement{w.chosen[choice]};
    while (bounds && w.bounded[choice / p.rows].load(std::memory_order_acquire) < w.bound_runs)
      std::this_thread::yield();
    choose(w, choice, t);
  } else {
    const int64_t choice = (item - bounds - w.choices) / w.runs, run = (item - bounds - w.choices) % w.runs;
    while (!w.chosen[choice].load(std::memory_order_acquire)) std::this_thread::yield();
    if (run * w.pages_of_run(choice) < w.count[choice]) attend_pages_on[w.machine](w, choice, run, t);
    if (w.attended[choice].fetch_add(1, std::memory_order_acq_rel) + 1 == w.runs) merge_runs(w, choice, t.output.data());
  }
}

}  // namespace

// What `sentei_pages` does; throws bad_alloc.
int read_pages(const Paged& p) {
  Work w(p);
  const int64_t before = (p.task == kAttendToKept ? 0 : p.batch * p.groups * w.bound_runs) + w.choices;
  in_parallel(before + (p.task == kScoreOnly ? 0 : w.choices * w.runs), p.threads, [&] {
    const size_t most = std::max(kPagesOfAttention, (w.pages + w.runs - 1) / std::max(w.runs, int64_t(1)));
    return Scratch{Zeros(p.width), Zeros(p.width),
                   Zeros(w.per_group * most * round_up(p.page)), Zeros(w.pages), Zeros(p.value_width),
                   std::vector<uint8_t>(w.pages), {}};
  }, [&](int64_t i, Scratch& t) { do_item(w, i, t); });
  return w.is_refused ? kRefused : kDone;
}

extern "C" {

int sentei_paged_size() { return int(sizeof(Paged)); }

// 0; 1 when memory ran out; 2 when a score was NaN or plus infinity. The output is then unfinished.
int sentei_pages(const Paged* problem) {
  int refused = kDone;
  const int status = status_of([&] { refused = read_pages(*problem); });
  return status ? status : refused;
}
}
