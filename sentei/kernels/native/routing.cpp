// Mixtures of feed-forward networks: the products of each expert with its own tokens, forward and backward. Tokens stand
// in vectors and weights are read as they lie: each is used by few tokens, and is not laid out anew. Of many rows,
// bfloat16 numbers are multiplied as pairs where these are the faster, and else in float32, as are those of few.
#include "neurons.h"

namespace {

struct RouteBackward {
  Route call;
  const void* gradient;            // [T, O], contiguous: of the output
  void *hidden, *first, *down;     // [T, D], [E, 2 F or F, D] (gate's rows, then up's), [E, O, F]; null: not wanted
  float* weights;                  // [T, K]
};

// The kept (token, slot) pairs, sorted by expert; each is a row.
struct Order {
  explicit Order(const Route& p) : start(p.experts + 1), place(p.tokens * p.slots, -1) {
    const int64_t pairs = p.tokens * p.slots;
    for (int64_t i = 0; i < pairs; ++i) {
      if (p.ids[i] < -1 || p.ids[i] >= p.experts) throw BadPlan();
      if (p.ids[i] >= 0) ++start[p.ids[i] + 1];
    }
    for (int64_t e = 0; e < p.experts; ++e) start[e + 1] += start[e];
    token.resize(start[p.experts]);
    pair.resize(start[p.experts]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < pairs; ++i) {
      if (p.ids[i] < 0) continue;
      place[i] = next[p.ids[i]]++;
      token[place[i]] = i / p.slots;
      pair[place[i]] = i;
    }
  }
  int64_t rows(int64_t e) const { return start[e + 1] - start[e]; }
  std::vector<int64_t> start, place, token, pair;  // [E + 1], [T, K], rows, rows
};

// One expert of a wave: its rows, and where its panels begin, counted in panels of the wave and of all experts.
struct Share {
  int64_t expert, first, rows, panel, all_panel;
};

// A block of a product: lines and columns of an expert's.
struct Block {
  const Share* share;
  int64_t line, first, columns;
  int lines;
};

constexpr int64_t kNear = 4;  // panels for which a left factor is not worth a copy

// Everything about a call that its phases share.
struct Call {
  explicit Call(const Route& p, const void* gradient = nullptr)
      : p(p), order(p),
        way(p.bfloat16, p.machine, {p.width, p.inner, p.outputs, p.hidden_stride, p.up_stride[0], p.up_stride[1],
                                    p.gate_stride[0], p.gate_stride[1], p.down_stride[0], p.down_stride[1]},
            {p.hidden, p.up, p.gate, p.down, gradient}),
        machine(way.machine), panel(panel_of(machine)), unit(way.pairs ? 2 : 1),
        multiply(way.pairs ? multiply_pairs : multiply_on[machine]),
        rooms(std::max<int64_t>(p.threads, 1), std::max(p.width, p.outputs)) {}

