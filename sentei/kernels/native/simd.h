// Arithmetic on short vectors of floats, for any instruction set: the vectors are the compiler's own, of a length that
// is a template's argument, and `ON_EVERY_MACHINE` compiles a function for each set this library is made for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AVX2 __attribute__((target("arch=x86-64-v3")))
#define AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))
#else
#define AVX2
#define AVX512
#define AVX512_BF16
#endif

// name_on[set_of(machine)]: the template `name<lanes>` for an instruction set.
#define ON_EVERY_MACHINE(name, parameters, arguments)           \
  void name##_portable parameters { name<4> arguments; }        \
  AVX2 void name##_avx2 parameters { name<8> arguments; }       \
  AVX512 void name##_avx512 parameters { name<16> arguments; }  \
  constexpr decltype(&name##_portable) name##_on[] = {name##_portable, name##_avx2, name##_avx512};

namespace {

constexpr int kRows = 6, kColumns = 16;  // of the micro-kernel; what columns are rounded up to
constexpr float kNone = -std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kCacheLine = 64;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

int64_t round_up(int64_t value) { return (value + kColumns - 1) / kColumns * kColumns; }

// bfloat16 is the upper half of a float32.
INLINE float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even; a NaN stays one.
INLINE uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows of numbers, `half` of them bfloat16, else float32.
INLINE void widen_row(const void* from, bool half, int64_t count, float* to) {
  if (half) {
    const auto* numbers = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = widen(numbers[i]);
  } else {
    std::memcpy(to, from, count * sizeof(float));
  }
}

INLINE void narrow_row(const float* from, bool half, int64_t count, void* to) {
  if (half) {
    auto* numbers = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) numbers[i] = narrow(from[i]);
  } else {
    std::memcpy(to, from, count * sizeof(float));
  }
}

// Two rows of bfloat16 numbers as one of pairs, each in the place of a float; zeros are the second where there is none.
INLINE void pair_row(const uint16_t* even, const uint16_t* odd, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pair = even[i] | (odd ? uint32_t(odd[i]) << 16 : 0);
    std::memcpy(to + i, &pair, sizeof pair);
  }
}

INLINE const void* at(const void* data, bool half, int64_t element) {
  return static_cast<const char*>(data) + element * (half ? 2 : 4);
}
INLINE void* at(void* data, bool half, int64_t element) { return static_cast<char*>(data) + element * (half ? 2 : 4); }

// Pairs of bfloat16 numbers are multiplied on one instruction set; elsewhere nothing of that is compiled.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
constexpr bool kPairs = true;
constexpr int kPairLanes = 16, kPairMachine = 3;
#else
constexpr bool kPairs = false;
constexpr int kPairLanes = 4, kPairMachine = 3;
#endif

// How many instruction sets this machine can run, from the plainest: portable, AVX2, AVX-512, and that with products of
// pairs of bfloat16 numbers.
int machines() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 1;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? (__builtin_cpu_supports("avx512bf16") ? 4 : 3) : 2;
#else
  return 1;
#endif
}

// The instruction set of the wanted number, -1 for the best, in which pairs are nothing of their own.
int set_of(int64_t machine) { return std::min(machine < 0 ? machines() - 1 : int(machine), 2); }

// How the factors of a product lie in memory: as rows of floats, as rows of pairs of bfloat16 numbers, each pair in the
// place of a float, or as floats of which the left factor is turned.
enum Factors { kRowMajor, kPaired, kTurned };

