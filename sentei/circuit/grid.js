// The grid of tokens by layers, layer 0 at the bottom; two runs stand side by side with their agreement between them.
const ROOMS = [
  { name: "connections", short: "keys", colour: "attention" }, { name: "heads", short: "KV", colour: "ink" },
  { name: "experts", short: "FFN", colour: "network" }, { name: "depth", short: "depth", colour: "muted" },
];
const TOP = 44;
const STRIP = 15;
const SPINE = 31;
const ARCS = 80;
let palette = {};

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "ink", "muted", "hair", "faint", "raised", "attention", "network", "rank", "a", "b"]) {
    palette[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// Where everything stands, for a width to fill. Two long runs are mirrored instead, with their tokens in the middle.
function layout(pen, available) {
  const total = runs.reduce((sum, run) => sum + run.T, 0);
  const side = 30 + STRIP * ROOMS.length;
  const spine = runs.length > 1 ? SPINE * ROOMS.length + 34 : 0;
  const L = runs[0].L;
  const fit = (tokens, sides) => Math.floor((available - side * sides - spine - 8) / tokens);
  const mirrored = runs.length > 1 && fit(total, 2) < 9;
  const widest = Math.max(...runs.map((run) => run.T));
  const cw = mirrored ? Math.max(4, Math.min(24, fit(widest, 1))) : Math.max(5, Math.min(88, fit(total, runs.length)));
  const ch = Math.max(mirrored ? 8 : 9, Math.min(24, Math.floor(window.innerHeight * (mirrored ? 0.36 : 0.54) / L)));
  const longest = Math.max(...runs.map((run) => Math.max(...run.labels.map((label) => pen.measure(label, 12)))));
  const level = !mirrored && longest + 6 < cw;
  const labels = level ? 26 : Math.min(longest, 110) * 0.82 + 16;
  const foot = labels + (runs.length > 1 && !mirrored ? 22 : 0);
  const base = { run: runs[0], x: side, y: TOP, w: runs[0].T * cw, h: L * ch, strip: 4, numbers: side - 5, up: true };
  const geo = { cw, ch, L, level, labels, mirrored, grids: [base], width: side + base.w + 10, height: TOP + L * ch + foot, spine: 0 };
  if (runs.length > 1) {
    const x = mirrored ? side : side + base.w + spine;
    const y = mirrored ? TOP + L * ch + 2 * labels + 22 : TOP;
    geo.grids.push({ run: runs[1], x, y, w: runs[1].T * cw, h: L * ch, strip: mirrored ? 4 : x + runs[1].T * cw + 6,
      numbers: mirrored ? side - 5 : null, up: !mirrored });
    geo.spine = mirrored ? side + widest * cw + 10 : side + base.w + 10;
    geo.width = mirrored ? geo.spine + spine : x + runs[1].T * cw + side;
    if (mirrored) geo.height = y + L * ch + TOP;
  }
  geo.width = Math.max(geo.width, 320);
  return geo;
}

const rowY = (geo, grid, l) => grid.y + (grid.up ? geo.L - 1 - l : l) * geo.ch;
const tokenX = (geo, grid, t) => grid.x + t * geo.cw;

// What lies under a point of the stage: a cell, or a whole token under the grid.
function cellAt(geo, x, y) {
  for (const grid of geo.grids) {
    const t = Math.floor((x - grid.x) / geo.cw);
    const row = Math.floor((y - grid.y) / geo.ch);
    const l = grid.up ? geo.L - 1 - row : row;
    if (t >= 0 && t < grid.run.T && l >= 0 && l < geo.L) return { run: grid.run, l, t };
  }
  return null;
}

const tint = (share) => 0.07 + 0.83 * share;

// Half a cell. What did not run is hollow with a thin line through it; what ran outside the mass is pale and has the line.
function drawHalf(pen, x, y, w, h, colour, share, ran) {
  if (ran) return pen.rect(x, y, w, h, palette[colour], tint(share));
  if (observed) pen.rect(x, y, w, h, palette[colour], 0.28 * tint(share));
  else if (w >= 8) pen.frame(x + 0.5, y + 0.5, w - 1, h - 1, palette.hair, 1);
  return pen.line(x + 1, y + h / 2, x + w - 1, y + h / 2, palette.muted, 0.75, observed ? 0.45 : 0.8);
}

// The barcode of a cell's experts: a bar for each that is kept, as high as its weight among them.
function drawBars(pen, run, l, t, x, y, w, h, inverted, alpha = 0.9) {
  const own = run.layers[l];
  const bins = Math.min(own.experts, Math.max(1, Math.floor(w / 2)));
  const heights = new Float32Array(bins);
  const heaviest = run.heaviest(l, t);
  const most = heaviest.length ? heaviest[0][1] : 0;
  const weight = new Map(heaviest);
  for (let expert = 0; expert < own.experts; expert++) {
    const kept = run.keepsExpert(l, t, expert);
    if (kept === inverted) continue;
    const high = inverted ? 0.5 : most ? 0.3 + 0.7 * Math.sqrt((weight.get(expert) || 0) / most) : 1;
    const bin = Math.floor(expert * bins / own.experts);
    heights[bin] = Math.max(heights[bin], high);
  }
  pen.rect(x, y, w, h, palette.network, 0.07);
  const step = w / bins;
  const gap = step > 3 ? 1 : step > 2 ? 0.5 : 0;
  for (let bin = 0; bin < bins; bin++) {
    if (heights[bin]) pen.rect(x + bin * step, y + h * (1 - heights[bin]), step - gap, h * heights[bin], palette.network, alpha);
  }
}

function drawTicks(pen, run, l, t, x, y, h, step, inverted) {
  for (let group = 0; group < run.layers[l].kv_heads; group++) {
    const lit = run.keepsHead(l, t, group) !== inverted;
    if (lit) pen.rect(x + group * step, y, Math.max(1.5, step - 1.5), h, palette.ink, 0.85);
    else pen.frame(x + group * step + 0.5, y + 0.5, Math.max(0.5, step - 2.5), h - 1, palette.muted, 0.6, 0.7);
  }
}

function drawCell(pen, geo, grid, l, t, lens, inverted) {
  const { run } = grid;
  const own = run.layers[l];
  const wide = geo.cw >= 22 && geo.ch >= 11;
  const gap = geo.cw >= 8 ? 1.5 : geo.cw >= 6 ? 0.5 : 0;
  const x = tokenX(geo, grid, t);
  const y = rowY(geo, grid, l) + 0.5;
  const w = geo.cw - gap;
  const h = geo.ch - 1.5;
  const i = l * run.T + t;
  const share = (room) => {
    const value = run.shares[room][i];
    return Number.isNaN(value) ? (inverted ? 0 : 1) : inverted ? 1 - value : value;
  };
  const attended = run.attentionRan(l, t) !== inverted || !own.ran;
  const fed = run.networkRan(l, t) !== inverted || !own.ran;
  if (lens === "connections") return drawHalf(pen, x, y, w, h, "attention", share("connections"), true);
  if (lens === "rank") return own.rank && pen.rect(x, y, w * share("rank"), h, palette.rank, 0.85);
  if (lens === "heads") {
    if (wide && own.headBits && own.kv_heads * 4 <= w) return drawTicks(pen, run, l, t, x, y + 1, h - 2, w / own.kv_heads, inverted);
    return drawHalf(pen, x, y, w, h, "ink", share("heads"), true);
  }
  if (lens === "experts") {
    if (wide && own.expertBits) return drawBars(pen, run, l, t, x, y, w, h, inverted);
    return drawHalf(pen, x, y, w, h, "network", share("experts"), true);
  }
  const half = h / 2;
  if (lens === "depth") {
    drawHalf(pen, x, y, w, half - 0.5, "network", 0.75, fed);
    return drawHalf(pen, x, y + half, w, half, "attention", 0.75, attended);
  }
  const bars = wide && own.expertBits;
  if (bars && (fed || inverted)) drawBars(pen, run, l, t, x, y, w, half - 0.5, inverted);
  else if (bars && observed) {
    drawBars(pen, run, l, t, x, y, w, half - 0.5, inverted, 0.25);
    pen.line(x + 1, y + half / 2, x + w - 1, y + half / 2, palette.muted, 0.75, 0.45);
  } else drawHalf(pen, x, y, w, half - 0.5, "network", share("experts"), fed || inverted);
  drawHalf(pen, x, y + half, w, half, "attention", share("connections"), attended || inverted);
  if (wide && own.headBits && own.kv_heads <= 8) drawTicks(pen, run, l, t, x + 1.5, y + half + 1.5, half - 3, 4, inverted);
  if (own.rank) pen.rect(x, y + h - 2, w * share("rank"), 2, palette.rank, 1);
}

function drawStrips(pen, geo, grid) {
  const { run } = grid;
  const edge = grid.up ? grid.y : grid.y + grid.h;
  const out = grid.up ? -1 : 1;
  ROOMS.forEach((room, i) => {
    const x = grid.strip + i * STRIP;
    pen.text(room.short, x + STRIP / 2 - 1, edge + 8 * out, palette.muted, { size: 9, align: "left", turn: 0.9 * out });
    for (let l = 0; l < geo.L; l++) {
      const value = run.mean(room.name, l);
      const y = rowY(geo, grid, l) + 1.5;
      pen.rect(x, y, STRIP - 3, geo.ch - 3.5, palette.faint);
      if (!Number.isNaN(value)) pen.rect(x, y, (STRIP - 3) * value, geo.ch - 3.5, palette[room.colour], 0.75);
    }
  });
  const top = grid.up ? edge - 22 : edge + 6;
  for (let t = 0; t < run.T; t++) {
    const [done, dense] = run.costs(t);
    const high = dense ? 16 * done / dense : 16;
    const x = tokenX(geo, grid, t);
    const w = geo.cw - (geo.cw >= 8 ? 1.5 : 0);
    pen.rect(x, top, w, 16, palette.faint);
    pen.rect(x, grid.up ? top + 16 - high : top, w, high, palette.muted, 0.55);
  }
  pen.text("multiply-adds a token", grid.x, edge + 31 * out, palette.muted, { size: 9 });
  if (runs.length > 1) {
    const colour = palette["ab"[run.number]];
    pen.text("AB"[run.number], grid.x + grid.w - 2, edge + 31 * out, colour, { size: 12, align: "right", bold: true });
  }
}

function drawLabels(pen, geo, grid) {
  const { run } = grid;
  const out = grid.up ? 1 : -1;
  const y = grid.up ? grid.y + grid.h : grid.y;
  const skip = Math.max(1, Math.ceil(11 / geo.cw));
  run.labels.forEach((label, t) => { if (t % skip === 0) drawLabel(pen, geo, grid, t, false); });
  if (run.prompt < run.T) {
    const x = tokenX(geo, grid, run.prompt) - 1;
    pen.line(x, grid.y, x, y + 6 * out, palette.network, 1, 0.8, [3, 3]);
  }
}

function drawLabel(pen, geo, grid, t, strong) {
  const { run } = grid;
  const fill = strong ? palette.ink : t >= run.prompt ? palette.network : palette.muted;
  const x = tokenX(geo, grid, t) + geo.cw / 2;
  const label = run.labels[t];
  const y = grid.up ? grid.y + grid.h : grid.y;
  if (geo.level) {
    if (strong) pen.rect(x - geo.cw / 2, y + 5, geo.cw, 19, palette.paper);
    pen.text(label, x, y + 14, fill, { size: 12, align: "center", bold: strong });
  } else if (strong) {
    const width = 7.2 * Math.min(label.length, 18) + 10;
    const left = Math.max(grid.x, Math.min(x - width / 2, grid.x + grid.w - width));
    const middle = grid.up ? y + 13 : y - 13;
    pen.rect(left, middle - 9, width, 18, palette.ink);
    pen.text(label.slice(0, 18), left + width / 2, middle, palette.paper, { size: 12, align: "center", bold: true });
  } else {
    const words = label.length > 18 ? `${label.slice(0, 17)}…` : label;
    pen.text(words, x + 3, grid.up ? y + 9 : y - 9, fill, grid.up ? { size: 12, align: "right", turn: -0.95 } : { size: 12, align: "right", turn: 0.95 });
  }
}

// The words under two grids: which tokens are shared, and that what they kept is the same.
function drawPrefix(pen, geo) {
  const { shared, differences } = trace.together;
  if (!shared) return;
  const words = differences ? `shared, ${differences} bytes differ` : "shared, and an identical circuit";
  const bracket = (grid, y, out) => {
    const stop = tokenX(geo, grid, shared) - 2;
    pen.line(grid.x, y - 5 * out, grid.x, y, palette.ink, 1.2);
    pen.line(grid.x, y, stop, y, palette.ink, 1.2);
    pen.line(stop, y - 5 * out, stop, y, palette.ink, 1.2);
  };
  if (geo.mirrored) {
    const y = geo.grids[0].y + geo.grids[0].h + geo.labels;
    bracket(geo.grids[0], y + 4, 1);
    bracket(geo.grids[0], y + 18, -1);
    return pen.text(words, geo.grids[0].x + 6, y + 11, palette.ink, { size: 10 });
  }
  return geo.grids.forEach((grid) => {
    bracket(grid, geo.height - 15, 1);
    pen.text(words, grid.x, geo.height - 7, palette.ink, { size: 10 });
  });
}

// The agreement of the runs by layer and room: bars of the pair in question, ticks for the mean, longer ones for the
// control's agreement with A.
function drawSpine(pen, geo, across) {
  const pair = across && across.values;
  const controls = across ? across.control : trace.together.control && trace.together.control.agreement;
  ROOMS.forEach((room, i) => {
    const x = geo.spine + i * SPINE;
    pen.text(room.short, x + (SPINE - 4) / 2, TOP - 9, palette.muted, { size: 10, align: "center" });
    for (let l = 0; l < geo.L; l++) {
      const mean = trace.together ? trace.together.agreement[l][i] : null;
      const value = pair ? pair[l][i] : mean;
      const y = rowY(geo, geo.grids[0], l) + 1.5;
      pen.rect(x, y, SPINE - 4, geo.ch - 3.5, palette.faint);
      if (value === null) continue;
      pen.rect(x, y, (SPINE - 4) * value, geo.ch - 3.5, palette[room.colour], pair ? 0.95 : 0.6);
      if (pair && mean !== null) pen.rect(x + (SPINE - 4) * mean - 0.75, y, 1.5, geo.ch - 3.5, palette.paper);
      if (controls && controls[l][i] !== null) drawControl(pen, x + (SPINE - 4) * controls[l][i], y - 1, geo.ch - 1.5);
    }
  });
  pen.text("agreement of A and B", geo.spine, TOP - 31, palette.muted, { size: 9 });
  for (let l = 0; l < geo.L; l++) {
    if (!geo.mirrored && (geo.ch >= 11 || l % 2 === 0)) {
      pen.text(String(l), geo.spine + SPINE * ROOMS.length + 12, rowY(geo, geo.grids[0], l) + geo.ch / 2, palette.muted, { size: 9, align: "right" });
    }
  }
}

function drawControl(pen, x, y, high) {
  pen.rect(x - 2, y, 4, high, palette.paper);
  pen.rect(x - 1, y, 2, high, palette.ink);
}

function drawBase(pen, geo, state) {
  pen.rect(0, 0, geo.width, geo.height, palette.paper);
  for (const grid of geo.grids) {
    for (let l = 0; l < geo.L; l++) {
      for (let t = 0; t < grid.run.T; t++) drawCell(pen, geo, grid, l, t, state.lens, state.inverted);
      if (grid.numbers !== null && (geo.ch >= 11 || l % 2 === 0)) {
        pen.text(String(l), grid.numbers, rowY(geo, grid, l) + geo.ch / 2, palette.muted, { size: 9, align: "right" });
      }
    }
    drawStrips(pen, geo, grid);
    drawLabels(pen, geo, grid);
  }
  if (runs.length > 1) { drawSpine(pen, geo, null); drawPrefix(pen, geo); }
}

// A token's road: in every layer the keys it reads, as dots in their columns, and its own column as the stem.
function drawRoad(pen, geo, cell, other, inverted) {
  const grid = geo.grids[cell.run.number];
  const { run, t } = cell;
  const stem = tokenX(geo, grid, t) + geo.cw / 2;
  const visible = run.visible(t);
  const marks = new Map();  // by colour, drawn at once: a rectangle at a time would be slow
  const largest = Math.min(geo.ch * 0.42, Math.max(2.5, geo.cw * 0.42));
  for (let l = 0; l < geo.L; l++) {
    const y = rowY(geo, grid, l) + geo.ch / 2;
    const attended = run.attentionRan(l, t);
    pen.line(stem, y - geo.ch / 2, stem, y + geo.ch / 2, palette.ink, attended || run.networkRan(l, t) ? 2 : 0.8);
    const { count, weight } = run.reads(l, t);
    const theirs = other ? other.run.reads(l, other.t).count : null;
    for (let key = 0; key < visible; key++) {
      if (key === t) continue;
      const x = tokenX(geo, grid, key) + geo.cw / 2;
      if (!count[key]) {
        if (inverted) pen.disc(x, y, Math.min(2.6, largest), null, palette.muted, 0.9);
        continue;
      }
      if (inverted) continue;
      const r = Math.max(1.2, largest * Math.min(1, Math.sqrt(Math.max(weight[key], 0.3 * count[key] / run.layers[l].heads))));
      const match = other ? other.partner(key) : -1;
      const joint = !other || (match >= 0 && match < theirs.length && theirs[match] > 0);
      const colour = joint ? palette.ink : run.number === 0 ? palette.a : palette.b;
      const upright = !joint && run.number > 0;  // in columns too narrow for a diamond
      if (geo.cw < 8) {
        if (!marks.has(colour)) marks.set(colour, []);
        marks.get(colour).push(upright ? [x - r / 2, y - 1.8 * r, r, 3.6 * r] : [x - r, y - r, 2 * r, 2 * r]);
      } else if (joint) pen.disc(x, y, r, palette.ink, palette.paper, 1);
      else if (run.number === 0) pen.disc(x, y, r, palette.a, palette.paper, 1);
      else pen.diamond(x, y, r * 1.25, palette.b, palette.paper, 1);
    }
  }
  for (const [colour, boxes] of marks) pen.boxes(boxes, colour);
}

// Arcs to the keys that a cell reads, to the heaviest where there are many.
function drawArches(pen, geo, cell) {
  const grid = geo.grids[cell.run.number];
  const { run, l, t } = cell;
  const y = grid.up ? rowY(geo, grid, l) + 1 : rowY(geo, grid, l) + geo.ch - 1;
  const room = grid.up ? y + 4 : geo.height - y;
  const end = tokenX(geo, grid, t) + geo.cw / 2;
  const { count, weight } = run.reads(l, t);
  const { heads } = run.layers[l];
  const arcs = [];
  for (let key = 0; key < count.length; key++) {
    if (key !== t && count[key]) arcs.push([Math.max(weight[key], 0.1 * count[key] / heads), key]);
  }
  arcs.sort((a, b) => b[0] - a[0]);
  for (const [strength, key] of arcs.slice(0, ARCS)) {
    const start = tokenX(geo, grid, key) + geo.cw / 2;
    const height = Math.min(14 + Math.abs(end - start) * 0.35, room) * (grid.up ? 1 : -1);
    pen.arch(start, end, y, height, palette.attention, Math.max(0.6, 4.5 * Math.sqrt(strength) * Math.min(1, geo.cw / 12)),
      0.35 + 0.6 * Math.sqrt(strength));
  }
}

function drawOver(pen, geo, state, active, companion, across) {
  for (const pinned of state.pins) {
    const grid = geo.grids[pinned.run];
    const x = tokenX(geo, grid, pinned.t);
    pen.frame(x - 0.5, grid.y - 1, geo.cw, grid.h + 2, palette.ink, 1.5, 0.9, [4, 3]);
    pen.diamond(x + geo.cw / 2, grid.up ? grid.y - 27 : grid.y + grid.h + 27, 4, palette.ink);
  }
  const cells = [active, companion].filter(Boolean);
  for (const cell of cells) {
    const grid = geo.grids[cell.run.number];
    const x = tokenX(geo, grid, cell.t);
    const y = rowY(geo, grid, cell.l);
    pen.rect(grid.x - 1, grid.y, x - grid.x + 1, grid.h, palette.paper, 0.62);
    pen.rect(x + geo.cw, grid.y, grid.x + grid.w - x - geo.cw + 1, grid.h, palette.paper, 0.62);
    pen.rect(grid.x - 1, y - 0.5, grid.w + 1, 1, palette.ink, 0.35);
    pen.rect(grid.x - 1, y + geo.ch - 0.5, grid.w + 1, 1, palette.ink, 0.35);
    const other = cells.length > 1 ? cells[cell === active ? 1 : 0] : null;
    drawArches(pen, geo, cell);
    drawRoad(pen, geo, cell, other && { ...other, partner: partnerOf(cell, other) }, state.inverted);
    pen.frame(x - 1.25, y - 1, geo.cw + 1, geo.ch + 0.5, palette.ink, 2);
    drawLabel(pen, geo, grid, cell.t, true);
  }
  if (across) {
    pen.rect(geo.spine - 2, 0, SPINE * ROOMS.length + 22, TOP + geo.L * geo.ch, palette.paper);
    drawSpine(pen, geo, across);
  }
}
