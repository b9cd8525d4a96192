/** Cost against resolution: multiply-adds and memory of every system, log-log, with the formulas of one system. */

import { clip, cost, COSTS, symbols, terms } from "./kernel.mjs";
import {
  choice,
  fixed,
  frame,
  grouped,
  handle,
  html,
  markup,
  panel,
  prefixed,
  set,
  slider,
  surface,
  svg,
} from "./ui.mjs";

export const title = "Cost against resolution";

/** A layer of dat_tiny's stage 3 with 49 keys on 14 × 14, and peers with as many keys. Only the map grows. */
const FIRST = 14; // side of the smallest map
const PIXELS = 16; // side of a map pixel in pixels of the image
const TIMES = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16];
const LAYER = { C: 384, M: 12, G: 3, r: 2, k: 5 };
const SYSTEMS = {
  deformable_fixed: { name: "DAT, fixed keys", cost: "deformable", config: (times) => ({ ...LAYER, r: 2 * times }) },
  deformable: { name: "DAT, fixed stride", config: () => LAYER },
  multi_head: { name: "plain attention", config: () => LAYER },
  pyramid: { name: "spatial reduction", config: () => ({ ...LAYER, r: 2 }) },
  window: { name: "window", config: () => ({ ...LAYER, w: 7 }) },
  neighborhood: { name: "neighborhood", config: () => ({ ...LAYER, K: 7 }) },
  per_query: { name: "keys of each query", config: () => ({ ...LAYER, K: 7 }) },
  ms_deform: { name: "Deformable DETR", config: () => ({ ...LAYER, P: 49 }) },
  ms_deform_dot: { name: "DETR, dot products", config: () => ({ ...LAYER, P: 49 }) },
  deform_conv: { name: "deformable conv.", config: () => ({ ...LAYER, k: 7 }) },
};
const KINDS = Object.keys(SYSTEMS);

/** Meaning of the symbols in the formulas of a system. */
const LETTERS = {
  HW: "pixels",
  Ns: "points",
  Nk: "keys",
  N: "keys per query",
  P: "points per head",
  C: "channels",
  M: "heads",
  G: "groups",
  k: "kernel",
  r: "reduction",
  w: "window",
  "HW⁺": "pixels with window padding",
};

export function mount(element, { system = "deformable_fixed", start = 1 } = {}) {
  const { body, say, expose } = frame(element, "cost", title);
  const state = { times: TIMES[start], system, part: "macs" };
  const resolution = slider({
    label: "image",
    least: 0,
    most: TIMES.length - 1,
    step: 1,
    value: start,
    text: (n) => sizeText(TIMES[n]),
    change: (n) => change({ times: TIMES[n] }),
  });
  const choose = (kind) => change({ system: kind });
  const slide = (times) => change({ times });
  const plots = {
    macs: new Plot("multiply-adds", "", "macs", choose, slide),
    kept: new Plot("memory for the backward pass", "B", "kept", choose, slide),
  };
  const table = new Table(choose);
  const formulas = new Formulas((part) => change({ part }));
  body.append(
    html("div", { class: "live-wide" }, resolution.element),
    ...Object.values(plots).map((plot) =>
      html("div", { class: "live-part" }, html("p", { class: "live-quiet" }, plot.name), plot.drawing),
    ),
    table.element,
    formulas.element,
  );

  function change(wanted) {
    Object.assign(state, wanted);
    const amounts = Object.fromEntries(KINDS.map((kind) => [kind, amount(kind, state.times)]));
    resolution.show(TIMES.indexOf(state.times));
    Object.values(plots).forEach((plot) => plot.show(state, amounts));
    table.show(state, amounts);
    formulas.show(state);
    const { macs, kept } = amounts[state.system];
    say(
      `${SYSTEMS[state.system].name} at ${sizeText(state.times)}: ` +
        `${prefixed(macs)} multiply-adds, ${prefixed(kept, "B")} stored.`,
    );
    expose({ ...state, side: FIRST * state.times, amounts, terms: termsOf(state.system, state.times) });
  }
  change({});
}

const sizeText = (times) => `${PIXELS * FIRST * times} × ${PIXELS * FIRST * times}`;
const side = (times) => [FIRST * times, FIRST * times];
const kindOf = (kind) => SYSTEMS[kind].cost ?? kind;
const amount = (kind, times) => cost(kindOf(kind), side(times), SYSTEMS[kind].config(times));
const termsOf = (kind, times) => terms(kindOf(kind), side(times), SYSTEMS[kind].config(times));
const ours = (kind) => kind.startsWith("deformable");

// ------------------------------------------------------------------------------------------------ curves

const [WIDTH, HEIGHT, LEFT, NAMES, TOP, FOOT] = [400, 300, 48, 118, 12, 30];
const INNER = WIDTH - LEFT - NAMES;
const PITCH = 14; // distance between two names

