/** Receptive field: choose a query and a system; the pixels that enter the query's output as keys or values. */

import { POINTS } from "./data/points.mjs";
import { axisNeighbors, axisWindow, clip, places, receptiveField } from "./kernel.mjs";
import { frame, handle, html, panel, set, slider, surface, svg } from "./ui.mjs";

export const title = "Receptive field of a query";

const SIZE = POINTS.size;
const COUNT = SIZE[0] * SIZE[1];

/** The systems: name, kind of receptive field with its parameters, number of keys, lines of the structure, caption. */
const SYSTEMS = {
  multi_head: { name: "plain attention", kind: "whole", keys: COUNT, says: "Every pixel is a key for every query." },
  pyramid: {
    name: "spatial reduction",
    kind: "whole",
    keys: 9,
    lines: { every: 4, from: 0 },
    says: "The whole map at a coarser resolution: one key per 4 × 4 pixels (PVT).",
  },
  window: {
    name: "window",
    kind: "window",
    w: 3,
    shift: 0,
    lines: { every: 3, from: 0 },
    says: "The window that contains the query. Other windows are not visible (Swin).",
  },
  shifted_window: {
    name: "shifted window",
    kind: "window",
    w: 3,
    shift: 1,
    lines: { every: 3, from: 1 },
    says: "Windows shifted by one pixel and cut at the border (every second layer of Swin).",
  },
  neighborhood: {
    name: "neighborhood",
    kind: "neighborhood",
    K: 3,
    dilation: 1,
    says: "The pixels around the query. At the border the square moves inwards.",
  },
  dilated: {
    name: "dilated neighborhood",
    kind: "neighborhood",
    K: 3,
    dilation: 3,
    says: "The same with dilation 3: two pixels are skipped between neighbors.",
  },
  deformable: {
    name: "deformable attention",
    kind: "points",
    says: "A grid of nine points, moved by the image. All queries share them: move the query, and they stay.",
  },
  deformable_groups: {
    name: "deformable, 3 groups",
    kind: "points",
    says: "One grid for each group of channels: three times nine points, shared by all queries.",
  },
  deform_conv: {
    name: "deformable convolution",
    kind: "points",
    says: "Nine taps around the query, each with an offset. One matrix per tap, no keys.",
  },
  ms_deform: {
    name: "Deformable DETR",
    kind: "points",
    says: "Three points for each of three heads, around the query. Their weights depend on the query alone.",
  },
  per_query: {
    name: "keys of each query",
    kind: "points",
    says: "Nine points around the query, each with an offset. The features at the points are the keys.",
  },
  dat_dcn: {
    name: "DAT-DCN",
    kind: "points",
    says: "Deformable DETR's attention as a block of DAT: three points per head.",
  },
};