  // The product of a block of a left factor with panels: C[lines x columns] of the room, `below` so many of its lines.
  // `soon` is what is read after it; depths are in floats, which may be pairs.
  void product(Rooms::Room& room, const Left& left, int64_t line, int lines, const float* b, int64_t apart,
               int64_t columns, int64_t depth, int below = 0, bool add = false, const Soon& soon = {}) const {
    const int64_t each = even_part(depth, kDepth, 32);  // which every panel divides
    const bool near = left.how == Left::kPanels || (columns <= kNear * panel && !left.half);
    const int far = near ? lines / kStripLines * kStripLines : 0;  // what is read where it lies
    float* c = room.c.get() + below * kToken;
    for (int64_t d = 0; d < depth; d += each, add = true) {
      const int depths = int(std::min(each, depth - d));
      const int64_t rest = depth - d - each;
      const Soon next = rest > 0 ? soon_of(left, line, lines, d + each, std::min(each, rest)) : soon;
      if (far)
        multiply(lines_of(left, line, d), b + d * panel, apart, c, far, int(columns), depths, add, next);
      if (far == lines) continue;
      copy_left_on[machine](left, line + far, lines - far, d, depths, room.a.get());
      const Lines copied{room.a.get(), left.how == Left::kAcross ? Lines::kCopiedAcross : Lines::kCopied, 0};
      multiply(copied, b + d * panel, apart, c + far * kToken, lines - far, int(columns), depths, add,
               far ? Soon{} : next);
    }
  }
  // What the block after number i, of the same thread, begins with, of the left factors left_of(expert).
  template <class LeftOf>
  Soon after(const std::vector<Block>& blocks, int64_t i, int64_t depth, LeftOf left_of) const {
    const size_t next = size_t(i + rooms.count());
    if (next >= blocks.size()) return {};
    return soon_of(left_of(blocks[next].share->expert), blocks[next].line, blocks[next].lines, 0,
                   std::min(depth, even_part(depth, kDepth, 32)));
  }
  // Where a block of floats begins.
  Lines lines_of(const Left& left, int64_t line, int64_t depth) const {
    const auto* data = static_cast<const float*>(left.data);
    if (left.how == Left::kAcross) return {data + depth * left.stride + line, Lines::kFarAcross, left.stride};
    if (left.how == Left::kPanels)
      return {data + depth * left.stride + line * panel / unit, Lines::kPanels, left.stride * panel / unit};
    return {data + line * left.stride + depth, Lines::kFar, left.stride};
  }
  // A part of a left factor that is copied next.
  Soon soon_of(const Left& left, int64_t line, int64_t lines, int64_t depth, int64_t depths) const {
    const int64_t size = left.half ? 2 : 4, wide = panel / unit, each = left.pairs ? 2 : 1;
    if (left.how == Left::kPanels)
      return {at(left.data, false, depth * left.stride + line * wide), left.stride * wide * size,
              (depths + wide - 1) / wide, lines * wide * size};
    if (left.how == Left::kAcross) return {at(left.data, left.half, depth * each * left.stride + line),
                                           left.stride * size, depths * each, lines * size};
    return {at(left.data, left.half, line * left.stride + depth), left.stride * size, lines, depths * size};
  }

  // The blocks of lines times so many columns, or each expert's rows (-1), of each of a wave; those of an expert are of
  // about as many columns.
  std::vector<Block> blocks(const std::vector<Share>& wave, int64_t lines, int64_t step, int64_t columns) const {
    std::vector<Block> found;
    for (const Share& share : wave) {
      const int64_t all = columns < 0 ? share.rows : columns, each = even_part(all, tokens_of(machine), panel);
      for (int64_t line = 0; line < lines; line += step)
        for (int64_t first = 0; first < all; first += each)
          found.push_back({&share, line, first, std::min(each, all - first), int(std::min(step, lines - line))});
    }
    return found;
  }

  // Rows [T, depth] of the wave's experts, turned into panels.
  void turn(const std::vector<Share>& wave, const void* data, int64_t stride, int64_t depth, float* to) {
    const Rows rows{data, stride / unit, half() && !way.pairs, order.token.data()};
    depth = floats(depth);
    std::vector<std::pair<const Share*, int64_t>> tasks;
    for (const Share& share : wave)
      for (int64_t first = 0; first < share.rows; first += panel) tasks.push_back({&share, first});
    rooms.each(int64_t(tasks.size()), [&](int64_t i, Rooms::Room& room) {
      const auto [share, first] = tasks[i];
      Rows own = rows;
      own.order += share->first;
      turn_panel_on[machine](own, first, share->rows, depth, to + (share->panel + first / panel) * depth * panel,
                             room.a.get());
    });
  }

  void sum(const float* rows, int64_t width, const float* weights, void* to) {
    rooms.each((p.tokens + 63) / 64, [&](int64_t i, Rooms::Room& room) {
      for (int64_t t = i * 64; t < std::min(p.tokens, i * 64 + 64); ++t)
        combine_on[machine](rows, width, order.place.data() + t * p.slots, weights ? weights + t * p.slots : nullptr,
                            p.slots, half(), room.row.get(), at(to, half(), t * width));
    });
  }

  bool half() const { return way.half; }
  // What so many numbers along a depth take, and are counted in.
  int64_t floats(int64_t numbers) const { return (numbers + unit - 1) / unit; }
  Left left(const void* weight, const int64_t* stride, int64_t e, bool across) const {
    const void* data = at(weight, half(), e * stride[0]);
    if (across) return {data, stride[1], half(), Left::kAcross, way.pairs};
    return {data, stride[1] / unit, half() && !way.pairs, Left::kAlong, way.pairs};
  }

