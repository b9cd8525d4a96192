/** Attention of one pixel: to every pixel, to a window, or to 24 points that all pixels share. */

import { queryWeights, readings, places } from "./kernel.mjs";
import {
  cells,
  colorAt,
  fromDrawing,
  GRID,
  KEYS,
  LEARNED,
  nearestPixel,
  paintOf,
  photograph,
  PICTURE,
  shade,
  SIZE,
  STRIDE,
  toDrawing,
  UNIT,
} from "./picture.mjs";
import { button, choice, frame, grouped, handle, html, markup, set, slider, surface, svg } from "./ui.mjs";

export const title = "The attention of one pixel";

const PIXELS = places(SIZE);
const NAMES = { everywhere: "every pixel", window: "a window", grid: "24 on a grid", learned: "24 that moved" };
const QUERIES = { "an eye": [15, 23], "the nose": [32, 35], "the fur": [24, 8] };
const STAR = "M0-11 3.2-3.6 10.5-3.4 4.8 1.5 6.5 8.9 0 5-6.5 8.9-4.8 1.5-10.5-3.4-3.2-3.6Z";

export function mount(element, { modes = ["everywhere", "window"], query = [15, 23] } = {}) {
  const { body, say, expose, glide } = frame(element, "attention", title);
  const dark = shade();
  const { drawing, element: left } = photograph("A photograph of a cat with one pixel, a star, to drag", dark.element);
  const marks = svg("g", { "pointer-events": "none" });
  const ground = svg("rect", { width: SIZE[1] * UNIT, height: SIZE[0] * UNIT, fill: "transparent" });
  drawing.append(ground, marks);
  surface(drawing, ground, (spot) => change({ query: nearestPixel(fromDrawing(spot)) }));
  const star = handle(drawing, {
    label: "Pixel",
    shape: svg("path", { class: "live-star", d: STAR }),
    reach: 24,
    drag: (spot) => change({ query: nearestPixel(fromDrawing(spot)) }),
    nudge: (step, fine) =>
      change({ query: nearestPixel(state.query.map((at, axis) => at + step[axis] * (fine ? 1 : 3))) }),
  });
  const picker = choice({
    label: "it looks at",
    options: modes.map((mode) => [mode, NAMES[mode]]),
    value: modes[0],
    change: (mode) => change({ mode }),
  });
  const sides = slider({
    label: "side of the map",
    least: 1,
    most: 8,
    step: 1,
    value: 1,
    text: (times) => `${SIZE[0] * times} × ${SIZE[1] * times}`,
    change: (times) => change({ times }),
  });
  const side = html("div", { class: "live-side", "aria-live": "off" });
  const walks = Object.entries(QUERIES).map(([name, target]) =>
    button(name, () => {
      const from = state.query;
      glide((share) => change({ query: from.map((at, axis) => Math.round(at + share * (target[axis] - at))) }));
    }),
  );
  const counting = modes.includes("everywhere");
  body.append(
    left,
    side,
    html(
      "div",
      { class: "live-wide live-controls" },
      picker.element,
      html("div", { class: "live-row" }, ...walks),
      ...(counting ? [sides.element] : []),
    ),
  );

  const state = { mode: modes[0], query, times: 1 };

  function change(wanted) {
    Object.assign(state, wanted);
    const keys = keysOf(state);
    const read = readings(PICTURE, keys);
    const weights = queryWeights(PICTURE, keys, read, state.query);
    const mixed = [0, 1, 2].map((channel) =>
      weights.reduce((sum, weight, n) => sum + weight * read[n].value[channel], 0),
    );
    picker.show(state.mode);
    sides.show(state.times);
    star.at(toDrawing(state.query));
    star.describe(`row ${state.query[0]}, column ${state.query[1]}`, state.query[0]);
    cast(state, keys, weights, dark);
    marks.replaceChildren(...draw(state, keys, read, weights));
    side.replaceChildren(...readout(state, keys, weights, mixed, counting));
    say(`Pixel ${state.query.join(", ")} looks at ${keys.length} places: ${NAMES[state.mode]}.`);
    expose({ ...state, keys: keys.length < 200 ? keys : keys.length, weights, mixed });
  }
  change({});
}

/** The window of STRIDE × STRIDE pixels around a query. */
const cornerOf = (query) => query.map((place) => STRIDE * Math.floor(place / STRIDE));

function keysOf({ mode, query }) {
  if (mode === "grid") return GRID;
  if (mode === "learned") return LEARNED;
  if (mode === "everywhere") return PIXELS;
  const corner = cornerOf(query);
  return PIXELS.filter((pixel) => pixel.every((place, axis) => place >= corner[axis] && place < corner[axis] + STRIDE));
}

/** Let what gets attention glow, and darken the rest. */
function cast({ mode }, keys, weights, dark) {
  if (mode === "grid" || mode === "learned") {
    dark.cast(() => 0);
    return;
  }
  const largest = Math.max(...weights);
  const light = new Float64Array(PIXELS.length);
  keys.forEach(([row, column], n) => (light[row * SIZE[1] + column] = Math.sqrt(weights[n] / largest)));
  dark.cast((pixel) => light[pixel]);
}

function draw({ mode, query }, keys, read, weights) {
  if (mode === "everywhere") return [];
  if (mode === "window") {
    const [y, x] = cornerOf(query).map((place) => place * UNIT);
    return [svg("rect", { class: "live-frame", x, y, width: STRIDE * UNIT, height: STRIDE * UNIT })];
  }
  return [
    cells(),
    ...keys.flatMap((point, n) => {
      const [cy, cx] = toDrawing(point);
      const grown = svg("circle", { class: "live-bead", cx, cy, r: 3 + 46 * Math.sqrt(weights[n] / 2) });
      grown.style.fill = paintOf(read[n].value);
      return [grown];
    }),
  ];
}

function readout({ mode, query, times }, keys, weights, mixed, counting) {
  const swatch = (color, name) =>
    markup("div", { class: "live-sample" }, `<span style="background: ${paintOf(color)}"></span>${name}`);
  const pixels = SIZE[0] * SIZE[1] * times ** 2;
  const looked = { everywhere: pixels, window: STRIDE ** 2 }[mode] ?? KEYS[0] * KEYS[1];
  const count = (label, number) => html("div", { class: "live-count" }, html("b", {}, grouped(number)), ` ${label}`);
  const swatches = html(
    "div",
    { class: "live-samples" },
    swatch(colorAt(query), "the pixel"),
    swatch(mixed, "what attention mixes"),
  );
  if (counting)
    return [
      count("pixels in the map", pixels),
      count("of them looked at by this pixel", looked),
      html(
        "div",
        { class: "live-count live-total" },
        html("b", {}, grouped(pixels * looked)),
        " pairs for the whole map",
      ),
      swatches,
    ];
  const most = Math.max(...weights);
  return [
    count("readings of the map, for all pixels", keys.length),
    count("if every pixel had 24 of its own", keys.length * SIZE[0] * SIZE[1]),
    html(
      "div",
      { class: "live-count" },
      html("b", {}, `${Math.round(100 * most)} %`),
      " of this pixel’s weight is on one point",
    ),
    swatches,
  ];
}
