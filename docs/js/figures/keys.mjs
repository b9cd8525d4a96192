/** Accuracy against the number of keys: the bound of a fixed grid, and what was measured. */

import { STUDIES } from "./data/studies.mjs";
import { clip, CONVENTIONS, fixedGridBound, hitRate, places, readAxis, referencePoints, toPixels } from "./kernel.mjs";
import { choice, fixed, frame, handle, html, markup, panel, slider, surface, svg } from "./ui.mjs";

export const title = "Accuracy and number of keys";

const [WIDTH, HEIGHT] = [420, 300];
const [LEFT, TOP, RIGHT, BOTTOM] = [44, 14, WIDTH - 12, HEIGHT - 44];
const SIDE = 16; // pixels of the drawn map
const UNIT = 18; // drawing units for one of them
const STRIDES = [8, 4, 2, 1];
const ARMS = {
  offsets: "live-ours",
  "no offsets": "live-fixed",
  "more keys": "live-fixed",
  "average pooling": "live-pool",
};
const NAMES = { discs: "colored discs", objects: "objects on photographs" };

export function mount(element, { study = "discs" } = {}) {
  const { body, say, expose } = frame(element, "keys", title);
  const plot = panel(WIDTH, HEIGHT, "Accuracy against the number of keys");
  const map = panel(SIDE * UNIT, SIDE * UNIT, "A map, the pixels that a fixed grid reads, and a target to drag");
  map.classList.add("live-cut");
  const ground = svg("rect", { class: "live-ground", width: SIDE * UNIT, height: SIDE * UNIT });
  const grid = svg("g", { "pointer-events": "none" });
  map.append(ground, grid);
  surface(map, ground, (spot) => aim(spot.map((place) => place / UNIT - 0.5 * state.side)));
  const target = handle(map, {
    label: "Target",
    shape: svg("rect", { class: "live-target", rx: 3 }),
    reach: 26,
    drag: (spot) => aim(spot.map((place) => place / UNIT - 0.5 * state.side)),
    nudge: (step) => aim(state.target.map((place, axis) => place + step[axis])),
  });
  const pick = choice({
    label: "study",
    options: Object.entries(NAMES),
    value: study,
    change: (name) => change({ study: name }),
  });
  const density = slider({
    label: "keys",
    least: 0,
    most: 3,
    step: 1,
    value: 0,
    text: (n) => `${(SIDE / STRIDES[n]) ** 2}`,
    change: (n) => change({ stride: STRIDES[n] }),
  });
  const size = slider({
    label: "side of the target",
    least: 1,
    most: 7,
    step: 1,
    value: 3,
    text: (side) => `${side}`,
    change: (side) => resize(side),
  });
  const words = html("p", { class: "live-note" });
  const legend = markup(
    "p",
    { class: "live-legend" },
    '<span class="live-where">● offsets</span> <span class="live-minus">● keys on a fixed grid</span> ' +
      '<span class="live-quiet">● average pooling</span> <span class="live-quiet">▬ bound of a fixed grid</span>',
  );
  body.append(
    html("div", { class: "live-part" }, plot, legend, pick.element),
    html("div", { class: "live-part" }, map, density.element, size.element, words),
  );
  const state = { study, stride: 8, side: 3, target: [1, 9] };

  function aim(corner) {
    change({ target: corner.map((place) => clip(Math.round(place), 0, SIDE - state.side)) });
  }

  function resize(side) {
    change({ side, target: state.target.map((place) => Math.min(place, SIDE - side)) });
  }

  function change(wanted) {
    Object.assign(state, wanted);
    const { stride, side, target: corner } = state;
    const read = readAxis(SIDE, stride);
    const seen = corner.every((start) => read.slice(start, start + side).includes(true));
    const hits = hitRate([SIDE, SIDE], stride, [side, side]);
    const bound = fixedGridBound(hits, STUDIES.discs.classes);
    pick.show(state.study);
    density.show(STRIDES.indexOf(stride));
    size.show(side);
    grid.replaceChildren(...drawGrid(state, read));
    const box = target.element.querySelector(".live-target");
    for (const [name, value] of Object.entries({
      x: (-side * UNIT) / 2,
      y: (-side * UNIT) / 2,
      width: side * UNIT,
      height: side * UNIT,
    }))
      box.setAttribute(name, value);
    box.classList.toggle("live-missed", !seen);
    target.at(corner.map((start) => (start + side / 2) * UNIT));
    target.describe(`row ${corner[0]}, column ${corner[1]}, ${seen ? "read by a key" : "read by no key"}`, corner[0]);
    plot.replaceChildren(...drawPlot(state));
    words.innerHTML =
      `${seen ? "Some key reads this target." : "<b>No key reads this target.</b>"} ` +
      `The fixed grid reads ${Math.round(100 * hits)} % of the places of a target of ${side} × ${side}: ` +
      `with seven answers it is right in at most ${fixed(100 * bound, 0)} %.`;
    say(words.textContent);
    expose({ ...state, seen, hits, bound });
  }
  change({});
}

