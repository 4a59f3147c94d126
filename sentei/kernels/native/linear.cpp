// What a layer of a transformer is made of besides attention: a linear layer, a gated MLP, an RMS norm, the queries, keys
// and values of an attention layer. Of few rows, here, every weight is read from memory once, for all of them, as fast as
// memory gives it; many.cpp has what many rows take.
#include "heads.h"

namespace {

constexpr int64_t kAhead = 1024;  // bytes ahead at which weights are prefetched, from one row into the next
constexpr int kLevel = 2;         // to which cache: the second holds more requests on their way than the first

// Keeps a vector in its register, where the compiler would load it again for each product.
template <class Vec>
INLINE void hold(Vec& vector) {
#if defined(__x86_64__) && defined(__GNUC__)
  asm("" : "+v"(vector));
#endif
}

// Outputs first, first + apart … of R rows, K of them. The order in which one is summed depends on neither R nor K.
template <class Kind, int L, int R, int K>
INLINE void outputs(const Linear& p, const float* inputs, int64_t first, int64_t apart) {
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
  constexpr int64_t line = kCacheLine / sizeof(Number);
  const int64_t whole = p.width / (2 * L) * (2 * L), next = apart * p.weight_stride;
  for (int64_t j = 0; j < whole; j += 2 * L) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      from[k] = weight + k * next + j;
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2 * L; i += line) __builtin_prefetch(from[k] + kAhead / sizeof(Number) + i, 0, kLevel);
    }
    add(j);
  }
  if (whole < p.width) {
    Number rest[K][2 * L]{};
    for (int k = 0; k < K; ++k) {
      std::copy_n(weight + k * next + whole, p.width - whole, rest[k]);
      from[k] = rest[k];
    }
    add(whole);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const float total = Simd<L>::total(sum[r][k]);
      const auto* bias = static_cast<const Number*>(p.bias);
      const float value = bias ? total + Kind::widen(bias[first + k * apart]) : total;
      const int64_t at = r * p.outputs + first + k * apart;
      if (p.wide)
        p.wide[at] = value;
      else
        static_cast<Number*>(p.output)[at] = Kind::narrow(value);
    }
}

// Outputs first … last - 1; as many at once as the registers hold sums of: an input is then read once for all of them.
// They lie far apart, so that each goes on where the last one of its kind ended: memory gives more to several streams
// than to rows beside each other.
template <class Kind, int L, int R>
INLINE void run(const Linear& p, const float* inputs, int64_t first, int64_t last) {
  constexpr int K = L == 16 ? (R <= 5 ? 4 : 3) : R <= 2 ? 4 : R <= 4 ? 2 : 1;
  const int64_t apart = (last - first) / K;
  for (int64_t o = first; o < first + apart; ++o) outputs<Kind, L, R, K>(p, inputs, o, apart);
  for (int64_t o = first + K * apart; o < last; ++o) outputs<Kind, L, R, 1>(p, inputs, o, 1);
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

// Inputs as `LaidOut` has them; the last dimension of the tensor is contiguous.
template <class Kind, int L>
INLINE void lay(const void* input, int64_t rows, int64_t width, int64_t stride, float* to) {
  using Number = typename Kind::Number;
  typename Simd<L>::Vec one, two;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = static_cast<const Number*>(input) + r * stride;
    auto put = [&](const Number* numbers, int64_t at) INLINE_LAMBDA {
      Kind::template load<L>(numbers, one, two);
      Simd<L>::store(to + at * rows + 2 * r * L, one);
      Simd<L>::store(to + at * rows + (2 * r + 1) * L, two);
    };
    const int64_t whole = width / (2 * L) * (2 * L);
    for (int64_t j = 0; j < whole; j += 2 * L) put(from + j, j);
    if (whole == width) continue;
    Number rest[2 * L]{};
    std::copy(from + whole, from + width, rest);
    put(rest, whole);
  }
}

