// The page: what is selected, what the mouse and the keyboard do to it, and the state in the address.
const $ = (id) => document.getElementById(id);
const LENSES = ["all", "connections", "experts", "depth", "heads", "rank"];
const LENS_NAMES = { all: "all", connections: "connections", experts: "feed-forward", depth: "depth", heads: "KV heads", rank: "rank" };
const state = { lens: "all", inverted: false, cursor: null, pins: [], edge: null };
let runs = [];
let geo = null;
let hover = null;
let over = null;
let matrices = [];
let maps = null;
let control = null;  // the third run, and the places of A's tokens in it
let waiting = 0;

const cellOf = ({ run: number, l, t }) => ({ run: runs[number], l, t });
const same = (a, b) => a && b && a.run === b.run && a.l === b.l && a.t === b.t;

// The key of one cell's run that stands for a key of the other's.
function partnerOf(cell, other) {
  if (cell.run === other.run) return (key) => key;
  const map = maps[cell.run.number];
  return (key) => map[key];
}

// The cell to compare with: the other pin, or the matched token of the other run.
function companionOf(cell) {
  const [first, second] = state.pins;
  if (second && first.t === cell.t && runs[first.run] === cell.run) return { run: runs[second.run], l: cell.l, t: second.t };
  if (second && second.t === cell.t && runs[second.run] === cell.run) return { run: runs[first.run], l: cell.l, t: first.t };
  if (runs.length < 2) return null;
  const t = maps[cell.run.number][cell.t];
  return t < 0 ? null : { run: runs[1 - cell.run.number], l: cell.l, t };
}

function pairValues(cell, other) {
  return Array.from({ length: geo.L }, (_, l) => alike(cell.run, cell.t, other.run, other.t, l, partnerOf(cell, other)));
}

// Two tokens of two runs through all layers, and A's of them against its partner in the control.
function between(cell, other) {
  const one = [cell, other].find((each) => each.run === runs[0]);
  const u = control && cell.run !== other.run ? control.map[one.t] : -1;
  const partner = (key) => control.map[key];
  return { values: pairValues(cell, other), control: u < 0 ? null
    : Array.from({ length: geo.L }, (_, l) => alike(one.run, one.t, control.run, u, l, partner)) };
}

// Draws what changes with the mouse.
function refresh() {
  const active = hover || (state.cursor && cellOf(state.cursor));
  let companion = active ? companionOf(active) : null;
  if (companion && companion.run === active.run) companion = null;
  const pinned = state.pins.length === 2 ? state.pins.map((pin) => ({ run: runs[pin.run], l: 0, t: pin.t })) : null;
  const across = runs.length > 1 && active && companion ? between(active, companion)
    : runs.length > 1 && !active && pinned ? between(...pinned) : null;
  over.clear(geo.width, geo.height);
  drawOver(over, geo, state, active, companion, across);
  $("line").textContent = active ? describe(active.run, active.l, active.t)
    : "Point at a cell, or walk with the arrow keys: what that token used of that layer is said here.";
  return active;
}

function panels() {
  const active = hover || (state.cursor && cellOf(state.cursor));
  const companion = active && companionOf(active);
  const cells = active ? [active, companion].filter(Boolean) : [];
  if (cells.length === 2 && cells[0].run !== cells[1].run) cells.sort((a, b) => a.run.number - b.run.number);
  const alikeness = cells.length < 2 ? null : {
    here: alike(cells[0].run, cells[0].t, cells[1].run, cells[1].t, cells[0].l, partnerOf(...cells)),
    way: cells[0].run === cells[1].run ? null : between(...cells), control: control && control.run.told.text,
  };
  const home = $("panels");
  const available = cells.length > 1 ? Math.floor((home.clientWidth - 34) / 2) : home.clientWidth;
  while (home.children.length > Math.max(cells.length, 1)) home.lastChild.remove();
  matrices = cells.map((cell, i) => {
    const kind = runs.length > 1 ? ` ${"ab"[cell.run.number]}` : "";
    const panel = home.children[i] || home.appendChild(element("section", {}));
    panel.setAttribute("class", `panel${kind}`);
    panel.setAttribute("aria-label", place(cell.run, cell.l, cell.t));
    return { cell, ...fillPanel(panel, cell, alikeness, available) };
  });
  if (!cells.length) {
    const panel = element("section", { class: "panel" }, element("h2", { text: "No cell chosen" }),
      element("p", { text: "Its heads by keys, experts, key/value heads and cost are shown here." }));
    home.replaceChildren(panel);
  }
  matrices.forEach(listenToMatrix);
}

