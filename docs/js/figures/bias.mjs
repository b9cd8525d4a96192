/** Position bias: a movable key and query on a map, their table position, and the bias of all queries. */

import { BIAS } from "./data/table.mjs";
import { biasWindows, clip, CONVENTIONS, places, queryPixels, sample, tableBias, tablePosition } from "./kernel.mjs";
import { button, fixed, frame, handle, html, markup, panel, set, signed, surface, svg } from "./ui.mjs";

export const title = "The position bias of a moved key";

const SIZE = BIAS.size;
const TABLE_SIZE = SIZE.map((length) => 2 * length - 1);
const QUERIES = queryPixels(SIZE, CONVENTIONS.CELL_CENTER);
const MOST = Math.max(...BIAS.table.map(Math.abs));
const START = { key: [1.7, 4.25], query: [3, 2] };
const EDGE = 1; // distance in pixels that the key may move outside the map

export function mount(element) {
  const { body, say, expose, glide } = frame(element, "bias", title);
  const map = new Grid(SIZE, 44, 44 * EDGE, "The map, with a query and a key to move");
  const table = new Grid(TABLE_SIZE, 30, 30 * EDGE, "The bias table, with the entries that all queries read for this key");
  const sum = html("div", { class: "live-sum" });
  const numbers = html("p", { class: "live-number live-reading" });
  const buttons = {
    "key on a pixel": () => travel([2, 4]),
    "half-way between pixels": () => travel([1.5, 3.5]),
    "key over the border": () => travel([-0.6, 6.4]),
    "queries in turn": tour,
  };
  lay(body, map, table, numbers, sum, buttons);

  const seen = map.layer();
  table.paintValues(BIAS.table);
  const [zeroY, zeroX] = table.spot(SIZE.map((length) => length - 1));
  table.layer().append(svg("circle", { class: "live-zero", cx: zeroX, cy: zeroY, r: 3 }));
  const marks = table.layer();
  const pictures = new Sum(sum);

  let state = structuredClone(START);
  const queryHandle = handle(map.drawing, {
    label: "Query",
    shape: svg("rect", { class: "live-query", x: -map.unit / 2, y: -map.unit / 2, width: map.unit, height: map.unit }),
    reach: map.unit / 2,
    drag: (spot) => change({ query: map.place(spot) }),
    nudge: ([y, x]) => change({ query: [state.query[0] + y, state.query[1] + x] }),
    hint: "Arrow keys move it by a pixel.",
  });
  const keyHandle = handle(map.drawing, {
    label: "Key",
    shape: svg("circle", { class: "live-dot", r: 7 }),
    reach: 16,
    drag: (spot) => change({ key: map.place(spot) }),
    nudge: ([y, x], fine) =>
      change({ key: [state.key[0] + y * (fine ? 0.01 : 0.1), state.key[1] + x * (fine ? 0.01 : 0.1)] }),
  });
  surface(map.drawing, map.cells, (spot) => change({ query: map.place(spot) }));

  function change(wanted) {
    const { key, query } = { ...state, ...wanted };
    state = {
      key: key.map((place, axis) => clip(Math.round(place * 100) / 100, -EDGE, SIZE[axis] - 1 + EDGE)),
      query: query.map((place, axis) => clip(Math.round(place), 0, SIZE[axis] - 1)),
    };
    draw();
  }

  function draw() {
    const { key, query } = state;
    const position = query.map((place, axis) => tablePosition(place, key[axis], TABLE_SIZE[axis]));
    const { value } = sample(BIAS.table, TABLE_SIZE, position);
    const bias = tableBias(BIAS.table, TABLE_SIZE, key, QUERIES);
    const windows = biasWindows(BIAS.table, SIZE, key);
    queryHandle.at(map.spot(query));
    queryHandle.describe(`row ${query[0]}, column ${query[1]}`, query[0]);
    keyHandle.at(map.spot(key));
    keyHandle.describe(`row ${fixed(key[0])}, column ${fixed(key[1])}`, key[0]);
    map.paintValues(bias);
    seen.replaceChildren(svg("path", { class: "live-displacement", d: `M${map.xy(key)}L${map.xy(query)}` }));
    marks.replaceChildren(...drawWindows(table, windows, key), ...drawReading(table, position));
    pictures.show(windows, bias);
    const displacement = query.map((place, axis) => signed(place - key[axis])).join(", ");
    numbers.innerHTML =
      `<span><i>q</i> − <i class="live-where">p̃</i> = (${displacement})</span>` +
      `<span>reads the table at (${position.map((place) => fixed(place)).join(", ")})</span>` +
      `<span>bias ${colored(value)}</span>`;
    say(`Bias ${signed(value)}, read at row ${fixed(position[0])}, column ${fixed(position[1])} of the table.`);
    expose({
      size: SIZE,
      table: BIAS.table,
      ...state,
      position,
      value,
      bias,
      weights: windows.map(({ weight }) => weight),
    });
  }

  /** Move the key to a position along a straight line. */
  function travel(target) {
    const from = state.key;
    glide((share) => change({ key: from.map((place, axis) => place + share * (target[axis] - place)) }), 700);
  }

  /** Show every query once, row by row. */
  function tour() {
    glide(
      (share) => change({ query: places(SIZE)[Math.min(Math.floor(share * QUERIES.length), QUERIES.length - 1)] }),
      5000,
    );
  }

  change({});
}

