// Two pens with the same strokes: one draws on a canvas, the other writes SVG. Sizes are CSS pixels.
const FONT = getComputedStyle(document.body).fontFamily;

class CanvasPen {
  constructor(canvas, width, height) {
    const scale = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(width, height, 1));
    canvas.width = Math.ceil(width * scale);
    canvas.height = Math.ceil(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    this.context = canvas.getContext("2d");
    this.context.scale(scale, scale);
    this.font = FONT;
    this.alpha = 1;
    this.fill = null;
  }

  clear(width, height) { this.context.clearRect(0, 0, width, height); }

  rect(x, y, w, h, fill, alpha = 1) {
    if (this.alpha !== alpha) this.context.globalAlpha = this.alpha = alpha;
    if (this.fill !== fill) this.context.fillStyle = this.fill = fill;
    this.context.fillRect(x, y, w, h);
  }

  path(trace, stroke, width, alpha, dash, fill) {
    const c = this.context;
    c.beginPath();
    trace(c);
    c.globalAlpha = this.alpha = alpha;
    if (fill) { c.fillStyle = this.fill = fill; c.fill(); }
    if (stroke) {
      c.strokeStyle = stroke;
      c.lineWidth = width;
      c.lineCap = "round";
      if (dash) c.setLineDash(dash);
      c.stroke();
      if (dash) c.setLineDash([]);
    }
  }

  frame(x, y, w, h, stroke, width = 1, alpha = 1, dash = null) {
    this.path((c) => c.rect(x, y, w, h), stroke, width, alpha, dash);
  }

  line(x1, y1, x2, y2, stroke, width = 1, alpha = 1, dash = null) {
    this.path((c) => { c.moveTo(x1, y1); c.lineTo(x2, y2); }, stroke, width, alpha, dash);
  }

  arch(x1, x2, y, height, stroke, width, alpha) {
    this.path((c) => { c.moveTo(x1, y); c.bezierCurveTo(x1, y - height, x2, y - height, x2, y); }, stroke, width, alpha);
  }

  disc(x, y, r, fill, stroke = null, width = 1, alpha = 1) {
    this.path((c) => c.arc(x, y, r, 0, 2 * Math.PI), stroke, width, alpha, null, fill);
  }

  diamond(x, y, r, fill, stroke = null, width = 1) {
    const trace = (c) => { c.moveTo(x, y - r); c.lineTo(x + r, y); c.lineTo(x, y + r); c.lineTo(x - r, y); c.closePath(); };
    this.path(trace, stroke, width, 1, null, fill);
  }

  text(words, x, y, fill, { size = 11, align = "left", turn = 0, bold = false } = {}) {
    const c = this.context;
    c.save();
    c.globalAlpha = 1;
    c.translate(x, y);
    c.rotate(turn);
    c.fillStyle = fill;
    c.font = `${bold ? "600 " : ""}${size}px ${this.font}`;
    c.textAlign = align;
    c.textBaseline = "middle";
    c.fillText(words, 0, 0);
    c.restore();
  }

  // Boxes [x, y, w, h] of one colour, in one go.
  boxes(all, fill) { this.path((c) => all.forEach((box) => c.rect(...box)), null, 0, 1, null, fill); }

  // Short strokes from the lower left to the upper right of boxes [x, y, w, h].
  hatch(boxes, stroke) {
    this.path((c) => boxes.forEach(([x, y, w, h]) => { c.moveTo(x + 1, y + h - 1); c.lineTo(x + w - 1, y + 1); }),
      stroke, 0.6, 0.55);
  }

  measure(words, size = 11) {
    this.context.font = `${size}px ${this.font}`;
    return this.context.measureText(words).width;
  }
}

class SvgPen {
  constructor(width, height) {
    this.root = this.make("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    this.root.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    this.root.setAttribute("font-family", "sans-serif");
  }

  make(name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null) element.setAttribute(key, typeof value === "number" ? Math.round(value * 100) / 100 : value);
    }
    return element;
  }

  add(name, attributes) { return this.root.appendChild(this.make(name, attributes)); }

  rect(x, y, w, h, fill, alpha = 1) { this.add("rect", { x, y, width: w, height: h, fill, opacity: alpha }); }

  frame(x, y, w, h, stroke, width = 1, alpha = 1, dash = null) {
    this.add("rect", { x, y, width: w, height: h, fill: "none", stroke, "stroke-width": width, opacity: alpha,
      "stroke-dasharray": dash && dash.join(" ") });
  }

  line(x1, y1, x2, y2, stroke, width = 1, alpha = 1, dash = null) {
    this.add("line", { x1, y1, x2, y2, stroke, "stroke-width": width, opacity: alpha, "stroke-linecap": "round",
      "stroke-dasharray": dash && dash.join(" ") });
  }

  arch(x1, x2, y, height, stroke, width, alpha) {
    this.add("path", { d: `M${x1} ${y}C${x1} ${y - height} ${x2} ${y - height} ${x2} ${y}`, fill: "none", stroke,
      "stroke-width": width, opacity: alpha });
  }

  disc(x, y, r, fill, stroke = null, width = 1, alpha = 1) {
    this.add("circle", { cx: x, cy: y, r, fill: fill || "none", stroke, "stroke-width": width, opacity: alpha });
  }

  diamond(x, y, r, fill, stroke = null, width = 1) {
    this.add("path", { d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`, fill, stroke,
      "stroke-width": width });
  }

  text(words, x, y, fill, { size = 11, align = "left", turn = 0, bold = false } = {}) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    const element = this.add("text", { fill, "font-size": size, "text-anchor": anchor, "dominant-baseline": "central",
      "font-weight": bold ? 600 : null, transform: `translate(${x} ${y}) rotate(${turn * 180 / Math.PI})` });
    element.textContent = words;
  }

  boxes(all, fill) { all.forEach((box) => this.rect(...box, fill)); }

  source() { return new XMLSerializer().serializeToString(this.root); }
}
