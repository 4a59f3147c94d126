// A call of attention to chosen pages.
#pragma once

#include "call.h"

// Every field has 8 bytes, in the order paging/fused_cpp.py packs them. Strides are in elements, the last dimension is contiguous.
struct Paged {
  const void* query;        // [B, R, H, D]
  const void *key, *value;  // [B, T, G, D] and [B, T, G, Dv]
  const void* bounds;       // [B, G, pages, 2, D], lowest and highest of each whole page, or null
  const int64_t* lengths;   // [B, 2] or null
  void* output;             // [B, R, H, Dv], contiguous
  float* scores;            // [B, G, R, KB], contiguous; for the task kScoreOnly
  uint8_t* kept;            // [B, G, R, KB], contiguous
  int64_t query_stride[3], key_stride[3], value_stride[3], bounds_stride[4];
  int64_t batch, rows, keys, heads, groups, width, value_width, page, window, causal;
  int64_t is_half;        // key, value and bounds are bfloat16, not float
  int64_t is_query_half;  // and query and output
  int64_t task;           // of `Task`
  int64_t rule;           // of `RuleKind`
  int64_t threads, machine;
  double parameter, scale;
};

enum Task : int64_t { kScoreOnly = 0, kAttendToKept = 1, kChooseAndAttend = 2 };

constexpr int kRefused = 2;  // the status where a score was NaN or plus infinity

namespace {

INLINE float wide_one(const float* from) { return *from; }
INLINE float wide_one(const uint16_t* from) { return widen(*from); }

// The lowest and the highest of one or more rows `apart`, number by number; a NaN stays one.
template <class Number>
INLINE void bound_rows(const Number* row, int64_t apart, int64_t count, int64_t width, float* low, float* high) {
  for (int64_t d = 0; d < width; ++d) low[d] = high[d] = wide_one(row + d);
  for (int64_t j = 1; j < count; ++j) {
    row += apart;
    for (int64_t d = 0; d < width; ++d) {
      const float k = wide_one(row + d);
      low[d] = k != k || k < low[d] ? k : low[d];
      high[d] = k != k || k > high[d] ? k : high[d];
    }
  }
}

}  // namespace

// Does all of it; the output is unfinished where it is refused. Throws bad_alloc.
int read_pages(const Paged& p);