/** Arrange the parts of the figure. */
function lay(body, map, table, numbers, sum, buttons) {
  const part = (words, ...rest) =>
    html("div", { class: "live-part" }, markup("p", { class: "live-quiet" }, words), ...rest);
  const windows = part("the bias of the key for all queries is a weighted sum of four windows of the table", sum);
  windows.classList.add("live-wide");
  body.append(
    part("the map: a query <i>q</i> and a key <i>p̃</i>", map.drawing),
    part("the table, read at <i>q</i> − <i>p̃</i>; the dot marks zero displacement", table.drawing),
    numbers,
    windows,
    html(
      "div",
      { class: "live-row live-wide" },
      ...Object.entries(buttons).map(([name, click]) => button(name, click)),
    ),
  );
}

const colored = (value) => `<b class="${value < 0 ? "live-minus" : "live-plus"}">${signed(value)}</b>`;

/** Color and opacity of a bias. */
const shade = (value) => ({
  class: value < 0 ? "live-below" : "live-above",
  "fill-opacity": (0.9 * Math.abs(value)) / MOST,
});

// ------------------------------------------------------------------------------------------------ grids

/** Cells of a map or table: pixel (y, x) is a square of `unit` around its center. */
class Grid {
  constructor(size, unit, margin, label) {
    [this.size, this.unit, this.margin] = [size, unit, margin];
    const [height, width] = size.map((length) => length * unit + 2 * margin);
    this.drawing = panel(width, height, label);
    this.cells = svg("g");
    this.squares = places(size).map(([y, x]) => {
      const corner = this.spot([y - 0.5, x - 0.5]);
      return svg("rect", { x: corner[1], y: corner[0], width: unit, height: unit });
    });
    const [top, left] = this.spot([-0.5, -0.5]);
    const border = { x: left, y: top, width: size[1] * unit, height: size[0] * unit };
    this.cells.append(
      svg("rect", { class: "live-paper", ...border }),
      ...this.squares,
      svg("rect", { class: "live-border", ...border }),
    );
    this.drawing.append(this.cells);
  }

  /** The drawing position of a map or table position, [y, x]. */
  spot(place) {
    return place.map((value) => this.margin + (value + 0.5) * this.unit);
  }

  xy(place) {
    const [y, x] = this.spot(place);
    return `${x.toFixed(1)} ${y.toFixed(1)}`;
  }

  /** The map or table position of a drawing position. */
  place(spot) {
    return spot.map((value) => (value - this.margin) / this.unit - 0.5);
  }

  paintValues(values) {
    this.squares.forEach((square, n) => set(square, shade(values[n])));
  }

  layer() {
    const group = svg("g", { "pointer-events": "none" });
    this.drawing.append(group);
    return group;
  }

  /** A rectangle of `size` cells whose first cell is at a position. */
  box(place, size, attributes) {
    const [y, x] = this.spot(place.map((value) => value - 0.5));
    return svg("rect", {
      x: x.toFixed(1),
      y: y.toFixed(1),
      width: size[1] * this.unit,
      height: size[0] * this.unit,
      ...attributes,
    });
  }
}

/** The block of the table that all queries read for the key, and the four windows of whole entries around it. */
function drawWindows(table, windows, key) {
  const whole = windows
    .filter(({ weight }) => weight > 0)
    .map(({ top, left, weight }) =>
      table.box([top, left], SIZE, { class: "live-window", "stroke-opacity": 0.25 + 0.75 * weight }),
    );
  return [
    ...whole,
    table.box(
      SIZE.map((length, axis) => length - 1 - key[axis]),
      SIZE,
      { class: "live-block" },
    ),
  ];
}

/** The unit square around the table position: its overlap with an entry is that entry's weight. */
function drawReading(table, position) {
  const [y, x] = table.spot(position);
  return [
    table.box(position, [1, 1], { class: "live-reading-square" }),
    svg("circle", { class: "live-dot", cx: x, cy: y, r: 5 }),
  ];
}

// ------------------------------------------------------------------------------------------------ the sum

/** Four windows with their weights, and their weighted sum. */
class Sum {
  constructor(place) {
    this.terms = [1, 2, 3, 4].map(() => ({
      grid: new Grid(SIZE, 16, 1, "A window of the table"),
      weight: html("span", { class: "live-number live-where" }),
    }));
    this.whole = new Grid(SIZE, 16, 1, "The bias of the key for every query");
    const parts = this.terms.flatMap(({ grid, weight }, n) => [
      html("span", { class: "live-sign" }, n ? "+" : ""),
      html("figure", { class: "live-term" }, grid.drawing, html("div", {}, weight)),
    ]);
    place.append(
      ...parts,
      html("span", { class: "live-sign" }, "="),
      html("figure", { class: "live-term" }, this.whole.drawing, html("div", {}, "bias")),
    );
  }

  show(windows, bias) {
    this.terms.forEach(({ grid, weight: text }, n) => {
      const { picture, weight } = windows[n];
      grid.paintValues(picture);
      grid.drawing.style.opacity = 0.25 + 0.75 * weight;
      text.textContent = `${fixed(weight)} ×`;
    });
    this.whole.paintValues(bias);
  }
}
