/** Bilinear sampling: a movable point on a small map, with its four weights, value, gradients and kinks. */

import { clip, corners, profile, sample, sampleNearest } from "./kernel.mjs";
import { choice, fixed, frame, handle, html, markup, panel, signed, surface, svg } from "./ui.mjs";

export const title = "Bilinear sampling";

const SIZE = [4, 5];
const MAP = [1, 2, 4, 3, 1, 2, 5, 8, 5, 2, 1, 6, 9, 4, 3, 0, 2, 5, 6, 2];
// A position bias: one number for each displacement of -2 … 1 pixels down and -2 … 2 to the right; near points get more.
const TABLE = [1, 2, 3, 2, 1, 2, 5, 7, 5, 2, 3, 7, 9, 7, 3, 2, 5, 7, 5, 2];
const MAPS = { features: MAP, bias: TABLE };
const MOST = 9;
const START = [1.35, 1.7];
const EDGE = 1.25; // distance in pixels outside the outermost pixel centers
const UNIT = 60; // drawing units per pixel
const [LEFT, TOP] = [1.3 * UNIT, 1.3 * UNIT]; // drawing position of the center of pixel (0, 0)
const [RIGHT, BOTTOM] = [LEFT + (SIZE[1] + 0.35) * UNIT, TOP + (SIZE[0] + 0.35) * UNIT];
const PLOT = 108; // height of the plots next to the map, for the value MOST
const [WIDTH, HEIGHT] = [RIGHT + PLOT + 22, BOTTOM + PLOT + 24];
const SNAP = 0.04; // distance in pixels at which a dragged point snaps to the lattice

const across = (x) => LEFT + x * UNIT;
const down = (y) => TOP + y * UNIT;

/** With `choices` the reader may read the position bias instead of features, and round instead of interpolating. */
export function mount(element, { choices = false } = {}) {
  const { body, say, expose } = frame(element, "sampling", title);
  const drawing = panel(
    WIDTH,
    HEIGHT,
    "A map of 4 by 5 pixels with a point to drag, and the value read along its row and column",
  );
  const numbers = html("div");
  body.append(drawing, numbers);
  const ground = svg("g", { class: "live-map" });
  const moving = svg("g");
  drawing.append(ground, moving);
  const controls = [
    choice({
      label: "read",
      options: [
        ["features", "a feature"],
        ["bias", "the position bias"],
      ],
      value: "features",
      change: (map) => move({ map }),
    }),
    choice({
      label: "between pixels",
      options: [
        ["interpolate", "interpolate"],
        ["round", "round"],
      ],
      value: "interpolate",
      change: (rule) => move({ rule }),
    }),
  ];
  if (choices) body.append(html("div", { class: "live-wide live-controls" }, ...controls.map((each) => each.element)));
  const point = handle(drawing, {
    label: "Sampling point",
    shape: svg("circle", { class: "live-dot", r: 7 }),
    reach: 24,
    drag: (spot) => move({ point: under(spot) }),
    nudge: (step, fine) => move({ point: state.point.map((at, axis) => at + step[axis] * (fine ? 0.01 : 0.1)) }),
  });
  surface(drawing, ground, (spot) => move({ point: under(spot) }));

  const state = { point: START, map: "features", rule: "interpolate" };
  function move(wanted) {
    Object.assign(state, wanted);
    state.point = state.point.map((at, axis) => clip(Math.round(at * 100) / 100, -EDGE, SIZE[axis] - 1 + EDGE));
    const found = look(state);
    const [y, x] = state.point;
    point.at([down(y), across(x)]);
    point.describe(`row ${fixed(y)}, column ${fixed(x)}`, y);
    drawMap(ground, MAPS[state.map]);
    moving.replaceChildren(...drawPieces(found), ...drawGuides(found), ...drawProfiles(found), ...drawArrow(found));
    numbers.replaceChildren(...readout(found));
    say(
      `Value ${fixed(found.value)}. ` +
        `Slope down ${signed(found.slope[0])}, right ${signed(found.slope[1])}. ${found.note}`,
    );
    expose({
      size: SIZE,
      map: MAPS[state.map],
      rule: state.rule,
      point: state.point,
      value: found.value,
      slope: found.slope,
      weights: found.corners.map((c) => c.weight),
    });
  }
  move({});
}

/** All values that the figure shows for a point. */
function look({ point, map: name, rule }) {
  const map = MAPS[name];
  if (rule === "round") {
    const read = sampleNearest(map, SIZE, point);
    const note =
      "Rounded: a small move changes nothing, then the value jumps. The slope is zero, so no gradient moves the point.";
    const nearest = point.map(Math.round);
    return { point, name, map, rule, ...read, corners: corners(nearest, SIZE).slice(0, 1), before: read.slope, note };
  }
  const read = sample(map, SIZE, point);
  // The slope along an axis is constant inside a cell; half a pixel back is in the previous cell.
  const before = point.map((place, axis) => {
    const back = [...point];
    back[axis] -= 0.5;
    return Number.isInteger(place) ? sample(map, SIZE, back).slope[axis] : read.slope[axis];
  });
  return {
    point,
    name,
    map,
    rule,
    ...read,
    corners: corners(point, SIZE),
    before,
    note: noteOn(point, read.slope, before),
  };
}

