// A call of attention to chosen pages.
#pragma once

#include "call.h"

// Every field has 8 bytes, in the order pages.py packs them. Strides are in elements, the last dimension is contiguous.
struct Paged {
  const float* query;       // [B, R, H, D]
  const void *key, *value;  // [B, T, G, D] and [B, T, G, Dv]
  const void* bounds;       // [B, G, pages, 2, D], lowest and highest of each whole page, or null
  const int64_t* lengths;   // [B, 2] or null
  float* output;            // [B, R, H, Dv], contiguous
  float* scores;            // [B, G, R, KB], contiguous; for the task kScoreOnly
  uint8_t* kept;            // [B, G, R, KB], contiguous
  int64_t query_stride[3], key_stride[3], value_stride[3], bounds_stride[4];
  int64_t batch, rows, keys, heads, groups, width, value_width, page, window, causal;
  int64_t is_half;  // key, value and bounds are bfloat16, not float
  int64_t task;     // of `Task`
  int64_t rule;     // of `RuleKind`
  int64_t threads, machine;
  double parameter, scale;
};

enum Task : int64_t { kScoreOnly = 0, kAttendToKept = 1, kChooseAndAttend = 2 };

constexpr int kRefused = 2;  // the status where a score was NaN or plus infinity

// Does all of it; the output is unfinished where it is refused. Throws bad_alloc.
int read_pages(const Paged& p);
