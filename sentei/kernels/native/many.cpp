// Layers of many rows, as a prompt has them: products of pairs of bfloat16 numbers where these are the faster, and else in
// float32 whatever the dtype. Weights are laid out once a call; rows go through a layer block by block, so that what is
// between two of its products stays in the cache.
#include "heads.h"
#include "products.h"

namespace {

constexpr int64_t kLaidOut = 16 << 20;  // numbers of a matrix laid out at once

// Weights [O, I] in panels of outputs, [panel][I][outputs], and their biases, zeros where there are none.
struct Panels {
  Lent numbers;
  Zeros bias;
};

// What the layers of a call share: its rows, cut into blocks, and room for each thread.
class RowBlocks {
 public:
  // `rows` of `width` numbers, `stride` apart.
  RowBlocks(const void* input, int64_t rows, int64_t width, int64_t stride, const Way& way, int64_t threads)
      : way(way), unit(way.pairs ? 2 : 1), panel(panel_of(way.machine)), most(tokens_of(way.machine)),
        multiply(way.pairs ? multiply_pairs : multiply_on[way.machine]), wide_(way.half && !way.pairs),
        input_{input, stride / unit, wide_, Left::kAlong}, rows_(rows), width_(width / unit),
        depth_(even_part(width_, kDepth, 32)), rooms_(threads, (width_ + depth_ - 1) / depth_ * kLeft) {
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int lines = kLines; lines >= kLines / 2; lines -= kStripLines) {  // those of which the busiest thread has least
      const int64_t blocks = (rows + lines - 1) / lines, busiest = (blocks + threads - 1) / threads * lines;
      if (busiest < least) least = busiest, lines_ = lines;
    }
    few_ = std::max<int64_t>(8 * threads * lines_ / rows, 1);
    rooms_.prepare();
  }

  Panels lay_out(const void* weight, const void* bias, int64_t outputs, int64_t width, int64_t stride) {
    const int64_t panels = (outputs + panel - 1) / panel, depths = width / unit;
    Panels made{Lent(panels * panel * depths), Zeros(outputs)};
    std::vector<int64_t> order(outputs);
    for (int64_t o = 0; o < outputs; ++o) order[o] = o;
    rooms_.each(panels, [&](int64_t i, Rooms::Room& room) {
      turn_panel_on[way.machine]({weight, stride / unit, wide_, order.data()}, i * panel, outputs, depths,
                             made.numbers.get() + i * panel * depths, room.a.get());
    });
    if (bias) widen_row(bias, way.half, outputs, made.bias.data());
    return made;
  }

  // work(first row, rows, room) for every block of rows, which is then in the room.
  template <class Work>
  void each(Work work) {
    each(1, [&](int64_t first, int lines, int64_t, int64_t, Rooms::Room& room) { work(first, lines, room); });
  }
  // work(first row, rows, first output, outputs, room), where few blocks are cut into parts of the outputs, too.
  template <class Work>
  void each(int64_t outputs, Work work) {
    const int64_t blocks = (rows_ + lines_ - 1) / lines_;
    const int64_t part = even_part(outputs, (outputs + few_ - 1) / few_, panel), parts = (outputs + part - 1) / part;
    rooms_.each(blocks * parts, [&](int64_t i, Rooms::Room& room) {
      const int64_t first = i % blocks * lines_, output = i / blocks * part;
      const int lines = int(std::min<int64_t>(lines_, rows_ - first));
      float* to = room.row.get();
      for (int64_t d = 0; d < width_; d += depth_, to += kLeft) {
        copy_left_on[way.machine](input_, first, lines, d, int(std::min(depth_, width_ - d)), to);
        std::fill(to + lines * kLine, to + round_lines(lines) * kLine, 0.0f);  // computed with, and left
      }
      work(first, lines, output, std::min(part, outputs - output), room);
    });
  }