template <int L>
INLINE void lay_float32(const void* input, int64_t rows, int64_t width, int64_t stride, float* to) {
  lay<Float32, L>(input, rows, width, stride, to);
}
ON_EVERY_MACHINE(lay_float32, (const void* input, int64_t rows, int64_t width, int64_t stride, float* to),
                 (input, rows, width, stride, to))

template <int L>
INLINE void lay_bfloat16(const void* input, int64_t rows, int64_t width, int64_t stride, float* to) {
  lay<BFloat16, L>(input, rows, width, stride, to);
}
ON_EVERY_MACHINE(lay_bfloat16, (const void* input, int64_t rows, int64_t width, int64_t stride, float* to),
                 (input, rows, width, stride, to))

// The inputs of a call, laid out with the instructions of a machine.
template <class Kind>
Zeros laid(const void* input, int64_t rows, int64_t width, int64_t stride, int machine) {
  const int64_t step = 8 << machine;
  Zeros to((width + step - 1) / step * step * rows);
  const auto lay_on = sizeof(typename Kind::Number) == 2 ? lay_bfloat16_on : lay_float32_on;
  lay_on[machine](input, rows, width, stride, to.data());
  return to;
}

// gate becomes act(gate) · up, where act(g) = g / (1 + 2^t): silu with t = -g log2(e), and gelu by tanh, because
// (1 + tanh u) / 2 = 1 / (1 + e^(-2u)).
template <int L>
INLINE void activate(float* gate, const float* up, int64_t count, bool tanh) {
  using Vec = typename Simd<L>::Vec;
  auto one = [&](Vec g, Vec u) INLINE_LAMBDA {
    const Vec t = tanh ? g * (-1.5957691216057308f * kLog2E) * (1.0f + 0.044715f * g * g) : g * -kLog2E;
    return g / (1.0f + (t > 127.0f ? Vec{} - kNone : Simd<L>::exp2(t))) * u;
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) Simd<L>::store(gate + i, one(Simd<L>::load(gate + i), Simd<L>::load(up + i)));
  float rest[2][L]{};
  std::copy(gate + i, gate + count, rest[0]);
  std::copy(up + i, up + count, rest[1]);
  Simd<L>::store(rest[0], one(Simd<L>::load(rest[0]), Simd<L>::load(rest[1])));
  std::copy_n(rest[0], count - i, gate + i);
}
ON_EVERY_MACHINE(activate, (float* gate, const float* up, int64_t count, bool tanh), (gate, up, count, tanh))

// y = x / sqrt(mean(x²) + epsilon) · (shift + weight), in this order in fp32, rounded once.
template <class Kind, int L>
INLINE void norm(const Norm& p) {
  using Number = typename Kind::Number;
  const auto* weight = static_cast<const Number*>(p.weight);
  for (int64_t r = 0; r < p.rows; ++r) {
    const auto* from = static_cast<const Number*>(p.input) + r * p.width;
    auto* to = static_cast<Number*>(p.output) + r * p.width;
    typename Simd<L>::Vec one, two, sum[2]{};
    auto add = [&](const Number* numbers) INLINE_LAMBDA {
      Kind::template load<L>(numbers, one, two);
      sum[0] += one * one;
      sum[1] += two * two;
    };
    int64_t i = 0;
    for (; i + 2 * L <= p.width; i += 2 * L) add(from + i);
    Number rest[2 * L]{};
    std::copy(from + i, from + p.width, rest);
    add(rest);
    const float total = Simd<L>::total(sum[0] + sum[1]);
    const float factor = 1.0f / std::sqrt(total / float(p.width) + p.epsilon);
    for (int64_t j = 0; j < p.width; ++j)
      to[j] = Kind::narrow(Kind::widen(from[j]) * factor * (p.shift + Kind::widen(weight[j])));
  }
}

template <int L>
INLINE void norm_float32(const Norm& p) {
  norm<Float32, L>(p);
}
ON_EVERY_MACHINE(norm_float32, (const Norm& p), (p))

