"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const many = data.runs.length > 1;
  const axes = {
    tokens: ["training tokens", counted],
    flops: ["training FLOPs", powers],
    hours: ["hours up", plain],
    step: ["steps", counted],
  };
  const view = { axis: data.axes[0], smooth: true, logX: false, logY: false, late: false, hidden: new Set(), cursor: null };
  const form = document.getElementById("controls");
  if (!form) return;

  // Numbers

  function digits(value, most) {
    return Number(value.toPrecision(most)).toString();
  }
  function plain(value) {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e6) ? powers(value) : Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 8 });
  }
  function counted(value) {
    for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (Math.abs(value) >= size) return digits(value / size, 3) + unit;
    }
    return digits(value, 3);
  }
  function powers(value) {
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(2).split("e");
    const raised = String(Number(exponent)).replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
    return Number(mantissa) === 1 ? "10" + raised : `${Number(mantissa)}×10${raised}`;
  }
  const percent = (value) => `${digits(100 * value, 3)} %`;
  const loss = (value) => value.toFixed(3);

  // Series: {label, color, x, y, low, high, smooth, points, dash}

  function gaussian(values) {
    const sigma = Math.max(1, values.length * 0.01);
    const reach = Math.ceil(3 * sigma);
    const weights = Array.from({ length: reach + 1 }, (_, d) => Math.exp((-d * d) / (2 * sigma * sigma)));
    return values.map((value, i) => {
      if (value === null) return null;
      // At the steep start as far ahead as back, lest it lean; at the end as far back as ever, lest the last point be noise.
      const ahead = Math.min(reach, i, values.length - 1 - i);
      let sum = 0;
      let total = 0;
      for (let d = -Math.min(reach, i); d <= ahead; d++) {
        const other = values[i + d];
        if (other === null) continue;
        sum += weights[Math.abs(d)] * other;
        total += weights[Math.abs(d)];
      }
      return sum / total;
    });
  }

  function metric(name, options = {}) {
    return (run, r) => {
      const column = run.series[name];
      if (!column) return [];
      return [{ label: options.label || "", run: r, color: `--run-${r % 8}`, x: run.x, y: column.mean, low: column.low, high: column.high, ...options }];
    };
  }
  function heldOut(name, label) {
    return (run, r) =>
      run.held_out
        .filter((measured) => measured[name].some((value) => value !== null))
        .map((measured, s) => ({
          label: `${label} ${measured.source}`,
          run: r,
          color: `--run-${many ? r % 8 : (s + 1) % 8}`,
          dash: many && s ? `${2 + 3 * s} ${3 + s}` : "",
          x: measured.x,
          y: measured[name],
          points: true,
        }));
  }
  function utilization(run, r) {
    const low = run.series.mfu_low;
    if (!low) return [];
    const high = run.series.mfu_high || low;
    const kept = high.mean.map((value, i) => (value !== null && value <= 1 ? value : low.mean[i]));
    const middle = low.mean.map((value, i) => (value === null ? null : (value + kept[i]) / 2));
    return [{ label: "", run: r, color: `--run-${r % 8}`, x: run.x, y: middle, low: low.mean, high: kept, range: true, smooth: false }];
  }
  const charts = {
    loss: { series: [metric("loss", { label: "training", smooth: true }), heldOut("loss", "held-out")], format: loss, height: 340 },
    bits_per_byte: { series: [heldOut("bits_per_byte", "held-out")], format: loss, references: data.references },
    lr: { series: [metric("lr")], format: plain },
    grad_norm: { series: [metric("grad_norm", { smooth: true })], format: plain },
    update_norm: { series: [metric("update_norm", { smooth: true })], format: plain },
    tokens_per_second: { series: [metric("tokens_per_second", { smooth: true })], format: counted, zero: true },
    mfu: { series: [utilization], format: percent, zero: true },
  };

  // Axes

  function scale(low, high, log, from, to) {
    const f = log ? Math.log10 : (v) => v;
    const a = f(low);
    const span = f(high) - a || 1;
    const place = (v) => from + ((f(v) - a) / span) * (to - from);
    place.invert = (p) => {
      const v = a + ((p - from) / (to - from)) * span;
      return log ? 10 ** v : v;
    };
    return place;
  }
  function ticks(low, high, log, most) {
    if (log) {
      const found = [];
      const decades = Math.log10(high / low);
      const steps = decades > most ? [1] : decades > 2 ? [1, 3] : decades > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
      const stride = Math.max(1, Math.ceil(decades / most));
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
        if (e % stride) continue;
        for (const step of steps) found.push(step * 10 ** e);
      }
      const inside = found.filter((v) => v >= low * 0.9999 && v <= high * 1.0001);
      if (inside.length > 1) return inside;
    }
    const rough = (high - low) / most;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((s) => s * unit).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  // Drawing

  function svg(name, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  }
  function html(name, className = "", text = null) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== null) element.textContent = text;
    return element;
  }
  function path(points) {
    let d = "";
    let pen = "M";
    for (const point of points) {
      if (!point) {
        pen = "M";
        continue;
      }
      d += `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  const drawn = [];
  class Chart {
    constructor(figure) {
      this.spec = charts[figure.dataset.chart];
      this.title = figure.querySelector("figcaption").firstChild.textContent.trim();
      this.box = figure.querySelector(".plot");
      this.tip = html("div", "tip");
      this.tip.hidden = true;
    }

    series() {
      const found = data.runs.flatMap((run, r) => (view.hidden.has(r) ? [] : this.spec.series.flatMap((make) => make(run, r))));
      const furthest = Math.max(0, ...data.runs.flatMap((run) => run.x[view.axis]).map((v) => v ?? 0));
      return found.map((s) => {
        const x = s.x[view.axis].map((v) => (view.late && v < furthest / 4 ? null : v));
        const ok = (v, log) => v !== null && v !== undefined && (!log || v > 0);
        const keep = (values) => values && values.map((v, i) => (ok(x[i], view.logX) && ok(v, view.logY) ? v : null));
        const y = keep(s.y);
        return { ...s, x, y, low: keep(s.low), high: keep(s.high), shown: view.smooth && s.smooth ? gaussian(y) : y };
      });
    }

    draw() {
      const { spec } = this;
      const width = Math.max(260, this.box.clientWidth);
      const height = spec.height ? Math.min(spec.height, width * 0.75) : 210;
      const series = this.series();
      const xs = series.flatMap((s) => s.x.filter((v, i) => s.y[i] !== null));
      const references = (spec.references || []).filter((r) => !view.logY || r.value > 0);
      const ys = [...series.flatMap((s) => [s.y, s.low || [], s.high || []].flat()), ...references.map((r) => r.value)].filter((v) => v !== null);
      const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
      this.box.replaceChildren(this.tip);
      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": `${this.title} against ${axes[view.axis][0]}` });
      this.box.prepend(picture);
      this.picture = picture;
      if (!xs.length || !ys.length) {
        picture.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show here"));
        this.points = null;
        return;
      }
      let [x0, x1] = extent(xs);
      if (!view.logX && !view.late) x0 = Math.min(x0, 0);
      if (x0 === x1) [x0, x1] = view.logX ? [x0 / 2, x1 * 2] : [x0, x0 + 1];
      let [y0, y1] = extent(ys);
      if (spec.zero && !view.logY) y0 = 0;
      if (view.logY) [y0, y1] = [y0 / 1.04, y1 * 1.04];
      else {
        const air = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
        [y0, y1] = [spec.zero ? 0 : y0 >= 0 ? Math.max(0, y0 - air) : y0 - air, y1 + air];
      }
      const yTicks = ticks(y0, y1, view.logY, height > 250 ? 7 : 4);
      const yFormat = spec.format === loss ? plain : spec.format;
      const left = 14 + 6.2 * Math.max(...yTicks.map((v) => yFormat(v).length));
      const [right, top, bottom] = [14, 10, 38];
      const px = scale(x0, x1, view.logX, left, width - right);
      const py = scale(y0, y1, view.logY, height - bottom, top);
      for (const tick of yTicks) {
        picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }));
        picture.append(svg("text", { x: left - 7, y: py(tick) + 4, "text-anchor": "end" }, yFormat(tick)));
      }
      const [xName, xFormat] = axes[view.axis];
      let taken = -Infinity;
      for (const tick of ticks(x0, x1, view.logX, Math.max(2, Math.floor((width - left) / 72)))) {
        const label = xFormat(tick);
        const half = label.length * 3.1 + 5;
        picture.append(svg("line", { class: "base", x1: px(tick), x2: px(tick), y1: height - bottom, y2: height - bottom + 4 }));
        if (px(tick) - half < taken || px(tick) + half > width + 8) continue;
        taken = px(tick) + half;
        picture.append(svg("text", { x: px(tick), y: height - bottom + 17, "text-anchor": "middle" }, label));
      }
      picture.append(svg("line", { class: "base", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
      picture.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, xName));

      for (const reference of references) {
        picture.append(svg("line", { class: "reference", x1: left, x2: width - right, y1: py(reference.value), y2: py(reference.value) }));
      }
      this.marks = [];
      data.runs.forEach((run, r) => {
        if (view.hidden.has(r)) return;
        for (const mark of run.marks) {
          const x = mark.x[view.axis];
          if (x === null || x < x0 || x > x1) continue;
          this.marks.push({ x: px(x), text: many ? `${run.name}: ${mark.text}` : mark.text });
          const style = many ? `--warn: var(--run-${r % 8})` : "";
          picture.append(svg("line", { class: "mark", style, x1: px(x), x2: px(x), y1: top, y2: height - bottom }));
          picture.append(svg("path", { class: "flag", style, d: `M${px(x) - 4} ${top - 6}h8l-4 6z` }));
        }
      });
      for (const s of series) {
        const group = svg("g", { style: `--color: var(${s.color})` });
        const at = (values) => values.map((v, i) => (v === null ? null : [px(s.x[i]), py(v)]));
        if (s.low && s.high) {
          const upper = at(s.high);
          const lower = at(s.low);
          let d = "";
          for (let start = 0; start < upper.length; ) {
            let end = start;
            while (end < upper.length && upper[end] && lower[end]) end++;
            if (end > start) d += path([...upper.slice(start, end), ...lower.slice(start, end).reverse()]) + "Z";
            start = end + 1;
          }
          group.append(svg("path", { class: "band", d }));
        }
        if (s.shown !== s.y) group.append(svg("path", { class: "line raw", d: path(at(s.y)) }));
        const line = svg("path", { class: s.points ? "line held" : "line", d: path(at(s.shown)) });
        if (s.dash) line.setAttribute("stroke-dasharray", s.dash);
        group.append(line);
        const points = at(s.y).filter(Boolean);
        if (points.length === 1 || (s.points && points.length <= 60)) {
          for (const [cx, cy] of points) group.append(svg("circle", { class: "point", cx: cx.toFixed(1), cy: cy.toFixed(1), r: 2.8 }));
        }
        picture.append(group);
      }
      const lowest = extent(series.flatMap((s) => s.y).filter((v) => v !== null))[0];
      for (const reference of references) {
        const below = reference.value < lowest; // there the left is empty, above it the right
        const name = new Set(data.references.map((r) => r.source)).size > 1 ? `${reference.name}, ${reference.source}` : reference.name;
        const place = { x: below ? left + 2 : width - right, y: py(reference.value) - 5, "text-anchor": below ? "start" : "end" };
        picture.append(svg("text", { class: "halo", ...place }, `${name} ${loss(reference.value)}`));
      }
      this.cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
      picture.append(this.cursor);
      Object.assign(this, { px, width, left, right, points: series, x0, x1 });

      const move = (event) => {
        const frame = picture.getBoundingClientRect();
        const place = ((event.clientX - frame.left) / frame.width) * width;
        point(px.invert(Math.min(width - right, Math.max(left, place))), this);
      };
      picture.addEventListener("pointermove", move);
      picture.addEventListener("pointerdown", move);
      picture.addEventListener("pointerleave", () => point(null, null));
      picture.addEventListener("blur", () => point(null, null));
      picture.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const here = view.cursor === null ? (step > 0 ? left : width - right) : px(view.cursor) + step * 8;
        point(px.invert(Math.min(width - right, Math.max(left, here))), this);
      });
    }

    show(x, active) {
      if (!this.points) return;
      const inside = x !== null && x >= this.x0 && x <= this.x1;
      this.cursor.setAttribute("visibility", inside ? "visible" : "hidden");
      this.tip.hidden = !(inside && active);
      if (!inside) return;
      const place = this.px(x);
      this.cursor.setAttribute("x1", place);
      this.cursor.setAttribute("x2", place);
      if (!active) return;
      this.tip.replaceChildren(html("div", "quiet", `${axes[view.axis][1](x)} ${axes[view.axis][0]}`));
      for (const s of this.points) {
        let best = -1;
        s.x.forEach((v, i) => {
          if (s.y[i] !== null && (best < 0 || Math.abs(v - x) < Math.abs(s.x[best] - x))) best = i;
        });
        if (best < 0) continue;
        const row = html("div");
        const swatch = html("span", "swatch");
        swatch.style.setProperty("--color", `var(${s.color})`);
        const name = [many ? data.runs[s.run].name : "", s.label].filter(Boolean).join(" ") || this.title;
        const value = s.range ? `${this.spec.format(s.low[best])} to ${this.spec.format(s.high[best])}` : this.spec.format(s.shown[best]);
        row.append(swatch, html("span", "", name), html("b", "", value));
        this.tip.append(row);
      }
      for (const mark of this.marks.filter((m) => Math.abs(m.x - place) < 8).slice(0, 3)) this.tip.append(html("div", "incident", mark.text));
      const shift = this.picture.clientWidth / this.width;
      const near = place * shift;
      const free = this.picture.clientWidth - this.tip.offsetWidth;
      this.tip.style.top = "12px";
      this.tip.style.left = `${Math.max(0, near + 12 <= free ? near + 12 : near - 12 - this.tip.offsetWidth)}px`;
    }
  }

  function point(x, active) {
    view.cursor = x;
    for (const chart of drawn) chart.show(x, chart === active);
  }
  function redraw() {
    for (const chart of drawn) chart.draw();
  }

  // Controls

  form.addEventListener("change", () => {
    const values = new FormData(form);
    view.axis = values.get("axis") || view.axis;
    for (const name of ["smooth", "logX", "logY", "late"]) view[name] = values.has(name);
    view.cursor = null;
    redraw();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  const legend = document.getElementById("legend");
  data.runs.forEach((run, r) => {
    if (!many) return;
    const button = html("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = html("span", "swatch");
    swatch.style.setProperty("--color", `var(--run-${r % 8})`);
    button.append(swatch, run.name);
    button.addEventListener("click", () => {
      view.hidden.has(r) ? view.hidden.delete(r) : view.hidden.add(r);
      button.setAttribute("aria-pressed", String(!view.hidden.has(r)));
      redraw();
    });
    legend.append(button);
  });
  const entry = (color, text, dotted) => {
    const item = html("span");
    const sample = svg("svg", { width: 26, height: 10, style: `--color: var(${color})` });
    sample.append(svg("path", { d: "M1 5H25", fill: "none", stroke: "var(--color)", "stroke-width": 2 }));
    if (dotted) sample.append(svg("circle", { cx: 13, cy: 5, r: 3, fill: "var(--paper)", stroke: "var(--color)", "stroke-width": 1.6 }));
    item.append(sample, text);
    legend.append(item);
  };
  entry(many ? "--quiet" : "--run-0", "training", false);
  const sources = [...new Set(data.runs.flatMap((run) => run.held_out.map((measured) => measured.source)))];
  if (many && sources.length) entry("--quiet", "held-out", true);
  else sources.forEach((source, s) => entry(`--run-${(s + 1) % 8}`, `held-out ${source}`, true));

  for (const figure of document.querySelectorAll("[data-chart]")) drawn.push(new Chart(figure));
  redraw();
  let width = document.body.clientWidth;
  addEventListener("resize", () => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    redraw();
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
})();