  const Route& p;
  const Order order;
  const Way way;
  const int machine;
  const int64_t panel, unit;  // tokens; numbers in the place of a float
  const decltype(&multiply_pairs) multiply;
  Rooms rooms;
};

// Experts of more than `few` rows, wave by wave: the rows of one take about kTogether bytes, at `bytes` each.
constexpr int64_t kTogether = 16 << 20;
template <class Work>
void in_waves(Call& call, int64_t few, int64_t bytes, Work work) {
  std::vector<Share> wave;
  const Order& order = call.order;
  int64_t panels = 0, all = 0, panel = call.panel;
  for (int64_t e = 0; e < call.p.experts; ++e) {
    const int64_t rows = order.rows(e);
    if (rows <= few) continue;
    call.rooms.prepare();
    if (panels && (panels * panel + rows) * bytes > kTogether) {
      work(wave, panels);
      wave.clear();
      panels = 0;
    }
    wave.push_back({e, order.start[e], rows, panels, all});
    panels += (rows + panel - 1) / panel;
    all += (rows + panel - 1) / panel;
  }
  if (panels) work(wave, panels);
}

// Few rows of each expert: every weight is read once, for all of them.
template <class Kind>
class FewRows {
  using Number = typename Kind::Number;

 public:
  FewRows(Call& call, const std::vector<Share>& shares, float* answers)
      : call_(call), p_(call.p), shares_(shares), answers_(answers),
        product_(product_of_rows(call.half(), Kind::pairs, call.machine)) {
    int64_t rows = 0;
    for (const Share& share : shares) {
      inputs_.emplace_back(share.rows, p_.width, lanes());
      hidden_.emplace_back(share.rows, p_.inner, lanes());
      begins_.push_back(rows);
      rows += share.rows;
    }
    ups_ = Lent(rows * p_.inner);
    gates_ = Lent(p_.gate ? rows * p_.inner : 0);
  }

  void run() {
    lay_out();
    in_pieces(p_.inner, (p_.gate ? 2 : 1) * p_.width, [&](int64_t i, int64_t first, int64_t last) {
      up(i, first, last);
    });
    in_pieces(p_.outputs, p_.inner, [&](int64_t i, int64_t first, int64_t last) {
      const Share& share = shares_[i];
      const Linear down = linear(p_.down, p_.down_stride, share, p_.inner, p_.outputs,
                                 answers_ + share.first * p_.outputs);
      product_(down, hidden_[i].data(), first, last);
    });
  }

 private:
  int lanes() const { return 4 << call_.machine; }

  void lay_out() {
    const auto lay = [&](int64_t i) {
      for (int64_t r = 0; r < shares_[i].rows; ++r) {
        const int64_t token = call_.order.token[shares_[i].first + r];
        inputs_[i].write(r, 0, p_.width, static_cast<const Number*>(p_.hidden) + token * p_.hidden_stride);
      }
    };
    const int64_t count = int64_t(shares_.size());
    if (call_.order.token.size() * p_.width * sizeof(Number) >= kAlone)
      return call_.rooms.each(count, [&](int64_t i, Rooms::Room&) { lay(i); });
    for (int64_t i = 0; i < count; ++i) lay(i);
  }

  Linear linear(const void* weight, const int64_t* stride, const Share& share, int64_t width, int64_t outputs,
                float* to) const {
    return {nullptr, at(weight, call_.half(), share.expert * stride[0]), nullptr, nullptr, to, share.rows, width,
            outputs, 0, stride[1]};
  }

  void up(int64_t i, int64_t first, int64_t last) {
    const Share& share = shares_[i];
    float *ups = ups_.get() + begins_[i] * p_.inner, *gates = p_.gate ? gates_.get() + begins_[i] * p_.inner : ups;
    product_(linear(p_.up, p_.up_stride, share, p_.width, p_.inner, ups), inputs_[i].data(), first, last);
    if (p_.gate)
      product_(linear(p_.gate, p_.gate_stride, share, p_.width, p_.inner, gates), inputs_[i].data(), first, last);
    for (int64_t r = 0; r < share.rows; ++r) {
      float* row = gates + r * p_.inner;
      activate_row_on[call_.machine](row + first, p_.gate ? ups + r * p_.inner + first : nullptr, last - first,
                                     p_.activation);
      hidden_[i].write(r, first, last, row);
    }
  }

