/** Offsets: drag the points of a key grid over a photograph; switch the convention, the bound and s. */

import { PHOTO } from "./data/photo.mjs";
import {
  boundPoint,
  boundSlope,
  clip,
  CONVENTIONS,
  fromPixels,
  offsetLimit,
  pixelsPerUnit,
  places,
  rawTowards,
  referencePoints,
  sample,
  toPixels,
} from "./kernel.mjs";
import { button, choice, fixed, frame, handle, html, markup, panel, set, signed, slider, svg } from "./ui.mjs";

export const title = "Offsets on a key grid";

const SIZE = PHOTO.size;
const KEYS = [6, 9];
const UNIT = 12.5; // drawing units per pixel of the map
const MARGIN = 36; // around the photograph, for points outside it
const LARGEST = 3; // largest raw offset that a drag can reach: tanh 3 is 0.995
const CHANNELS = [0, 1, 2].map((channel) => PHOTO.pixels.filter((_, n) => n % 3 === channel));
const NAMES = { CELL_CENTER: "cell center", PAPER: "paper", CVPR2022: "code 2022", DATPP2023: "code 2023" };
const RELEASED = { CELL_CENTER: "TANH_CELLS", PAPER: "TANH_CELLS", CVPR2022: "TANH_CELLS", DATPP2023: "CLAMP" };

/** Presets of raw offsets, set by hand, not learned: [y, x] as a function of the key's position in the grid. */
const EYES = [
  [0.37, 0.385],
  [0.47, 0.71],
]; // of the photograph, in fractions of its height and width
const WISHES = {
  none: () => [0, 0],
  "one way": () => [0.45, 0.8],
  apart: ([y, x]) => [3.2 * (y - 0.5), 3.2 * (x - 0.5)],
  "to the eyes": ([y, x]) => {
    const [eyeY, eyeX] = EYES.reduce((a, b) =>
      Math.hypot(y - a[0], x - a[1]) < Math.hypot(y - b[0], x - b[1]) ? a : b,
    );
    const distance = Math.hypot(y - eyeY, x - eyeX) + 1e-9;
    const pull = 4.5 * Math.min(distance, 0.22);
    return [(pull * (eyeY - y)) / distance, (pull * (eyeX - x)) / distance];
  },
};
const CLAMPED = 0.35; // raw offsets without a tanh are normalized coordinates: a smaller unit

