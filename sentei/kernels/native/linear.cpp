// A linear layer for few rows: every weight is read from memory once, for all rows, as fast as memory gives it.
#include "call.h"

namespace {

// Strides are in elements; the last dimension of every tensor is contiguous, the output wholly.
struct Linear {
  const void *input, *weight, *bias;  // [R, I], [O, I], [O] or null; all of one dtype
  void* output;                       // [R, O]
  int64_t rows, width, outputs, input_stride, weight_stride;
};

constexpr int64_t kPiece = 512 << 10;  // bytes of weights that are one piece of work, about
constexpr int64_t kAlone = 64 << 10;   // bytes that are not worth a second thread
constexpr int64_t kNear = 20000;       // bytes of weight rows read at once that are little enough to prefetch the next
constexpr int64_t kFar = 8192;         // how many bytes ahead then; in longer rows
constexpr int64_t kAhead = 1024;       //   the processor sees them coming itself

// Keeps a vector in its register, where the compiler would load it again for each product.
template <class Vec>
INLINE void hold(Vec& vector) {
#if defined(__x86_64__) && defined(__GNUC__)
  asm("" : "+v"(vector));
#endif
}

// What a dtype is in memory, and how 2 L of its numbers become two vectors: number i of them stands at place(i, L).
// The inputs are laid out so beforehand, and no weight crosses a vector.
struct Float32 {
  using Number = float;
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
  static INLINE float widen(uint16_t number) {
    const uint32_t bits = uint32_t(number) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  // To nearest, ties to even.
  static INLINE uint16_t narrow(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return number == number ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
  }
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

// Outputs first … first + K - 1 of R rows. The order in which one is summed depends on neither R nor K.
template <class Kind, int L, int R, int K>
INLINE void outputs(const Linear& p, const float* inputs, int64_t first) {
  using Number = typename Kind::Number;
  using Vec = typename Simd<L>::Vec;
  Vec sum[R][K]{};
  const Number *weight = static_cast<const Number*>(p.weight) + first * p.weight_stride, *from[K];
  auto add = [&](int64_t at) INLINE_LAMBDA {
    Vec part[2][K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) Kind::template load<L>(from[k], part[0][k], part[1][k]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec x = Simd<L>::load(inputs + at * R + (2 * r + half) * L);
        if (K > 1) hold(x);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum[r][k] += part[half][k] * x;
      }
  };
  // Short rows are prefetched in the order in which they lie in memory, long ones each for itself.
  constexpr int64_t size = sizeof(Number), lines = (K * 2 * L * size + 63) / 64;
  const bool near = K * p.weight_stride * size < kNear;
  const char* next = reinterpret_cast<const char*>(weight) + (near ? kFar : kAhead);
  const int64_t pace = near ? K * size : size, apart = near ? 64 : p.weight_stride * size;
  const int64_t whole = p.width / (2 * L) * (2 * L);
  for (int64_t j = 0; j < whole; j += 2 * L) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      from[k] = weight + k * p.weight_stride + j;
      if (k < lines || !near) __builtin_prefetch(next + j * pace + k * apart);
    }
    add(j);
  }
  if (whole < p.width) {
    Number rest[K][2 * L]{};
    for (int k = 0; k < K; ++k) {
      std::copy_n(weight + k * p.weight_stride + whole, p.width - whole, rest[k]);
      from[k] = rest[k];
    }
    add(whole);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const float total = Simd<L>::fold(sum[r][k], [](auto a, auto b) INLINE_LAMBDA { return a + b; });
      const auto* bias = static_cast<const Number*>(p.bias);
      static_cast<Number*>(p.output)[r * p.outputs + first + k] =
          Kind::narrow(bias ? total + Kind::widen(bias[first + k]) : total);
    }
}

// Outputs first … last - 1; as many at once as the registers hold sums of.
template <class Kind, int L, int R>
INLINE void run(const Linear& p, const float* inputs, int64_t first, int64_t last) {
  constexpr int K = R <= 2 ? 4 : R <= 4 ? 2 : 1;
  for (; first + K <= last; first += K) outputs<Kind, L, R, K>(p, inputs, first);
  for (; first < last; ++first) outputs<Kind, L, R, 1>(p, inputs, first);
}

template <class Kind, int L>
INLINE void run_rows(const Linear& p, const float* inputs, int64_t first, int64_t last) {
  switch (p.rows) {
    case 1: return run<Kind, L, 1>(p, inputs, first, last);
    case 2: return run<Kind, L, 2>(p, inputs, first, last);
    case 3: return run<Kind, L, 3>(p, inputs, first, last);
    case 4: return run<Kind, L, 4>(p, inputs, first, last);
    case 5: return run<Kind, L, 5>(p, inputs, first, last);
    case 6: return run<Kind, L, 6>(p, inputs, first, last);
    case 7: return run<Kind, L, 7>(p, inputs, first, last);
    default: return run<Kind, L, 8>(p, inputs, first, last);
  }
}

template <int L>
INLINE void run_float32(const Linear& p, const float* inputs, int64_t first, int64_t last) {
  run_rows<Float32, L>(p, inputs, first, last);
}
ON_EVERY_MACHINE(run_float32, (const Linear& p, const float* inputs, int64_t first, int64_t last),
                 (p, inputs, first, last))

template <int L>
INLINE void run_bfloat16(const Linear& p, const float* inputs, int64_t first, int64_t last) {
  run_rows<BFloat16, L>(p, inputs, first, last);
}
ON_EVERY_MACHINE(run_bfloat16, (const Linear& p, const float* inputs, int64_t first, int64_t last),
                 (p, inputs, first, last))

// Adds up floats, as fast as one loop reads memory: what the benchmark holds a product against.
template <int L>
INLINE void read(const float* from, int64_t count, float* total) {
  typename Simd<L>::Vec sum[8]{};
  for (int64_t i = 0; i + 8 * L <= count; i += 8 * L)
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) sum[v] += Simd<L>::load(from + i + v * L);
  for (int v = 1; v < 8; ++v) sum[0] += sum[v];
  *total = Simd<L>::fold(sum[0], [](auto a, auto b) INLINE_LAMBDA { return a + b; });
}
ON_EVERY_MACHINE(read, (const float* from, int64_t count, float* total), (from, count, total))