  // work(share, first, last) for pieces of the lines of every share's weights, each of `numbers`.
  template <class Work>
  void in_pieces(int64_t lines, int64_t numbers, Work work) {
    const int64_t threads = std::max<int64_t>(p_.threads, 1), count = int64_t(shares_.size());
    const int64_t all = count * lines * numbers * int64_t(sizeof(Number));
    const int64_t most = all < kAlone ? 1 : threads * ((all + threads * kPiece - 1) / (threads * kPiece));
    const int64_t least = std::max<int64_t>((count * lines + most - 1) / most, 4), each = (lines + least - 1) / least;
    const int64_t piece = (lines + each - 1) / each;
    call_.rooms.each(all < kAlone ? 1 : count * each, [&](int64_t task, Rooms::Room&) {
      for (int64_t i = all < kAlone ? 0 : task; i < (all < kAlone ? count * each : task + 1); ++i)
        work(i / each, i % each * piece, std::min(lines, (i % each + 1) * piece));
    });
  }

  Call& call_;
  const Route& p_;
  const std::vector<Share>& shares_;
  float* answers_;
  const ProductOfRows product_;
  std::vector<LaidOut<Kind>> inputs_, hidden_;
  std::vector<int64_t> begins_;
  Lent ups_, gates_;
};

// Many rows of each expert of a wave.
void many_rows(Call& call, const std::vector<Share>& wave, float* inputs, float* acts, float* answers) {
  const Route& p = call.p;
  const int64_t panel = call.panel, inner = p.inner;
  const int64_t width = call.floats(p.width), depth = call.floats(inner);
  const auto finish_up = call.way.pairs ? finish_up_pairs : finish_up_on[call.machine];
  call.turn(wave, p.hidden, p.hidden_stride, p.width, inputs);
  const int step = p.gate ? kLines / 2 : kLines;
  const auto up_blocks = call.blocks(wave, inner, step, -1);
  call.rooms.each(int64_t(up_blocks.size()), [&](int64_t i, Rooms::Room& room) {
    const auto [share, line, first, columns, lines] = up_blocks[i];
    const int64_t at_panel = share->panel + first / panel;
    const float* b = inputs + at_panel * panel * width;
    auto up = [&](int64_t e) { return call.left(p.up, p.up_stride, e, false); };
    auto gate = [&](int64_t e) { return call.left(p.gate, p.gate_stride, e, false); };
    const Soon after = call.after(up_blocks, i, width, up);
    const int64_t part = std::min(width, even_part(width, kDepth, 32));
    call.product(room, up(share->expert), line, lines, b, width * panel, columns, width, 0, false,
                 p.gate ? call.soon_of(gate(share->expert), line, lines, 0, part) : after);
    if (p.gate)
      call.product(room, gate(share->expert), line, lines, b, width * panel, columns, width, round_lines(lines),
                   false, after);
    float* saved = p.saved ? p.saved + ((share->all_panel + first / panel) * inner * (p.gate ? 2 : 1) + line) * panel
                           : nullptr;
    finish_up(room.c.get(), lines, int(columns), p.gate != nullptr, p.activation, inner,
              acts + (at_panel * inner + line) * panel / call.unit, saved);
  });
  const auto down_blocks = call.blocks(wave, p.outputs, kLines, -1);
  call.rooms.each(int64_t(down_blocks.size()), [&](int64_t i, Rooms::Room& room) {
    const auto [share, line, first, columns, lines] = down_blocks[i];
    call.product(room, call.left(p.down, p.down_stride, share->expert, false), line, lines,
                 acts + (share->panel + first / panel) * panel * depth, depth * panel, columns, depth, 0, false,
                 {answers + (share->first + first) * p.outputs + line, p.outputs * 4, columns, lines * 4});
    turn_block_on[call.machine](room.c.get(), lines, int(columns), answers + (share->first + first) * p.outputs + line,
                                p.outputs);
  });
}

void forward(const Route& p) {
  Call call(p);
  const Lent answers(int64_t(call.order.token.size()) * p.outputs);
  std::vector<Share> few;
  for (int64_t e = 0; e < p.experts; ++e)
    if (!p.saved && 0 < call.order.rows(e) && call.order.rows(e) <= kFew)
      few.push_back({e, call.order.start[e], call.order.rows(e), 0, 0});
  const auto run = [&](auto kind) { FewRows<decltype(kind)>(call, few, answers.get()).run(); };
  if (!few.empty() && !call.half()) run(Float32());
  if (!few.empty() && call.half()) takes_pairs(p.machine) ? run(Pairs()) : run(BFloat16());
  Lent inputs, acts;
  int64_t room_for = 0;
  const int64_t width = call.floats(p.width), inner = call.floats(p.inner);
  in_waves(call, p.saved ? 0 : kFew, (width + inner) * 4, [&](const std::vector<Share>& wave, int64_t panels) {
    if (panels > room_for) {
      room_for = panels;
      inputs = Lent(panels * call.panel * width);
      acts = Lent(panels * call.panel * inner);
    }
    many_rows(call, wave, inputs.get(), acts.get(), answers.get());
  });
  if (p.saved) {  // what rounding up to panels has left: so that the same call saves the same
    const int64_t pairs = p.tokens * p.slots, products = p.gate ? 2 * p.inner : p.inner;
    int64_t panels = 0;
    for (int64_t e = 0; e < p.experts; ++e) panels += (call.order.rows(e) + call.panel - 1) / call.panel;
    std::fill(p.saved + panels * call.panel * products,
              p.saved + (pairs + std::min(pairs, p.experts) * (call.panel - 1)) * products, 0.0f);
  }
  call.sum(answers.get(), p.outputs, p.weights, p.output);
}

// What the backward of a wave needs room for.
struct BackwardRoom {
  void fit(const Call& call, int64_t panels) {
    if (panels <= panels_) return;
    panels_ = panels;
    const Route& p = call.p;
    const int64_t panel = call.panel, tokens = panels * panel, inner = p.inner, products = p.gate ? 2 * inner : inner;
    turned = Lent(tokens * call.floats(p.outputs));
    line_slopes = Lent(tokens * products / call.unit);
    token_slopes = Lent(call.way.pairs ? tokens * products / 2 : 0);
    acts = Lent(tokens * inner / call.unit);
    gradients = Lent(tokens / call.unit * ((p.outputs + panel - 1) / panel * panel));
    inputs = Lent(tokens / call.unit * ((p.width + panel - 1) / panel * panel));
    weights = Lent(tokens);
    sums = Lent((inner + kLines - 1) / kLines * tokens);
    tokens_ = tokens;
  }
  Lent turned;                     // the output's gradients in panels of tokens: [panel][O][panel]
  Lent line_slopes, token_slopes;  // gradients of gate's and up's products: [panel][2 F][panel]; see Slopes
  Lent acts;                       // weighed activations: [panel][F][panel]
  Lent gradients, inputs;          // the output's gradients, and the tokens, in panels of columns: an expert's [O / panel][N]
  Lent weights, sums;              // of a row; its weight's gradient, in parts: [F / kLines][tokens]
  int64_t panels_ = 0, tokens_ = 0;
};

// Where a panel of columns of an expert's own rows begins.
int64_t column_panel(const Call& call, const Share& share, int64_t columns, int64_t number) {
  const int64_t panels = (columns + call.panel - 1) / call.panel;
  return (share.panel * panels * call.panel / call.unit + number * call.floats(share.rows)) * call.panel;
}

// Rows [T, columns] of each expert of a wave, in panels of columns: those of an expert begin at `tokens before` ·
// `columns`.
void column_panels(Call& call, const std::vector<Share>& wave, const void* rows, int64_t stride, int64_t columns,
                   float* to) {
  const int64_t panel = call.panel, panels = (columns + panel - 1) / panel;
  const auto copy_panel = call.way.pairs ? copy_panel_pairs : copy_panel_on[call.machine];
  call.rooms.each(int64_t(wave.size()) * panels, [&](int64_t i, Rooms::Room&) {
    const Share& share = wave[i / panels];
    copy_panel({rows, stride, call.half(), call.order.token.data() + share.first}, i % panels * panel, columns,
               share.rows, to + column_panel(call, share, columns, i % panels));
  });
}

// The gradients of activations, and all that follows from them row by row.
void slopes_of(Call& call, const RouteBackward& q, const std::vector<Share>& wave, BackwardRoom& own) {
  const Route& p = call.p;
  const int64_t panel = call.panel, inner = p.inner, products = p.gate ? 2 * inner : inner;
  const int64_t depth = call.floats(p.outputs);
  const auto finish_slopes = call.way.pairs ? finish_slopes_pairs : finish_slopes_on[call.machine];
  call.turn(wave, q.gradient, p.outputs, p.outputs, own.turned.get());
  for (const Share& share : wave) {
    float* to = own.weights.get() + share.panel * panel;
    std::fill_n(to, (share.rows + panel - 1) / panel * panel, 0.0f);
    for (int64_t i = 0; i < share.rows; ++i) to[i] = p.weights[call.order.pair[share.first + i]];
  }
  const auto blocks = call.blocks(wave, inner, kLines, -1);
  call.rooms.each(int64_t(blocks.size()), [&](int64_t i, Rooms::Room& room) {
    const auto [share, line, first, columns, lines] = blocks[i];
    const int64_t at_panel = share->panel + first / panel;
    auto down = [&](int64_t e) { return call.left(p.down, p.down_stride, e, true); };
    call.product(room, down(share->expert), line, lines, own.turned.get() + at_panel * panel * depth, depth * panel,
                 columns, depth, 0, false, call.after(blocks, i, depth, down));
    const int64_t slope = (at_panel * products + line) * panel / call.unit;
    finish_slopes(room.c.get(), lines, int(columns), p.gate != nullptr, p.activation, inner,
                  p.saved + ((share->all_panel + first / panel) * products + line) * panel,
                  own.weights.get() + at_panel * panel,
                  {own.line_slopes.get() + slope, own.token_slopes.get() + slope,
                   own.acts.get() + (at_panel * inner + line) * panel / call.unit,
                   own.sums.get() + line / kLines * own.tokens_ + at_panel * panel});
  });
  for (const Share& share : wave)
    for (int64_t i = 0; q.weights && i < share.rows; ++i) {
      float sum = 0.0f;
      for (int64_t part = 0; part * kLines < inner; ++part)
        sum += own.sums[part * own.tokens_ + share.panel * panel + i];
      q.weights[call.order.pair[share.first + i]] = sum;
    }
}

// An expert's gradient of a weight: left factor's lines times its rows' columns, written line by line or turned.
void weight_gradient(Call& call, const std::vector<Share>& wave, const float* lefts, int64_t lines, const float* rights,
                     int64_t columns, bool turned, void* to) {
  const int64_t panel = call.panel;
  const auto blocks = call.blocks(wave, lines, kLines, columns);
  call.rooms.each(int64_t(blocks.size()), [&](int64_t i, Rooms::Room& room) {
    const auto [share, line, first, across, some] = blocks[i];
    const int64_t start = share->expert * lines * columns, size = call.half() ? 2 : 4;
    const int64_t depth = call.floats(share->rows);
    const Left left{lefts + share->panel * panel * lines / call.unit, lines, false, Left::kPanels, call.way.pairs};
    const void* written = at(to, call.half(), start + (turned ? first * lines + line : line * columns + first));
    call.product(room, left, line, some, rights + column_panel(call, *share, columns, first / panel), depth * panel,
                 across, depth, 0, false,
                 turned ? Soon{written, lines * size, across, some * size}
                        : Soon{written, columns * size, some, across * size});
    const float* from = room.c.get();
    int64_t from_stride = kToken, rows = some, numbers = across;
    if (turned) {
      turn_block_on[call.machine](room.c.get(), some, int(across), room.a.get(), kLines);
      from = room.a.get(), from_stride = kLines, rows = across, numbers = some;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t element = turned ? (first + r) * lines + line : (line + r) * columns + first;
      round_row_on[call.machine](from + r * from_stride, call.half(), numbers, at(to, call.half(), start + element));
    }
  });
}

// The gradients of an expert's own rows of tokens.
void row_gradients(Call& call, const std::vector<Share>& wave, const float* slopes, float* rows) {
  const Route& p = call.p;
  const int64_t panel = call.panel, depth = call.floats(p.inner), products = p.gate ? 2 * depth : depth;
  const auto blocks = call.blocks(wave, p.width, kLines, -1);
  call.rooms.each(int64_t(blocks.size()), [&](int64_t i, Rooms::Room& room) {
    const auto [share, line, first, columns, lines] = blocks[i];
    const float* b = slopes + (share->panel + first / panel) * panel * products;
    if (p.gate)
      call.product(room, call.left(p.gate, p.gate_stride, share->expert, true), line, lines, b, products * panel,
                   columns, depth);
    call.product(room, call.left(p.up, p.up_stride, share->expert, true), line, lines,
                 b + (p.gate ? depth * panel : 0), products * panel, columns, depth, 0, p.gate != nullptr,
                 {rows + (share->first + first) * p.width + line, p.width * 4, columns, lines * 4});
    turn_block_on[call.machine](room.c.get(), lines, int(columns), rows + (share->first + first) * p.width + line,
                                p.width);
  });
}

void backward(const RouteBackward& q) {
  const Route& p = q.call;
  Call call(p, q.gradient);
  const int64_t inner = p.inner, products = p.gate ? 2 * inner : inner, size = call.half() ? 2 : 4;
  const Lent rows(q.hidden ? int64_t(call.order.token.size()) * p.width : 0);
  for (int64_t e = 0; e < p.experts; ++e) {
    if (call.order.rows(e)) continue;
    if (q.first) std::memset(at(q.first, call.half(), e * products * p.width), 0, products * p.width * size);
    if (q.down) std::memset(at(q.down, call.half(), e * p.outputs * inner), 0, p.outputs * inner * size);
  }
  if (q.weights) std::fill_n(q.weights, p.tokens * p.slots, 0.0f);
  BackwardRoom own;
  const int64_t bytes = (2 * p.outputs + p.width + products * call.unit + inner) * 4 / call.unit;
  in_waves(call, 0, bytes, [&](const std::vector<Share>& wave, int64_t panels) {
    own.fit(call, panels);
    slopes_of(call, q, wave, own);
    if (q.down) {
      column_panels(call, wave, q.gradient, p.outputs, p.outputs, own.gradients.get());
      weight_gradient(call, wave, own.acts.get(), inner, own.gradients.get(), p.outputs, true, q.down);
    }
    if (q.first) {
      column_panels(call, wave, p.hidden, p.hidden_stride, p.width, own.inputs.get());
      const Lent& slopes = call.way.pairs ? own.token_slopes : own.line_slopes;
      weight_gradient(call, wave, slopes.get(), products, own.inputs.get(), p.width, false, q.first);
    }
    if (q.hidden) row_gradients(call, wave, own.line_slopes.get(), rows.get());
  });
  if (q.hidden) call.sum(rows.get(), p.width, nullptr, q.hidden);
}

}  // namespace

