// Products of blocks, and what goes before and after them in feed-forward networks.
//
// A panel is as many tokens (or columns) as the micro-kernel takes at once: numbers [depth][panel], beside each other. A
// strip is kStripLines lines: numbers [depth][kStripLines].
//
// Where bfloat16 numbers are multiplied as pairs, a pair, of neighbours along the depth, is in the place of a float:
// factors are then floats of half the depth. Those that are contiguous along it are copied and turned as such.
#pragma once

#include "call.h"

namespace {

enum Activation { kSilu = 0, kGeluTanh = 1, kRelu = 2, kIdentity = 3, kGelu = 4 };

constexpr int kLines = 96, kDepth = 256, kTokens = 512;    // of a block, at most: what the caches hold
constexpr int kLine = kDepth + 16, kToken = kTokens + 16;  // from one line to the next: no power of two
constexpr int kStripLines = 12;                            // what lines are rounded up to
constexpr int kAhead = kCacheLine / sizeof(float);

// The micro-kernel: a panel of kDepth is no more than half of the first cache, and its accumulators fill the registers.
template <int L>
struct Micro {
  static constexpr int lines = L == 16 ? kStripLines : kRows, vectors = (L == 16 ? 32 : kColumns) / L;
  static constexpr int panel = vectors * L;
};
int panel_of(int set) { return set == 2 ? Micro<16>::panel : Micro<8>::panel; }
int64_t tokens_of(int set) { return set == 2 ? kTokens : kTokens / 2; }  // of a block
// What `all` is cut into, so that no part is larger than `most`: parts about as large, multiples of `unit`.
int64_t even_part(int64_t all, int64_t most, int64_t unit) {
  const int64_t parts = std::max<int64_t>((all + most - 1) / most, 1), each = (all + parts - 1) / parts;
  return std::max<int64_t>((each + unit - 1) / unit * unit, unit);
}
int round_lines(int lines) { return (lines + kStripLines - 1) / kStripLines * kStripLines; }

// How numbers are multiplied: bfloat16 ones as pairs, if all widths and strides are even and all begin where floats may.
struct Way {
  Way(bool half, int64_t wanted, std::initializer_list<int64_t> even, std::initializer_list<const void*> begin)
      : half(half), machine(set_of(wanted)),
        pairs(half && takes_pairs(wanted) &&
              std::all_of(even.begin(), even.end(), [](int64_t number) { return number % 2 == 0; }) &&
              std::all_of(begin.begin(), begin.end(), [](const void* at) { return uintptr_t(at) % 4 == 0; })) {}
  const bool half;
  const int machine;
  const bool pairs;
};

// Rows of a tensor in the order of a list.
struct Rows {
  const void* data;
  int64_t stride;
  bool half;
  const int64_t* order;
};

// L rows first … of `rows`, their numbers d … d + L - 1 turned: to[number][row].
template <int L>
INLINE void turn_square(const Rows& rows, int64_t first, int64_t d, float* to, int64_t stride) {
  typename Simd<L>::Vec square[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const void* from = at(rows.data, rows.half, rows.order[first + i] * rows.stride + d);
    square[i] = rows.half ? wide<L>(static_cast<const uint16_t*>(from)) : wide<L>(static_cast<const float*>(from));
  }
  transpose_square<L>(square);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) Simd<L>::store(to + i * stride, square[i]);
}

// A panel of rows first … of `count` rows (zeros beyond), turned: [depth][panel]. `room` holds L rows of L numbers.
template <int L>
INLINE void turn_panel(const Rows& rows, int64_t first, int64_t count, int64_t depth, float* to, float* room) {
  constexpr int panel = Micro<L>::panel;
  const int lines = int(std::min<int64_t>(panel, count - first)), whole = lines / L * L;
  const int64_t squares = depth / L * L;
  for (int64_t d = 0; d < squares; d += L) {
    for (int i = 0; i < panel; ++i) __builtin_prefetch(to + (d + 4 * L) * panel + i * L, 1);
    for (int i = 0; i < whole; i += L) turn_square<L>(rows, first + i, d, to + d * panel + i, panel);
  }
  for (int i = 0; i < panel; i += L)
    for (int64_t d = i < whole ? squares : 0; d < depth; d += L) {
      const int some = int(std::min<int64_t>(L, depth - d));
      std::fill_n(room, L * L, 0.0f);
      for (int r = 0; r < std::min(L, lines - i); ++r)
        widen_row(at(rows.data, rows.half, rows.order[first + i + r] * rows.stride + d), rows.half, some, room + r * L);
      for (int j = 0; j < some; ++j)
        for (int r = 0; r < L; ++r) to[(d + j) * panel + i + r] = room[r * L + j];
    }
}
ON_EVERY_MACHINE(turn_panel, (const Rows& rows, int64_t first, int64_t count, int64_t depth, float* to, float* room),
                 (rows, first, count, depth, to, room))