function drawGrid({ stride }, read) {
  const shaded = places([SIDE, SIDE])
    .filter(([row, column]) => read[row] && read[column])
    .map(([row, column]) =>
      svg("rect", { class: "live-seen", x: column * UNIT, y: row * UNIT, width: UNIT, height: UNIT }),
    );
  const lines = [];
  for (let at = stride; at < SIDE; at += stride)
    lines.push(`M0 ${at * UNIT}H${SIDE * UNIT}M${at * UNIT} 0V${SIDE * UNIT}`);
  const keys = [SIDE / stride, SIDE / stride];
  const dots = referencePoints(keys, CONVENTIONS.CELL_CENTER).map((point) => {
    const [cy, cx] = point.map((place) => (toPixels(place, SIDE, CONVENTIONS.CELL_CENTER) + 0.5) * UNIT);
    return svg("circle", { class: "live-dot", cx, cy, r: stride > 2 ? 5 : 3 });
  });
  return [...shaded, svg("path", { class: "live-line", d: lines.join("") }), ...dots];
}

const down = (accuracy) => BOTTOM - (BOTTOM - TOP) * accuracy;

function drawPlot({ study, stride }) {
  const { keys, bounds, runs, classes } = STUDIES[study];
  const across = (n) => LEFT + ((n + 0.5) * (RIGHT - LEFT)) / keys.length;
  const axis = [0, 0.25, 0.5, 0.75, 1].flatMap((level) => [
    svg("path", { class: "live-line", d: `M${LEFT} ${down(level)}H${RIGHT}` }),
    svg("text", { class: "end", x: LEFT - 6, y: down(level) + 4 }, `${100 * level} %`),
  ]);
  const ticks = keys.map((count, n) => svg("text", { class: "middle", x: across(n), y: BOTTOM + 17 }, String(count)));
  const steps = `M${LEFT} ${down(bounds[0])}${bounds.map((bound, n) => `L${across(n)} ${down(bound)}`).join("")}H${RIGHT}`;
  const limit = [
    svg("path", { class: "live-beyond", d: `${steps}V${TOP}H${LEFT}Z` }),
    svg("path", { class: "live-bound", d: steps }),
  ];
  const column = { offsets: 0, "no offsets": 0, "more keys": 1, "average pooling": 0 };
  const shift = { offsets: -16, "no offsets": 0, "more keys": 0, "average pooling": 16 };
  const dots = Object.entries(runs).flatMap(([arm, values]) =>
    values.map((value) =>
      svg("circle", { class: `live-run ${ARMS[arm]}`, cx: across(column[arm]) + shift[arm], cy: down(value), r: 4.5 }),
    ),
  );
  const chance = svg("path", { class: "live-chance", d: `M${LEFT} ${down(1 / classes)}H${RIGHT}` });
  const here = svg("rect", {
    class: "live-column",
    x: across(STRIDES.indexOf(stride)) - 40,
    y: TOP,
    width: 80,
    height: BOTTOM - TOP,
  });
  return [
    here,
    ...axis,
    chance,
    svg("text", { class: "end", x: RIGHT, y: down(1 / classes) - 4 }, "chance"),
    ...limit,
    ...ticks,
    svg("text", { class: "middle", x: (LEFT + RIGHT) / 2, y: HEIGHT - 8 }, "keys in each group"),
    ...dots,
  ];
}