template <int L>
INLINE void norm_bfloat16(const Norm& p) {
  norm<BFloat16, L>(p);
}
ON_EVERY_MACHINE(norm_bfloat16, (const Norm& p), (p))

// Adds up floats, as fast as one loop reads memory: what the benchmark holds a product against.
template <int L>
INLINE void read(const float* from, int64_t count, float* total) {
  typename Simd<L>::Vec sum[8]{};
  for (int64_t i = 0; i + 8 * L <= count; i += 8 * L)
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) sum[v] += Simd<L>::load(from + i + v * L);
  for (int v = 1; v < 8; ++v) sum[0] += sum[v];
  *total = Simd<L>::total(sum[0]);
}
ON_EVERY_MACHINE(read, (const float* from, int64_t count, float* total), (from, count, total))

// work(first, last) for pieces of the outputs, of which each reads `bytes` of weights.
template <class Work>
void in_pieces(int64_t outputs, int64_t bytes, int64_t threads, Work work) {
  const int64_t all = outputs * bytes;
  const int64_t most = all < kAlone ? 1 : threads * ((all + threads * kPiece - 1) / (threads * kPiece));
  const int64_t piece = std::max<int64_t>((outputs + most - 1) / most, 4);
  in_parallel((outputs + piece - 1) / piece, threads, [] { return 0; }, [&](int64_t i, int) {
    work(i * piece, std::min(outputs, (i + 1) * piece));
  });
}

template <class Kind, class Run>
void linear(const Linear& p, Run run, int64_t threads, int machine) {
  const auto inputs = laid<Kind>(p.input, p.rows, p.width, p.input_stride, machine);
  in_pieces(p.outputs, p.width * int64_t(sizeof(typename Kind::Number)), threads, [&](int64_t first, int64_t last) {
    run(p, inputs.data(), first, last);
  });
}

// What is between the products stays in fp32, whatever the dtype.
template <class Kind, class Run>
void gated(const Gated& p, Run run, int64_t threads, int machine) {
  const int64_t size = sizeof(typename Kind::Number);
  const auto inputs = laid<Kind>(p.input, p.rows, p.width, p.width, machine);
  Zeros gates(p.rows * p.hidden), ups(p.rows * p.hidden);
  LaidOut<Kind> hidden(p.rows, p.hidden, 4 << machine);
  const Linear gate{nullptr, p.gate, p.gate_bias, nullptr, gates.data(), p.rows, p.width, p.hidden, 0, p.width};
  const Linear up{nullptr, p.up, p.up_bias, nullptr, ups.data(), p.rows, p.width, p.hidden, 0, p.width};
  const Linear down{nullptr, p.down, p.down_bias, p.output, nullptr, p.rows, p.hidden, p.outputs, 0, p.hidden};
  in_pieces(p.hidden, 2 * p.width * size, threads, [&](int64_t first, int64_t last) {
    run(gate, inputs.data(), first, last);
    run(up, inputs.data(), first, last);
    for (int64_t r = 0; r < p.rows; ++r) {
      float* row = gates.data() + r * p.hidden;
      activate_on[machine](row + first, ups.data() + r * p.hidden + first, last - first, p.tanh);
      hidden.write(r, first, last, [&](int64_t i) { return row[i]; });
    }
  });
  in_pieces(p.outputs, p.hidden * size, threads, [&](int64_t first, int64_t last) {
    run(down, hidden.data(), first, last);
  });
}