function listenToMatrix(matrix) {
  const { canvas, shape, cell } = matrix;
  const say = (head, key) => {
    matrix.at = [head, key];
    drawMatrix(new CanvasPen(canvas, shape.width, shape.height), shape, cell, head, key);
    $("line").textContent = describeEdge(cell.run, cell.l, cell.t, head, key);
  };
  canvas.addEventListener("pointermove", (event) => {
    const key = Math.floor((event.offsetX - shape.x) / shape.size);
    for (let head = 0; head < shape.heads; head++) {
      const y = event.offsetY - shape.y(head);
      if (y >= 0 && y < shape.high && key >= 0 && key < shape.keys) say(head, key);
    }
  });
  canvas.addEventListener("pointerleave", () => {
    drawMatrix(new CanvasPen(canvas, shape.width, shape.height), shape, cell, null, 0);
    refresh();
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") { $("stage").focus(); refresh(); event.stopPropagation(); return; }
    if (!steps) return;
    const [head, key] = matrix.at || [0, steps[1] < 0 ? 1 : -1 + Math.abs(steps[0])];
    say(Math.max(0, Math.min(shape.heads - 1, head + steps[0])), Math.max(0, Math.min(shape.keys - 1, key + steps[1])));
    event.preventDefault();
    event.stopPropagation();
  });
}

function select(cell) {
  state.cursor = cell && { run: cell.run.number, l: cell.l, t: cell.t };
  hover = null;
  changed();
}

function changed() {
  refresh();
  panels();
  for (const button of $("lenses").children) button.setAttribute("aria-pressed", String(button.dataset.lens === state.lens));
  $("invert").setAttribute("aria-pressed", String(state.inverted));
  const parts = [];
  if (state.cursor) parts.push(`c=${state.cursor.run}.${state.cursor.l}.${state.cursor.t}`);
  if (state.lens !== "all") parts.push(`lens=${state.lens}`);
  if (state.inverted) parts.push("not=1");
  if (state.pins.length) parts.push(`pin=${state.pins.map((pin) => `${pin.run}.${pin.t}`).join(",")}`);
  if (location.protocol !== "about:") history.replaceState(null, "", `#${parts.join("&")}`);
}

function readAddress() {
  const inside = (number, l, t) => runs[number] && l >= 0 && l < geo.L && t >= 0 && t < runs[number].T;
  const told = new URLSearchParams(location.hash.slice(1));
  const [number, l, t] = (told.get("c") || "").split(".").map(Number);
  state.cursor = inside(number, l, t) ? { run: number, l, t } : null;
  state.lens = lenses().includes(told.get("lens")) ? told.get("lens") : "all";
  state.inverted = told.get("not") === "1";
  state.pins = (told.get("pin") || "").split(",").map((pin) => pin.split(".").map(Number))
    .filter(([which, token]) => inside(which, 0, token)).map(([which, token]) => ({ run: which, t: token })).slice(0, 2);
}

function pin() {
  if (!state.cursor) return;
  const { run: number, t } = state.cursor;
  const index = state.pins.findIndex((one) => one.run === number && one.t === t);
  if (index >= 0) state.pins.splice(index, 1);
  else state.pins = [...state.pins.slice(-1), { run: number, t }];
  changed();
}

function clear() {
  if (state.cursor) state.cursor = null;
  else state.pins = [];
  hover = null;
  changed();
}

function redraw() {
  readPalette();
  const probe = new CanvasPen(document.createElement("canvas"), 1, 1);
  const work = $("work");
  const tokens = runs.reduce((sum, run) => sum + run.T, 0);
  const beside = runs.length === 1 && tokens * 12 < work.clientWidth - 340;
  work.className = `work${beside ? " beside" : ""}`;
  geo = layout(probe, $("stage").clientWidth);
  drawBase(new CanvasPen($("base"), geo.width, geo.height), geo, state);
  over = new CanvasPen($("over"), geo.width, geo.height);
}