// A panel of columns first … of `columns` (zeros beyond) of `count` rows: [row][panel], or [row / 2][panel] of pairs.
template <int L, bool Pairs = false>
INLINE void copy_panel(const Rows& rows, int64_t first, int64_t columns, int64_t count, float* to) {
  constexpr int panel = Micro<L>::panel;
  const int some = int(std::min<int64_t>(panel, columns - first));
  const auto row = [&](int64_t i) INLINE_LAMBDA {
    return at(rows.data, rows.half, rows.order[i] * rows.stride + first);
  };
  const auto half = [&](int64_t i) INLINE_LAMBDA {
    return i < count ? static_cast<const uint16_t*>(row(i)) : nullptr;
  };
  for (int64_t i = 0; i < count; i += Pairs ? 2 : 1, to += panel) {
    if (Pairs)
      pair_row(half(i), half(i + 1), some, to);
    else
      widen_row(row(i), rows.half, some, to);
    std::fill(to + some, to + panel, 0.0f);
  }
}
ON_EVERY_MACHINE(copy_panel, (const Rows& rows, int64_t first, int64_t columns, int64_t count, float* to),
                 (rows, first, columns, count, to))
AVX512_BF16 void copy_panel_pairs(const Rows& rows, int64_t first, int64_t columns, int64_t count, float* to) {
  copy_panel<kPairLanes, kPairs>(rows, first, columns, count, to);
}

// The left factor of a product: lines of a matrix in memory, of which blocks are copied, widened.
struct Left {
  const void* data;
  int64_t stride;    // from a line to the next; where they lie across, from a depth to the next
  bool half;         // floats, which may be pairs, if not
  enum { kAlong, kAcross, kPanels } how;  // depth contiguous; lines contiguous; panels [panel][stride][panel]
  bool pairs;        // a depth of kAcross is two of memory's, of halves; a panel of kPanels is half as wide
};

// `count` numbers of a depth, which are of so many lines, to strips; paired with those that follow if they are given.
INLINE void copy_across(const void* from, bool half, const void* odd, int count, float* to) {
  for (int i = 0; i < count; i += kStripLines, to += kDepth * kStripLines) {
    const int some = std::min(kStripLines, count - i);
    if (odd)
      pair_row(static_cast<const uint16_t*>(from) + i, static_cast<const uint16_t*>(odd) + i, some, to);
    else
      widen_row(at(from, half, i), half, some, to);
  }
}

// Lines line … of `lines`, depths depth … of `depths`, to [lines][kLine], or across to strips, kDepth apart.
template <int L>
INLINE void copy_left(const Left& left, int64_t line, int lines, int64_t depth, int depths, float* to) {
  const int panel = Micro<L>::panel / (left.pairs ? 2 : 1);
  if (left.how == Left::kAcross) {
    const int64_t each = left.pairs ? 2 : 1;
    for (int d = 0; d < depths; ++d) {
      const void* from = at(left.data, left.half, (depth + d) * each * left.stride + line);
      copy_across(from, left.half, left.pairs ? at(from, true, left.stride) : nullptr, lines, to + d * kStripLines);
    }
    return;
  }
  for (int i = 0; i < lines; ++i) {
    if (left.how == Left::kAlong) {
      widen_row(at(left.data, left.half, (line + i) * left.stride + depth), left.half, depths, to + i * kLine);
      continue;
    }
    const auto* from = static_cast<const float*>(left.data) + (depth * left.stride + (line + i) * panel);
    for (int d = 0; d < depths; d += panel, from += left.stride * panel)
      std::memcpy(to + i * kLine + d, from, panel * sizeof(float));
  }
}
ON_EVERY_MACHINE(copy_left, (const Left& left, int64_t line, int lines, int64_t depth, int depths, float* to),
                 (left, line, lines, depth, depths, to))