export function mount(element, { system = "deformable" } = {}) {
  const { body, say, expose } = frame(element, "receptive_field", title);
  const state = { query: [3, 8], system, moved: 1 };
  const unit = 30;
  const main = new Picture(unit, 2);
  const label = html("h4", { class: "live-name" });
  const [says, numbers] = [html("p", { class: "live-note" }), html("p", { class: "live-large live-number" })];
  const motion = slider({
    label: "offsets",
    least: 0,
    most: 1,
    step: 0.05,
    value: 1,
    text: (share) => `${Math.round(100 * share)} %`,
    change: (moved) => change({ moved }),
  });
  const thumbnails = Object.entries(SYSTEMS).map(
    ([key, { name }]) => new Thumbnail(key, name, () => change({ system: key })),
  );
  const list = html(
    "div",
    { class: "live-list", role: "radiogroup", "aria-label": "system" },
    ...thumbnails.map(({ element: item }) => item),
  );
  list.addEventListener("keydown", (event) => step(event));
  body.append(
    html("div", { class: "live-main" }, main.drawing),
    html("div", { class: "live-about" }, label, numbers, says, motion.element),
    list,
  );

  const queryHandle = handle(main.drawing, {
    label: "Query",
    shape: svg("rect", { class: "live-query", x: -unit / 2, y: -unit / 2, width: unit, height: unit }),
    reach: unit * 0.7,
    drag: (spot) => change({ query: main.place(spot) }),
    nudge: ([y, x]) => change({ query: [state.query[0] + y, state.query[1] + x] }),
    hint: "Arrow keys move it by a pixel.",
  });
  surface(main.drawing, main.cells, (spot) => change({ query: main.place(spot) }));

  /** Arrow keys move through the list, as in any group of radio buttons. */
  function step(event) {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const keys = Object.keys(SYSTEMS);
    const next = (keys.indexOf(state.system) + move + keys.length) % keys.length;
    change({ system: keys[next] });
    thumbnails[next].element.focus();
  }

  function change(wanted) {
    Object.assign(state, wanted);
    state.query = state.query.map((place, axis) => clip(Math.round(place), 0, SIZE[axis] - 1));
    const all = Object.fromEntries(Object.keys(SYSTEMS).map((key) => [key, look(key, state)]));
    const chosen = all[state.system];
    main.paint(chosen, SYSTEMS[state.system].lines);
    queryHandle.at(main.spot(state.query));
    queryHandle.describe(`row ${state.query[0]}, column ${state.query[1]}`, state.query[0]);
    thumbnails.forEach((thumbnail) => thumbnail.show(all[thumbnail.key], state));
    label.textContent = SYSTEMS[state.system].name;
    says.textContent = SYSTEMS[state.system].says;
    const outside = chosen.outside ? `, ${chosen.outside} of them outside` : "";
    const what = chosen.points.length ? "points" : "keys";
    numbers.textContent = `${chosen.count} of ${COUNT} pixels, ${chosen.keys} ${what}${outside}`;
    motion.show(state.moved);
    motion.element.classList.toggle("live-idle", !chosen.points.length);
    motion.input.disabled = !chosen.points.length;
    say(
      `${SYSTEMS[state.system].name}: the query at row ${state.query[0]}, column ${state.query[1]} ` +
        `attends to ${chosen.count} of ${COUNT} pixels.`,
    );
    expose({
      size: SIZE,
      ...state,
      counts: Object.fromEntries(Object.entries(all).map(([key, { count }]) => [key, count])),
      seen: chosen.seen.map(Number),
      points: chosen.points,
    });
  }
  change({});
}

/** The receptive field of a query under a system. */
function look(key, { query, moved }) {
  const system = SYSTEMS[key];
  const moves = system.kind === "points";
  const [points, reference] = [moved, 0].map((share) => (moves ? pointsOf(key, query, share) : []));
  const seen = receptiveField(system, query, SIZE, points);
  const outside = points.filter((point) =>
    point.some((place, axis) => place < -0.5 || place > SIZE[axis] - 0.5),
  ).length;
  return {
    seen,
    points,
    reference,
    outside,
    count: seen.filter(Boolean).length,
    keys: points.length || system.keys || keysOf(system, query),
  };
}

function keysOf({ kind, w, shift, K, dilation }, query) {
  const along = (place, axis) =>
    kind === "window" ? axisWindow(place, SIZE[axis], w, shift) : axisNeighbors(place, SIZE[axis], K, dilation);
  return query.map((place, axis) => along(place, axis).length).reduce((a, b) => a * b);
}

/** A system's points for a query, moved by a fraction of their offsets. */
function pointsOf(key, query, moved) {
  const { shared, count, reference, points } = POINTS.systems[key];
  const first = shared ? 0 : 2 * count * (query[0] * SIZE[1] + query[1]);
  const start = (n, axis) => reference[2 * n + axis] / 100 + (shared ? 0 : query[axis]);
  const end = (n, axis) => (points[first + 2 * n + axis] + 0.5) / 100;
  const between = (n, axis) => (moved === 1 ? end(n, axis) : start(n, axis) + moved * (end(n, axis) - start(n, axis)));
  return Array.from({ length: count }, (_, n) => [between(n, 0), between(n, 1)]);
}

// ------------------------------------------------------------------------------------------------ drawing

