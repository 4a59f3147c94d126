// Layers of rows: what linear.cpp makes of few, whose weights are read once, and many.cpp of many.
#pragma once

#include "call.h"

// Strides are in elements; the last dimension of every tensor is contiguous, the output wholly.
struct Linear {
  const void *input, *weight, *bias;  // [R, I], [O, I], [O] or null; all of one dtype
  void* output;                       // [R, O]
  float* wide;                        // [R, O]: takes the output's place where it is not null
  int64_t rows, width, outputs, input_stride, weight_stride;
};

// All contiguous and of one dtype; biases may be null.
struct Gated {
  const void *input, *gate, *up, *down;               // [R, I], [F, I], [F, I], [O, F]
  const void *gate_bias, *up_bias, *down_bias;        // [F], [F], [O]
  void* output;                                       // [R, O]
  int64_t rows, width, hidden, outputs;               // hidden: F
  int64_t tanh;                                       // the activation: gelu by tanh if not 0, else silu
};

// All contiguous and of one dtype.
struct Norm {
  const void *input, *weight;  // [R, I], [I]
  void* output;                // [R, I]
  int64_t rows, width;
  float epsilon, shift;        // the weights are shift + weight
};

// All contiguous and of one dtype; biases and norms may be null.
struct Heads {
  const void* input;                        // [R, I]
  const void *weight[3], *bias[3];          // of queries, keys and values: [O, I] and [O]
  const void* norm[2];                      // [D]: of every query and of every key
  const void *cosine, *sine;                // [N, D]: row r is turned by row r % N
  void* output;                             // [R, the three O together]
  int64_t rows, width, outputs[3], head, turns;  // head: D
  float epsilon, shift;                     // as in Norm
};

// The queries, keys and values of what an RMS norm makes of the rows: `heads.input`.
struct Before {
  Heads heads;
  const void* gain;      // [I]
  float epsilon, shift;  // as in Norm
};

// h = residual + a linear layer of what attention gave, and h + a gated MLP of an RMS norm of h: `gated`, but its input.
struct After {
  Gated gated;
  const void *attended, *residual, *weight, *bias, *gain;  // [R, H], [R, I], [I, H], [I] or null, [I]
  int64_t inner;                                           // H
  float epsilon, shift;                                    // as in Norm
};

constexpr int64_t kFew = 8;  // rows; more of them are many
void linear_of_many(const Linear& p, bool bfloat16, int64_t threads, int64_t machine);
void gated_of_many(const Gated& p, bool bfloat16, int64_t threads, int64_t machine);
void heads_of_many(const Heads& p, bool bfloat16, int64_t threads, int64_t machine);

// Of few.
void before_attention(const Before& p, bool bfloat16, int64_t threads, int64_t machine);
void after_attention(const After& p, bool bfloat16, int64_t threads, int64_t machine);

// Outputs first … last - 1 of one to eight rows of inputs `LaidOut`.
using ProductOfRows = void (*)(const Linear& p, const float* inputs, int64_t first, int64_t last);

// For float32 or bfloat16 weights, which may be multiplied as pairs, on an instruction set.
ProductOfRows product_of_rows(bool bfloat16, bool pairs, int machine);

namespace {

constexpr int64_t kPiece = 1 << 20;   // bytes of weights that are one piece of work, about
constexpr int64_t kAlone = 64 << 10;   // bytes that are not worth a second thread

// What a dtype is in memory, and how 2 L of its numbers become two vectors: number i of them stands at place(i, L).
// The inputs are laid out so beforehand, as `laid` numbers, and no weight crosses a vector.
struct Float32 {
  using Number = float;
  static constexpr bool pairs = false, in_order = true;
  static INLINE float laid(float number) { return number; }
  static INLINE float widen(float number) { return number; }
  static INLINE float narrow(float number) { return number; }
  static INLINE int place(int i, int) { return i; }
  template <int L>
  static INLINE void load(const float* from, typename Simd<L>::Vec& one, typename Simd<L>::Vec& two) {
    one = Simd<L>::load(from);
    two = Simd<L>::load(from + L);
  }
};

struct BFloat16 {
  using Number = uint16_t;  // the upper half of a float's bits
  static constexpr bool pairs = false, in_order = false;
  static INLINE float laid(float number) { return number; }
  static INLINE float laid(uint16_t number) { return widen(number); }
  static INLINE float widen(uint16_t number) { return ::widen(number); }
  static INLINE uint16_t narrow(float number) { return ::narrow(number); }
  // Numbers at even places are the lower halves of the bits of the first vector, those at odd places of the second.
  static INLINE int place(int i, int lanes) { return i / 2 + i % 2 * lanes; }
  template <int L>
  static INLINE void load(const uint16_t* from, typename Simd<L>::Vec& one, typename Simd<L>::Vec& two) {
    typename Simd<L>::Ints pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    const typename Simd<L>::Ints even = pairs << 16, odd = pairs & int32_t(0xffff0000);
    std::memcpy(&one, &even, sizeof one);
    std::memcpy(&two, &odd, sizeof two);
  }
};

// bfloat16 numbers that are multiplied as pairs, as they are: 2 L of them are one vector.
struct Pairs : BFloat16 {
  static constexpr bool pairs = kPairs, in_order = true;
  static INLINE uint16_t laid(float number) { return narrow(number); }
  static INLINE uint16_t laid(uint16_t number) { return number; }
  static INLINE int place(int i, int) { return i; }
};

// Inputs as `outputs` reads them: for every 2 L places the rows in turn, zeros beyond the end.
template <class Kind>
class LaidOut {
 public:
  LaidOut(int64_t rows, int64_t width, int lanes)
      : rows_(rows), step_(2 * lanes), numbers_((width + step_ - 1) / step_ * step_ * rows) {}
  // Numbers from[first] … from[last - 1] of a row.
  template <class Number>
  void write(int64_t row, int64_t first, int64_t last, const Number* from) {
    for (int64_t i = first; i < last;) {
      const int64_t begin = i / step_ * step_, end = std::min(begin + step_, last);
      Laid* to = numbers_.data() + begin * rows_ + row * step_;
      if constexpr (std::is_same_v<Number, Laid> && Kind::in_order)
        std::copy(from + i, from + end, to + (i - begin));
      else
        for (int64_t j = i; j < end; ++j) to[Kind::place(int(j - begin), int(step_ / 2))] = Kind::laid(from[j]);
      i = end;
    }
  }
  const float* data() const { return reinterpret_cast<const float*>(numbers_.data()); }

 private:
  using Laid = decltype(Kind::laid(0.0f));
  int64_t rows_, step_;
  std::vector<Laid, Aligned<Laid>> numbers_;
};

template <class Kind>
LaidOut<Kind> laid_out(const void* input, int64_t rows, int64_t width, int64_t stride, int lanes) {
  LaidOut<Kind> inputs(rows, width, lanes);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = static_cast<const typename Kind::Number*>(input) + r * stride;
    inputs.write(r, 0, width, from);
  }
  return inputs;
}

}  // namespace