// What there is to look through: no rank where no layer has adapters.
const lenses = () => LENSES.filter((lens) => lens !== "rank" || runs.some((run) => run.layers.some((own) => own.rank)));

function setLens(lens) { if (lenses().includes(lens)) { state.lens = lens; redraw(); changed(); } }

// Leads the keyboard into the heads by keys of the cell that is chosen.
function enter() {
  const active = hover || (state.cursor && cellOf(state.cursor));
  const matrix = matrices.find((one) => same(one.cell, active));
  if (matrix) matrix.canvas.focus();
}

function invert() { state.inverted = !state.inverted; redraw(); changed(); }

function walk(run, l, t) {
  const cursor = state.cursor || { run: 0, l: 0, t: 0 };
  const number = (cursor.run + run + runs.length) % runs.length;
  const within = (value, most) => Math.max(0, Math.min(most, value));
  select(cellOf({ run: number, l: within(cursor.l + l, geo.L - 1), t: within(cursor.t + t, runs[number].T - 1) }));
  const x = tokenX(geo, geo.grids[state.cursor.run], state.cursor.t);
  const stage = $("stage");
  if (x < stage.scrollLeft || x > stage.scrollLeft + stage.clientWidth - geo.cw) stage.scrollLeft = x - stage.clientWidth / 2;
}

const KEYS = {
  ArrowLeft: ["one token back", () => walk(0, 0, -1)], ArrowRight: ["one token on", () => walk(0, 0, 1)],
  ArrowUp: ["one layer up", () => walk(0, 1, 0)], ArrowDown: ["one layer down", () => walk(0, -1, 0)],
  Home: ["first token", () => walk(0, 0, -1e6)], End: ["last token", () => walk(0, 0, 1e6)],
  PageUp: ["last layer", () => walk(0, 1e6, 0)], PageDown: ["layer 0", () => walk(0, -1e6, 0)],
  x: ["the other prompt", () => walk(1, 0, 0)], Enter: ["pin or unpin the token", pin], Escape: ["clear", clear],
  e: ["heads by keys: walk there with the arrow keys, Escape leads back", enter],
  n: ["what was not computed", invert], "?": ["this list", toggleHelp],
  ...Object.fromEntries(LENSES.map((lens, i) => [String(i + 1), [`lens: ${LENS_NAMES[lens]}`, () => setLens(lens)]])),
};

function toggleHelp() {
  const keys = $("keys");
  keys.hidden = !keys.hidden;
  $("help").setAttribute("aria-expanded", String(!keys.hidden));
}

