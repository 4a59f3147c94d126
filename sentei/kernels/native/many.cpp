// Layers of many rows, as a prompt has them: products in float32 whatever the dtype, which is faster where a processor has
// no fast arithmetic for halves. Weights are laid out once a call; rows go through a layer block by block, so that what is
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

// What the layers of a call share.
class RowBlocks {
 public:
  // `rows` of `width` numbers, `stride` apart.
  RowBlocks(const void* input, int64_t rows, int64_t width, int64_t stride, bool half, int64_t threads, int machine)
      : half(half), machine(machine), panel(panel_of(machine)), most(tokens_of(machine)), rooms_(threads, 1),
        input_{input, stride, half, Left::kAlong}, rows_(rows), width_(width) {
    rooms_.prepare();
    const int64_t rounds = (rows + kLines * threads - 1) / (kLines * threads);
    lines_ = even_part(rows, (rows + rounds * threads - 1) / (rounds * threads), 1);
    lines_ = std::min<int64_t>(round_lines(int(lines_)), kLines);
  }

  Panels lay_out(const void* weight, const void* bias, int64_t outputs, int64_t width, int64_t stride) {
    const int64_t panels = (outputs + panel - 1) / panel;
    Panels made{Lent(panels * panel * width), Zeros(outputs)};
    std::vector<int64_t> order(outputs);
    for (int64_t o = 0; o < outputs; ++o) order[o] = o;
    rooms_.each(panels, [&](int64_t i, Rooms::Room& room) {
      turn_panel_on[machine]({weight, stride, half, order.data()}, i * panel, outputs, width,
                             made.numbers.get() + i * panel * width, room.a.get());
    });
    if (bias) widen_row(bias, half, outputs, made.bias.data());
    return made;
  }

  // work(first row, rows, part, room) for every block of rows and part of 0 … parts - 1, the blocks fastest.
  template <class Work>
  void each(int64_t parts, Work work) {
    const int64_t blocks = (rows_ + lines_ - 1) / lines_;
    rooms_.each(blocks * parts, [&](int64_t i, Rooms::Room& room) {
      const int64_t first = i % blocks * lines_;
      work(first, int(std::min(lines_, rows_ - first)), i / blocks, room);
    });
  }

  // C[lines x columns] of the inputs from row `first` and the outputs from `column`, which a panel begins with.
  void product(Rooms::Room& room, int64_t first, int lines, const Panels& weights, int64_t column, int64_t columns,
               float* c) const {
    block_product(machine, room, input_, first, lines, weights.numbers.get() + column * width_, width_ * panel,
                  int(columns), width_, c);
  }

  const bool half;
  const int machine;
  const int64_t panel, most;  // outputs of a panel; columns of a product

 private:
  Rooms rooms_;
  const Left input_;
  const int64_t rows_, width_;
  int64_t lines_;
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
template <int L>
INLINE void join_block(const float* c, int lines, int64_t columns, int64_t up, const float* gate_bias,
                       const float* up_bias, int64_t kind, float* to) {
  const Activate<L> act{kind};
  for (int i = 0; i < lines; ++i, c += kToken, to += kLine)
    for (int64_t j = 0; j < columns; j += L)
      Simd<L>::store(to + j, act.value(Simd<L>::load(c + j) + Simd<L>::load(gate_bias + j)) *
                                 (Simd<L>::load(c + up + j) + Simd<L>::load(up_bias + j)));
}
ON_EVERY_MACHINE(join_block, (const float* c, int lines, int64_t columns, int64_t up, const float* gate_bias,
                              const float* up_bias, int64_t kind, float* to),
                 (c, lines, columns, up, gate_bias, up_bias, kind, to))

}  // namespace

void linear_of_many(const Linear& p, bool half, int64_t threads, int machine) {
  RowBlocks blocks(p.input, p.rows, p.width, p.input_stride, half, threads, machine);
  const int64_t group = std::max(kLaidOut / p.width / blocks.panel, int64_t(1)) * blocks.panel;
  for (int64_t begin = 0; begin < p.outputs; begin += group) {
    const int64_t count = std::min(group, p.outputs - begin), each = even_part(count, blocks.most, blocks.panel);
    const Panels weights = blocks.lay_out(at(p.weight, half, begin * p.weight_stride),
                                          p.bias ? at(p.bias, half, begin) : nullptr, count, p.width, p.weight_stride);
    blocks.each((count + each - 1) / each, [&](int64_t first, int lines, int64_t part, Rooms::Room& room) {
      const int64_t column = part * each, columns = std::min(each, count - column);
      blocks.product(room, first, lines, weights, column, columns, room.c.get());
      write_block_on[machine](room.c.get(), lines, columns, weights.bias.data() + column, half,
                              at(p.output, half, first * p.outputs + begin + column), p.outputs);
    });
  }
}