/** Cost of all systems against the side of the image, log-log, with a line to slide. */
class Plot {
  constructor(name, unit, part, choose, slide) {
    [this.name, this.unit, this.part] = [name, unit, part];
    this.drawing = panel(WIDTH, HEIGHT, `${name} of ten systems against the side of the image`);
    const values = KINDS.map((kind) => TIMES.map((times) => amount(kind, times)[part]));
    this.low = Math.log10(Math.min(...values.flat())) - 0.08;
    this.high = Math.log10(Math.max(...values.flat())) + 0.05;
    this.scales();
    const heights = this.heights(values.map((row) => row.at(-1)));
    this.curves = KINDS.map((kind, n) => {
      const line = TIMES.map((times, at) => `${this.x(times).toFixed(1)} ${this.y(values[n][at]).toFixed(1)}`).join(
        "L",
      );
      const [end, height] = [this.y(values[n].at(-1)), heights[n]];
      const lead = `M${LEFT + INNER + 3} ${end.toFixed(1)}L${LEFT + INNER + 12} ${height.toFixed(1)}h4`;
      const curve = svg(
        "g",
        { class: `live-curve${ours(kind) ? " live-ours" : ""}` },
        svg("path", { class: "live-catch", d: `M${line}` }),
        svg("path", {
          class: "live-stroke",
          d: `M${line}`,
          "stroke-dasharray": kind === "deformable" ? "6 4" : undefined,
        }),
        svg("path", { class: "live-lead", d: lead }),
        svg("text", { x: LEFT + INNER + 19, y: (height + 4).toFixed(1) }, SYSTEMS[kind].name),
        svg("circle", { class: "live-value", r: 2.6 }),
      );
      curve.addEventListener("click", () => choose(kind));
      this.drawing.append(curve);
      return curve;
    });
    this.cursor = svg("line", { class: "live-guide", y1: TOP, y2: HEIGHT - FOOT });
    this.drawing.insertBefore(this.cursor, this.curves[0]);
    const toTimes = ([, x]) => nearest(2 ** ((Math.log2(TIMES.at(-1)) * (x - LEFT)) / INNER));
    this.handle = handle(this.drawing, {
      label: `Side of the image, ${name}`,
      shape: svg("circle", { class: "live-dot", r: 6.5 }),
      drag: (spot) => slide(toTimes(spot)),
      nudge: ([down, right]) => slide(TIMES[clip(TIMES.indexOf(this.times) + right - down, 0, TIMES.length - 1)]),
      hint: "Arrow keys change it.",
    });
    surface(this.drawing, this.axis, (spot) => slide(toTimes(spot)));
  }

  x(times) {
    return LEFT + (INNER * Math.log2(times)) / Math.log2(TIMES.at(-1));
  }

  y(value) {
    return TOP + ((HEIGHT - FOOT - TOP) * (this.high - Math.log10(value))) / (this.high - this.low);
  }

  /** Heights of the names next to the ends of their curves: names that would overlap are stacked around their mean. */
  heights(ends) {
    const order = ends.map((_, n) => n).sort((a, b) => ends[b] - ends[a]);
    const piles = [];
    const middle = ({ wanted }) => wanted.reduce((sum, height) => sum + height, 0) / wanted.length;
    const top = (pile) => Math.max(middle(pile) - (PITCH * (pile.wanted.length - 1)) / 2, TOP);
    for (const n of order) {
      piles.push({ names: [n], wanted: [this.y(ends[n])] });
      while (piles.length > 1 && top(piles.at(-1)) - top(piles.at(-2)) < PITCH * piles.at(-2).names.length) {
        const last = piles.pop();
        piles.at(-1).names.push(...last.names);
        piles.at(-1).wanted.push(...last.wanted);
      }
    }
    const heights = [];
    for (const pile of piles) pile.names.forEach((n, at) => (heights[n] = top(pile) + PITCH * at));
    return heights;
  }

  scales() {
    const lines = [];
    for (let power = Math.ceil(this.low); power <= this.high; power += 1) {
      const y = this.y(10 ** power);
      lines.push(svg("path", { class: "live-line", d: `M${LEFT} ${y}h${INNER}` }));
      const label = prefixed(10 ** power, this.unit).replace(/\.0+ /, " ");
      lines.push(svg("text", { class: "end", x: LEFT - 7, y: y + 4 }, label));
    }
    for (const times of [1, 2, 4, 8, 16]) {
      lines.push(
        svg("text", { class: "middle", x: this.x(times), y: HEIGHT - FOOT + 22 }, String(PIXELS * FIRST * times)),
      );
    }
    lines.push(svg("path", { class: "live-line", d: `M${LEFT} ${HEIGHT - FOOT}h${INNER}` }));
    this.axis = svg("rect", { x: LEFT, y: HEIGHT - FOOT - 12, width: INNER, height: 36, fill: "transparent" });
    this.drawing.append(...lines, this.axis);
  }

