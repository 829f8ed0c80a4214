"use strict";
// Draws the curves from the page's data and moves the samples. All texts go in as text, never as HTML.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const WIDTH = 350, HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 26;
  const FEW = 40;  // points up to which each is shown by a dot
  const ROWS = 12;  // of a chart's table

  const toNumbers = text => text === "" ? [] : text.split(" ").map(Number);
  const byId = id => document.getElementById(id);
  const runs = data.runs.map(run => {
    const grids = run.grids.map(toNumbers);
    const curves = Object.entries(run.curves).map(([name, [grid, values]]) => [name, {steps: grids[grid], values: toNumbers(values)}]);
    return {...run, curves: new Map(curves), shown: true};
  });

  const make = (parent, name, attributes = {}, text = null) => {
    const svg = parent instanceof SVGElement || name === "svg";
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  };
  const swatch = (parent, run) => {
    const svg = make(parent, "svg", {class: `swatch ${run.look}`, viewBox: "0 0 32 10", "aria-hidden": "true"});
    make(svg, "line", {x1: 0, x2: 32, y1: 5, y2: 5});
  };

  // ---- Numbers as text, and ticks.
  const short = value => {
    if (!Number.isFinite(value)) return "NaN or inf";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const round = value => {
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${unit}`;
    return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
  };
  const linearTicks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(factor => factor * power).find(one => one >= rough * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), every = Math.ceil((to - from) / 6);
    const factors = high / low < 200 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let power = from; power <= to; power += every)
      for (const factor of factors) ticks.push(factor * 10 ** power);
    return ticks.filter(tick => tick >= low && tick <= high);
  };

  // Exponential moving average without the pull towards zero at its start (as Adam's moments).
  const smoothed = (values, weight) => {
    let sum = 0, total = 0;
    return values.map(value => {
      if (!Number.isFinite(value)) return NaN;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  };

  // ---- Charts.
  const controls = {log: byId("log"), smoothing: byId("smoothing"), axis: byId("axis")};
  const position = (run, step) => controls.axis.value === "images" ? step * run.images_per_step : step;

  class Chart {
    constructor(place, {name, about}) {
      this.name = name;
      const figure = make(place, "figure", {"data-name": name});
      const caption = make(figure, "figcaption");
      make(caption, "strong", {}, name);
      make(caption, "small", {}, about);
      this.svg = make(figure, "svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img"});
      this.slider = make(figure, "input", {type: "range", min: 0, "aria-label": `Read ${name} at a step`});
      this.values = make(figure, "p", {class: "values"});
      const details = make(figure, "details");
      make(details, "summary", {}, "As a table");
      this.table = make(details, "div", {class: "scroll"});
      this.details = details;
      this.atEnd = true;
      this.slider.addEventListener("input", () => {
        this.atEnd = this.slider.value === this.slider.max;
        this.read();
      });
      const move = event => {
        const box = this.svg.getBoundingClientRect();
        const x = this.value((event.clientX - box.left) / box.width * WIDTH);
        this.slider.value = nearest(this.positions, x);
        this.atEnd = this.slider.value === this.slider.max;
        this.read();
      };
      this.svg.addEventListener("pointermove", move);
      this.svg.addEventListener("pointerdown", move);
      details.addEventListener("toggle", () => this.tabulate());
    }

    draw() {
      const {svg, name} = this, log = controls.log.checked, weight = Number(controls.smoothing.value);
      const usable = value => Number.isFinite(value) && (!log || value > 0);
      this.lines = runs.filter(run => run.shown && run.curves.has(name)).map(run => {
        const {steps, values} = run.curves.get(name);
        return {run, xs: steps.map(step => position(run, step)), raw: values, values: weight ? smoothed(values, weight) : values};
      });
      this.positions = [...new Set(this.lines.flatMap(line => line.xs))].sort((a, b) => a - b);
      svg.replaceChildren();
      const heights = this.lines.flatMap(line => weight ? [...line.values, ...line.raw] : line.values).filter(usable);
      const floors = [...new Set(this.lines.map(line => line.run.floor[name]).filter(value => value !== undefined && usable(value)))];
      this.left_out = this.lines.reduce((sum, line) => sum + line.raw.filter(value => !usable(value)).length, 0);
      this.slider.hidden = heights.length === 0;
      if (heights.length === 0) {
        make(svg, "text", {x: LEFT, y: HEIGHT / 2}, this.lines.length ? "No value can be drawn on this scale." : "No run is shown.");
        this.values.textContent = "";
        svg.setAttribute("aria-label", `${name}: nothing to draw`);
        this.tabulate();
        return;
      }

      // The scales; a margin of 4 % above and below.
      const bend = log ? Math.log10 : value => value;
      let [low, high] = extent([...heights, ...floors].map(bend));
      const size = Math.max(Math.abs(low), Math.abs(high));
      const margin = high - low > size * 1e-6 ? (high - low) * 0.04 : size * 0.1 || 1;  // of a constant, but for rounding
      [low, high] = [low - margin, high + margin];
      let [from, to] = extent(this.positions);
      if (from === to) [from, to] = [from - 1, to + 1];
      const wide = WIDTH - LEFT - RIGHT, high_px = HEIGHT - TOP - BOTTOM;
      this.x = value => LEFT + (value - from) / (to - from) * wide;
      this.value = x => from + (x - LEFT) / wide * (to - from);
      this.y = value => TOP + (1 - (bend(value) - low) / (high - low)) * high_px;

      const back = log ? value => 10 ** value : value => value;
      let ticks = log ? logTicks(back(low), back(high)) : [];
      if (ticks.length < 3) ticks = linearTicks(back(low), back(high), 4);
      for (const tick of ticks) {
        make(svg, "line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(tick), y2: this.y(tick)});
        make(svg, "text", {x: LEFT - 6, y: this.y(tick) + 4, "text-anchor": "end"}, round(tick));
      }
      for (const tick of linearTicks(from, to, 5)) {
        const anchor = this.x(tick) > WIDTH - RIGHT - 14 ? "end" : "middle";
        make(svg, "text", {x: this.x(tick), y: HEIGHT - 8, "text-anchor": anchor}, round(tick));
      }
      for (const floor of floors) {
        make(svg, "line", {class: "floor", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(floor), y2: this.y(floor)});
        make(svg, "text", {x: WIDTH - RIGHT, y: this.y(floor) - 4, "text-anchor": "end"}, "real images");
      }
      for (const line of this.lines) {
        if (weight) this.trace(line.run, line.xs, line.raw, usable, "raw");
        this.trace(line.run, line.xs, line.values, usable, "");
        for (const [step, what] of line.run.marks) {
          const x = this.x(position(line.run, step)), y = HEIGHT - BOTTOM;
          if (x < LEFT - 1 || x > WIDTH - RIGHT + 1) continue;
          const mark = make(svg, "path", {class: `mark ${line.run.look}`, d: `M${x} ${y}l-4 7h8z`});
          make(mark, "title", {}, `${line.run.name}, step ${step.toLocaleString("en")}: ${what}`);
        }
      }
      this.cursor = make(svg, "line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM});
      const ends = this.lines.map(line => `${line.run.name} ${short(line.raw.at(-1))}`).join("; ");
      svg.setAttribute("aria-label", `Curves of ${name}. Last values: ${ends}. The table below has more.`);
      this.slider.max = this.positions.length - 1;
      if (this.atEnd) this.slider.value = this.slider.max;
      this.read();
      this.tabulate();
    }

    trace(run, xs, values, usable, kind) {
      let path = "", pen = "M";
      const points = [];
      values.forEach((value, i) => {
        if (!usable(value)) { pen = "M"; return; }
        const x = this.x(xs[i]).toFixed(1), y = this.y(value).toFixed(1);
        const alone = pen === "M" && !usable(values[i + 1]);  // a point without neighbours
        path += `${pen}${x} ${y}`;
        pen = "L";
        if (kind === "" && (alone || values.length <= FEW)) points.push([x, y]);
      });
      make(this.svg, "path", {class: `${run.look} ${kind}`, d: path});
      for (const [cx, cy] of points) make(this.svg, "circle", {class: run.look, cx, cy, r: 2.5});
    }

    read() {  // the values where the slider is
      const x = this.positions[this.slider.value];
      this.cursor.setAttribute("x1", this.x(x));
      this.cursor.setAttribute("x2", this.x(x));
      this.cursor.setAttribute("visibility", this.atEnd ? "hidden" : "visible");
      const axis = controls.axis.selectedOptions[0].textContent;
      const found = this.lines.map(line => [line.run, this.at(line, x)]);
      this.values.replaceChildren(`${axis} ${x.toLocaleString("en")}:`);
      for (const [run, value] of found) {
        const span = make(this.values, "span");
        if (runs.length > 1) swatch(span, run);
        span.append(` ${value}`);
      }
      const why = controls.log.checked ? "NaN, inf or not above 0" : "NaN or inf";
      if (this.left_out) make(this.values, "span", {class: "note"}, ` (points not drawn, ${why}: ${this.left_out})`);
      const said = found.map(([run, value]) => `${runs.length > 1 ? `${run.name} ` : ""}${value}`).join(", ");
      this.slider.setAttribute("aria-valuetext", `${axis} ${x.toLocaleString("en")}: ${said}`);
    }

    at(line, x) {  // a run's value there; where it had ended, its last one with its place
      const i = nearest(line.xs, x), value = short(line.values[i]);
      return x > line.xs.at(-1) ? `${value} (at ${line.xs[i].toLocaleString("en")})` : value;
    }

    tabulate() {
      if (!this.details.open) return;
      this.table.replaceChildren();
      const table = make(this.table, "table"), head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
      make(head, "th", {scope: "col"}, controls.axis.selectedOptions[0].textContent);
      for (const {run} of this.lines) make(head, "th", {scope: "col", class: "number"}, run.name);
      const count = Math.min(ROWS, this.positions.length);
      for (let i = 0; i < count; i++) {
        const x = this.positions[Math.round(i * (this.positions.length - 1) / Math.max(1, count - 1))];
        const row = make(body, "tr");
        make(row, "th", {scope: "row"}, x.toLocaleString("en"));
        for (const line of this.lines) make(row, "td", {class: "number"}, this.at(line, x));
      }
    }
  }
  const extent = values => values.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);
  const nearest = (sorted, x) => {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
  };

  const charts = data.charts.map(chart => new Chart(byId(`charts-${chart.section}`), chart));
  const draw = () => charts.forEach(chart => chart.draw());
  const showSmoothing = () => { byId("smoothing-value").textContent = Number(controls.smoothing.value).toFixed(2); };
  for (const control of Object.values(controls)) control?.addEventListener("input", () => { showSmoothing(); draw(); });

  // ---- Samples: each run shows its newest grid up to the chosen step.
  const slider = byId("when"), samples = [...document.querySelectorAll(".samples figure")];
  const steps = [...new Set(runs.flatMap(run => run.samples))].sort((a, b) => a - b);
  const showSamples = () => {
    const step = steps[slider.value], said = [];
    for (const figure of samples) {
      const run = runs[figure.dataset.run], pictures = [...figure.querySelectorAll("img")];
      const chosen = run.samples.findLastIndex(one => one <= step);
      figure.hidden = !run.shown;
      pictures.forEach((picture, i) => { picture.hidden = i !== chosen; });
      const text = chosen < 0 ? "no samples yet" : `step ${run.samples[chosen].toLocaleString("en")}`;
      figure.querySelector(".at").textContent = text;
      if (run.shown) said.push(runs.length > 1 ? `${run.name}: ${text}` : text);
    }
    byId("when-value").textContent = `step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", said.join("; "));
  };
  if (slider) {
    slider.max = steps.length - 1;
    slider.value = slider.max;
    slider.addEventListener("input", showSamples);
  }

  for (const box of document.querySelectorAll("input[data-run]"))
    box.addEventListener("input", () => {
      runs[box.dataset.run].shown = box.checked;
      draw();
      if (slider) showSamples();
    });
  document.querySelectorAll("label svg.swatch, h3 svg.swatch").forEach(one => make(one, "line", {x1: 0, x2: 32, y1: 5, y2: 5}));

  // Paper opens nothing: what is folded is printed unfolded.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach(one => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach(one => { one.open = false; }));

  if (charts.length) draw();
  if (slider) showSamples();
}
