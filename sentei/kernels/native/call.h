// What a call is about, and its tensors cut into blocks.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "shelf.h"
#include "simd.h"

// The tiles to compute: for every item (batch, head, block) the blocks that go with it, full and partial ones apart.
// Without lists (null) it is everything that is permitted.
struct Plan {
  const int32_t *full_count, *full_ids, *partial_count, *partial_ids;  // [B, P, blocks], [B, P, blocks, slots]
  int64_t heads, full_slots, partial_slots;                            // P = H, G or 1
};

// Strides are in elements; the last dimension of every tensor is contiguous.
struct Problem {
  const void *query, *key, *value;  // [B, Tq, H, D], [B, Tk, G, D], [B, Tk, G, Dv]
  void* output;                     // [B, Tq, H, Dv], contiguous; of the same element type
  float* lse;                       // [B, Tq, H], contiguous
  float* softmax;  // [2, B, Tq, H]: a base (of powers of two) and 1 / Σ 2^(score - base); 0 without keys
  int64_t query_stride[3], key_stride[3], value_stride[3];
  Plan plan;               // of query blocks
  const int64_t* lengths;  // [B, 2] or null
  int64_t batch, queries, keys, heads, groups, width, value_width;
  int64_t query_block, key_block, causal, window, threads;  // window: keys a query sees up to its own; 0 for all
  int64_t first, stride;                                    // the estimate's rows of a query block
  int64_t machine;                                          // the instruction set, -1 for the best
  int64_t bfloat16;                                         // the element type; else float32
  float scale, softcap;  // scores are softcap · tanh(scale · q·k / softcap), or scale · q·k where it is 0
  float* shares;         // [B, H, QB, KB]: the estimate's result
  float cut;      // a tile whose every score lies more than this below its row's largest so far is skipped; 0 for none
  uint8_t* kept;  // [B, H, QB, KB]: those that were not, where there is a cut
};

// Whether pairs of bfloat16 numbers are multiplied as such: where that is asked for by number, or measured, once, to be
// faster here.
bool takes_pairs(int64_t machine);

namespace {

// Zeros that begin with a cache line.
template <class Number>
struct Aligned {
  using value_type = Number;
  Aligned() = default;
  template <class Other>
  Aligned(const Aligned<Other>&) {}
  Number* allocate(size_t count) {
    return static_cast<Number*>(::operator new(count * sizeof(Number), std::align_val_t(kCacheLine)));
  }
  void deallocate(Number* numbers, size_t) { ::operator delete(numbers, std::align_val_t(kCacheLine)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Zeros = std::vector<float, Aligned<float>>;

enum Status { kDone = 0, kNoMemory = 1, kBadPlan = 2 };
struct BadPlan {};

// Runs run() on up to `threads` threads: those of torch's own OpenMP, where this process has one, so that there are not
// two sets of threads which wait for work and take the cores from each other.
template <class Run>
void on_threads(int64_t threads, Run& run) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads > 1 && parallel) {
    parallel([](void* given) { (*static_cast<Run*>(given))(); }, &run, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(std::ref(run));
  } catch (const std::system_error&) {  // the system gives no more
  }
  run();
  for (auto& other : others) other.join();
}

// Hands out 0 … count - 1, in order, to up to `threads` threads: work(i, scratch), with a scratch of each thread's own
// from make(). Throws bad_alloc when any of them ran out of memory, after all have ended.
template <class Make, class Work>
void in_parallel(int64_t count, int64_t threads, Make make, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto run = [&] {
    try {
      auto scratch = make();
      for (int64_t i; !failed && (i = next.fetch_add(1)) < count;) work(i, scratch);
    } catch (const std::bad_alloc&) {
      failed = true;
    } catch (const std::length_error&) {
      failed = true;
    }
  };
  if (count) on_threads(std::min(threads, count), run);
  if (failed) throw std::bad_alloc();
}

// What became of work().
template <class Work>
int status_of(Work work) {
  try {
    work();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {
    return kNoMemory;
  } catch (const BadPlan&) {
    return kBadPlan;
  }
}

struct Sizes {
  explicit Sizes(const Problem& p)
      : query_blocks((p.queries + p.query_block - 1) / p.query_block),
        key_blocks((p.keys + p.key_block - 1) / p.key_block), machine(set_of(p.machine)),
        columns(int(round_up(p.key_block))), width(int(p.width)),
        even_width(int(round_up(p.width))), value_width(int(round_up(p.value_width))), per_group(p.heads / p.groups) {}
  int64_t query_blocks, key_blocks;
  int machine, columns, width, even_width, value_width;  // all but `width` rounded up
  int64_t per_group;                               // query heads
};

// The vectors of one row of a tensor: of the tokens of a head in a batch entry.
struct Vectors {
  const void* data;
  int64_t stride, width;
  bool bfloat16;

  // One token's vector where it is float32.
  INLINE const float* at(int64_t token) const { return static_cast<const float*>(data) + token * stride; }

  // One token's vector where it is bfloat16.
  INLINE const uint16_t* halves(int64_t token) const { return static_cast<const uint16_t*>(data) + token * stride; }

  // One token's vector as it is, where it is bfloat16; pairs are in the place of floats.
  INLINE void copy(int64_t token, float* to) const {
    if (width) std::memcpy(to, halves(token), width * sizeof(uint16_t));  // there may be no memory where it is 0
  }

  // One token's vector, times a factor.
  INLINE void read(int64_t token, float* to, float factor = 1.0f) const {
    if (bfloat16) {
      const uint16_t* from = halves(token);
      for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d]) * factor;
    } else {
      const float* from = at(token);
      for (int64_t d = 0; d < width; ++d) to[d] = from[d] * factor;
    }
  }
};

// A tensor [B, T, heads, width]. Its rows are numbered (batch, head).
struct Tensor {
  const void* data;
  const int64_t* stride;
  int64_t tokens, heads, width;
  bool bfloat16;

