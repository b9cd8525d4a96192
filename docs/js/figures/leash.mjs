/** Who moves the points: the offset network of one cell, and the square that s allows. */

import {
  boundPoint,
  clip,
  CONVENTIONS,
  fromPixels,
  offsetLimit,
  places,
  rawTowards,
  referencePoints,
  toPixels,
} from "./kernel.mjs";
import {
  ACTIVATED,
  fromDrawing,
  GRID,
  KEYS,
  nameOf,
  photograph,
  POINTWISE,
  RAW,
  SIZE,
  STRIDE,
  toDrawing,
  UNIT,
} from "./picture.mjs";
import { button, fixed, frame, handles, html, markup, panel, set, signed, slider, svg } from "./ui.mjs";

export const title = "Offsets from a cell, and their range";

const CELLS = CONVENTIONS.CELL_CENTER;
const REFERENCES = referencePoints(KEYS, CELLS);
const LARGEST = 4; // largest raw offset that a drag can reach: tanh 4 is 0.9993

export function mount(element, { s = 2, chosen = 10 } = {}) {
  const { body, say, expose, glide } = frame(element, "mover", title);
  const { drawing, element: left } = photograph(
    "A photograph with 24 cells, a point for each, and the square it may reach",
  );
  drawing.classList.add("live-cut");
  const squares = svg("g", { "pointer-events": "none" });
  drawing.append(svg("rect", { class: "live-veil", width: SIZE[1] * UNIT, height: SIZE[0] * UNIT }), squares);
  const { all, select } = handles(drawing, {
    count: GRID.length,
    label: nameOf,
    shape: () => svg("circle", { class: "live-dot", r: 7 }),
    reach: 24,
    drag: (n, spot) => pull(n, fromDrawing(spot)),
    nudge: (n, step, fine) =>
      pull(
        n,
        pointsOf(state)[n].map((place, axis) => place + step[axis] * (fine ? 0.1 : 0.5)),
      ),
    focus: (n) => change({ chosen: n }),
  });
  const range = slider({
    label: markup("span", {}, "<i>s</i>"),
    least: 0,
    most: 4,
    step: 0.5,
    value: s,
    text: (value) => `${fixed(value, 1)} cells`,
    change: (value) => change({ s: value }),
  });
  const sums = new Sums();
  const words = markup("p", { class: "live-note" }, "");
  body.append(
    left,
    html("div", { class: "live-side" }, sums.drawing, words),
    html(
      "div",
      { class: "live-wide live-controls" },
      range.element,
      html(
        "div",
        { class: "live-row" },
        button("offsets of the network", () => travel(RAW)),
        button("zero offsets", () => travel(RAW.map(() => [0, 0]))),
      ),
    ),
  );
  const state = { s, chosen, raw: RAW.map((pair) => [...pair]) };

  function pull(n, place) {
    if (!state.s) return;
    const raw = state.raw.map((pair) => [...pair]);
    raw[n] = place.map((pixel, axis) => {
      const wanted = fromPixels(pixel, SIZE[axis], CELLS);
      return rawTowards(wanted, REFERENCES[n][axis], offsetLimit(state.s, KEYS[axis], CELLS), LARGEST);
    });
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
    select(state.chosen);
    range.show(state.s);
    const points = pointsOf(state);
    all.forEach(({ element: group, at, describe }, n) => {
      at(toDrawing(points[n]));
      describe(`row ${fixed(points[n][0], 1)}, column ${fixed(points[n][1], 1)}`, points[n][0]);
      group.classList.toggle("live-chosen", n === state.chosen);
    });
    squares.replaceChildren(...drawSquares(state, points));
    const own = state.raw[state.chosen].every((value, axis) => Math.abs(value - RAW[state.chosen][axis]) < 1e-9);
    sums.show(state.chosen, own);
    const moved = points[state.chosen].map((place, axis) => place - GRID[state.chosen][axis]);
    const outside = strayed(points);
    words.innerHTML =
      `Raw offset Δ (down, right): (${state.raw[state.chosen].map((value) => signed(value)).join(", ")}). ` +
      `The point moves (${moved.map((value) => signed(value, 1)).join(", ")}) pixels; ` +
      `at most ${fixed((state.s / 2) * STRIDE, 1)} are possible. ` +
      (state.s === 0
        ? "No point moves."
        : state.s > 1
          ? `The squares overlap: points can meet. ${outside} of 24 have left their cell.`
          : "The squares do not overlap: no two points can meet.");
    say(words.textContent);
    expose({ ...state, points });
  }
  change({});
}