// Arithmetic on vectors of L floats.
template <int L>
struct Simd {
  typedef float Vec __attribute__((vector_size(4 * L)));
  typedef int32_t Ints __attribute__((vector_size(4 * L)));
  typedef uint16_t Halves __attribute__((vector_size(2 * L)));
  typedef float Unaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));
  static constexpr int kVectors = L == 16 ? 4 : kColumns / L;  // of columns at once: what the registers hold

  static INLINE Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
  static INLINE void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
  // As they are, or as bfloat16 numbers, each pair in the place of a float.
  template <bool Pairs>
  static INLINE void store(float* to, Vec value) {
    if constexpr (Pairs) {
      Halves halves;
      asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(value));
      std::memcpy(to, &halves, sizeof halves);
    } else {
      store(to, value);
    }
  }

  // Two vectors as pairs of bfloat16 numbers, each in the place of a float.
  static INLINE Vec pair(Vec even, Vec odd) {
    int32_t order[L];  // of halves, two in the place of an integer
    for (int i = 0; i < L; ++i) order[i] = i | (i + L) << 16;
    Ints places, both;
    std::memcpy(&places, order, sizeof places);
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(even), "v"(odd));
    asm("vpermw %1, %2, %0" : "=v"(both) : "v"(both), "v"(places));
    Vec pairs;
    std::memcpy(&pairs, &both, sizeof pairs);
    return pairs;
  }

  // 2^x: split at the nearest integer, to which adding a large number rounds, and a polynomial of degree 5 on
  // [-1/2, 1/2]; relative error 2e-7. Below 2^-126 the result is 0; a NaN stays one.
  static INLINE Vec exp2(Vec x) {
    const float large = 12582912.0f + 127;  // 1.5 * 2^23 and the exponent's bias: the last bits are the new exponent
    const Vec rounded = x + large;
    const Vec f = x - (rounded - large);
    Vec p = f * 0.00132647f + 0.00967151f;
    p = p * f + 0.05550734f;
    p = p * f + 0.24022242f;
    p = p * f + 0.693147f;
    p = p * f + 1.0f;
    Ints bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -126.0f ? Vec{} : p * power;
  }

  // sum + a b; of pairs of bfloat16 numbers, each in the place of a float, that is the sum of two products; numbers below
  // 2^-126 count as 0 there.
  template <bool Pairs>
  static INLINE Vec multiply_add(Vec sum, const float* a, Vec b) {
    if constexpr (Pairs) {
      int32_t bits;
      std::memcpy(&bits, a, sizeof bits);
      const Ints pair = Ints{} + bits;
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(b));
      return sum;
    } else {
      return sum + *a * b;
    }
  }

  // C[rows x L V] = factor ((add ? C : 0) + A[rows x depth] B[depth x L V]), all row-major, or A turned:
  // [depth x rows]. A and B may be of pairs.
  template <Factors F, int R, int V>
  static INLINE void product_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                  int depth, bool add, float factor) {
    const int64_t next_row = F == kTurned ? 1 : lda, next_depth = F == kTurned ? lda : 1;
    Vec sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * ldc + v * L) : Vec{};
    for (int d = 0; d < depth; ++d, a += next_depth, b += ldb) {
      Vec row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<F == kPaired>(sum[r][v], a + r * next_row, row[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + r * ldc + v * L, sum[r][v] * factor);
  }

  template <int R>
  using Count = std::integral_constant<int, R>;
  template <Factors F, int V>
  static INLINE void product_columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                                     int rows, int depth, bool add, float factor) {
    const int64_t next = F == kTurned ? 1 : lda;
    const auto tile = [&](auto count, int r) INLINE_LAMBDA {
      product_tile<F, count.value, V>(a + r * next, lda, b, ldb, c + r * ldc, ldc, depth, add, factor);
    };
    int r = 0;
    for (; r + kRows <= rows; r += kRows) tile(Count<kRows>{}, r);
    for (; r + 4 <= rows; r += 4) tile(Count<4>{}, r);
    for (; r + 2 <= rows; r += 2) tile(Count<2>{}, r);
    for (; r < rows; ++r) tile(Count<1>{}, r);
  }

  // The same for any number of columns that kColumns divides.
  template <Factors F = kRowMajor>
  static INLINE void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int rows,
                             int columns, int depth, bool add, float factor = 1.0f) {
    int j = 0;
    for (; j + kVectors * L <= columns; j += kVectors * L)
      product_columns<F, kVectors>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add, factor);
    if constexpr (kVectors > 2)
      for (; j + 2 * L <= columns; j += 2 * L)
        product_columns<F, 2>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add, factor);
    for (; j < columns; j += L) product_columns<F, 1>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add, factor);
  }

  // One number from a vector, by halves.
  template <class Join>
  static INLINE float fold(Vec v, Join join) {
    if constexpr (L == 4) {
      float part[4];
      std::memcpy(part, &v, sizeof part);
      return join(join(part[0], part[1]), join(part[2], part[3]));
    } else {
      typename Simd<L / 2>::Vec low, high;
      std::memcpy(&low, &v, sizeof low);
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Simd<L / 2>::fold(join(low, high), join);
    }
  }

  // The sums of every fourth lane.
  static INLINE auto quarter(Vec v) {
    if constexpr (L == 4) {
      return v;
    } else {
      typename Simd<L / 2>::Vec low, high;
      std::memcpy(&low, &v, sizeof low);
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Simd<L / 2>::quarter(low + high);
    }
  }

  static INLINE float total(Vec v) {
    return fold(v, [](auto a, auto b) INLINE_LAMBDA { return a + b; });
  }

  // The largest of a row in every lane.
  static INLINE Vec greatest(const float* row, int columns) {
    Vec most = load(row);
    for (int j = L; j < columns; j += L) {
      const Vec next = load(row + j);
      most = next > most ? next : most;
    }
    return most;
  }

  static INLINE float largest(const float* row, int columns) {
    return fold(greatest(row, columns), [](auto a, auto b) INLINE_LAMBDA { return b > a ? b : a; });
  }

  // Replaces a row of scores by 2^(score - base), which are bfloat16 numbers beside each other where products are of
  // pairs, and adds them to the lanes of `sum`.
  template <bool Pairs = false>
  static INLINE void exponentiate(float* row, int columns, float base, Vec& sum) {
    for (int j = 0; j < columns; j += L) {
      const Vec share = exp2(load(row + j) - base);
      store<Pairs>(row + j / (Pairs ? 2 : 1), share);
      sum += share;
    }
  }

  // The same, and returns the sum.
  static INLINE float exponentiate(float* row, int columns, float base) {
    Vec sum{};
    exponentiate(row, columns, base, sum);
    return total(sum);
  }

  // Whether any score of a row lies above the row's bound. A NaN does not, nor does anything where both are infinite.
  static INLINE bool any_above(const float* scores, int columns, int rows, const float* bounds) {
    Vec excess = Vec{} + kNone;
    for (int r = 0; r < rows; ++r, scores += columns) {
      const Vec above = greatest(scores, columns) - bounds[r];
      excess = above > excess ? above : excess;
    }
    return fold(excess, [](auto a, auto b) INLINE_LAMBDA { return b > a ? b : a; }) > 0;
  }

  // Scores (of powers of two) become cap · tanh(score / cap), cap in the same unit. `slopes`, unless null, gets the
  // derivative: not 1 - tanh², of which nothing is left near the cap. That of a NaN is 0: it may yet be forbidden.
  // Far below the cap, where the exponential is one and nothing is left of the difference, tanh is its series.
  static INLINE void soften_peaks(float* row, int columns, float cap, float* slopes = nullptr) {
    for (int j = 0; j < columns; j += L) {
      const Vec score = load(row + j), ratio = score * (1 / cap), twice = score * (2 * kLog2E / cap);
      const Vec grown = exp2(twice > 126.0f ? Vec{} + 126.0f : twice), part = 1.0f / (grown + 1.0f);
      const Vec square = ratio * ratio;
      const Vec series = (((square * (62.0f / 2835) - 17.0f / 315) * square + 2.0f / 15) * square - 1.0f / 3) * square;
      store(row + j, square < 0.09f ? score + score * series : cap - 2 * cap / (grown + 1.0f));
      const Vec slope = grown * part * (4.0f * part);  // 4 · grown may be too large for a float
      if (slopes) store(slopes + j, slope == slope ? slope : Vec{});
    }
  }

  // In the backward: scores become weights 2^(score - top) / sum, and the gradients of the weights those of the scores.
  // `slopes` are those of `soften_peaks`, null where there was none.
  static INLINE void soften(float* scores, float* gradients, int columns, float top, float inverse, float delta,
                            const float* slopes) {
    for (int j = 0; j < columns; j += L) {
      const Vec weight = exp2(load(scores + j) - top) * inverse;
      Vec gradient = weight * (load(gradients + j) - delta);
      if (slopes) gradient *= load(slopes + j);
      store(scores + j, weight);
      store(gradients + j, gradient);
    }
  }
};

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Places __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(one, two, a, b, c, d) __builtin_shufflevector(one, two, a, b, c, d)
#else
#define SHUFFLE(one, two, a, b, c, d) __builtin_shuffle(one, two, Places{a, b, c, d})
#endif

