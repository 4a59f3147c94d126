// What a call is about, and its tensors cut into blocks.
#pragma once

#include <atomic>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.h"

// The tiles to compute: for every item (batch, head, block) the blocks that go with it, full and partial ones apart.
struct Plan {
  const int32_t *full_count, *full_ids, *partial_count, *partial_ids;  // [B, P, blocks], [B, P, blocks, slots]
  const int64_t* order;                                                // items, longest first
  int64_t heads, full_slots, partial_slots;                            // P = H or G
};

// Strides are in elements; the last dimension of every tensor is contiguous.
struct Problem {
  const float *query, *key, *value;  // [B, Tq, H, D], [B, Tk, G, D], [B, Tk, G, Dv]
  float *output, *lse;               // [B, Tq, H, Dv] and [B, Tq, H], contiguous
  float* softmax;  // [2, B, Tq, H]: the largest score (of powers of two) and 1 / Σ 2^(score - largest); 0 without keys
  int64_t query_stride[3], key_stride[3], value_stride[3];
  Plan plan;               // of query blocks
  const int64_t* lengths;  // [B, 2] or null
  int64_t batch, queries, keys, heads, groups, width, value_width;
  int64_t query_block, key_block, causal, threads;
  int64_t first, stride;  // the estimate's rows of a query block
  int64_t machine;        // the instruction set, -1 for the best
  float scale;
  float* shares;  // [B, H, QB, KB]: the estimate's result
};

namespace {

// Hands out 0 … count - 1, in order, to `threads` threads, or to fewer where the system gives no more:
// work(i, scratch), with a scratch of each thread's own from make(). Throws bad_alloc when any of them ran out of
// memory, after all have ended.
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
    }
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int64_t t = 1; t < std::min(threads, count); ++t) others.emplace_back(run);
  } catch (const std::system_error&) {
  }
  run();
  for (auto& other : others) other.join();
  if (failed) throw std::bad_alloc();
}

// 0, or 1 when memory ran out in work().
template <class Work>
int status_of(Work work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const std::length_error&) {
    return 1;
  }
}

struct Sizes {
  explicit Sizes(const Problem& p)
      : query_blocks((p.queries + p.query_block - 1) / p.query_block),
        key_blocks((p.keys + p.key_block - 1) / p.key_block), machine(p.machine < 0 ? machines() - 1 : int(p.machine)),
        rows(int(round_up(p.query_block))), columns(int(round_up(p.key_block))), width(int(p.width)),
        value_width(int(round_up(p.value_width))) {}
  int64_t query_blocks, key_blocks;
  int machine, rows, columns, width, value_width;  // rows, columns and value_width are rounded up
};

// A tensor [B, T, heads, width].
struct Tensor {
  const float* data;
  const int64_t* stride;
  int64_t tokens, heads, width;
  const float* at(int64_t row, int64_t token) const {
    return data + row / heads * stride[0] + token * stride[1] + row % heads * stride[2];
  }
};

// A tensor's blocks as the micro-kernel reads them, times a factor: each [width][tokens] ("across") or [tokens][width],
// what is contiguous rounded up, zeros beyond the end.
class Blocks {
 public:
  Blocks(const Problem& p, const Tensor& from, int64_t block, bool across, float factor = 1.0f)
      : line(int(round_up(across ? block : from.width))),
        blocks_((from.tokens + block - 1) / block),
        size_(line * (across ? from.width : block)),
        data_(p.batch * from.heads * blocks_ * size_) {
    in_parallel(p.batch * from.heads * blocks_, p.threads, [] { return 0; }, [&](int64_t i, int) {
      const int64_t row = i / blocks_, first = i % blocks_ * block, last = std::min(first + block, from.tokens);
      for (int64_t j = first; j < last; ++j) {
        const float* token = from.at(row, j);
        float* to = data_.data() + i * size_ + (j - first) * (across ? 1 : line);
        for (int64_t d = 0; d < from.width; ++d) to[d * (across ? line : 1)] = token[d] * factor;
      }
    });
  }
  // `row` is b · heads + head.
  const float* at(int64_t row, int64_t block) const { return data_.data() + (row * blocks_ + block) * size_; }

  const int line;  // elements from one line to the next

 private:
  int64_t blocks_, size_;
  std::vector<float> data_;
};

INLINE Tensor queries_of(const Problem& p) { return {p.query, p.query_stride, p.queries, p.heads, p.width}; }
INLINE Tensor keys_of(const Problem& p) { return {p.key, p.key_stride, p.keys, p.groups, p.width}; }
INLINE Tensor values_of(const Problem& p) { return {p.value, p.value_stride, p.keys, p.groups, p.value_width}; }

// An item of the queries; they are numbered (batch, head, query block), the last fastest.
struct Item {
  INLINE Item(const Problem& p, const Sizes& s, int64_t number)
      : block(number % s.query_blocks), row(number / s.query_blocks), h(row % p.heads), b(row / p.heads),
        group(b * p.groups + h / (p.heads / p.groups)), first(block * p.query_block) {}
  int64_t block, row, h, b, group, first;
};

// What a plan keeps for block `block` of `blocks`, partial ones first.
struct Kept {
  INLINE Kept(const Problem& p, const Plan& plan, int64_t b, int64_t h, int64_t block, int64_t blocks)
      : plan(plan), place((b * plan.heads + h * plan.heads / p.heads) * blocks + block),
        partial(plan.partial_count[place]), count(partial + plan.full_count[place]) {}
  INLINE bool is_partial(int32_t slot) const { return slot < partial; }
  INLINE int64_t block(int32_t slot) const {
    return is_partial(slot) ? plan.partial_ids[place * plan.partial_slots + slot]
                            : plan.full_ids[place * plan.full_slots + slot - partial];
  }
  const Plan& plan;
  int64_t place;
  int32_t partial, count;
};

// Query rows first, first + step, … of one head, times what makes scores powers of two; zeros beyond the end.
INLINE void load_queries(const Problem& p, int64_t row, int64_t first, int rows, int step, float* to) {
  const Tensor query = queries_of(p);
  for (int r = 0; r < rows; ++r) {
    const int64_t i = first + int64_t(r) * step;
    for (int64_t d = 0; d < p.width; ++d)
      to[r * p.width + d] = i < p.queries ? query.at(row, i)[d] * (p.scale * kLog2E) : 0.0f;
  }
}

// The permitted keys of a query in a block, counted from the block's first: from `first` to before `end`.
struct Seen {
  INLINE Seen(const Problem& p, int64_t b, int64_t query, int64_t block) {
    const int64_t base = block * p.key_block, stop = p.lengths ? std::min(p.lengths[2 * b + 1], p.keys) : p.keys;
    first = (p.lengths ? p.lengths[2 * b] : 0) - base;
    end = std::min(p.causal ? std::min(stop, p.keys - p.queries + query + 1) - base : stop - base, p.key_block);
  }
  int64_t first, end;
};

// Minus infinity where row r of a tile of scores, at query first_row + r · step, may not see a key of a block.
INLINE void forbid(const Problem& p, int64_t b, int64_t first_row, int rows, int step, int64_t block, float* scores,
                   int columns) {
  for (int r = 0; r < rows; ++r) {
    const Seen seen(p, b, first_row + int64_t(r) * step, block);
    for (int j = 0; j < columns; ++j)
      if (j < seen.first || j >= seen.end) scores[r * columns + j] = kNone;
  }
}

}  // namespace
