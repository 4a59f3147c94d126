// What the page was given: words as JSON, tensors as deflated bytes. Nothing here touches the document but to read.
const trace = JSON.parse(document.getElementById("trace").textContent);
const NONE = 65535;
const VIEWS = { U8: Uint8Array, U16: Uint16Array, I32: Int32Array, F32: Float32Array };
const BITS = Uint8Array.from({ length: 256 }, (_, byte) => {
  let count = 0;
  for (let rest = byte; rest; rest >>= 1) count += rest & 1;
  return count;
});

async function inflate(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const decode = (code) => (code / 255) ** 2;
const bit = (bytes, offset, index) => (bytes[offset + (index >> 3)] >> (index & 7)) & 1;

// One run: every question about it is answered from the packed tensors.
class Run {
  constructor(number, told, buffer) {
    Object.assign(this, { number, told, causal: told.causal, prompt: told.prompt });
    this.labels = told.tokens.map((token) => token[1]);
    this.ids = told.tokens.map((token) => token[0]);
    this.T = this.ids.length;
    this.L = told.layers.length;
    this.masks = new Map();
    this.layers = told.layers.map((shape, layer) => this.open(shape, layer, buffer));
    this.summarise();
  }

  open(shape, layer, buffer) {
    const part = (name) => {
      const found = trace.tensors[`${this.number}.${layer}.${name}`];
      if (!found) return null;
      const [dtype, sizes, position] = found;
      const View = VIEWS[dtype];
      const count = sizes.reduce((a, b) => a * b, 1);
      return new View(buffer.slice(position, position + count * View.BYTES_PER_ELEMENT));
    };
    const own = {
      ...shape, bits: part("connections.bits"), ids: part("connections.ids"), weights: part("connections.weights"),
      expertBits: part("experts.bits"), expertIds: part("experts.ids"), expertWeights: part("experts.weights"),
      headBits: part("heads.bits"), headWeights: part("heads.weights"), rankKept: part("rank.kept"),
      ran: part("depth.bits"), sizes: part("depth.weights"), cost: part("cost"),
    };
    own.rowOf = new Int32Array(this.T).fill(-1);
    own.rows = [];
    const spans = part("connections.spans") || [];
    let offset = 0;
    for (let i = 0; i < spans.length; i += 4) {
      const [first, queries, block, unit] = spans.slice(i, i + 4);
      for (let start = 0; start < queries; start += block) {
        const stop = Math.min(start + block, queries);
        const width = Math.ceil((this.causal ? first + stop : this.T) / unit);
        for (let t = first + start; t < first + stop; t++) own.rowOf[t] = own.rows.length;
        own.rows.push({ offset, width, unit });
        offset += Math.ceil(width / 8);
      }
    }
    own.bytes = offset;
    return own;
  }

  // How many keys a token may see.
  visible(t) { return this.causal ? t + 1 : this.T; }

  // Whether a head keeps a key; where nothing was chosen it does.
  keeps(l, head, t, key) {
    const own = this.layers[l];
    const row = own.rowOf[t];
    if (row < 0) return true;
    const { offset, unit } = own.rows[row];
    const chooser = Math.floor(head * own.choosers / own.heads);
    return bit(own.bits, chooser * own.bytes + offset, Math.floor(key / unit)) === 1;
  }

  // The weight of a key kept, or of the candidate it belongs to; null where it is not among the strongest.
  weight(l, head, t, key) {
    const own = this.layers[l];
    const row = own.rowOf[t];
    if (row < 0) return null;
    const chooser = Math.floor(head * own.choosers / own.heads);
    const kept = own.ids.length / (own.choosers * own.rows.length);
    const start = (chooser * own.rows.length + row) * kept;
    const wanted = Math.floor(key / own.rows[row].unit);
    for (let i = start; i < start + kept; i++) if (own.ids[i] === wanted) return decode(own.weights[i]);
    return null;
  }

  attentionRan(l, t) { return !this.layers[l].ran || (this.layers[l].ran[t] & 1) > 0; }

  networkRan(l, t) { return !this.layers[l].ran || (this.layers[l].ran[t] & 2) > 0; }

  keepsHead(l, t, group) {
    const own = this.layers[l];
    return !own.headBits || bit(own.headBits, t * Math.ceil(own.kv_heads / 8), group) === 1;
  }

  keepsExpert(l, t, expert) {
    const own = this.layers[l];
    return !own.expertBits || bit(own.expertBits, t * Math.ceil(own.experts / 8), expert) === 1;
  }

  // The weights of the experts a token keeps, heaviest first: pairs [expert, weight].
  heaviest(l, t) {
    const own = this.layers[l];
    if (!own.expertIds) return [];
    const kept = own.expertIds.length / this.T;
    const found = [];
    for (let i = t * kept; i < (t + 1) * kept; i++) {
      if (own.expertIds[i] !== NONE) found.push([own.expertIds[i], decode(own.expertWeights[i])]);
    }
    return found;
  }

  // The keys that each chooser keeps for a token, Uint8Array [choosers × visible]; the newest are remembered.
  mask(l, t) {
    const place = l * this.T + t;
    const known = this.masks.get(place);
    if (known) return known;
    const own = this.layers[l];
    const visible = this.visible(t);
    const found = new Uint8Array(Math.max(own.choosers, 1) * visible);
    const row = own.rowOf[t];
    if (row < 0) found.fill(1);
    for (let chooser = 0; row >= 0 && chooser < own.choosers; chooser++) {
      const { offset, unit } = own.rows[row];
      const start = chooser * own.bytes + offset;
      for (let key = 0; key < visible; key++) {
        const place = unit === 1 ? key : Math.floor(key / unit);
        found[chooser * visible + key] = own.bits[start + (place >> 3)] >> (place & 7) & 1;
      }
    }
    if (this.masks.size > 4 * this.L) this.masks.clear();
    this.masks.set(place, found);
    return found;
  }

  // By key, how many heads keep it and their mean weight.
  reads(l, t) {
    const own = this.layers[l];
    const visible = this.visible(t);
    const count = new Uint16Array(visible);
    const weight = new Float32Array(visible);
    const mask = this.mask(l, t);
    const choosers = mask.length / visible;
    const per = own.heads / choosers;
    for (let chooser = 0; chooser < choosers; chooser++) {
      for (let key = 0, i = chooser * visible; key < visible; key++, i++) count[key] += mask[i] * per;
    }
    const row = own.rowOf[t];
    const kept = row < 0 ? 0 : own.ids.length / (own.choosers * own.rows.length);
    for (let chooser = 0; row >= 0 && chooser < own.choosers; chooser++) {
      const { unit } = own.rows[row];
      const first = (chooser * own.rows.length + row) * kept;
      for (let i = first; i < first + kept && own.ids[i] !== NONE; i++) {
        const share = decode(own.weights[i]) / own.choosers / unit;
        const stop = Math.min((own.ids[i] + 1) * unit, visible);
        for (let key = own.ids[i] * unit; key < stop; key++) weight[key] += share;
      }
    }
    return { count, weight };
  }

  // Pairs of a head and a key that a token keeps, and could keep.
  pairs(l, t) {
    const own = this.layers[l];
    const possible = this.visible(t) * own.heads;
    const row = own.rowOf[t];
    if (row < 0) return [possible, possible];
    const { offset, width, unit } = own.rows[row];
    const per = own.heads / own.choosers;
    let kept = 0;
    if (unit === 1 && width <= this.visible(t)) {
      const size = Math.ceil(width / 8);
      for (let chooser = 0; chooser < own.choosers; chooser++) {
        const start = chooser * own.bytes + offset;
        for (let i = start; i < start + size; i++) kept += BITS[own.bits[i]];
      }
      return [kept * per, possible];
    }
    for (let chooser = 0; chooser < own.choosers; chooser++) {
      for (let i = 0; i < width; i++) {
        if (bit(own.bits, chooser * own.bytes + offset, i)) {
          kept += Math.max(0, Math.min(this.visible(t) - i * unit, unit));
        }
      }
    }
    return [kept * per, possible];
  }

  expertsKept(l, t) {
    const own = this.layers[l];
    if (!own.expertBits) return 0;
    const size = Math.ceil(own.experts / 8);
    let kept = 0;
    for (let i = t * size; i < (t + 1) * size; i++) kept += BITS[own.expertBits[i]];
    return kept;
  }

  headsKept(l, t) {
    const own = this.layers[l];
    let kept = 0;
    for (let group = 0; group < own.kv_heads; group++) kept += this.keepsHead(l, t, group) ? 1 : 0;
    return kept;
  }

  // Shares kept, by room, of every cell [layer × token]; NaN where there is nothing to choose.
  summarise() {
    const size = this.L * this.T;
    const shares = { connections: 0, experts: 0, heads: 0, depth: 0, rank: 0, cost: 0 };
    for (const name of Object.keys(shares)) shares[name] = new Float32Array(size).fill(NaN);
    for (let l = 0; l < this.L; l++) {
      const own = this.layers[l];
      for (let t = 0; t < this.T; t++) {
        const i = l * this.T + t;
        const [kept, possible] = this.pairs(l, t);
        shares.connections[i] = this.attentionRan(l, t) || trace.kind === "observed" ? kept / possible : 0;
        if (own.expertBits) shares.experts[i] = this.expertsKept(l, t) / own.experts;
        if (own.headBits) shares.heads[i] = this.headsKept(l, t) / own.kv_heads;
        if (own.ran) shares.depth[i] = ((own.ran[t] & 1) + (own.ran[t] >> 1 & 1)) / 2;
        if (own.rank) shares.rank[i] = own.rankKept[t] / own.rank;
        if (own.cost) shares.cost[i] = own.cost[2 * t + 1] > 0 ? own.cost[2 * t] / own.cost[2 * t + 1] : 1;
      }
    }
    this.shares = shares;
  }

  // The mean of a room's shares: of a layer (l), of a token (t), or of all.
  mean(room, l, t) {
    let sum = 0;
    let count = 0;
    for (let i = l ?? 0; i < (l === undefined ? this.L : l + 1); i++) {
      for (let j = t ?? 0; j < (t === undefined ? this.T : t + 1); j++) {
        const value = this.shares[room][i * this.T + j];
        if (!Number.isNaN(value)) { sum += value; count += 1; }
      }
    }
    return count ? sum / count : NaN;
  }

  // Multiply-adds done and dense, of a token or of all.
  costs(t) {
    let done = 0;
    let dense = 0;
    for (const own of this.layers) {
      for (let j = t ?? 0; own.cost && j < (t === undefined ? this.T : t + 1); j++) {
        done += own.cost[2 * j];
        dense += own.cost[2 * j + 1];
      }
    }
    return [done, dense];
  }
}

// How alike two cells of one layer are, by room: |both| ÷ |either| of what is kept; null where nothing is chosen.
function alike(one, t, other, u, l, partner) {
  const own = one.layers[l];
  const theirs = other.layers[l];
  let both = 0;
  let mine = 0;
  let yours = 0;
  const [here, there] = [one.mask(l, t), other.mask(l, u)];
  const [wide, far] = [one.visible(t), other.visible(u)];
  const choosers = [here.length / wide, there.length / far];
  const heads = Math.max(...choosers);
  const matches = Int32Array.from({ length: wide }, (_, key) => partner(key));
  for (let head = 0; head < heads; head++) {
    const first = Math.floor(head * choosers[0] / heads) * wide;
    const second = Math.floor(head * choosers[1] / heads) * far;
    for (let key = 0; key < wide; key++) {
      if (!here[first + key]) continue;
      mine += 1;
      if (matches[key] >= 0 && matches[key] < far) both += there[second + matches[key]];
    }
    for (let key = 0; key < far; key++) yours += there[second + key];
  }
  const share = (count, first, second) => {
    let joint = 0;
    let either = 0;
    for (let i = 0; i < count; i++) {
      joint += first(i) && second(i) ? 1 : 0;
      either += first(i) || second(i) ? 1 : 0;
    }
    return either ? joint / either : 1;
  };
  const either = mine + yours - both;
  return [
    either ? both / either : 1,
    own.headBits && theirs.headBits
      ? share(own.kv_heads, (i) => one.keepsHead(l, t, i), (i) => other.keepsHead(l, u, i)) : null,
    own.expertBits && theirs.expertBits
      ? share(own.experts, (i) => one.keepsExpert(l, t, i), (i) => other.keepsExpert(l, u, i)) : null,
    own.ran && theirs.ran ? share(2, (i) => own.ran[t] >> i & 1, (i) => theirs.ran[u] >> i & 1) : null,
  ];
}
