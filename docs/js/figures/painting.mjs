/** The painting: drag 24 points over a photograph, and see the photograph painted from what they read. */

import { paint, readings } from "./kernel.mjs";
import {
  cells,
  easel,
  fromDrawing,
  GRID,
  LEARNED,
  nameOf,
  onMap,
  paintOf,
  photograph,
  PICTURE,
  thousandths,
  toDrawing,
} from "./picture.mjs";
import { choice, fixed, frame, handles, html, markup, svg } from "./ui.mjs";

export const title = "A photograph painted from 24 readings";

const STARTS = { grid: GRID, learned: LEARNED };

export function mount(element, { start = "grid" } = {}) {
  const { body, say, expose, glide } = frame(element, "painting", title);
  const { drawing, element: left } = photograph("A photograph of a cat with 24 points to drag");
  const easels = easel("The photograph, painted from the colors at the 24 points");
  drawing.append(cells());
  const { all, select } = handles(drawing, {
    count: GRID.length,
    label: nameOf,
    shape: () => svg("circle", { class: "live-bead", r: 11 }),
    reach: 24,
    drag: (n, spot) => move(n, fromDrawing(spot)),
    nudge: (n, step, fine) =>
      move(
        n,
        state.points[n].map((place, axis) => place + step[axis] * (fine ? 0.1 : 1)),
      ),
    focus: (n) => change({ chosen: n }),
  });
  const places = choice({
    label: "points",
    options: [
      ["grid", "on a grid"],
      ["learned", "learned"],
      ["yours", "yours"],
    ],
    value: start,
    change: (mode) => travel(mode),
  });
  const score = markup("p", { class: "live-score live-number" }, "");
  body.append(
    html("div", { class: "live-part" }, left),
    html("div", { class: "live-part" }, easels.element),
    html("div", { class: "live-wide live-controls" }, places.element, score),
  );

  const state = { mode: start, points: STARTS[start].map((point) => [...point]), chosen: 8 };
  let yours = state.points;

  /** Move one point by hand. */
  function move(n, place) {
    const points = state.points.map((point) => [...point]);
    points[n] = onMap(place);
    yours = points;
    change({ points, mode: "yours", chosen: n });
  }

  function travel(mode) {
    const [from, to] = [state.points, STARTS[mode] ?? yours];
    state.mode = mode;
    glide((share) => {
      const between = (n, axis) => (share < 1 ? from[n][axis] + share * (to[n][axis] - from[n][axis]) : to[n][axis]);
      change({ points: from.map((_, n) => [between(n, 0), between(n, 1)]) });
    }, 900);
  }

  function change(wanted) {
    Object.assign(state, wanted);
    const read = readings(PICTURE, state.points);
    const result = paint(PICTURE, state.points, read);
    easels.show(result);
    all.forEach(({ element: group, at, describe }, n) => {
      const [y, x] = state.points[n];
      at(toDrawing(state.points[n]));
      describe(`row ${fixed(y, 1)}, column ${fixed(x, 1)}`, y);
      group.classList.toggle("live-chosen", n === state.chosen);
      group.querySelector(".live-bead").style.fill = paintOf(read[n].value);
    });
    places.show(state.mode);
    score.innerHTML = `<span class="live-quiet">error</span> <b>${thousandths(result.error)}</b> ‰`;
    say(`The error of the painting is ${thousandths(result.error)} per thousand.`);
    expose({ ...state, error: result.error, colors: result.colors.map((plane) => plane[15 * 60 + 23]) });
  }
  select(state.chosen);
  change({});
}