// Rows of memory that are read, or written, after a product: fetched while it is multiplied.
struct Soon {
  const void* from;
  int64_t stride, rows, bytes;  // from a row to the next, in bytes; of a row
};

// Fetches them in so many steps.
class Fetch {
 public:
  INLINE Fetch(const Soon& soon, int64_t steps)
      : row_(static_cast<const char*>(soon.from)), stride_(soon.stride),
        lines_((soon.bytes + int64_t(kCacheLine) - 1) / int64_t(kCacheLine)),
        left_(soon.rows * lines_), each_((left_ + steps - 1) / std::max<int64_t>(steps, 1)) {}
  INLINE void step() {
    for (int64_t i = std::min(each_, left_); i > 0; --i) {
      __builtin_prefetch(row_ + line_ * int64_t(kCacheLine), 0, 2);
      --left_;
      if (++line_ == lines_) line_ = 0, row_ += stride_;
    }
  }

 private:
  const char* row_;
  const int64_t stride_, lines_;
  int64_t left_, each_, line_ = 0;
};

// C[lines x panel] = (add ? C : 0) + A B; number (r, d) of A stands at r · line + d · step, where a template's 0 stands
// for `apart`; of panels, `line` deep, `apart` is from one to the next. At `ahead` is what is read soon: a cache line every four
// depths. Numbers may be pairs of bfloat16 numbers.
template <int L, bool Pairs, int line, int step, bool panels = false>
INLINE void tile(const float* a, int64_t apart, const float* b, float* c, int depths, bool add, const float* ahead,
                 Fetch& fetch) {
  constexpr int R = Micro<L>::lines, V = Micro<L>::vectors;
  const int64_t down = line ? line : apart, right = step ? step : apart;
  const float* third[R / 3];  // of the lines: processors reach the next two from there
#pragma GCC unroll 4
  for (int r = 0; r < R / 3; ++r) third[r] = a + 3 * r * down;
  typename Simd<L>::Vec sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? Simd<L>::load(c + r * kToken + v * L) : typename Simd<L>::Vec{};
  auto one_depth = [&]() INLINE_LAMBDA {
    typename Simd<L>::Vec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = Simd<L>::load(b + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[r][v] = Simd<L>::template multiply_add<Pairs>(sum[r][v],
                                                          line ? a + r * line : third[r / 3] + r % 3 * down, row[v]);
    if (line)
      a += right;
    else
#pragma GCC unroll 4
      for (int r = 0; r < R / 3; ++r) third[r] += right;
    b += V * L;
  };
  int d = 0;
  for (; d + 4 <= depths; d += 4, ahead += kAhead) {
    if (panels && d && d % line == 0) a += apart - line;
    __builtin_prefetch(ahead, 0, 2);
    fetch.step();
#pragma GCC unroll 4
    for (int next = 0; next < 4; ++next) one_depth();
  }
  if (panels && d && d < depths && d % line == 0) a += apart - line;
  for (; d < depths; ++d) one_depth();
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) Simd<L>::store(c + r * kToken + v * L, sum[r][v]);
}

// A left factor where it is to be read: a block that was copied, along or across, or lines that lie in memory so far
// apart, or depths, or panels of depths that do.
struct Lines {
  const float* data;
  enum { kCopied, kCopiedAcross, kFar, kFarAcross, kPanels } how;
  int64_t apart;
};