  // C[lines x columns] of the rows in the room and the outputs from `first`, which a panel begins with.
  void product(const Rooms::Room& room, int lines, const Panels& weights, int64_t first, int64_t columns,
               float* c) const {
    const float *a = room.row.get(), *b = weights.numbers.get() + first * width_;
    for (int64_t d = 0; d < width_; d += depth_, a += kLeft)
      multiply({a, Lines::kCopied, 0}, b + d * panel, width_ * panel, c, lines, int(columns),
               int(std::min(depth_, width_ - d)), d > 0, {});
  }

  const Way way;
  const int64_t unit;         // numbers in the place of a float
  const int64_t panel, most;  // outputs of a panel; columns of a product
  const decltype(&multiply_pairs) multiply;

 private:
  static constexpr int64_t kLeft = kLines * kLine;  // numbers of a left factor
  const bool wide_;                                 // bfloat16 numbers are widened as they are copied
  const Left input_;
  const int64_t rows_, width_, depth_;
  Rooms rooms_;
  int lines_;
  int64_t few_;
};

// C[lines x columns] + bias, rounded, to rows `stride` apart.
template <int L>
INLINE void write_block(float* c, int lines, int64_t columns, const float* bias, bool half, void* to, int64_t stride) {
  for (int i = 0; i < lines; ++i, c += kToken) {
    for (int64_t j = 0; j < columns; ++j) c[j] += bias[j];
    narrow_row(c, half, columns, at(to, half, i * stride));
  }
}
ON_EVERY_MACHINE(write_block, (float* c, int lines, int64_t columns, const float* bias, bool half, void* to,
                               int64_t stride),
                 (c, lines, columns, bias, half, to, stride))

// act(C + gate's bias) · (C from `up` + up's bias), to the lines of a left factor.
template <int L, bool Pairs = false>
INLINE void join_block(const float* c, int lines, int64_t columns, int64_t up, const float* gate_bias,
                       const float* up_bias, int64_t kind, float* to) {
  const Activate<L> act{kind};
  for (int i = 0; i < lines; ++i, c += kToken, to += kLine)
    for (int64_t j = 0; j < columns; j += L)
      Simd<L>::template store<Pairs>(to + j / (Pairs ? 2 : 1),
                                     act.value(Simd<L>::load(c + j) + Simd<L>::load(gate_bias + j)) *
                                         (Simd<L>::load(c + up + j) + Simd<L>::load(up_bias + j)));
}
ON_EVERY_MACHINE(join_block, (const float* c, int lines, int64_t columns, int64_t up, const float* gate_bias,
                              const float* up_bias, int64_t kind, float* to),
                 (c, lines, columns, up, gate_bias, up_bias, kind, to))
AVX512_BF16 void join_block_pairs(const float* c, int lines, int64_t columns, int64_t up, const float* gate_bias,
                                  const float* up_bias, int64_t kind, float* to) {
  join_block<kPairLanes, kPairs>(c, lines, columns, up, gate_bias, up_bias, kind, to);
}

}  // namespace

void linear_of_many(const Linear& p, bool half, int64_t threads, int64_t machine) {
  const Way way(half, machine, {p.width, p.input_stride, p.weight_stride}, {p.input, p.weight});
  RowBlocks blocks(p.input, p.rows, p.width, p.input_stride, way, threads);
  const int64_t group = std::max(kLaidOut / p.width / blocks.panel, int64_t(1)) * blocks.panel;
  for (int64_t begin = 0; begin < p.outputs; begin += group) {
    const int64_t count = std::min(group, p.outputs - begin);
    const Panels weights = blocks.lay_out(at(p.weight, half, begin * p.weight_stride),
                                          p.bias ? at(p.bias, half, begin) : nullptr, count, p.width, p.weight_stride);
    blocks.each(count, [&](int64_t row, int lines, int64_t first, int64_t outputs, Rooms::Room& room) {
      const int64_t each = even_part(outputs, blocks.most, blocks.panel);
      for (int64_t column = first; column < first + outputs; column += each) {
        const int64_t columns = std::min(each, first + outputs - column);
        blocks.product(room, lines, weights, column, columns, room.c.get());
        write_block_on[way.machine](room.c.get(), lines, columns, weights.bias.data() + column, half,
                                   at(p.output, half, row * p.outputs + begin + column), p.outputs);
      }
    });
  }
}