function offer(name, blob) {
  const link = element("a", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function picture(pen) {
  drawBase(pen, geo, state);
  const active = state.cursor && cellOf(state.cursor);
  const companion = active && companionOf(active);
  const across = companion && companion.run !== active.run ? companion : null;
  drawOver(pen, geo, state, active, across, across ? between(active, across) : null);
  return pen;
}

// Every cell as plain values, for JSON and CSV.
function cells() {
  return runs.flatMap((run) => Array.from({ length: run.L * run.T }, (_, i) => {
    const [l, t] = [Math.floor(i / run.T), i % run.T];
    const own = run.layers[l];
    const [pairs, possible] = run.pairs(l, t);
    return {
      run: run.number, layer: l, token: t, text: run.labels[t], pairs, possible_pairs: possible,
      kv_heads: own.headBits ? run.headsKept(l, t) : null, experts: own.expertBits ? run.expertsKept(l, t) : null,
      rank: own.rank ? own.rankKept[t] : null, attention: run.attentionRan(l, t), feed_forward: run.networkRan(l, t),
      multiply_adds: own.cost ? own.cost[2 * t] : null, dense_multiply_adds: own.cost ? own.cost[2 * t + 1] : null,
    };
  }));
}

function table() {
  const rows = cells();
  const names = Object.keys(rows[0]);
  // A leading sign would be a formula to a spreadsheet.
  const safe = (value) => value === null ? "" : typeof value === "string"
    ? `"${(/^[=+\-@\t\r]/.test(value) ? `'${value}` : value).replaceAll('"', '""')}"` : String(value);
  return [names.join(","), ...rows.map((row) => names.map((name) => safe(row[name])).join(","))].join("\r\n");
}

function listen() {
  const stage = $("stage");
  const cellOfEvent = (event) => {
    const box = $("base").getBoundingClientRect();
    return cellAt(geo, event.clientX - box.left, event.clientY - box.top);
  };
  stage.addEventListener("pointermove", (event) => {
    const cell = cellOfEvent(event);
    if (cell === hover || same(cell, hover)) return;
    hover = cell;
    refresh();
    // The line and the road follow at once, the panels with the next frame.
    if (cell && !waiting) waiting = requestAnimationFrame(() => { waiting = 0; panels(); });
  });
  stage.addEventListener("pointerleave", () => { if (hover) { hover = null; refresh(); panels(); } });
  stage.addEventListener("click", (event) => { const cell = cellOfEvent(event); if (cell) select(cell); });
  stage.addEventListener("dblclick", pin);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const known = KEYS[event.key];
    const isButton = event.target instanceof HTMLButtonElement && ["Enter", " "].includes(event.key);
    if (!known || isButton) return;
    event.preventDefault();
    known[1]();
  });
  $("invert").addEventListener("click", invert);
  $("pin").addEventListener("click", pin);
  $("clear").addEventListener("click", clear);
  $("help").addEventListener("click", toggleHelp);
  $("png").addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    picture(new CanvasPen(canvas, geo.width, geo.height));
    canvas.toBlob((blob) => offer("circuit.png", blob));
  });
  $("svg").addEventListener("click", () => offer("circuit.svg", new Blob([picture(new SvgPen(geo.width, geo.height)).source()], { type: "image/svg+xml" })));
  $("json").addEventListener("click", () => offer("circuit.json", new Blob([JSON.stringify({ ...trace, tensors: undefined, cells: cells() })], { type: "application/json" })));
  $("csv").addEventListener("click", () => offer("circuit.csv", new Blob([table()], { type: "text/csv" })));
  window.addEventListener("hashchange", () => { readAddress(); redraw(); changed(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); refresh(); panels(); } });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => { redraw(); refresh(); panels(); });
  }
}

function furnish() {
  const title = $("prompts");
  runs.forEach((run, i) => {
    const line = element("span", { class: runs.length > 1 ? "ab"[i] : "" });
    if (runs.length > 1) line.append(element("i", { text: "AB"[i] }));
    line.append(document.createTextNode(run.told.text));
    title.append(line);
  });
  $("about").textContent = [`${trace.model}, ${runs[0].L} layers`, trace.rule, trace.date,
    ...Object.entries(trace.versions).map(([name, version]) => `${name} ${version}`), `trace ${trace.hash.slice(0, 12)}`].filter(Boolean).join(" · ");
  $("honest").textContent = (observed
    ? "Everything was computed. Shown is what holds the mass, and so what could be skipped; whether the answer would stay the same, only a pruned run can say. "
    : "Shown is which parts ran and which did not. ") + "This is execution, not causation.";
  const facts = [["multiply-adds, of dense", (run) => { const [done, dense] = run.costs(); return dense ? done / dense : NaN; }],
    ["head-key pairs", (run) => run.mean("connections")], ["KV heads", (run) => run.mean("heads")],
    [observed ? "neuron groups" : "experts", (run) => run.mean("experts")], ["sublayers", (run) => run.mean("depth")], ["rank", (run) => run.mean("rank")]];
  for (const [name, value] of facts) {
    const values = runs.map(value);
    if (values.every(Number.isNaN)) continue;
    $("facts").append(element("div", {}, element("dt", { text: name }), element("dd", {},
      ...values.map((share, i) => element("span", { class: runs.length > 1 ? "ab"[i] : "", text: percent(share) })))));
  }
  if (control) {
    $("facts").append(element("div", {}, element("dt", { text: "control of A" }), element("dd", { text: quoted(control.run.told.text) })));
  }
  runs.forEach((run, i) => {
    if (!run.told.following.length) return;
    const next = run.told.following.slice(0, 3).map(([text, chance]) => `${quoted(text)} ${percent(chance)}`).join(", ");
    $("facts").append(element("div", {}, element("dt", { text: `next token${runs.length > 1 ? ` of ${"AB"[i]}` : ""}` }), element("dd", { text: next })));
  });
  lenses().forEach((lens, i) => {  // the one that may be missing is the last
    const button = element("button", { type: "button", "data-lens": lens, "aria-pressed": "false", title: `key ${i + 1}`, text: LENS_NAMES[lens] });
    button.addEventListener("click", () => setLens(lens));
    $("lenses").append(button);
  });
  $("invert").textContent = LEFT;
  const withRank = lenses().includes("rank");
  for (const [key, [what]] of Object.entries(KEYS)) if (withRank || what !== `lens: ${LENS_NAMES.rank}`) $("keys").append(element("p", {}, element("kbd", { text: key }), ` ${what}`));
  legend(withRank);
  const bypassed = runs.flatMap((run) => run.told.bypasses);
  $("small").textContent = `Weights are kept for the 8 heaviest keys of a head and the 16 heaviest experts of a token, in 8 bits. Multiply-adds leave out the choosing, softmax and norms.${
    bypassed.length ? ` Some calls ran dense: ${[...new Set(bypassed)].join("; ")}.` : ""}`;
}

function legend(withRank) {
  const entries = [
    ["attention: share of head-key pairs", 40, (pen) => [0, 0.25, 0.5, 1].forEach((share, i) => pen.rect(i * 10, 3, 9, 9, palette.attention, tint(share)))],
    [`feed-forward: ${observed ? "neuron groups" : "experts"}`, 34, (pen) => [0.9, 0.4, 0, 0.7, 0, 1, 0.3].forEach((high, i) => high && pen.rect(i * 5, 13 - 11 * high, 4, 11 * high, palette.network, 0.9))],
    ["KV heads", 16, (pen) => [true, false, true].forEach((lit, i) => lit ? pen.rect(i * 5, 3, 3, 9, palette.ink, 0.85) : pen.frame(i * 5 + 0.5, 3.5, 2, 8, palette.muted, 0.7))],
    [LEFT, 26, (pen) => drawHalf(pen, 0, 2, 26, 11, "attention", 0, false)],
    ["a key that the chosen token reads", 14, (pen) => pen.disc(7, 7.5, 4.5, palette.ink)],
  ];
  if (runs.length > 1) {
    entries.push(["read in A only", 14, (pen) => pen.disc(7, 7.5, 4.5, palette.a)], ["read in B only", 14, (pen) => pen.diamond(7, 7.5, 5.5, palette.b)]);
  }
  if (control) entries.push(["agreement of A with its control", 14, (pen) => drawControl(pen, 7, 1, 13)]);
  if (withRank) entries.push(["rank", 26, (pen) => pen.rect(0, 10, 18, 3, palette.rank)]);
  $("legend").replaceChildren(...entries.map(([words, width, draw]) => element("span", {}, swatches.bar(width, 15, draw), words)));
}

// Where to look first: the last token of the last run; of two, the layer in which its matched tokens agree least.
function notable() {
  const t = runs[0].T - 1;
  const u = runs.length > 1 ? maps[0][t] : -1;
  if (u < 0) return { run: 0, l: Math.floor(geo.L / 2), t };
  const values = pairValues({ run: runs[0], t }, { run: runs[1], t: u }).map((value) => value[0]);
  return { run: 0, l: values.indexOf(Math.min(...values)), t };
}

async function start() {
  const buffer = await inflate($("data").textContent);
  const all = trace.runs.map((told, number) => new Run(number, told, buffer));
  runs = all.slice(0, 2);
  if (runs.length > 1) {
    maps = runs.map((run) => new Int32Array(run.T).fill(-1));
    for (const [one, other] of trace.together.pairs) { maps[0][one] = other; maps[1][other] = one; }
    if (trace.together.control) {
      control = { run: all[2], map: new Int32Array(runs[0].T).fill(-1) };
      for (const [one, other] of trace.together.control.pairs) control.map[one] = other;
    }
  }
  readPalette();
  furnish();
  redraw();
  readAddress();
  if (!location.hash) state.cursor = notable();
  redraw();
  listen();
  changed();
  // Milliseconds since the page was asked for: for whoever waits for the picture.
  document.documentElement.dataset.drawn = performance.now().toFixed(1);
}

start();