// C[lines x columns] = (add ? C : 0) + A B, of a block of A and as many panels of B, which lie `apart`. While one panel
// is multiplied the next one is fetched, or the first of the depths that follow, and `soon`: they come from far.
template <int L, bool Pairs = false>
INLINE void multiply(const Lines& a, const float* b, int64_t apart, float* c, int lines, int columns, int depths,
                     bool add, const Soon& soon) {
  constexpr int panel = Micro<L>::panel, left_panel = panel / (Pairs ? 2 : 1);
  const float* follows = b + depths * panel;
  const int64_t tiles = int64_t((columns + panel - 1) / panel) * ((lines + Micro<L>::lines - 1) / Micro<L>::lines);
  Fetch fetch(soon, tiles * (depths / 4));
  for (int j = 0; j < columns; j += panel, b += apart)
    for (int i = 0; i < lines; i += Micro<L>::lines) {
      const int64_t part = int64_t(i) / Micro<L>::lines * (depths / 4) * kAhead;
      const float* ahead = part < depths * panel ? (j + panel < columns ? b + apart : follows) + part : b;
      float* to = c + i * kToken + j;
      if (a.how == Lines::kCopied)
        tile<L, Pairs, kLine, 1>(a.data + i * kLine, 0, b, to, depths, add, ahead, fetch);
      else if (a.how == Lines::kCopiedAcross)
        tile<L, Pairs, 1, kStripLines>(a.data + i / kStripLines * kStripLines * kDepth + i % kStripLines, 0, b, to,
                                       depths, add, ahead, fetch);
      else if (a.how == Lines::kFar)
        tile<L, Pairs, 0, 1>(a.data + i * a.apart, a.apart, b, to, depths, add, ahead, fetch);
      else if (a.how == Lines::kFarAcross)
        tile<L, Pairs, 1, 0>(a.data + i, a.apart, b, to, depths, add, ahead, fetch);
      else
        tile<L, Pairs, left_panel, 1, true>(a.data + i * left_panel, a.apart, b, to, depths, add, ahead, fetch);
    }
}
ON_EVERY_MACHINE(multiply, (const Lines& a, const float* b, int64_t apart, float* c, int lines, int columns,
                            int depths, bool add, const Soon& soon),
                 (a, b, apart, c, lines, columns, depths, add, soon))
AVX512_BF16 void multiply_pairs(const Lines& a, const float* b, int64_t apart, float* c, int lines, int columns,
                                int depths, bool add, const Soon& soon) {
  multiply<kPairLanes, kPairs>(a, b, apart, c, lines, columns, depths, add, soon);
}

// act(z) and its derivative; silu and gelu by tanh are z / (1 + 2^t), because (1 + tanh u) / 2 = 1 / (1 + e^(-2u)).
template <int L>
struct Activate {
  using Vec = typename Simd<L>::Vec;
  int64_t kind;
  INLINE Vec share(Vec z) const {
    const Vec t = kind == kSilu ? z * -kLog2E : z * (-1.5957691216057308f * kLog2E) * (1.0f + 0.044715f * z * z);
    return 1.0f / (1.0f + (t > 127.0f ? Vec{} - kNone : Simd<L>::exp2(t)));
  }
  // Below is the normal distribution's share below z, and density e^(-z² / 2). The tail beyond |z| is the density times a
  // polynomial of 1 / (1 + 0.3 |z| / √2), fitted to a relative error of 5e-8.
  INLINE void normal(Vec z, Vec& below, Vec& density) const {
    const Vec t = 1.0f / (1.0f + 0.21213203f * (z < 0.0f ? -z : z));
    density = Simd<L>::exp2(z * z * (-0.5f * kLog2E));
    Vec p = t * -0.0647172989f + 0.242549484f;
    p = p * t - 0.255615819f;
    p = p * t + 0.273200477f;
    p = p * t - 0.0468176429f;
    p = p * t + 0.107218982f;
    p = p * t + 0.0742410064f;
    p = p * t + 0.0853459952f;
    p = p * t + 0.0845948059f;
    const Vec tail = p * t * density;
    below = z < 0.0f ? tail : 1.0f - tail;
  }
  INLINE Vec value(Vec z) const {
    if (kind == kIdentity) return z;
    if (kind == kRelu) return z <= 0.0f ? Vec{} : z;
    if (kind != kGelu) return z * share(z);
    Vec below, density;
    normal(z, below, density);
    return z * below;
  }
  INLINE void both(Vec z, Vec& value, Vec& slope) const {
    if (kind == kIdentity) {
      value = z;
      slope = Vec{} + 1.0f;
    } else if (kind == kRelu) {
      value = z <= 0.0f ? Vec{} : z;
      slope = z <= 0.0f ? Vec{} : Vec{} + 1.0f;
    } else if (kind == kGelu) {
      Vec below, density;
      normal(z, below, density);
      value = z * below;
      slope = below + z * density * 0.3989422804f;
    } else {
      const Vec part = share(z);
      value = z * part;
      const Vec inner = kind == kSilu ? z : z * (1.5957691216057308f * (1.0f + 0.134145f * z * z));
      slope = part * (1.0f + inner * (1.0f - part));
    }
  }
};

