// Queries and keys as attention reads them: normed, and turned by the rotary embedding, number j with number j + D / 2.
#pragma once

#include "rows.h"

namespace {

// The norms of queries and keys as they are multiplied, [2][D]: shift + weight.
inline Zeros norms_of(const Heads& p, bool half) {
  Zeros norms(2 * p.head);
  for (int i = 0; i < 2; ++i)
    for (int64_t j = 0; p.norm[i] && j < p.head; ++j) {
      float weight;
      widen_row(at(p.norm[i], half, j), half, 1, &weight);
      norms[i * p.head + j] = p.shift + weight;
    }
  return norms;
}

// Row `row` of the output, from its queries, keys and values in float32, which are lost. `room` holds 2 D numbers.
template <int L>
INLINE void turn_row(const Heads& p, bool half, const float* norms, int64_t row, float* const* made, float* room) {
  const int64_t middle = p.head / 2, total = p.outputs[0] + p.outputs[1] + p.outputs[2];
  float *cosine = room, *sine = room + p.head;
  widen_row(at(p.cosine, half, row % p.turns * p.head), half, p.head, cosine);
  widen_row(at(p.sine, half, row % p.turns * p.head), half, p.head, sine);
  void* to = at(p.output, half, row * total);
  for (int i = 0; i < 2; ++i, norms += p.head) {
    for (float* x = made[i]; x < made[i] + p.outputs[i]; x += p.head) {
      if (p.norm[i]) {
        typename Simd<L>::Vec squares{};
        int64_t j = 0;
        for (; j + L <= p.head; j += L) squares += Simd<L>::load(x + j) * Simd<L>::load(x + j);
        float sum = Simd<L>::total(squares);
        for (; j < p.head; ++j) sum += x[j] * x[j];
        const float factor = 1.0f / std::sqrt(sum / float(p.head) + p.epsilon);
        for (j = 0; j < p.head; ++j) x[j] *= factor * norms[j];
      }
      for (int64_t j = 0; j < middle; ++j) {
        const float one = x[j], other = x[j + middle];
        x[j] = one * cosine[j] - other * sine[j];
        x[j + middle] = other * cosine[j + middle] + one * sine[j + middle];
      }
    }
    narrow_row(made[i], half, p.outputs[i], to);
    to = at(to, half, p.outputs[i]);
  }
  narrow_row(made[2], half, p.outputs[2], to);
}
ON_EVERY_MACHINE(turn_row, (const Heads& p, bool half, const float* norms, int64_t row, float* const* made, float* room),
                 (p, half, norms, row, made, room))

}  // namespace