void gated_of_many(const Gated& p, bool half, int64_t threads, int64_t machine) {
  const Way way(half, machine, {p.width, p.hidden}, {p.input, p.gate, p.up, p.down});
  RowBlocks blocks(p.input, p.rows, p.width, p.width, way, threads);
  const auto join_block = way.pairs ? join_block_pairs : join_block_on[way.machine];
  Panels gate = blocks.lay_out(p.gate, p.gate_bias, p.hidden, p.width, p.width);
  Panels up = blocks.lay_out(p.up, p.up_bias, p.hidden, p.width, p.width);
  const Panels down = blocks.lay_out(p.down, p.down_bias, p.outputs, p.hidden, p.hidden);
  const int64_t panel = blocks.panel, some = even_part(p.hidden, std::min<int64_t>(blocks.most / 2, kDepth), panel);
  const int64_t each = even_part(p.outputs, blocks.most, panel), parts = (p.outputs + each - 1) / each;
  gate.bias.resize(p.hidden + panel), up.bias.resize(p.hidden + panel);  // what lies beyond is computed with, and left
  blocks.each([&](int64_t first, int lines, Rooms::Room& room) {
    const Lent sums(parts * kLines * kToken);  // the outputs, [part][line][kToken]
    if (!p.hidden) std::fill_n(sums.get(), parts * kLines * kToken, 0.0f);
    for (int64_t f = 0; f < p.hidden; f += some) {
      const int64_t depths = std::min(some, p.hidden - f);
      blocks.product(room, lines, gate, f, depths, room.c.get());
      blocks.product(room, lines, up, f, depths, room.c.get() + some);
      join_block(room.c.get(), lines, depths, some, gate.bias.data() + f, up.bias.data() + f,
                 p.tanh ? kGeluTanh : kSilu, room.a.get());
      for (int64_t part = 0; part < parts; ++part)
        blocks.multiply({room.a.get(), Lines::kCopied, 0},
                        down.numbers.get() + (part * each * p.hidden + f * panel) / blocks.unit,
                        p.hidden / blocks.unit * panel, sums.get() + part * kLines * kToken, lines,
                        int(std::min(each, p.outputs - part * each)), int(depths / blocks.unit), f > 0, {});
    }
    for (int64_t part = 0; part < parts; ++part)
      write_block_on[way.machine](sums.get() + part * kLines * kToken, lines, std::min(each, p.outputs - part * each),
                                 down.bias.data() + part * each, half,
                                 at(p.output, half, first * p.outputs + part * each), p.outputs);
  });
}

void heads_of_many(const Heads& p, bool half, int64_t threads, int64_t machine) {
  const Way way(half, machine, {p.width}, {p.input, p.weight[0], p.weight[1], p.weight[2]});
  RowBlocks blocks(p.input, p.rows, p.width, p.width, way, threads);
  std::vector<Panels> weights;
  for (int i = 0; i < 3; ++i)
    weights.push_back(blocks.lay_out(p.weight[i], p.bias[i], p.outputs[i], p.width, p.width));
  const Zeros norms = norms_of(p, half);
  const int64_t total = p.outputs[0] + p.outputs[1] + p.outputs[2];
  blocks.each([&](int64_t first, int lines, Rooms::Room& room) {
    Lent rows(kLines * total + 2 * p.head);
    float* made[3];
    int64_t before = 0;
    for (int i = 0; i < 3; before += p.outputs[i++]) {
      made[i] = rows.get() + before;
      const int64_t each = even_part(p.outputs[i], blocks.most, blocks.panel);
      for (int64_t column = 0; column < p.outputs[i]; column += each) {
        const int64_t columns = std::min(each, p.outputs[i] - column);
        blocks.product(room, lines, weights[i], column, columns, room.c.get());
        write_block_on[way.machine](room.c.get(), lines, columns, weights[i].bias.data() + column, false,
                                   made[i] + column, total);
      }
    }
    for (int64_t r = 0; r < lines; ++r) {
      turn_row_on[way.machine](p, half, norms.data(), first + r, made, rows.get() + kLines * total);
      for (float*& part : made) part += total;
    }
  });
}