template <class Kind, class Run>
void heads(const Heads& p, Run run, int64_t threads, int machine) {
  const auto inputs = laid<Kind>(p.input, p.rows, p.width, p.width, machine);
  const int64_t total = p.outputs[0] + p.outputs[1] + p.outputs[2];
  Zeros wide(p.rows * total);
  Linear part[3];
  int64_t before[3] = {0, p.outputs[0], p.outputs[0] + p.outputs[1]};
  for (int i = 0; i < 3; ++i)
    part[i] = {nullptr, p.weight[i], p.bias[i], nullptr, wide.data() + p.rows * before[i], p.rows, p.width, p.outputs[i],
               0, p.width};
  in_pieces(total, p.width * int64_t(sizeof(typename Kind::Number)), threads, [&](int64_t first, int64_t last) {
    for (int i = 0; i < 3; ++i) {
      const int64_t begin = std::max<int64_t>(first - before[i], 0), end = std::min(last - before[i], p.outputs[i]);
      if (begin < end) run(part[i], inputs.data(), begin, end);
    }
  });
  constexpr bool half = sizeof(typename Kind::Number) == 2;
  const Zeros norms = norms_of(p, half);
  Zeros room(2 * p.head);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* const made[] = {part[0].wide + r * p.outputs[0], part[1].wide + r * p.outputs[1],
                           part[2].wide + r * p.outputs[2]};
    turn_row_on[machine](p, half, norms.data(), r, made, room.data());
  }
}

// The numbers between two products, rounded as a tensor's.
template <class Kind>
using Rounded = std::vector<typename Kind::Number, Aligned<typename Kind::Number>>;

template <class Kind>
void add_rows(const void* one, const void* other, int64_t count, void* sum) {
  using Number = typename Kind::Number;
  const auto *a = static_cast<const Number*>(one), *b = static_cast<const Number*>(other);
  for (int64_t i = 0; i < count; ++i) static_cast<Number*>(sum)[i] = Kind::narrow(Kind::widen(a[i]) + Kind::widen(b[i]));
}

template <class Kind, class Run, class Normalize>
void normed_heads(const Before& p, Run run, Normalize normalize, int64_t threads, int machine) {
  Rounded<Kind> normed(p.heads.rows * p.heads.width);
  normalize({p.heads.input, p.gain, normed.data(), p.heads.rows, p.heads.width, p.epsilon, p.shift});
  Heads then = p.heads;
  then.input = normed.data();
  heads<Kind>(then, run, threads, machine);
}

template <class Kind, class Run, class Normalize>
void joined_and_gated(const After& p, Run run, Normalize normalize, int64_t threads, int machine) {
  const int64_t rows = p.gated.rows, width = p.gated.width, count = rows * width;
  Rounded<Kind> hidden(count), normed(count);
  linear<Kind>({p.attended, p.weight, p.bias, hidden.data(), nullptr, rows, p.inner, width, p.inner, p.inner}, run,
               threads, machine);
  add_rows<Kind>(p.residual, hidden.data(), count, hidden.data());
  normalize({hidden.data(), p.gain, normed.data(), rows, width, p.epsilon, p.shift});
  Gated then = p.gated;
  then.input = normed.data();
  gated<Kind>(then, run, threads, machine);
  add_rows<Kind>(hidden.data(), p.gated.output, count, p.gated.output);
}

}  // namespace

ProductOfRows product_of_rows(bool bfloat16, int machine) {
  return (bfloat16 ? run_bfloat16_on : run_float32_on)[machine];
}

void before_attention(const Before& p, bool bfloat16, int64_t threads, int machine) {
  if (bfloat16)
    normed_heads<BFloat16>(p, run_bfloat16_on[machine], norm_bfloat16_on[machine], threads, machine);
  else
    normed_heads<Float32>(p, run_float32_on[machine], norm_float32_on[machine], threads, machine);
}

void after_attention(const After& p, bool bfloat16, int64_t threads, int machine) {
  if (bfloat16)
    joined_and_gated<BFloat16>(p, run_bfloat16_on[machine], norm_bfloat16_on[machine], threads, machine);
  else
    joined_and_gated<Float32>(p, run_float32_on[machine], norm_float32_on[machine], threads, machine);
}