// Rows of activations in place of gate's products, or of up's where there is no gate.
template <int L>
INLINE void activate_row(float* products, const float* up, int64_t count, int64_t kind) {
  const Activate<L> act{kind};
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const auto value = act.value(Simd<L>::load(products + i));
    Simd<L>::store(products + i, up ? value * Simd<L>::load(up + i) : value);
  }
  if (i == count) return;
  float rest[2][L]{};
  std::copy(products + i, products + count, rest[0]);
  if (up) std::copy(up + i, up + count, rest[1]);
  const auto value = act.value(Simd<L>::load(rest[0]));
  Simd<L>::store(rest[0], up ? value * Simd<L>::load(rest[1]) : value);
  std::copy_n(rest[0], count - i, products + i);
}
ON_EVERY_MACHINE(activate_row, (float* products, const float* up, int64_t count, int64_t kind),
                 (products, up, count, kind))

// What follows a block of up's products C[lines x columns], and of gate's, which stand `lines` rounded up below: the
// activations, to panels of `inner` lines (neighbours as pairs where products are of pairs), and the products themselves,
// to panels of gate's lines and then up's.
template <int L, bool Pairs = false>
INLINE void finish_up(const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner, float* acts,
                      float* saved) {
  constexpr int panel = Micro<L>::panel, unit = Pairs ? 2 : 1;
  const Activate<L> act{kind};
  const float* gates = c + round_lines(lines) * kToken;
  for (int j = 0; j < columns; j += panel, acts += inner / unit * panel) {
    const auto finish = [&](int i, int v) INLINE_LAMBDA {
      const auto up = Simd<L>::load(c + i * kToken + j + v);
      const auto gate = gated ? Simd<L>::load(gates + i * kToken + j + v) : up;
      if (saved) Simd<L>::store(saved + i * panel + v, gate);
      if (saved && gated) Simd<L>::store(saved + (inner + i) * panel + v, up);
      return gated ? act.value(gate) * up : act.value(up);
    };
    for (int i = 0; i < lines; i += unit)
      for (int v = 0; v < panel; v += L) {
        auto value = finish(i, v);
        if constexpr (Pairs) value = Simd<L>::pair(value, finish(i + 1, v));
        Simd<L>::store(acts + i / unit * panel + v, value);
      }
    if (saved) saved += (gated ? 2 : 1) * inner * panel;
  }
}
ON_EVERY_MACHINE(finish_up, (const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner,
                             float* acts, float* saved),
                 (c, lines, columns, gated, kind, inner, acts, saved))
AVX512_BF16 void finish_up_pairs(const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner,
                                 float* acts, float* saved) {
  finish_up<kPairLanes, kPairs>(c, lines, columns, gated, kind, inner, acts, saved);
}

// Where the gradients of gate's and up's products go, and the weighed activations: to panels as `saved`'s and of `inner`
// lines. Of pairs, slopes are written twice, as their depth is the lines in one product and the tokens in another: there,
// and in that of the activations, neighbouring tokens are the pairs.
struct Slopes {
  float *lines, *tokens, *acts, *sums;  // tokens: null unless of pairs; sums: the weights' gradients
};

