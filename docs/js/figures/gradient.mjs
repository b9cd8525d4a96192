/** The gradient of the painting's error at a point: two paths, their sum, and steps along it. */

import { paint, paintGradient } from "./kernel.mjs";
import {
  cells,
  easel,
  fromDrawing,
  GRID,
  nameOf,
  onMap,
  photograph,
  pictureWith,
  thousandths,
  toDrawing,
} from "./picture.mjs";
import { button, choice, fixed, frame, handles, html, markup, svg } from "./ui.mjs";

export const title = "The gradient that reaches a point";

const PICTURE = pictureWith(10, 4); // colors count less than in the painting above, nearness more
const RATE = 2000; // pixels² of a step for one unit of the gradient
const LONGEST = 1; // pixels that a point moves in a step, at most
const ARROW = 110; // drawing units of the longest arrow
const PATHS = { both: "both", features: "only the colors", bias: "only the bias" };

export function mount(element, { chosen = 14 } = {}) {
  const { body, say, expose, glide } = frame(element, "gradient", title);
  const { drawing, element: left } = photograph("A photograph of a cat with 24 points, and arrows at one of them");
  const arrows = svg("g", { "pointer-events": "none" });
  drawing.append(cells());
  const { all, select } = handles(drawing, {
    count: GRID.length,
    label: nameOf,
    shape: () => svg("circle", { class: "live-dot", r: 6 }),
    reach: 24,
    drag: (n, spot) => place(n, fromDrawing(spot)),
    nudge: (n, step, fine) =>
      place(
        n,
        state.points[n].map((at, axis) => at + step[axis] * (fine ? 0.1 : 1)),
      ),
    focus: (n) => change({ chosen: n }),
  });
  drawing.append(arrows);
  const easels = easel("The painting");
  const wrong = easel("Where the painting is wrong");
  const path = choice({
    label: "follow",
    options: Object.entries(PATHS),
    value: "both",
    change: (name) => change({ path: name }),
  });
  const legend = markup(
    "p",
    { class: "live-legend" },
    '<span class="live-what">through the colors</span> <span class="live-slope">through the bias</span> <span><b>their sum</b></span>',
  );
  const numbers = html("p", { class: "live-score live-number" });
  body.append(
    html("div", { class: "live-part" }, left, legend),
    html(
      "div",
      { class: "live-part" },
      html("div", { class: "live-stack" }, easels.element, wrong.element),
      markup("p", { class: "live-legend live-quiet" }, "the painting; orange where it is wrong"),
    ),
    html(
      "div",
      { class: "live-wide live-controls" },
      html(
        "div",
        { class: "live-row" },
        button("step", () => walk(1, [state.chosen])),
        button("30 steps of all points", () => walk(30)),
        button("back to the grid", () => change({ points: GRID })),
      ),
      path.element,
      numbers,
    ),
  );
  const state = { points: GRID, chosen, path: "both" };

  function place(n, at) {
    change({ points: state.points.map((point, other) => (other === n ? onMap(at) : point)), chosen: n });
  }

  /** Walk down the gradient; `who` are the points that move. */
  function walk(steps, who = GRID.map((_, n) => n)) {
    let done = 0;
    glide((share) => {
      let { points } = state;
      for (; done < Math.round(share * steps); done += 1) points = step(points, state.path, who);
      if (points !== state.points) change({ points });
    }, 45 * steps);
  }

  function change(wanted) {
    Object.assign(state, wanted);
    select(state.chosen);
    const result = paint(PICTURE, state.points);
    const { features, bias } = paintGradient(PICTURE, state.points);
    easels.show(result);
    wrong.showErrors(result);
    path.show(state.path);
    all.forEach(({ element: group, at, describe }, n) => {
      const [y, x] = state.points[n];
      at(toDrawing(state.points[n]));
      describe(`row ${fixed(y, 1)}, column ${fixed(x, 1)}`, y);
      group.classList.toggle("live-chosen", n === state.chosen);
    });
    arrows.replaceChildren(...drawArrows(state, features, bias));
    numbers.innerHTML = `<span class="live-quiet">error</span> <b>${thousandths(result.error)}</b> ‰`;
    say(`The error of the painting is ${thousandths(result.error)} per thousand.`);
    expose({ ...state, error: result.error, features, bias });
  }
  change({});
}

/** One step of gradient descent, along one path or both, no longer than LONGEST. */
function step(points, path, who) {
  const { features, bias } = paintGradient(PICTURE, points);
  return points.map((point, n) => {
    if (!who.includes(n)) return point;
    const slope = sum(path === "bias" ? [0, 0] : features[n], path === "features" ? [0, 0] : bias[n]);
    const length = RATE * Math.hypot(...slope);
    const scale = length > LONGEST ? LONGEST / length : 1;
    return onMap(point.map((place, axis) => place - RATE * scale * slope[axis]));
  });
}

const sum = (one, other) => one.map((part, axis) => part + other[axis]);

/** Descent directions at the chosen point, in one scale. */
function drawArrows({ points, chosen }, features, bias) {
  const parts = [
    ["live-what", features[chosen]],
    ["live-slope", bias[chosen]],
    ["live-ink", sum(features[chosen], bias[chosen])],
  ];
  const longest = Math.max(...parts.map(([, slope]) => Math.hypot(...slope)), 1e-12);
  const [y, x] = toDrawing(points[chosen]);
  return parts.flatMap(([kind, slope]) => {
    const length = (ARROW * Math.hypot(...slope)) / longest;
    if (length < 4) return [];
    const [dy, dx] = slope.map((part) => -part / Math.hypot(...slope));
    const [from, to] = [9, 9 + length];
    const point = (along, across) =>
      `${(x + dx * along - dy * across).toFixed(1)},${(y + dy * along + dx * across).toFixed(1)}`;
    return [
      svg(
        "g",
        { class: `live-vector ${kind}` },
        svg("path", { class: "live-halo", d: `M${point(from, 0)}L${point(to, 0)}` }),
        svg("path", { d: `M${point(from, 0)}L${point(to, 0)}` }),
        svg("polygon", { points: [point(to + 15, 0), point(to - 2, 9), point(to - 2, -9)].join(" ") }),
      ),
    ];
  });
}
