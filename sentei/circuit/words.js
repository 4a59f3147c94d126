// The picture in words: what the text line says, for eyes, screen readers and tests alike.
const quoted = (label) => `“${label}”`;
const percent = (share) => `${Math.round(share * 100)} %`;
// A size told in words: the highest code stands for 1 and all above it, which a byte does not tell apart.
const sized = (code, words) => `${code === 255 ? "at least " : ""}${words(decode(code))}`;
const number = (value) => value.toLocaleString("en");
const observed = trace.kind === "observed";
const KEEPS = observed ? "the mass lies in" : "computed";
const LEFT = observed ? "outside the mass" : "not computed";
const named = (list) => list.length < 2 ? list.join("") : `${list.slice(0, -1).join(", ")} and ${list.at(-1)}`;

function place(run, l, t) {
  const which = runs.length > 1 ? `${"AB"[run.number]}, layer` : "Layer";
  return `${which} ${l}, token ${t} ${quoted(run.labels[t])}`;
}

// One cell.
function describe(run, l, t) {
  const own = run.layers[l];
  const parts = [];
  const [kept, possible] = run.pairs(l, t);
  const attended = run.attentionRan(l, t);
  const fed = run.networkRan(l, t);
  if (attended || observed) {
    const { count } = run.reads(l, t);
    const keys = count.reduce((sum, heads) => sum + (heads > 0), 0);
    parts.push(`attention: ${KEEPS} ${number(kept)} of ${number(possible)} head-key pairs, `
      + `${number(keys)} of ${number(count.length)} keys`);
  }
  if (own.headBits) parts.push(`KV heads: ${KEEPS} ${run.headsKept(l, t)} of ${own.kv_heads}`);
  if (own.expertBits && (fed || observed)) {
    const most = run.heaviest(l, t).slice(0, 3).map(([expert]) => expert);
    const what = observed ? "neuron groups" : "experts";
    parts.push(`feed-forward: ${KEEPS} ${run.expertsKept(l, t)} of ${own.experts} ${what}`
      + (most.length ? `, most in ${named(most)}` : ""));
  }
  if (own.rank) parts.push(`rank: ${own.rankKept[t]} of ${own.rank} directions`);
  const skipped = [attended ? "" : "attention", fed ? "" : "feed-forward"].filter(Boolean);
  if (skipped.length) parts.push(`${named(skipped)} ${LEFT}`);
  if (own.cost) parts.push(`${percent(run.shares.cost[l * run.T + t])} of the dense multiply-adds`);
  return `${place(run, l, t)}: ${parts.join("; ")}.`;
}

// One head and key of a cell.
function describeEdge(run, l, t, head, key) {
  const weight = run.weight(l, head, t, key);
  const kept = run.keeps(l, head, t, key);
  const state = !run.attentionRan(l, t) && !observed ? LEFT : !kept ? LEFT
    : weight === null ? "kept, weight not among the strongest" : `kept, weight ${weight.toFixed(3)}`;
  return `${place(run, l, t)}, head ${head}, key ${key} ${quoted(run.labels[key])}: ${state}.`;
}

const AGREED = ["connections", "KV heads", "feed-forward", "depth"];

// Two cells of one layer.
function describePair(values) {
  return values.map((value, i) => (value === null ? "" : `${AGREED[i]} ${percent(value)}`)).filter(Boolean).join(", ");
}

// Two tokens through all layers: by room how far they agree, and in how many layers they differ, which may be any.
function describeWay(values) {
  return AGREED.map((name, i) => {
    const column = values.map((row) => row[i]);
    const told = column.filter((value) => value !== null);
    if (!told.length) return "";
    const differing = told.filter((value) => value < 1).length;
    const first = column.findIndex((value) => value !== null && value < 1);
    const mean = told.reduce((sum, value) => sum + value, 0) / told.length;
    return `${name} ${percent(mean)} ${first < 0 ? "(nowhere different)"
      : `(differs in ${differing} of ${told.length} layers, first in layer ${first})`}`;
  }).filter(Boolean).join(", ");
}

const million = (value) => value >= 1e9 ? `${(value / 1e9).toFixed(2)} G` : value >= 1e6 ? `${(value / 1e6).toFixed(1)} M`
  : value >= 1e3 ? `${(value / 1e3).toFixed(1)} k` : String(Math.round(value));