function noteOn(point, slope, before) {
  if (point.some((place, axis) => place <= -1 || place >= SIZE[axis]))
    return "One pixel or more outside the map: the value and the gradient are zero.";
  const kinks = [0, 1].filter((axis) => before[axis] !== slope[axis]);
  if (kinks.length) {
    const [axis] = kinks;
    const sides = axis ? ["the left", "the right"] : ["above", "below"];
    const slopes = `${signed(before[axis])} from ${sides[0]}, ${signed(slope[axis])} from ${sides[1]}`;
    return `On a ${axis ? "column" : "row"} of pixel centers: slope ${slopes}. The gradient is the latter.`;
  }
  if (point.some((place, axis) => place < 0 || place > SIZE[axis] - 1))
    return "Less than one pixel outside the map: the value falls to zero.";
  return "Inside a cell: moving the point changes the weights smoothly.";
}

/** The position at a place of the drawing. */
const under = ([y, x]) => [snapped((y - TOP) / UNIT), snapped((x - LEFT) / UNIT)];

/** A position, snapped to the lattice when it is near. */
function snapped(place) {
  const whole = Math.round(place);
  return Math.abs(place - whole) < SNAP ? whole : place;
}

// ------------------------------------------------------------------------------------------------ drawing

function drawMap(ground, values) {
  ground.replaceChildren(svg("rect", { x: 0, y: 0, width: RIGHT, height: BOTTOM, fill: "transparent" }));
  values.forEach((value, n) => {
    const [row, column] = [Math.floor(n / SIZE[1]), n % SIZE[1]];
    const [x, y] = [across(column - 0.5), down(row - 0.5)];
    ground.append(
      svg("rect", {
        class: "live-cell",
        x,
        y,
        width: UNIT,
        height: UNIT,
        "fill-opacity": 0.04 + (0.44 * value) / MOST,
      }),
      svg("text", { class: "ink", x: x + 6, y: y + 16 }, String(value)),
    );
  });
  const lines = [];
  for (let x = 0; x < SIZE[1]; x += 1) lines.push(`M${across(x)} ${down(-1)}V${BOTTOM + PLOT}`);
  for (let y = 0; y < SIZE[0]; y += 1) lines.push(`M${across(-1)} ${down(y)}H${RIGHT + PLOT}`);
  ground.append(
    svg("path", { class: "live-line live-lattice", d: lines.join("") }),
    svg("path", {
      class: "live-line",
      d: `M${across(-1.3)} ${BOTTOM + PLOT}H${across(SIZE[1] + 0.3)}M${RIGHT} ${down(-1.3)}V${down(SIZE[0] + 0.3)}`,
    }),
    svg("text", { x: across(-1.3), y: BOTTOM + PLOT + 18 }, "φ along the row"),
    svg("text", { class: "end", x: WIDTH, y: down(-1.3) + 4 }, "φ along the column"),
  );
}

/** The unit square around the point: its overlap with a pixel is that pixel's weight. */
function drawPieces({ point: place, rule, corners: found }) {
  const point = rule === "round" ? place.map(Math.round) : place;
  const pieces = found.flatMap(({ row, column, inside, weight }) => {
    const [top, left] = [Math.max(point[0], row) - 0.5, Math.max(point[1], column) - 0.5];
    const [height, width] = [1 - Math.abs(point[0] - row), 1 - Math.abs(point[1] - column)];
    if (height <= 0 || width <= 0) return [];
    const box = { x: across(left), y: down(top), width: width * UNIT, height: height * UNIT };
    if (!inside) return [svg("rect", { class: "live-outside", ...box })];
    const piece = svg("rect", { class: "live-piece", ...box, "fill-opacity": 0.25 + 0.4 * weight });
    const outline = svg("rect", { class: "live-square live-thin", ...box });
    return [piece, outline];
  });
  const [x, y] = [across(point[1] - 0.5), down(point[0] - 0.5)];
  return [...pieces, svg("rect", { class: "live-square", x, y, width: UNIT, height: UNIT })];
}

function drawGuides({ point: [y, x], value }) {
  const level = (PLOT * value) / MOST;
  return [
    svg("path", {
      class: "live-line live-guide",
      d: `M${across(x)} ${down(y)}V${BOTTOM + PLOT - level}M${across(x)} ${down(y)}H${RIGHT + level}`,
    }),
  ];
}