// The inputs as `outputs` reads them: for every 2 L places the rows in turn, zeros beyond the end.
template <class Kind>
std::vector<float> laid_out(const Linear& p, int lanes) {
  const int64_t step = 2 * lanes;
  std::vector<float> inputs((p.width + step - 1) / step * step * p.rows);
  for (int64_t r = 0; r < p.rows; ++r) {
    const auto* from = static_cast<const typename Kind::Number*>(p.input) + r * p.input_stride;
    for (int64_t i = 0; i < p.width; i += step) {
      float* to = inputs.data() + i * p.rows + r * step;
      for (int j = 0; j < std::min(step, p.width - i); ++j) to[Kind::place(j, lanes)] = Kind::widen(from[i + j]);
    }
  }
  return inputs;
}

template <class Kind, class Run>
void linear(const Linear& p, Run run, int64_t threads, int machine) {
  const std::vector<float> inputs = laid_out<Kind>(p, 4 << machine);
  const int64_t bytes = p.outputs * p.width * int64_t(sizeof(typename Kind::Number));
  const int64_t most = bytes < kAlone ? 1 : threads * ((bytes + threads * kPiece - 1) / (threads * kPiece));
  const int64_t piece = std::max<int64_t>((p.outputs + most - 1) / most, 4);
  in_parallel((p.outputs + piece - 1) / piece, threads, [] { return 0; }, [&](int64_t i, int) {
    run(p, inputs.data(), i * piece, std::min(p.outputs, (i + 1) * piece));
  });
}

}  // namespace

extern "C" {

// One to eight rows; `half` says bfloat16, `machine` the instruction set, -1 the best. Returns 0, or 1 when memory ran
// out; the output is then unfinished. Plain arguments: a struct filled from Python costs more than some layers.
int sentei_linear(const void* input, const void* weight, const void* bias, void* output, int64_t rows, int64_t width,
                  int64_t outputs, int64_t input_stride, int64_t weight_stride, int64_t half, int64_t threads,
                  int64_t machine) {
  return status_of([&] {
    const Linear p{input, weight, bias, output, rows, width, outputs, input_stride, weight_stride};
    const int set = machine < 0 ? machines() - 1 : int(machine);
    if (half)
      linear<BFloat16>(p, run_bfloat16_on[set], threads, set);
    else
      linear<Float32>(p, run_float32_on[set], threads, set);
  });
}

// Adds up `count` floats, which 128 divides.
int sentei_read(const float* from, int64_t count, float* total, int64_t threads) {
  return status_of([&] {
    const int64_t piece = 1 << 17, pieces = (count + piece - 1) / piece;
    std::vector<float> part(pieces);
    in_parallel(pieces, threads, [] { return 0; }, [&](int64_t i, int) {
      read_on[machines() - 1](from + i * piece, std::min(piece, count - i * piece), &part[i]);
    });
    *total = 0;
    for (float one : part) *total += one;
  });
}
}