template <int L, int Width, int Last, int... I>
INLINE typename Simd<L>::Vec in_turn(typename Simd<L>::Vec one, typename Simd<L>::Vec two,
                                     std::integer_sequence<int, I...>) {
#define PLACE (I / 4 * 4 + (Width == 1 ? I % 4 / 2 + I % 2 * L : I % 2 + I % 4 / 2 * L) + 2 * Last)
#if defined(__clang__)
  return __builtin_shufflevector(one, two, PLACE...);
#else
  return __builtin_shuffle(one, two, typename Simd<L>::Ints{PLACE...});
#endif
#undef PLACE
}

// Of every four lanes of two vectors the first half plus the last, `Width` numbers of one and of the other in turn. Of
// four vectors, by 1 and the results by 2, that is in every four lanes a part of the sum of each vector's.
template <int L, int Width>
INLINE typename Simd<L>::Vec folded(typename Simd<L>::Vec one, typename Simd<L>::Vec two) {
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  return in_turn<L, Width, 0>(one, two, lanes) + in_turn<L, Width, 1>(one, two, lanes);
}

// to[j][i] = from[i][j] for 4 x 4 numbers.
INLINE void transpose_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const Four a = Simd<4>::load(from), b = Simd<4>::load(from + from_stride), c = Simd<4>::load(from + 2 * from_stride),
             d = Simd<4>::load(from + 3 * from_stride);
  const Four low = SHUFFLE(a, b, 0, 4, 1, 5), high = SHUFFLE(a, b, 2, 6, 3, 7);
  const Four next_low = SHUFFLE(c, d, 0, 4, 1, 5), next_high = SHUFFLE(c, d, 2, 6, 3, 7);
  Simd<4>::store(to, SHUFFLE(low, next_low, 0, 1, 4, 5));
  Simd<4>::store(to + to_stride, SHUFFLE(low, next_low, 2, 3, 6, 7));
  Simd<4>::store(to + 2 * to_stride, SHUFFLE(high, next_high, 0, 1, 4, 5));
  Simd<4>::store(to + 3 * to_stride, SHUFFLE(high, next_high, 2, 3, 6, 7));
}