function pointsOf({ s, raw }) {
  const limits = KEYS.map((count) => offsetLimit(s, count, CELLS));
  return REFERENCES.map((reference, n) =>
    reference.map((place, axis) =>
      toPixels(boundPoint(raw[n][axis], place, "TANH_CELLS", limits[axis]), SIZE[axis], CELLS),
    ),
  );
}

/** How many points are outside their own cell. */
const strayed = (points) =>
  points.filter((point, n) => point.some((place, axis) => Math.abs(place - GRID[n][axis]) > STRIDE / 2)).length;

function drawSquares({ s, chosen }, points) {
  const side = s * STRIDE * UNIT;
  const square = (n, kind) => {
    const [y, x] = toDrawing(GRID[n]).map((place) => place - side / 2);
    return svg("rect", { class: kind, x, y, width: side, height: side });
  };
  const arms = points.map((point, n) => {
    const [[y, x], [toY, toX]] = [toDrawing(GRID[n]), toDrawing(point)];
    return svg("path", { class: "live-arm", d: `M${x} ${y}L${toX.toFixed(1)} ${toY.toFixed(1)}` });
  });
  const starts = GRID.map((point) => {
    const [cy, cx] = toDrawing(point);
    return svg("circle", { class: "live-start", cx, cy, r: 3 });
  });
  return [...GRID.map((_, n) => square(n, "live-faint-square")), square(chosen, "live-leash"), ...arms, ...starts];
}

/** The sixteen numbers of a cell, and how they add up to the two offsets. */
class Sums {
  constructor() {
    [this.width, this.height] = [300, 190];
    this.drawing = panel(this.width, this.height, "The sixteen numbers of the cell, and their two weighted sums", {
      role: "img",
    });
  }

  show(cell, own) {
    const found = ACTIVATED[cell];
    const step = (this.width - 30) / found.length;
    const largest = Math.max(...ACTIVATED.flat());
    const bars = found.map((value, n) => {
      const height = (60 * Math.abs(value)) / largest;
      return svg("rect", { class: "live-bar", x: n * step + 2, y: 74 - height, width: step - 4, height: height + 1 });
    });
    const most = Math.max(
      ...ACTIVATED.flatMap((row) => POINTWISE.map((weights) => peak(weights.map((weight, n) => weight * row[n])))),
    );
    const ends = POINTWISE.map((weights) => weights.reduce((sum, weight, n) => sum + weight * found[n], 0));
    const lines = POINTWISE.map((weights, axis) => {
      const kind = ["live-down", "live-right"][axis];
      let [sum, path] = [0, `M0 132`];
      weights.forEach((weight, n) => {
        sum += weight * found[n];
        path += `V${(132 - (46 * sum) / most).toFixed(1)}H${((n + 1) * step).toFixed(1)}`;
      });
      const apart =
        Math.abs(ends[0] - ends[1]) * (46 / most) < 13 ? 7 * Math.sign(ends[1 - axis] - ends[axis] || 1 - 2 * axis) : 0;
      const y = clip(132 - (46 * sum) / most + apart, 88, 180);
      return svg(
        "g",
        { class: kind },
        svg("path", { class: "live-sum-line", d: path }),
        svg("text", { x: found.length * step + 4, y: y + 4 }, ["Δy", "Δx"][axis]),
      );
    });
    set(this.drawing, { class: `live-panel${own ? "" : " live-idle"}` });
    this.drawing.replaceChildren(
      svg("text", { x: 0, y: 10 }, own ? "16 numbers for this cell" : "offset set by hand; the network would say:"),
      ...bars,
      svg("path", { class: "live-line", d: `M0 132H${found.length * step}` }),
      svg("text", { x: 0, y: 94 }, "their weighted sums"),
      ...lines,
    );
  }
}

/** The largest absolute value of the running sums. */
function peak(terms) {
  let [sum, most] = [0, 0];
  for (const term of terms) most = Math.max(most, Math.abs((sum += term)));
  return most;
}