  show({ times, system }, amounts) {
    this.times = times;
    const x = this.x(times);
    set(this.cursor, { x1: x, x2: x });
    this.handle.at([HEIGHT - FOOT, x]);
    this.handle.describe(`${sizeText(times)} pixels`, FIRST * PIXELS * times);
    this.curves.forEach((curve, n) => {
      curve.classList.toggle("live-taken", KINDS[n] === system);
      set(curve.lastChild, { cx: x, cy: this.y(amounts[KINDS[n]][this.part]) });
    });
    const taken = this.curves[KINDS.indexOf(system)];
    this.drawing.insertBefore(taken, this.handle.element);
  }
}

const nearest = (wanted) =>
  TIMES.reduce((a, b) => (Math.abs(Math.log(a / wanted)) < Math.abs(Math.log(b / wanted)) ? a : b));

// ------------------------------------------------------------------------------------------------ numbers

/** Table of all systems with their costs; a row selects one. */
class Table {
  constructor(choose) {
    this.rows = KINDS.map((kind) => {
      const pick = html("button", { type: "button", class: "live-pick" }, SYSTEMS[kind].name);
      const cells = [0, 1, 2].map(() => html("td"));
      const row = html("tr", { class: ours(kind) ? "live-ours" : "" }, html("td", {}, pick), ...cells);
      row.addEventListener("click", () => choose(kind));
      return { kind, row, cells, pick };
    });
    const heads = ["", "mult.\u2011adds", "memory", "side\u00a0×\u00a02"].map((word) => html("th", {}, word));
    this.element = html(
      "table",
      { class: "live-table live-systems" },
      html("thead", {}, html("tr", {}, ...heads)),
      html("tbody", {}, ...this.rows.map(({ row }) => row)),
    );
  }

  show({ times, system }, amounts) {
    for (const { kind, row, cells, pick } of this.rows) {
      const { macs, kept } = amounts[kind];
      const growth = amount(kind, 2 * times).macs / macs;
      [prefixed(macs), prefixed(kept, "B"), `× ${fixed(growth, 1)}`].forEach(
        (text, n) => (cells[n].textContent = text),
      );
      row.classList.toggle("live-taken", kind === system);
      set(pick, { "aria-pressed": String(kind === system) });
    }
  }
}

/** Formulas of one system with their values: multiply-adds, or memory for the backward pass. */
class Formulas {
  constructor(change) {
    const options = [
      ["macs", "multiply-adds"],
      ["kept", "memory"],
    ];
    this.choice = choice({ label: "formulas of", options, value: "macs", change });
    [this.name, this.letters] = [html("h4", { class: "live-name" }), html("p", { class: "live-quiet live-letters" })];
    this.table = html("table", { class: "live-table" });
    this.element = html("div", { class: "live-formulas" }, this.name, this.letters, this.choice.element, this.table);
  }

  show({ system, times, part }) {
    const formulas = COSTS[kindOf(system)][part];
    const values = symbols(kindOf(system), side(times), SYSTEMS[system].config(times));
    const used = Object.keys(values).filter((name) =>
      Object.values(formulas).some((formula) => mentions(formula, name)),
    );
    this.name.textContent = SYSTEMS[system].name;
    this.letters.innerHTML = used
      .map((name) => `<span class="live-number">${typeset(name)} = ${grouped(values[name])} ${LETTERS[name]}</span>`)
      .join(", ");
    this.choice.show(part);
    const found = termsOf(system, times).filter(({ name }) => name in formulas);
    const row = (term) =>
      html(
        "tr",
        {},
        html("td", {}, term.name),
        markup(
          "td",
          { class: "live-formula" },
          (part === "kept" ? "4 · (" : "") + typeset(formulas[term.name]) + (part === "kept" ? ")" : ""),
        ),
        html("td", {}, grouped(term[part])),
      );
    const sum = grouped(found.reduce((total, term) => total + term[part], 0));
    this.table.replaceChildren(
      html("tbody", {}, ...found.map(row)),
      html(
        "tfoot",
        {},
        html("tr", {}, html("td", { colspan: 2 }, part === "kept" ? "bytes" : "sum"), html("td", {}, sum)),
      ),
    );
  }
}

const mentions = (formula, name) => formula.split(" ").some((word) => word === name || word === `${name}²`);

/** A formula with italic letters and subscripts. */
function typeset(formula) {
  const word = (letters) => {
    if (/^[\d+]+$/.test(letters)) return letters;
    const [, name, index, power] = letters.match(/^(HW|[A-Z]|[a-z])([a-z]?)([²⁺]?)$/);
    return `<i>${name}</i>${index ? `<sub>${index}</sub>` : ""}${power}`;
  };
  return formula.split(" ").map(word).join("\u2009");
}
