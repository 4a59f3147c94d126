// The details of a cell: its heads by keys, its experts, its key/value heads, and what it cost against dense.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const swatches = {
  bar(width, height, draw) {
    const canvas = element("canvas", { "aria-hidden": "true" });
    draw(new CanvasPen(canvas, width, height), width, height);
    return canvas;
  },
};

// Sizes of the matrix of a cell: heads of one group stand together.
function matrixShape(cell, available) {
  const own = cell.run.layers[cell.l];
  const keys = cell.run.visible(cell.t);
  const size = Math.max(3, Math.min(34, Math.floor((available - 36) / keys)));
  const high = Math.max(6, Math.min(17, Math.floor(190 / own.heads)));
  const per = own.heads / own.kv_heads;
  const y = (head) => 2 + head * high + Math.floor(head / per) * 3;
  const longest = Math.max(...cell.run.labels.slice(0, keys).map((label) => Math.min(label.length, 10)));
  return { keys, size, high, y, x: 32, heads: own.heads, per, width: 32 + keys * size + 6,
    height: y(own.heads - 1) + high + (size >= 9 ? 12 + longest * 5.4 : 6) };
}

function drawMatrix(pen, shape, cell, head, key) {
  const { run, l, t } = cell;
  const attended = run.attentionRan(l, t) || observed;
  const dropped = [];
  const mask = run.mask(l, t);
  for (let h = 0; h < shape.heads; h++) {
    const y = shape.y(h);
    const chooser = Math.floor(h * mask.length / shape.keys / shape.heads);
    if (h % shape.per === 0) pen.text(`KV ${h / shape.per}`, shape.x - 5, y + shape.high / 2, palette.muted, { size: 9, align: "right" });
    for (let k = 0; k < shape.keys; k++) {
      const x = shape.x + k * shape.size;
      const w = shape.size - (shape.size > 4 ? 1 : 0);
      const tall = shape.high - 1;
      if (attended && mask[chooser * shape.keys + k]) {
        pen.rect(x, y, w, tall, palette.attention, 0.22 + 0.78 * Math.sqrt(run.weight(l, h, t, k) || 0));
      } else {
        pen.rect(x, y, w, tall, palette.faint);
        if (shape.size > 4) dropped.push([x, y, w, tall]);
      }
    }
  }
  pen.hatch(dropped, palette.muted);
  if (shape.size >= 9) {
    const bottom = shape.y(shape.heads - 1) + shape.high + 6;
    for (let k = 0; k < shape.keys; k++) {
      const label = run.labels[k].slice(0, 10);
      pen.text(label, shape.x + k * shape.size + shape.size / 2 + 2, bottom, k === t ? palette.ink : palette.muted,
        { size: 10, align: "right", turn: -1.15 });
    }
  }
  if (head !== null) {
    pen.frame(shape.x + key * shape.size - 1, shape.y(head) - 1, shape.size, shape.high, palette.ink, 1.75);
  }
}

function drawExperts(pen, cell, width, height) {
  const { run, l, t } = cell;
  const own = run.layers[l];
  const weights = new Map(run.heaviest(l, t));
  const most = Math.max(...weights.values(), 1e-9);
  const step = Math.max(1, Math.min(24, Math.floor(width / own.experts)));
  for (let expert = 0; expert < own.experts && expert * step < width; expert++) {
    const x = expert * step;
    const w = step - (step > 2 ? 1 : 0);
    const kept = run.keepsExpert(l, t, expert);
    const high = (height - 14) * Math.min(1, (weights.get(expert) || (kept ? 0.05 * most : 0)) / most);
    pen.rect(x, 0, w, height - 14, palette.faint);
    if (kept) pen.rect(x, height - 14 - high, w, high, palette.network, 0.9);
    else pen.line(x + 1, height - 15, x + w - 1, 1, palette.muted, 0.6, 0.5);
    if (step >= 11 || expert % 8 === 0) pen.text(String(expert), x + w / 2, height - 6, palette.muted, { size: 9, align: "center" });
  }
}

