// Room for numbers that calls leave to the next.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

struct Free {
  void operator()(float* numbers) const { std::free(numbers); }
};
using Floats = std::unique_ptr<float[], Free>;

// Room for floats that begins with a cache line, so that no vector lies across two; much of it in huge pages where the
// system has them, because the first touch of a page costs as much as some of the products.
inline Floats floats(int64_t count) {
  constexpr size_t huge = 2 << 20;
  const size_t bytes = std::max<size_t>(size_t(count) * sizeof(float), 64);
  void* numbers = nullptr;
  if (posix_memalign(&numbers, bytes < huge ? 64 : huge, bytes)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= huge) madvise(numbers, bytes / huge * huge, MADV_HUGEPAGE);
#endif
  return Floats(static_cast<float*>(numbers));
}

// Room that calls leave to the next: the first touch of a page costs as much as some of the products. At most kKept bytes
// wait here; pieces of less than kLeast are left to malloc.
constexpr int64_t kKept = 256 << 20, kLeast = 256 << 10;
class Shelf {
 public:
  struct Piece {
    Floats numbers;
    int64_t count;
  };
  // Numbers of any value: the least that wait and are enough but not twice as many, the last that came, or new ones.
  Piece take(int64_t count) {
    if (count * 4 >= kLeast) {
      const std::lock_guard<std::mutex> alone(mutex_);
      size_t best = pieces_.size();
      for (size_t i = 0; i < pieces_.size(); ++i)
        if (count <= pieces_[i].count && pieces_[i].count / 2 <= count &&
            (best == pieces_.size() || pieces_[i].count <= pieces_[best].count))
          best = i;
      if (best < pieces_.size()) {
        Piece found = std::move(pieces_[best]);
        pieces_.erase(pieces_.begin() + best);
        bytes_ -= found.count * 4;
        return found;
      }
    }
    return {floats(count), count};
  }
  // Those that have waited longest make room.
  void give(Piece piece) noexcept {
    if (!piece.numbers || piece.count * 4 < kLeast || piece.count * 4 > kKept) return;
    try {
      const std::lock_guard<std::mutex> alone(mutex_);
      pieces_.push_back(std::move(piece));
      bytes_ += pieces_.back().count * 4;
      for (; bytes_ > kKept; pieces_.erase(pieces_.begin())) bytes_ -= pieces_.front().count * 4;
    } catch (const std::bad_alloc&) {
    }
  }
  int64_t bytes() {
    const std::lock_guard<std::mutex> alone(mutex_);
    return bytes_;
  }

 private:
  std::mutex mutex_;
  std::vector<Piece> pieces_;
  int64_t bytes_ = 0;
};

// The library's one. It is never destroyed: what was lent may come back when all else has ended.
inline Shelf& shelf() {
  static Shelf& one = *new Shelf;
  return one;
}

// Numbers from the shelf.
class Lent {
 public:
  Lent() = default;
  explicit Lent(int64_t count) : piece_(shelf().take(std::max<int64_t>(count, 1))) {}
  Lent(Lent&&) = default;
  Lent& operator=(Lent&& other) {
    std::swap(piece_, other.piece_);
    return *this;
  }
  ~Lent() { shelf().give(std::move(piece_)); }
  float* get() const { return piece_.numbers.get(); }
  float& operator[](int64_t i) const { return get()[i]; }

 private:
  Shelf::Piece piece_{nullptr, 0};
};