/** φ along the row and along the column, with the tangent that the gradient gives. */
function drawProfiles({ point, map, rule, value, slope, before }) {
  const scale = PLOT / MOST;
  const spots = [
    (place, height) => [RIGHT + scale * height, down(place)], // along y, values to the right
    (place, height) => [across(place), BOTTOM + PLOT - scale * height],
  ];
  return [1, 0].flatMap((axis) => {
    const spot = (place, height) =>
      spots[axis](place, height)
        .map((number) => number.toFixed(1))
        .join(" ");
    const curve = rule === "round" ? stairs(map, point, axis) : profile(map, SIZE, point, axis);
    const knots = [[-1.3, 0], ...curve, [SIZE[axis] + 0.3, 0]];
    const line = knots.map(([place, height]) => spot(place, height)).join("L");
    const piece = (side, rise) => `M${spot(point[axis], value)}L${spot(point[axis] + side, value + side * rise)}`;
    const [cx, cy] = spots[axis](point[axis], value);
    const parts = [svg("path", { class: "live-profile", d: `M${line}` })];
    if (slope[axis] !== before[axis])
      parts.push(svg("path", { class: "live-tangent live-left", d: piece(-0.55, before[axis]) }));
    const both = slope[axis] === before[axis] ? piece(-0.55, slope[axis]) : "";
    parts.push(svg("path", { class: "live-tangent", d: both + piece(0.55, slope[axis]) }));
    parts.push(svg("circle", { class: "live-dot", cx, cy, r: 5, style: "pointer-events: none" }));
    return parts;
  });
}

/** The vertices of the rounded value along one axis through a point. */
function stairs(map, point, axis) {
  return Array.from({ length: SIZE[axis] + 2 }, (_, n) => {
    const place = [...point];
    place[axis] = n - 1;
    const { value } = sampleNearest(map, SIZE, place);
    return [
      [n - 1.5, value],
      [n - 0.5, value],
    ];
  }).flat();
}

/** The gradient at the point: the direction of steepest ascent. */
function drawArrow({ point, slope }) {
  const length = Math.hypot(...slope);
  if (length < 0.05) return [];
  const [dy, dx] = slope.map((part) => part / length);
  const [from, to] = [11, 11 + 11 * length];
  const [x, y] = [across(point[1]), down(point[0])];
  const tip = [x + dx * (to + 8), y + dy * (to + 8)];
  const sides = [1, -1].map((side) => `${x + dx * to - side * 5 * dy},${y + dy * to + side * 5 * dx}`);
  return [
    svg("line", { class: "live-arrow", x1: x + dx * from, y1: y + dy * from, x2: x + dx * to, y2: y + dy * to }),
    svg("polygon", { class: "live-head", points: [tip.join(","), ...sides].join(" ") }),
  ];
}

// ------------------------------------------------------------------------------------------------ numbers

/** A pixel of the map, or the displacement of an entry of the table. */
function placeName(name, row, column) {
  if (name === "features") return `row ${row}, column ${column}`;
  return `${signed(row - 2, 0)} down, ${signed(column - 2, 0)} right`;
}

function readout({ point, name, map, rule, value, slope, corners: found, note }) {
  const rows = found.map(({ row, column, inside, weight }) => {
    const pixel = inside ? map[row * SIZE[1] + column] : 0;
    const full = rule === "round" ? 0 : (1 - Math.abs(point[0] - row)) * (1 - Math.abs(point[1] - column));
    return html(
      "tr",
      {},
      html("td", {}, inside ? placeName(name, row, column) : "outside"),
      html("td", { class: "live-where" }, fixed(inside ? weight : Math.max(full, 0), 3)),
      html("td", { class: "live-what" }, `× ${pixel}`),
      html("td", {}, fixed(weight * pixel)),
    );
  });
  const head = ["pixel", "weight", "", ""].map((word) => html("th", {}, word));
  const sum = [html("td", { colspan: 3 }, "sum φ"), html("td", { class: "live-what" }, fixed(value))];
  return [
    markup(
      "p",
      { class: "live-large live-number" },
      `<span><i class="live-where">p</i> = (${fixed(point[0])}, ${fixed(point[1])})</span>` +
        `<span>φ = <span class="live-what">${fixed(value)}</span></span>`,
    ),
    html(
      "table",
      { class: "live-table" },
      html("thead", {}, html("tr", {}, ...head)),
      html("tbody", {}, ...rows),
      html("tfoot", {}, html("tr", {}, ...sum)),
    ),
    markup(
      "p",
      { class: "live-number", style: "margin: .7rem 0 .5rem" },
      `<span class="live-slope">∂φ/∂<i>p</i> = (${signed(slope[0])}, ${signed(slope[1])})</span><br>` +
        (rule === "round" ? "" : "∂φ/∂<i>z</i> = the four weights"),
    ),
    html("p", { class: "live-note" }, note),
  ];
}