extern "C" {

// Statuses are those of call.h; kBadPlan is an expert that does not exist. After any but kDone the output is unfinished.
// Plain arguments, in the order of the struct: one filled from Python costs more than some calls. The weights are
// bfloat16 where `half` says so.
int sentei_route(const void* hidden, const int64_t* ids, const void* weights, const void* up, const void* gate,
                 const void* down, void* output, float* saved, int64_t hidden_stride, int64_t up_stride, int64_t up_row,
                 int64_t gate_stride, int64_t gate_row, int64_t down_stride, int64_t down_row, int64_t tokens,
                 int64_t slots, int64_t experts, int64_t width, int64_t inner, int64_t outputs, int64_t activation,
                 int64_t bfloat16, int64_t threads, int64_t machine, int64_t half) {
  return status_of([&] {
    std::vector<float> wide(half ? tokens * slots : 0);
    if (half) widen_row(weights, true, tokens * slots, wide.data());
    const Route p{hidden, ids, half ? wide.data() : static_cast<const float*>(weights), up, gate, down, output, saved,
                  hidden_stride, {up_stride, up_row}, {gate_stride, gate_row}, {down_stride, down_row}, tokens, slots,
                  experts, width, inner, outputs, activation, bfloat16, threads, machine};
    const int set = set_of(machine);
    if (inner != 1 || saved)
      forward(p);
    else if (bfloat16)
      one_neuron<BFloat16>(p, set);
    else
      one_neuron<Float32>(p, set);
  });
}

// Numbers in `saved` of a call that keeps it: a panel is as many tokens as this.
int64_t sentei_route_panel(int64_t machine) { return panel_of(set_of(machine)); }

// Room of at least so many numbers, from what earlier calls left, null where memory ran out; `count` becomes how many
// there are, with which it is to be given back.
void* sentei_route_take(int64_t* count) {
  void* numbers = nullptr;
  status_of([&] {
    Shelf::Piece piece = shelf().take(*count);
    *count = piece.count;
    numbers = piece.numbers.release();
  });
  return numbers;
}
void sentei_route_give(void* numbers, int64_t count) { shelf().give({Floats(static_cast<float*>(numbers)), count}); }
int64_t sentei_kept() { return shelf().bytes(); }

int sentei_route_backward(const RouteBackward* q) {
  return status_of([&] { backward(*q); });
}
}