  INLINE Vectors row(int64_t number) const {
    return {::at(data, bfloat16, number / heads * stride[0] + number % heads * stride[2]), stride[1], width, bfloat16};
  }
};

// The vectors of `count` tokens from `first`, times a factor, turned: [width][line]. `room` holds them once more.
INLINE void read_turned(const Vectors& from, int64_t first, int count, float factor, float* to, int64_t line,
                        float* room) {
  for (int j = 0; j < count; ++j) from.read(first + j, room + j * from.width, factor);
  transpose(room, from.width, count, int(from.width), to, line);
}

// The same of bfloat16 numbers as they are, neighbours of a vector as a pair in the place of a float: [width / 2][line].
INLINE void pair_turned(const Vectors& from, int64_t first, int count, float* to, int64_t line, float* room) {
  const int64_t pairs = from.width / 2;
  for (int j = 0; j < count; ++j) from.copy(first + j, room + j * pairs);
  transpose(room, pairs, count, int(pairs), to, line);
}

// Of bfloat16 numbers too, but the pairs are of neighbouring tokens, the last of an odd number with a zero:
// [count / 2][line].
INLINE void pair_rows(const Vectors& from, int64_t first, int count, float* to, int64_t line) {
  for (int j = 0; j < count; j += 2, to += line)
    pair_row(from.halves(first + j), j + 1 < count ? from.halves(first + j + 1) : nullptr, from.width, to);
}

// Some rows of a tensor (a row is b · heads + head), cut into blocks as the micro-kernel reads them, times a factor: each
// [width][tokens] ("across") or [tokens][width], what is contiguous rounded up, zeros beyond the end. Or as pairs of
// bfloat16 numbers, neighbours along what is not contiguous, which must then be even: a pair is in the place of a float.
class Blocks {
 public:
  Blocks(const Problem& p, const Tensor& from, int64_t begin, int64_t end, int64_t block, bool across,
         float factor = 1.0f, bool pairs = false)
      : line(int(round_up(across ? block : from.width))),
        begin_(begin),
        blocks_((from.tokens + block - 1) / block),
        size_(line * (across ? from.width : block) / (pairs ? 2 : 1)),
        data_((end - begin) * blocks_ * size_) {
    const auto room = [&] { return Zeros(across ? block * from.width : 0); };
    in_parallel((end - begin) * blocks_, p.threads, room, [&](int64_t i, Zeros& turned) {
      const Vectors vectors = from.row(begin + i / blocks_);
      const int64_t first = i % blocks_ * block;
      const int count = int(std::min(block, from.tokens - first));
      float* to = data_.get() + i * size_;
      if (count < block || line != (across ? block : from.width)) std::fill(to, to + size_, 0.0f);
      if (across && pairs)
        pair_turned(vectors, first, count, to, line, turned.data());
      else if (across)
        read_turned(vectors, first, count, factor, to, line, turned.data());
      else if (pairs)
        pair_rows(vectors, first, count, to, line);
      else
        for (int j = 0; j < count; ++j) vectors.read(first + j, to + j * line, factor);
    });
  }
  const float* at(int64_t row, int64_t block) const {
    return data_.get() + ((row - begin_) * blocks_ + block) * size_;
  }

