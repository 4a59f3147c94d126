// The rules of core/rules.py for one query, in real numbers: sums and comparisons are in double, so that only where
// torch's fp32 rounds across an edge do the two keep another candidate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

enum RuleKind : int64_t { kAll = 0, kTopK = 1, kMass = 2, kThreshold = 3 };

struct RuleScratch {
  struct Candidate {
    float score;
    int64_t number;
  };
  std::vector<float> scores;
  std::vector<Candidate> heap;
};

// Marks the `wanted` highest of the candidates that are permitted and not kept yet, ties to the lower number.
inline void keep_highest(int64_t wanted, const float* scores, int64_t n, uint8_t* kept, RuleScratch& scratch) {
  std::vector<float>& open = scratch.scores;
  open.clear();
  for (int64_t c = 0; c < n; ++c)
    if (!kept[c] && scores[c] > -std::numeric_limits<float>::infinity()) open.push_back(scores[c]);
  if (wanted <= 0 || open.empty()) return;
  float lowest = -std::numeric_limits<float>::infinity();
  int64_t ties = 0;  // how many of those at the lowest kept score there is room for
  if (wanted < int64_t(open.size())) {
    std::nth_element(open.begin(), open.begin() + (wanted - 1), open.end(), [](float a, float b) { return a > b; });
    lowest = open[wanted - 1];
    ties = std::count(open.begin(), open.begin() + wanted, lowest);
  }
  for (int64_t c = 0; c < n; ++c)
    if (!kept[c] && (scores[c] > lowest || (scores[c] == lowest && ties > 0 && ties--))) kept[c] = 1;
}

// Marks candidates from the highest down, as long as the shares marked before are less than `mass`.
inline void keep_mass(double mass, float top, const float* scores, int64_t n, uint8_t* kept, RuleScratch& scratch) {
  auto& heap = scratch.heap;
  heap.clear();
  double sum = 0, before = 0;
  for (int64_t c = 0; c < n; ++c) {
    if (scores[c] == -std::numeric_limits<float>::infinity()) continue;
    const double share = std::exp(double(scores[c]) - top);
    sum += share;
    if (kept[c]) before += share;
    else heap.push_back({scores[c], c});
  }
  const auto later = [](const RuleScratch::Candidate& a, const RuleScratch::Candidate& b) {
    return a.score < b.score || (a.score == b.score && a.number > b.number);
  };
  std::make_heap(heap.begin(), heap.end(), later);
  for (; !heap.empty() && before < mass * sum; heap.pop_back()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    kept[heap.back().number] = 1;
    before += std::exp(double(heap.back().score) - top);
  }
}

// Which of n candidates one query keeps: kept[c] becomes 1 or 0.
//
// Scores are logits, minus infinity forbids. `forced` (null: none) are kept whatever their score, where permitted, and
// count first; ties go to the lower number. `parameter` is k, the mass or the ratio; as in Python it is a float.
// Returns how many are kept, or -1 where a score is NaN or plus infinity, which no rule takes.
// Cost: n, and for Mass kept · log n.
inline int64_t keep(RuleKind kind, double parameter, const float* scores, const uint8_t* forced, int64_t n,
                    uint8_t* kept, RuleScratch& scratch) {
  constexpr float kForbidden = -std::numeric_limits<float>::infinity();
  float top = kForbidden;
  int64_t count = 0;
  bool good = true;
  for (int64_t c = 0; c < n; ++c) {
    good &= scores[c] < std::numeric_limits<float>::infinity();  // a NaN is not
    top = std::max(top, scores[c]);
    kept[c] = forced && forced[c] && scores[c] != kForbidden;
    count += kept[c];
  }
  if (!good) return -1;
  if (kind == kTopK) {
    keep_highest(int64_t(parameter) - count, scores, n, kept, scratch);
  } else if (kind == kMass && float(parameter) < 1) {
    keep_mass(float(parameter), top, scores, n, kept, scratch);
  } else {  // everything from a score on, and from minus infinity on everything
    const double lowest = kind == kThreshold ? top + std::log(double(float(parameter))) : kForbidden;
    for (int64_t c = 0; c < n; ++c) kept[c] |= scores[c] != kForbidden && scores[c] >= lowest;
  }
  count = 0;
  for (int64_t c = 0; c < n; ++c) count += kept[c];
  return count;
}

}  // namespace