void gated_of_many(const Gated& p, bool half, int64_t threads, int machine) {
  RowBlocks blocks(p.input, p.rows, p.width, p.width, half, threads, machine);
  Panels gate = blocks.lay_out(p.gate, p.gate_bias, p.hidden, p.width, p.width);
  Panels up = blocks.lay_out(p.up, p.up_bias, p.hidden, p.width, p.width);
  const Panels down = blocks.lay_out(p.down, p.down_bias, p.outputs, p.hidden, p.hidden);
  const int64_t panel = blocks.panel, some = even_part(p.hidden, std::min<int64_t>(blocks.most / 2, kDepth), panel);
  const int64_t each = even_part(p.outputs, blocks.most, panel), parts = (p.outputs + each - 1) / each;
  gate.bias.resize(p.hidden + panel), up.bias.resize(p.hidden + panel);  // what lies beyond is computed with, and left
  blocks.each(1, [&](int64_t first, int lines, int64_t, Rooms::Room& room) {
    const Lent hidden(kBlock), sums(parts * kLines * kToken);  // act(gate) · up; the outputs, [part][line][kToken]
    std::fill_n(hidden.get(), kBlock, 0.0f);
    for (int64_t f = 0; f < p.hidden; f += some) {
      const int64_t depths = std::min(some, p.hidden - f);
      blocks.product(room, first, lines, gate, f, depths, room.c.get());
      blocks.product(room, first, lines, up, f, depths, room.c.get() + some);
      join_block_on[machine](room.c.get(), lines, depths, some, gate.bias.data() + f, up.bias.data() + f,
                             p.tanh ? kGeluTanh : kSilu, hidden.get());
      for (int64_t part = 0; part < parts; ++part)
        multiply_on[machine](hidden.get(), down.numbers.get() + part * each * p.hidden + f * panel, p.hidden * panel,
                             sums.get() + part * kLines * kToken, lines,
                             int(std::min(each, p.outputs - part * each)), int(depths), false, f > 0);
    }
    for (int64_t part = 0; part < parts; ++part)
      write_block_on[machine](sums.get() + part * kLines * kToken, lines, std::min(each, p.outputs - part * each),
                              down.bias.data() + part * each, half, at(p.output, half, first * p.outputs + part * each),
                              p.outputs);
  });
}

void heads_of_many(const Heads& p, bool half, int64_t threads, int machine) {
  RowBlocks blocks(p.input, p.rows, p.width, p.width, half, threads, machine);
  std::vector<Panels> weights;
  for (int i = 0; i < 3; ++i)
    weights.push_back(blocks.lay_out(p.weight[i], p.bias[i], p.outputs[i], p.width, p.width));
  const Zeros norms = norms_of(p, half);
  const int64_t total = p.outputs[0] + p.outputs[1] + p.outputs[2];
  blocks.each(1, [&](int64_t first, int lines, int64_t, Rooms::Room& room) {
    Lent rows(kLines * total + 2 * p.head);
    float* made[3];
    int64_t before = 0;
    for (int i = 0; i < 3; before += p.outputs[i++]) {
      made[i] = rows.get() + before;
      const int64_t each = even_part(p.outputs[i], blocks.most, blocks.panel);
      for (int64_t column = 0; column < p.outputs[i]; column += each) {
        const int64_t columns = std::min(each, p.outputs[i] - column);
        blocks.product(room, first, lines, weights[i], column, columns, room.c.get());
        write_block_on[machine](room.c.get(), lines, columns, weights[i].bias.data() + column, false,
                                made[i] + column, total);
      }
    }
    for (int64_t r = 0; r < lines; ++r) {
      turn_row_on[machine](p, half, norms.data(), first + r, made, rows.get() + kLines * total);
      for (float*& part : made) part += total;
    }
  });
}