extern "C" {

// Any number of rows; `half` says bfloat16, `machine` the instruction set, -1 the best. Returns 0, or 1 when memory ran
// out; the output is then unfinished. Plain arguments: a struct filled from Python costs more than some layers.
int sentei_linear(const void* input, const void* weight, const void* bias, void* output, int64_t rows, int64_t width,
                  int64_t outputs, int64_t input_stride, int64_t weight_stride, int64_t half, int64_t threads,
                  int64_t machine) {
  return status_of([&] {
    const Linear p{input, weight, bias, output, nullptr, rows, width, outputs, input_stride, weight_stride};
    const int set = set_of(machine);
    if (rows > kFew)
      linear_of_many(p, half, threads, machine);
    else if (half)
      linear<BFloat16>(p, run_bfloat16_on[set], threads, set);
    else
      linear<Float32>(p, run_float32_on[set], threads, set);
  });
}

// down(act(gate(x)) · up(x)); `tanh` says gelu by tanh, else silu; the rest as above.
int sentei_gated(const void* input, const void* gate, const void* up, const void* down, const void* gate_bias,
                 const void* up_bias, const void* down_bias, void* output, int64_t rows, int64_t width, int64_t hidden,
                 int64_t outputs, int64_t tanh, int64_t half, int64_t threads, int64_t machine) {
  return status_of([&] {
    const Gated p{input, gate, up, down, gate_bias, up_bias, down_bias, output, rows, width, hidden, outputs,
                  tanh};
    const int set = set_of(machine);
    if (rows > kFew)
      gated_of_many(p, half, threads, machine);
    else if (half)
      gated<BFloat16>(p, run_bfloat16_on[set], threads, set);
    else
      gated<Float32>(p, run_float32_on[set], threads, set);
  });
}

// An RMS norm of any number of rows.
int sentei_norm(const void* input, const void* weight, void* output, int64_t rows, int64_t width, double epsilon,
                double shift, int64_t half, int64_t threads, int64_t machine) {
  const auto norm = (half ? norm_bfloat16_on : norm_float32_on)[set_of(machine)];
  const int64_t row = width * (half ? 2 : 4), piece = std::max<int64_t>(kPiece / row, 1);
  auto some = [&](int64_t i, int) {
    const int64_t at = i * piece * row;
    norm({static_cast<const char*>(input) + at, weight, static_cast<char*>(output) + at,
          std::min(piece, rows - i * piece), width, float(epsilon), float(shift)});
  };
  return status_of([&] { in_parallel((rows + piece - 1) / piece, threads, [] { return 0; }, some); });
}

// The queries, keys and values of rows; the head's width is even and divides the queries' and the keys'. The
// rest as above.
int sentei_heads(const void* input, const void* query, const void* key, const void* value, const void* query_bias,
                 const void* key_bias, const void* value_bias, const void* query_norm, const void* key_norm,
                 const void* cosine, const void* sine, void* output, int64_t rows, int64_t width, int64_t queries,
                 int64_t keys, int64_t values, int64_t head, int64_t turns, double epsilon, double shift, int64_t half,
                 int64_t threads, int64_t machine) {
  return status_of([&] {
    const Heads p{input, {query, key, value}, {query_bias, key_bias, value_bias}, {query_norm, key_norm}, cosine, sine,
                  output, rows, width, {queries, keys, values}, head, turns, float(epsilon), float(shift)};
    const int set = set_of(machine);
    if (rows > kFew)
      heads_of_many(p, half, threads, machine);
    else if (half)
      heads<BFloat16>(p, run_bfloat16_on[set], threads, set);
    else
      heads<Float32>(p, run_float32_on[set], threads, set);
  });
}

// Adds up `count` floats, which 128 divides.
int sentei_read(const float* from, int64_t count, float* total, int64_t threads) {
  return status_of([&] {
    const int64_t piece = 1 << 17, pieces = (count + piece - 1) / piece;
    Zeros part(pieces);
    in_parallel(pieces, threads, [] { return 0; }, [&](int64_t i, int) {
      read_on[set_of(-1)](from + i * piece, std::min(piece, count - i * piece), &part[i]);
    });
    *total = 0;
    for (float one : part) *total += one;
  });
}
}