function drawGroups(pen, cell, width) {
  const { run, l, t } = cell;
  const own = run.layers[l];
  const all = Array.from({ length: own.kv_heads }, (_, group) => decode(own.headWeights[t * own.kv_heads + group]));
  const most = Math.max(...all, 1e-9);
  for (let group = 0; group < own.kv_heads; group++) {
    const size = all[group] / most;
    const y = group * 12;
    pen.rect(22, y + 1, width - 22, 9, palette.faint);
    if (run.keepsHead(l, t, group)) pen.rect(22, y + 1, (width - 22) * size, 9, palette.ink, 0.75);
    else pen.frame(22.5, y + 1.5, Math.max(0, (width - 22) * size - 1), 8, palette.muted, 1);
    pen.text(String(group), 14, y + 6, palette.muted, { size: 9, align: "right" });
  }
}

// Fills a panel with a cell; returns the matrix, so that the mouse and the keyboard can walk it. `alikeness`: where it
// is compared with another, the agreement in its layer (`here`), in all (`way`), and in all with the `control`.
function fillPanel(panel, cell, alikeness, available) {
  const { run, l, t } = cell;
  const own = run.layers[l];
  const width = Math.max(240, Math.min(420, available));
  panel.replaceChildren(element("h2", { text: place(run, l, t) }));
  if (own.cost) {
    const [done, dense] = [own.cost[2 * t], own.cost[2 * t + 1]];
    panel.append(element("h3", { text: "cost of this cell" }),
      swatches.bar(width, 10, (pen) => {
        pen.rect(0, 1, width, 8, palette.faint);
        pen.rect(0, 1, dense ? width * done / dense : width, 8, palette.muted, 0.7);
      }),
      element("p", { text: `${million(done)} of ${million(dense)} multiply-adds (${percent(dense ? done / dense : 1)})` }));
  }
  if (alikeness) {
    const { here, way, control } = alikeness;
    panel.append(element("h3", { text: "agreement with the other" }), element("p", { text: describePair(here) }));
    if (way) panel.append(element("h3", { text: "in all layers" }), element("p", { text: `with the other: ${describeWay(way.values)}` }));
    if (way && way.control) panel.append(element("p", { text: `control, A with ${quoted(control)}: ${describeWay(way.control)}` }));
  }
  panel.append(element("h3", { text: `heads by keys, ${KEEPS}` }));
  const shape = matrixShape(cell, Math.max(width, available));
  const canvas = element("canvas", { tabindex: "0", role: "application", "aria-label": "Heads by keys" });
  panel.append(element("div", { class: "wide" }, canvas));
  drawMatrix(new CanvasPen(canvas, shape.width, shape.height), shape, cell, null, 0);
  if (own.expertBits) {
    const size = own.ran && !run.networkRan(l, t) ? `, ${LEFT}` : "";
    panel.append(element("h3", { text: `feed-forward: ${own.experts} ${observed ? "groups" : "experts"} of ${own.unit} neurons${size}` }),
      swatches.bar(width, 58, (pen) => drawExperts(pen, cell, width, 58)));
  }
  if (own.headBits) {
    panel.append(element("h3", { text: "key/value heads" }),
      swatches.bar(width, own.kv_heads * 12, (pen) => drawGroups(pen, cell, width)));
  }
  if (own.sizes) {
    const [attention, network] = [own.sizes[2 * t], own.sizes[2 * t + 1]];
    panel.append(element("h3", { text: "depth" }), element("p", {
      text: observed ? `attention moves the token by ${sized(attention, percent)} of its length, the feed-forward layer by ${sized(network, percent)}`
        : `the block ${run.attentionRan(l, t) ? "ran" : "did not run"}; its score ${sized(attention, (score) => score.toFixed(2))}` }));
  }
  return { canvas, shape };
}
