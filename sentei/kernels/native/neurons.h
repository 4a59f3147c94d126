// A call of routing, and experts of one neuron.
#pragma once

#include "products.h"
#include "rows.h"

namespace {

// Strides are in elements; the last dimension of every tensor is contiguous.
struct Route {
  const void* hidden;              // [T, D]
  const int64_t* ids;              // [T, K], contiguous; -1 where a slot is empty
  const float* weights;            // [T, K], contiguous
  const void *up, *gate, *down;    // [E, F, D], the same or null, [E, O, F]
  void* output;                    // [T, O], contiguous
  float* saved;                    // up's and gate's products with the tokens for the backward, or null
  int64_t hidden_stride, up_stride[2], gate_stride[2], down_stride[2];  // of experts and rows
  int64_t tokens, slots, experts, width, inner, outputs;                // T, K, E, D, F, O
  int64_t activation, bfloat16, threads, machine;
};

// One neuron an expert: a row of each weight, read where it lies. Vectors stand as Kind::place says.
template <class Kind, int L>
INLINE void neurons(const Route& p, const float* x, const int64_t* ids, const float* weights, int64_t slots,
                    float* sum) {
  using Number = typename Kind::Number;
  using Vec = typename Simd<L>::Vec;
  const Activate<L> act{p.activation};
  auto row = [](const void* weight, const int64_t* stride, int64_t e) INLINE_LAMBDA {
    return static_cast<const Number*>(weight) + e * stride[0];
  };
  // The vectors of a row's numbers i …, zeros beyond its end.
  auto load = [](const Number* from, int64_t i, int64_t width, Vec& one, Vec& two) INLINE_LAMBDA {
    if (i + 2 * L <= width) return Kind::template load<L>(from + i, one, two);
    Number rest[2 * L]{};
    std::copy(from + i, from + width, rest);
    Kind::template load<L>(rest, one, two);
  };
  auto dot = [&](const Number* from) INLINE_LAMBDA {
    Vec one, two, sums[2]{};
    for (int64_t i = 0; i < p.width; i += 2 * L) {
      load(from, i, p.width, one, two);
      sums[0] += one * Simd<L>::load(x + i);
      sums[1] += two * Simd<L>::load(x + i + L);
    }
    return Simd<L>::total(sums[0] + sums[1]);
  };
  for (int64_t k = 0; k < slots; ++k) {
    if (ids[k] < 0) continue;
    if (k + 1 < slots && ids[k + 1] >= 0) {
      for (int64_t i = 0; i < p.width; i += int64_t(64 / sizeof(Number))) {
        __builtin_prefetch(row(p.up, p.up_stride, ids[k + 1]) + i);
        if (p.gate) __builtin_prefetch(row(p.gate, p.gate_stride, ids[k + 1]) + i);
      }
      for (int64_t i = 0; i < p.outputs; i += int64_t(64 / sizeof(Number)))
        __builtin_prefetch(row(p.down, p.down_stride, ids[k + 1]) + i);
    }
    const float up = dot(row(p.up, p.up_stride, ids[k]));
    const Vec value = act.value(Vec{} + (p.gate ? dot(row(p.gate, p.gate_stride, ids[k])) : up));
    const float weight = weights[k] * value[0] * (p.gate ? up : 1.0f);
    Vec one, two;
    for (int64_t i = 0; i < p.outputs; i += 2 * L) {
      load(row(p.down, p.down_stride, ids[k]), i, p.outputs, one, two);
      Simd<L>::store(sum + i, Simd<L>::load(sum + i) + weight * one);
      Simd<L>::store(sum + i + L, Simd<L>::load(sum + i + L) + weight * two);
    }
  }
}

template <int L>
INLINE void neurons_of(const Route& p, const float* x, const int64_t* ids, const float* weights, int64_t slots,
                       float* sum) {
  if (p.bfloat16) neurons<BFloat16, L>(p, x, ids, weights, slots, sum);
  else neurons<Float32, L>(p, x, ids, weights, slots, sum);
}
ON_EVERY_MACHINE(neurons_of, (const Route& p, const float* x, const int64_t* ids, const float* weights, int64_t slots,
                              float* sum), (p, x, ids, weights, slots, sum))

// A token's slots are cut into parts, whatever the number of threads, whose sums are added in order.
template <class Kind>
void one_neuron(const Route& p, int machine) {
  constexpr int64_t part = 64;
  for (int64_t i = 0; i < p.tokens * p.slots; ++i)
    if (p.ids[i] < -1 || p.ids[i] >= p.experts) throw BadPlan();
  const int lanes = 4 << machine, step = 2 * lanes;
  const int64_t parts = (p.slots + part - 1) / part, padded = (p.outputs + step - 1) / step * step;
  std::vector<float> sums(size_t(p.tokens * parts * padded));
  const int64_t bytes = p.tokens * p.slots * 2 * p.width * int64_t(sizeof(typename Kind::Number));
  in_parallel(p.tokens * parts, bytes < kAlone ? 1 : p.threads, [] { return 0; }, [&](int64_t i, int) {
    const int64_t t = i / parts, first = i % parts * part;
    const auto x = laid_out<Kind>(static_cast<const typename Kind::Number*>(p.hidden) + t * p.hidden_stride, 1, p.width,
                                  0, lanes);
    neurons_of_on[machine](p, x.data(), p.ids + t * p.slots + first, p.weights + t * p.slots + first,
                           std::min(part, p.slots - first), sums.data() + i * padded);
  });
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t o = 0; o < p.outputs; ++o) {
      float sum = 0.0f;
      for (int64_t i = 0; i < parts; ++i)
        sum += sums[(t * parts + i) * padded + o / step * step + Kind::place(int(o % step), lanes)];
      static_cast<typename Kind::Number*>(p.output)[t * p.outputs + o] = Kind::narrow(sum);
    }
}

}  // namespace
