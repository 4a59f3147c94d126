// One to eight rows through whole decoder layers whose attention reads chosen pages of a cache:
//
//     query, key, value = heads(norm(x));  the cache grows by key and value
//     h = x + linear(attention to pages);  h + gated(norm(h))
//
// What is between two of these steps is rounded as a tensor would be, so that the bits are those of the smaller calls.
#include "pages.h"
#include "rows.h"

// Every field has 8 bytes, in the order kernels/block.py packs them. All tensors are contiguous.
struct Weights {
  const void *first_gain, *weight[3], *bias[3], *norm[2];          // [I], and as in Heads
  const void *joint, *joint_bias, *second_gain;                    // [I, H Dv], [I] or null, [I]
  const void *gate, *up, *down, *gate_bias, *up_bias, *down_bias;  // as in Gated
  int64_t width, heads, groups, head, value_head, hidden, tanh, half;  // head: D, value_head: Dv; half: bfloat16
  double first_epsilon, first_shift, epsilon, shift, second_epsilon, second_shift;
};
struct Call {
  const void* input;                          // [B, T, I]
  const int64_t* lengths;                     // as in Paged
  const void *cosine, *sine;                  // as in Heads
  void *keys, *values, *bounds;               // [B, G, room, D], [B, G, room, Dv], [B, G, room / page, 2, D]
  void* output;                               // [B, T, I]
  int64_t batch, tokens, turns, room, length, page, window, rule;  // length: of what the cache holds before
  int64_t kept_half, threads, machine;        // kept_half: the cache is of bfloat16
  double parameter, scale;
};

namespace {

struct Block : Weights, Call {};

using Bytes = std::vector<uint8_t, Aligned<uint8_t>>;

int64_t queries_of(const Block& p) { return p.heads * p.head; }
int64_t keys_of(const Block& p) { return p.groups * p.head; }
int64_t values_of(const Block& p) { return p.groups * p.value_head; }

// The queries, keys and values of every row, side by side, [B·T, all of them], in the layer's dtype.
Bytes made_heads(const Block& p, int machine) {
  const int64_t rows = p.batch * p.tokens, all = queries_of(p) + keys_of(p) + values_of(p);
  Bytes made(rows * all * (p.half ? 2 : 4));
  before_attention({{p.input, {p.weight[0], p.weight[1], p.weight[2]}, {p.bias[0], p.bias[1], p.bias[2]},
                     {p.norm[0], p.norm[1]}, p.cosine, p.sine, made.data(), rows, p.width,
                     {queries_of(p), keys_of(p), values_of(p)}, p.head, p.turns, float(p.epsilon), float(p.shift)},
                    p.first_gain, float(p.first_epsilon), float(p.first_shift)},
                   p.half, p.threads, machine);
  return made;
}

// One vector into the cache, through `scratch` where the dtypes differ.
void append(const Block& p, const void* from, int64_t count, void* to, float* scratch) {
  if (p.half == p.kept_half) {
    std::memcpy(to, from, count * (p.half ? 2 : 4));
    return;
  }
  widen_row(from, p.half, count, scratch);
  narrow_row(scratch, p.kept_half, count, to);
}

void bound_page(const Block& p, int64_t group, int64_t page, float* scratch) {
  float *low = scratch, *high = scratch + p.head;
  const void* keys = at(p.keys, p.kept_half, (group * p.room + page * p.page) * p.head);
  if (p.kept_half)
    bound_rows(static_cast<const uint16_t*>(keys), p.head, p.page, p.head, low, high);
  else
    bound_rows(static_cast<const float*>(keys), p.head, p.page, p.head, low, high);
  narrow_row(low, p.kept_half, 2 * p.head, at(p.bounds, p.kept_half, (group * (p.room / p.page) + page) * 2 * p.head));
}

// Appends the keys and values of the rows, and the bounds of pages that are now whole.
void grow(const Block& p, const Bytes& made) {
  const int64_t all = queries_of(p) + keys_of(p) + values_of(p), after = p.length + p.tokens;
  Zeros scratch(std::max(2 * p.head, p.value_head));
  for (int64_t group = 0; group < p.batch * p.groups; ++group) {
    const int64_t b = group / p.groups, g = group % p.groups;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t key = (b * p.tokens + t) * all + queries_of(p) + g * p.head;
      const int64_t value = (b * p.tokens + t) * all + queries_of(p) + keys_of(p) + g * p.value_head;
      const int64_t place = group * p.room + p.length + t;
      append(p, at(made.data(), p.half, key), p.head, at(p.keys, p.kept_half, place * p.head), scratch.data());
      append(p, at(made.data(), p.half, value), p.value_head, at(p.values, p.kept_half, place * p.value_head),
             scratch.data());
    }
    for (int64_t page = p.length / p.page; page < after / p.page; ++page) bound_page(p, group, page, scratch.data());
  }
}

// What attention gives, [B·T, H Dv] in the layer's dtype; the status of `read_pages`.
int attend(const Block& p, const Bytes& made, Bytes& attended) {
  const int64_t rows = p.batch * p.tokens, all = queries_of(p) + keys_of(p) + values_of(p), keys = p.length + p.tokens;
  const int64_t whole = p.room / p.page * 2 * p.head;
  std::vector<uint8_t> kept(rows * p.groups * ((keys + p.page - 1) / p.page));
  return read_pages({made.data(), p.keys, p.values, p.bounds, p.lengths, attended.data(), nullptr, kept.data(),
                     {p.tokens * all, all, p.head},
                     {p.groups * p.room * p.head, p.head, p.room * p.head},
                     {p.groups * p.room * p.value_head, p.value_head, p.room * p.value_head},
                     {p.groups * whole, whole, 2 * p.head, p.head},
                     p.batch, p.tokens, keys, p.heads, p.groups, p.head, p.value_head, p.page,
                     std::min(p.window, keys), 1, p.kept_half, p.half, kChooseAndAttend, p.rule, p.threads, p.machine,
                     p.parameter, p.scale});
}

void finish(const Block& p, const Bytes& attended, int machine) {
  const int64_t rows = p.batch * p.tokens;
  after_attention({{nullptr, p.gate, p.up, p.down, p.gate_bias, p.up_bias, p.down_bias, p.output, rows, p.width,
                    p.hidden, p.width, p.tanh},
                   attended.data(), p.input, p.joint, p.joint_bias, p.second_gain, p.heads * p.value_head,
                   float(p.second_epsilon), float(p.second_shift)},
                  p.half, p.threads, machine);
}

// The output is unfinished unless 0 is returned.
int run(const Block& p) {
  int refused = kDone;
  const int status = status_of([&] {
    const int machine = set_of(p.machine);
    const Bytes made = made_heads(p, machine);
    grow(p, made);
    Bytes attended(p.batch * p.tokens * p.heads * p.value_head * (p.half ? 2 : 4));
    refused = attend(p, made, attended);
    if (!refused) finish(p, attended, machine);
  });
  return status ? status : refused;
}

}  // namespace

extern "C" {

int sentei_block_weights_size() { return int(sizeof(Weights)); }
int sentei_block_call_size() { return int(sizeof(Call)); }

// One to eight rows, B · T, through layers one after another; how many are done, and the status of the last that was
// begun, as of `sentei_pages`. The caches' buffers are written to, behind what they hold.
int sentei_blocks(int64_t count, const Weights* const* weights, const Call* calls, int64_t* done) {
  for (*done = 0; *done < count; ++*done)
    if (const int status = run({*weights[*done], calls[*done]})) return status;
  return kDone;
}
}