// L numbers, widened: bfloat16 is the upper half of a float.
template <int L>
INLINE typename Simd<L>::Vec wide(const float* from) { return Simd<L>::load(from); }

template <int L>
INLINE typename Simd<L>::Vec wide(const uint16_t* from) {
  typedef uint32_t Words __attribute__((vector_size(4 * L)));
  Words words;
  if constexpr (kPairs && L == kPairLanes) {  // in one instruction, where the compiler takes five
    asm("vpmovzxwd %1, %0" : "=v"(words) : "m"(*reinterpret_cast<const char(*)[2 * L]>(from)));
  } else {
    typename Simd<L>::Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    words = __builtin_convertvector(halves, Words);
  }
  words <<= 16;
  typename Simd<L>::Vec result;
  std::memcpy(&result, &words, sizeof result);
  return result;
}

// Numbers of two vectors, those of the second counted from L on.
template <int L>
INLINE typename Simd<L>::Vec merge(typename Simd<L>::Vec one, typename Simd<L>::Vec two,
                                   typename Simd<L>::Ints places) {
#if defined(__clang__)
  typename Simd<L>::Vec merged;
  for (int i = 0; i < L; ++i) merged[i] = places[i] < L ? one[places[i]] : two[places[i] - L];
  return merged;
#else
  return __builtin_shuffle(one, two, places);
#endif
}

// Row i of L rows of L numbers becomes column i: log2(L) times, rows i and i + L / 2 are merged number by number.
template <int L>
INLINE void transpose_square(typename Simd<L>::Vec (&rows)[L]) {
  typename Simd<L>::Ints low, high;
  for (int i = 0; i < L; ++i) low[i] = i / 2 + i % 2 * L, high[i] = low[i] + L / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    typename Simd<L>::Vec merged[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      merged[2 * i] = merge<L>(rows[i], rows[i + L / 2], low);
      merged[2 * i + 1] = merge<L>(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = merged[i];
  }
}

// to[j][i] = from[i][j] for `lines` x `count` numbers.
INLINE void transpose(const float* from, int64_t from_stride, int lines, int count, float* to, int64_t to_stride) {
  const int whole_lines = lines / 4 * 4, whole = count / 4 * 4;
  for (int i = 0; i < whole_lines; i += 4)
    for (int j = 0; j < whole; j += 4) transpose_four(from + i * from_stride + j, from_stride, to + j * to_stride + i,
                                                      to_stride);
  for (int i = 0; i < lines; ++i)
    for (int j = i < whole_lines ? whole : 0; j < count; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

// The same in squares of L, where code is for one machine.
template <int L>
INLINE void turn(const float* from, int64_t from_stride, int lines, int count, float* to, int64_t to_stride) {
  const int whole_lines = lines / L * L, whole = count / L * L;
  for (int j = 0; j < whole; j += L)
    for (int i = 0; i < whole_lines; i += L) {
      typename Simd<L>::Vec square[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) square[r] = Simd<L>::load(from + (i + r) * from_stride + j);
      transpose_square<L>(square);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) Simd<L>::store(to + (j + r) * to_stride + i, square[r]);
    }
  transpose(from + whole, from_stride, whole_lines, count - whole, to + whole * to_stride, to_stride);
  transpose(from + whole_lines * from_stride, from_stride, lines - whole_lines, count, to + whole_lines, to_stride);
}

}  // namespace