// What follows a block C[lines x columns] of the gradients of unweighed activations.
template <int L, bool Pairs = false>
INLINE void finish_slopes(const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner,
                          const float* saved, const float* weights, const Slopes& to) {
  using Vec = typename Simd<L>::Vec;
  constexpr int panel = Micro<L>::panel, unit = Pairs ? 2 : 1;
  const Activate<L> act{kind};
  const int64_t products = (gated ? 2 : 1) * inner;
  for (int j = 0; j < columns; j += panel) {
    const int64_t before = j * products, acts_before = j * inner;
    for (int v = 0; v < panel; v += L) {
      const Vec weight = Simd<L>::load(weights + j + v);
      Vec sum{}, even[2];
      const auto write = [&](int i, int which, Vec slope) INLINE_LAMBDA {
        const int64_t line = which * inner + i;
        if constexpr (Pairs) {
          Simd<L>::template store<true>(to.tokens + (before + line * panel + v) / 2, slope);
          if (i % 2)
            Simd<L>::store(to.lines + (before + (line - 1) * panel) / 2 + v, Simd<L>::pair(even[which], slope));
          even[which] = slope;
        } else {
          Simd<L>::store(to.lines + before + line * panel + v, slope);
        }
      };
      for (int i = 0; i < lines; ++i) {
        const Vec gradient = Simd<L>::load(c + i * kToken + j + v), z = Simd<L>::load(saved + before + i * panel + v);
        Vec value, slope;
        act.both(z, value, slope);
        const Vec weighed = gradient * weight;
        if (gated) {
          const Vec up = Simd<L>::load(saved + before + (inner + i) * panel + v);
          write(i, 1, weighed * value);
          slope *= up;
          value *= up;
        }
        write(i, 0, weighed * slope);
        Simd<L>::template store<Pairs>(to.acts + (acts_before + i * panel + v) / unit, value * weight);
        sum += gradient * value;
      }
      Simd<L>::store(to.sums + j + v, sum);
    }
  }
}
ON_EVERY_MACHINE(finish_slopes, (const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner,
                                 const float* saved, const float* weights, const Slopes& to),
                 (c, lines, columns, gated, kind, inner, saved, weights, to))
AVX512_BF16 void finish_slopes_pairs(const float* c, int lines, int columns, bool gated, int64_t kind, int64_t inner,
                                     const float* saved, const float* weights, const Slopes& to) {
  finish_slopes<kPairLanes, kPairs>(c, lines, columns, gated, kind, inner, saved, weights, to);
}

// A block C[lines x columns] turned: to[column][line].
template <int L>
INLINE void turn_block(const float* c, int lines, int columns, float* to, int64_t stride) {
  turn<L>(c, kToken, lines, columns, to, stride);
}
ON_EVERY_MACHINE(turn_block, (const float* c, int lines, int columns, float* to, int64_t stride),
                 (c, lines, columns, to, stride))

// One row of numbers as the tensors have them.
template <int L>
INLINE void round_row(const float* from, bool half, int64_t count, void* to) {
  narrow_row(from, half, count, to);
}
ON_EVERY_MACHINE(round_row, (const float* from, bool half, int64_t count, void* to), (from, half, count, to))

// Σ over a token's slots of weight · row, or of rows where there are no weights; empty slots (-1) are not read.
template <int L>
INLINE void combine(const float* rows, int64_t width, const int64_t* places, const float* weights, int64_t slots,
                    bool half, float* sum, void* to) {
  std::fill(sum, sum + width, 0.0f);
  for (int64_t k = 0; k < slots; ++k) {
    if (places[k] < 0) continue;
    const float weight = weights ? weights[k] : 1.0f, *row = rows + places[k] * width;
    for (int64_t i = 0; i < width; ++i) sum[i] += weight * row[i];
  }
  narrow_row(sum, half, width, to);
}
ON_EVERY_MACHINE(combine, (const float* rows, int64_t width, const int64_t* places, const float* weights,
                           int64_t slots, bool half, float* sum, void* to),
                 (rows, width, places, weights, slots, half, sum, to))

constexpr int64_t kBlock = kLines * std::max(kLine, kTokens);  // numbers of a left factor, or of a product

// Each thread's own blocks, kept from one phase to the next.
class Rooms {
 public:
  Rooms(int64_t threads, int64_t width) : rooms_(size_t(threads)), next_(0) {
    for (Room& room : rooms_) room.row = Lent(width);
  }
  // Makes the blocks, which few rows have no use for.
  void prepare() {
    for (Room& room : rooms_) {
      if (room.a.get()) continue;
      room.a = Lent(kBlock);
      room.c = Lent(kLines * kToken);
      std::fill_n(room.a.get(), kBlock, 0.0f);  // what is beyond a block is computed with, and left
    }
  }
  struct Room {
    Lent a, c, row;  // a block of the left factor (and what is turned in one), of the product, and a row
  };
  int64_t count() const { return int64_t(rooms_.size()); }
  // work(i, room) for 0 … count - 1.
  template <class Work>
  void each(int64_t count, Work work) {
    next_ = 0;
    in_parallel(count, int64_t(rooms_.size()), [&] { return &rooms_[next_++]; },
                [&](int64_t i, Room* room) { work(i, *room); });
  }

 private:
  std::vector<Room> rooms_;
  std::atomic<int64_t> next_;
};

}  // namespace