export function mount(element, { wish = "to the eyes", convention = "CELL_CENTER" } = {}) {
  const { body, say, expose, glide } = frame(element, "offsets", title);
  const label = "A photograph with a grid of 6 by 9 points to drag";
  const drawing = panel(SIZE[1] * UNIT + 2 * MARGIN, SIZE[0] * UNIT + 2 * MARGIN, label);
  drawing.classList.add("live-cut"); // a point far outside is clipped at the border of the drawing
  const read = new Mosaic();
  const numbers = html("div", { class: "live-number" });
  drawPhoto(drawing);
  const lines = svg("g", { "pointer-events": "none" });
  drawing.append(lines);

  const state = { convention, bound: RELEASED[convention], s: 2, raw: wished(wish, RELEASED[convention]), chosen: 21 };
  const handles = places(KEYS).map((key, n) =>
    handle(drawing, {
      label: `Key ${key[0]}, ${key[1]}`,
      shape: svg("circle", { class: "live-dot", r: 4.5 }),
      reach: 17,
      drag: (spot) =>
        pull(
          n,
          spot.map((value) => (value - MARGIN) / UNIT - 0.5),
        ),
      nudge: (step, fine) =>
        pull(
          n,
          geometry(state).points[n].map((place, axis) => place + step[axis] * (fine ? 0.05 : 0.5)),
        ),
      focus: () => change({ chosen: n }),
      hint: "Arrow keys move it, finely with shift; page up and page down select another key.",
    }),
  );
  drawing.addEventListener("keydown", (event) => {
    const step = { PageUp: -1, PageDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    handles[(state.chosen + step + handles.length) % handles.length].element.focus();
  });

  const controls = {
    convention: choice({
      label: "convention",
      options: Object.entries(NAMES),
      value: state.convention,
      change: (name) => change({ convention: name, ...rebound(state, RELEASED[name]) }),
    }),
    bound: choice({
      label: "bound",
      options: [
        ["TANH_CELLS", "tanh, s/2 cells"],
        ["CLAMP", "clamp to the map"],
      ],
      value: state.bound,
      change: (bound) => change(rebound(state, bound)),
    }),
    s: slider({
      label: "s",
      least: 0.5,
      most: 8,
      step: 0.5,
      value: state.s,
      text: (s) => `${fixed(s, 1)} cells`,
      change: (s) => change({ s }),
    }),
  };
  const wishes = Object.keys(WISHES).map((name) => button(name, () => travel(wished(name, state.bound))));
  body.append(
    html("div", {}, drawing),
    html(
      "div",
      { class: "live-side" },
      markup("p", { class: "live-quiet" }, "colors that the keys sample, <i>x̃</i>"),
      read.drawing,
      numbers,
    ),
    html(
      "div",
      { class: "live-wide live-controls" },
      controls.convention.element,
      controls.bound.element,
      controls.s.element,
      html("div", { class: "live-row" }, html("span", { class: "live-quiet" }, "offsets set by hand, not learned:"), ...wishes),
    ),
  );

  /** Set the raw offset so that a key's point is at a position, in pixels. */
  function pull(n, place) {
    const raw = state.raw.map((pair) => [...pair]);
    raw[n] = rawAt(state, n, place);
    change({ raw, chosen: n });
  }

  function travel(target) {
    const from = state.raw;
    glide((share) =>
      change({ raw: from.map((pair, n) => pair.map((value, axis) => value + share * (target[n][axis] - value))) }),
    );
  }

  function change(wanted) {
    Object.assign(state, wanted);
    const found = geometry(state);
    controls.convention.show(state.convention);
    controls.bound.show(state.bound);
    controls.s.element.classList.toggle("live-idle", state.bound === "CLAMP");
    controls.s.input.disabled = state.bound === "CLAMP";
    controls.s.show(state.s);
    handles.forEach(({ element: group, at, describe }, n) => {
      const point = found.points[n];
      at(spotOf(point));
      describe(`row ${fixed(point[0], 1)}, column ${fixed(point[1], 1)} of the map`, point[0]);
      group.classList.toggle("live-chosen", n === state.chosen);
      set(group, { tabindex: n === state.chosen ? 0 : -1 }); // one stop for the tab key instead of 54
    });
    drawOffsets(lines, found, state);
    const colors = found.points.map((point) => CHANNELS.map((channel) => sample(channel, SIZE, point).value));
    read.paint(colors, state.chosen);
    numbers.replaceChildren(...readout(found, state, colors[state.chosen]));
    const [y, x] = found.points[state.chosen];
    say(
      `Key ${state.chosen} of ${found.points.length} samples row ${fixed(y, 1)}, column ${fixed(x, 1)}. ` +
        `${found.outside} points are outside the map.`,
    );
    expose({
      size: SIZE,
      keys: KEYS,
      ...state,
      points: found.points,
      limit: found.limit,
      slopes: found.slopes,
      colors,
    });
  }
  change({});
}

// ------------------------------------------------------------------------------------------------ geometry

/** The raw offsets of a wish, one pair for each key. */
function wished(name, bound) {
  const unit = bound === "CLAMP" ? CLAMPED : 1;
  return places(KEYS).map((key) =>
    WISHES[name](key.map((index, axis) => (index + 0.5) / KEYS[axis])).map((value) => unit * value),
  );
}

/** All that follows from the state: references and points in pixels, limits and slopes. */
function geometry({ convention: name, bound, s, raw }) {
  const convention = CONVENTIONS[name];
  const limits = KEYS.map((count) => offsetLimit(s, count, convention));
  const references = referencePoints(KEYS, convention);
  const pixels = (pair) => pair.map((value, axis) => toPixels(value, SIZE[axis], convention));
  const points = references.map((p, n) =>
    pixels(p.map((value, axis) => boundPoint(raw[n][axis], value, bound, limits[axis]))),
  );
  return {
    references: references.map(pixels),
    normalised: references,
    points,
    limit: limits.map((limit, axis) => limit * pixelsPerUnit(SIZE[axis], convention)),
    slopes: references.map((p, n) => p.map((value, axis) => boundSlope(raw[n][axis], value, bound, limits[axis]))),
    outside: points.filter((point) => point.some((place, axis) => place < -0.5 || place > SIZE[axis] - 0.5)).length,
  };
}

/** The raw offset that moves a key's point to a position in pixels, or as near as the bound allows. */
function rawAt({ convention: name, bound, s }, n, place) {
  const convention = CONVENTIONS[name];
  const reference = referencePoints(KEYS, convention)[n];
  return place.map((pixel, axis) => {
    const wanted = fromPixels(pixel, SIZE[axis], convention);
    if (bound === "CLAMP") return clip(wanted, -1.25, 1.25) - reference[axis];
    return rawTowards(wanted, reference[axis], offsetLimit(s, KEYS[axis], convention), LARGEST);
  });
}

/** Switch to another bound, with offsets that leave the points in place where they can. */
function rebound(state, bound) {
  if (bound === state.bound) return { bound };
  const { points } = geometry(state);
  return { bound, raw: points.map((point, n) => rawAt({ ...state, bound }, n, point)) };
}

const spotOf = (point) => point.map((place) => MARGIN + (place + 0.5) * UNIT);

// ------------------------------------------------------------------------------------------------ drawing

function drawPhoto(drawing) {
  const box = { x: MARGIN, y: MARGIN, width: SIZE[1] * UNIT, height: SIZE[0] * UNIT };
  const cells = [];
  for (let row = 1; row < KEYS[0]; row += 1)
    cells.push(`M${MARGIN} ${MARGIN + (row * box.height) / KEYS[0]}h${box.width}`);
  for (let column = 1; column < KEYS[1]; column += 1)
    cells.push(`M${MARGIN + (column * box.width) / KEYS[1]} ${MARGIN}v${box.height}`);
  drawing.append(
    svg("image", { href: PHOTO.address, ...box, preserveAspectRatio: "none" }),
    svg("rect", { class: "live-veil", ...box }),
    svg("path", { class: "live-cells", d: cells.join("") }),
  );
}

/** Lines from each reference to its point, and the range of the selected point. */
function drawOffsets(lines, { references, points, limit }, { bound, chosen }) {
  const arms = points.map((point, n) => {
    const [[y, x], [toY, toX]] = [spotOf(references[n]), spotOf(point)];
    return svg("path", {
      class: "live-arm",
      d: `M${x.toFixed(1)} ${y.toFixed(1)}L${toX.toFixed(1)} ${toY.toFixed(1)}`,
    });
  });
  const starts = references.map((reference) => {
    const [cy, cx] = spotOf(reference);
    return svg("circle", { class: "live-start", cx, cy, r: 2.2 });
  });
  const reach = svg("rect", { class: "live-leash" });
  if (bound === "TANH_CELLS") {
    const [y, x] = spotOf(references[chosen].map((place, axis) => place - limit[axis]));
    set(reach, { x, y, width: 2 * limit[1] * UNIT, height: 2 * limit[0] * UNIT });
  } else set(reach, { x: MARGIN, y: MARGIN, width: SIZE[1] * UNIT, height: SIZE[0] * UNIT });
  lines.replaceChildren(reach, ...arms, ...starts);
}

/** The key grid as a picture: each cell has the color that its point samples. */
class Mosaic {
  constructor() {
    const unit = 26;
    this.drawing = panel(KEYS[1] * unit, KEYS[0] * unit, "Colors that the keys sample: a picture of 6 by 9 cells");
    this.cells = places(KEYS).map(([row, column]) =>
      svg("rect", { x: column * unit, y: row * unit, width: unit + 0.5, height: unit + 0.5 }),
    );
    this.mark = svg("rect", { class: "live-picked", width: unit, height: unit });
    this.unit = unit;
    this.drawing.append(...this.cells, this.mark);
  }

  paint(colors, chosen) {
    this.cells.forEach((cell, n) => set(cell, { fill: `rgb(${colors[n].map(Math.round).join(" ")})` }));
    const [row, column] = places(KEYS)[chosen];
    set(this.mark, { x: column * this.unit, y: row * this.unit });
  }
}

// ------------------------------------------------------------------------------------------------ numbers

function readout({ references, points, limit, slopes, outside }, { raw, bound, chosen }, color) {
  const pair = (values, digits = 1) => `(${values.map((value) => signed(value, digits)).join(", ")})`;
  const place = (values) => `(${values.map((value) => fixed(value, 1)).join(", ")})`;
  const held = slopes.filter((pair) => pair.includes(0)).length;
  const swatch = `<span class="live-swatch" style="background: rgb(${color.map(Math.round).join(" ")})"></span>`;
  const rows = [
    ["reference <i>p</i>", place(references[chosen])],
    ["raw offset <i>Δ</i>", pair(raw[chosen], 2)],
    ['point <i class="live-where">p̃</i>', place(points[chosen])],
    ["largest offset", bound === "CLAMP" ? "to the border" : `± (${limit.map((value) => fixed(value, 1)).join(", ")})`],
    ["sampled color", swatch],
  ];
  const note = held
    ? `${held} of ${points.length} points are clamped to the border. They get no gradient, so training does not move them.`
    : outside
      ? `${outside} of ${points.length} points are outside the map and read zeros.`
      : "All points are inside the map.";
  return [
    html(
      "table",
      { class: "live-table" },
      ...rows.map(([name, value]) => html("tr", {}, markup("th", { scope: "row" }, name), markup("td", {}, value))),
    ),
    html("p", { class: "live-note" }, note),
  ];
}