  const int line;  // elements from one line to the next

 private:
  int64_t begin_, blocks_, size_;
  Lent data_;
};

INLINE Tensor queries_of(const Problem& p) {
  return {p.query, p.query_stride, p.queries, p.heads, p.width, bool(p.bfloat16)};
}
INLINE Tensor keys_of(const Problem& p) {
  return {p.key, p.key_stride, p.keys, p.groups, p.width, bool(p.bfloat16)};
}
INLINE Tensor values_of(const Problem& p) {
  return {p.value, p.value_stride, p.keys, p.groups, p.value_width, bool(p.bfloat16)};
}

// Calls work(begin, end) for runs of KV rows (b · G + g), as many at once as have `bytes` each of packed copies within
// kPacked: memory stays that of one run, whatever the batch and the number of heads.
constexpr int64_t kPacked = 32 << 20;
template <class Work>
void by_rows(const Problem& p, int64_t bytes, Work work) {
  const int64_t rows = p.batch * p.groups, step = std::max<int64_t>(1, kPacked / std::max<int64_t>(1, bytes));
  for (int64_t begin = 0; begin < rows; begin += step) work(begin, std::min(begin + step, rows));
}

// An item of the queries; they are numbered (batch, head, query block), the last fastest.
struct Item {
  INLINE Item(const Problem& p, const Sizes& s, int64_t number)
      : block(number % s.query_blocks), row(number / s.query_blocks), h(row % p.heads), b(row / p.heads),
        group(row / s.per_group), first(block * p.query_block) {}
  int64_t block, row, h, b, group, first;
};

struct Span {
  int64_t first, end;
};

// The keys that query positions `low` … `high` may see: those that some may, or those that every one may.
INLINE Span seen(const Problem& p, int64_t b, int64_t low, int64_t high) {
  const int64_t start = p.lengths ? std::clamp<int64_t>(p.lengths[2 * b], 0, p.keys) : 0;
  const int64_t stop = p.lengths ? std::clamp<int64_t>(p.lengths[2 * b + 1], 0, p.keys) : p.keys;
  return {p.window ? std::max(start, low - p.window + 1) : start,
          p.causal ? std::max<int64_t>(0, std::min(stop, high + 1)) : stop};
}

// The key blocks of which a query block may see some pair, and those of which it may see every pair.
struct Reach {
  INLINE Reach(const Problem& p, int64_t b, int64_t block) {
    const int64_t first = p.keys - p.queries + block * p.query_block;
    const int64_t last = first + std::min(p.query_block, p.queries - block * p.query_block) - 1;
    const Span some = seen(p, b, first, last), every = seen(p, b, last, first);
    if (some.first >= some.end) return;
    permitted = {some.first / p.key_block, (some.end - 1) / p.key_block + 1};
    full = {(every.first + p.key_block - 1) / p.key_block, every.end / p.key_block};
    if (full.first >= full.end) full = {permitted.end, permitted.end};
  }
  INLINE bool is_partial(int64_t block) const { return block < full.first || block >= full.end; }
  INLINE bool has(int64_t block) const { return permitted.first <= block && block < permitted.end; }
  Span permitted{0, 0}, full{0, 0};
};

// What a plan keeps of the key blocks for one query block, partial ones first. Which are partial follows from what is
// permitted, so a list cannot say otherwise.
struct Kept : Reach {
  INLINE Kept(const Problem& p, const Sizes& s, int64_t b, int64_t h, int64_t block)
      : Reach(p, b, block), plan(p.plan) {
    if (plan.full_count) {
      place = (b * plan.heads + h * plan.heads / p.heads) * s.query_blocks + block;
      partial = plan.partial_count[place];
      count = partial + plan.full_count[place];
    } else {
      partial = int32_t(permitted.end - permitted.first - (full.end - full.first));
      count = int32_t(permitted.end - permitted.first);
    }
  }
  INLINE int64_t block(int32_t slot) const {
    if (plan.full_count)
      return slot < partial ? plan.partial_ids[place * plan.partial_slots + slot]
                            : plan.full_ids[place * plan.full_slots + slot - partial];
    if (slot >= partial) return full.first + slot - partial;
    const int64_t before = full.first - permitted.first;
    return slot < before ? permitted.first + slot : full.end + slot - before;
  }
  const Plan& plan;
  int64_t place = 0;
  int32_t partial, count;
};

// Numbers begin … end - 1, those with the largest size(number) first.
template <class Size>
std::vector<int64_t> longest_first(int64_t begin, int64_t end, Size size) {
  std::vector<std::pair<int64_t, int64_t>> sized;
  for (int64_t i = begin; i < end; ++i) sized.emplace_back(-size(i), i);
  std::sort(sized.begin(), sized.end());
  std::vector<int64_t> order;
  for (const auto& [_, number] : sized) order.push_back(number);
  return order;
}

// Throws BadPlan unless every list holds `blocks` ascending ids at most, -1 beyond its count.
inline void check_lists(const int32_t* count, const int32_t* ids, int64_t lists, int64_t slots, int64_t blocks) {
  for (int64_t i = 0; i < lists; ++i, ids += slots) {
    if (count[i] < 0 || count[i] > slots) throw BadPlan();
    int64_t before = -1;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t id = ids[slot];
      if (slot < count[i] ? id <= before || id >= blocks : id != -1) throw BadPlan();
      before = id;
    }
  }
}

inline void check_plan(const Problem& p, const Sizes& s) {
  const int64_t lists = p.batch * p.plan.heads * s.query_blocks;
  if (!p.plan.full_count) return;
  check_lists(p.plan.full_count, p.plan.full_ids, lists, p.plan.full_slots, s.key_blocks);
  check_lists(p.plan.partial_count, p.plan.partial_ids, lists, p.plan.partial_slots, s.key_blocks);
}

// Query rows first, first + step, … of one head, times what makes scores powers of two; zeros beyond the end.
INLINE void load_queries(const Problem& p, int64_t row, int64_t first, int rows, int step, float* to) {
  const Vectors query = queries_of(p).row(row);
  for (int r = 0; r < rows; ++r, to += p.width) {
    const int64_t i = first + int64_t(r) * step;
    if (i < p.queries)
      query.read(i, to, p.scale * kLog2E);
    else
      std::fill(to, to + p.width, 0.0f);
  }
}

// The permitted keys of a query in a block, counted from the block's first: from `first` to before `end`.
INLINE Span seen_in(const Problem& p, int64_t b, int64_t query, int64_t block) {
  const int64_t position = p.keys - p.queries + query, base = block * p.key_block;
  const Span keys = seen(p, b, position, position);
  return {keys.first - base, std::min(keys.end - base, p.key_block)};
}

// As `kStrip` rows of a partial tile see some of its columns only, it is computed in strips: `work` gets the first row
// of each, how many, and between which columns, multiples of kColumns but for the block's end, they see any. A full tile
// is one strip.
constexpr int kStrip = 16;
template <class Work>
INLINE void in_strips(const Problem& p, int64_t b, int64_t first_row, int rows, int64_t block, bool partial,
                      Work work) {
  const int strip = partial ? kStrip : rows;
  for (int r = 0; r < rows; r += strip) {
    const int count = std::min(strip, rows - r);
    Span some{0, p.key_block};
    if (partial) some = {seen_in(p, b, first_row + r, block).first, seen_in(p, b, first_row + r + count - 1, block).end};
    const int64_t begin = std::max<int64_t>(0, some.first) / kColumns * kColumns;
    work(r, count, int(begin), int(std::max(begin, std::min(round_up(some.end), p.key_block))));
  }
}

// Minus infinity where row r of a tile of scores, at query first_row + r · step, may not see a key of a block.
INLINE void forbid(const Problem& p, int64_t b, int64_t first_row, int rows, int step, int64_t block, float* scores,
                   int columns) {
  for (int r = 0; r < rows; ++r) {
    const Span keys = seen_in(p, b, first_row + int64_t(r) * step, block);
    for (int j = 0; j < columns; ++j)
      if (j < keys.first || j >= keys.end) scores[r * columns + j] = kNone;
  }
}

}  // namespace