const squares = (seen, unit, margin) =>
  places(SIZE)
    .filter((_, n) => seen[n])
    .map(([y, x]) => `M${margin + x * unit} ${margin + y * unit}h${unit}v${unit}h${-unit}z`)
    .join("");

function lattice(every, from, unit, margin) {
  const lines = [];
  for (let at = from; at <= SIZE[0]; at += every)
    if (at > 0 && at < SIZE[0]) lines.push(`M${margin} ${margin + at * unit}h${SIZE[1] * unit}`);
  for (let at = from; at <= SIZE[1]; at += every)
    if (at > 0 && at < SIZE[1]) lines.push(`M${margin + at * unit} ${margin}v${SIZE[0] * unit}`);
  return lines.join("");
}

/** The map, large, with the receptive field and the points that read it. */
class Picture {
  constructor(unit, margin) {
    [this.unit, this.margin] = [unit, margin];
    const [height, width] = SIZE.map((length) => length * unit);
    this.drawing = panel(width + 2 * margin, height + 2 * margin, "A map of 12 by 12 pixels with a query to move");
    const box = { x: margin, y: margin, width, height };
    this.cells = svg("g", {}, svg("rect", { class: "live-paper", ...box }));
    this.seen = svg("path", { class: "live-seen" });
    this.lines = svg("path", { class: "live-strong" });
    this.dots = svg("g", { "pointer-events": "none" });
    this.cells.append(
      this.seen,
      svg("path", { class: "live-faint", d: lattice(1, 0, unit, margin) }),
      this.lines,
      svg("rect", { class: "live-border live-strong", ...box }),
    );
    this.drawing.append(this.cells, this.dots);
  }

  spot(place) {
    return place.map((value) => this.margin + (value + 0.5) * this.unit);
  }

  place(spot) {
    return spot.map((value) => (value - this.margin) / this.unit - 0.5);
  }

  paint({ seen, points, reference }, lines) {
    set(this.seen, { d: squares(seen, this.unit, this.margin) });
    set(this.lines, { d: lines ? lattice(lines.every, lines.from, this.unit, this.margin) : "" });
    const near = points.filter((point) => point.every((place, axis) => place > -1.1 && place < SIZE[axis] + 0.1));
    const arms = points.map((point, n) => {
      const [[y, x], [toY, toX]] = [this.spot(reference[n]), this.spot(point)];
      return near.includes(point) ? `M${x.toFixed(1)} ${y.toFixed(1)}L${toX.toFixed(1)} ${toY.toFixed(1)}` : "";
    });
    this.dots.replaceChildren(
      svg("path", { class: "live-moved", d: arms.join("") }),
      ...near.map((point) => {
        const [cy, cx] = this.spot(point);
        return svg("circle", { class: "live-point", cx: cx.toFixed(1), cy: cy.toFixed(1), r: 5 });
      }),
    );
  }
}

/** A system's receptive field as a thumbnail, for selection. */
class Thumbnail {
  constructor(key, name, choose) {
    this.key = key;
    const unit = 6;
    const side = SIZE.map((length) => length * unit);
    this.seen = svg("path", { class: "live-seen" });
    this.query = svg("rect", { class: "live-here", width: unit, height: unit });
    this.count = html("span", { class: "live-number live-quiet" });
    const border = svg("rect", { class: "live-border", width: side[1], height: side[0] });
    const drawing = svg(
      "svg",
      { viewBox: `-1 -1 ${side[1] + 2} ${side[0] + 2}`, "aria-hidden": "true" },
      this.seen,
      this.query,
      border,
    );
    this.element = html(
      "button",
      { type: "button", class: "live-thumbnail", role: "radio" },
      drawing,
      html("span", {}, name),
      this.count,
    );
    this.element.addEventListener("click", choose);
    this.unit = unit;
  }

  show({ seen, count }, { query, system }) {
    const chosen = system === this.key;
    set(this.seen, { d: squares(seen, this.unit, 0) });
    set(this.query, { x: query[1] * this.unit, y: query[0] * this.unit });
    set(this.element, { "aria-checked": String(chosen), tabindex: chosen ? 0 : -1 });
    this.count.textContent = count;
  }
}
