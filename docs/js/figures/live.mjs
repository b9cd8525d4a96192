/** `dat_spot` in the page: drag an object over a photograph, and the points of the network follow it. */

import { NETWORK } from "./data/network.mjs";
import { SCENERY } from "./data/scenery.mjs";
import { changedFeatures, clip, parameters, spotAnswers, spotFeatures } from "./kernel.mjs";
import { button, choice, fixed, frame, handle, html, panel, slider, surface, svg } from "./ui.mjs";

export const title = "A trained network in the page";

const SIDE = 160; // pixels of the network's input
const SHOWN = 3; // canvas pixels for one of them
const UNIT = 3; // drawing units for one of them
const MAP = 4; // input pixels for one position of the map
const NOTHING = "nothing";

/** A picture from an address, once it can be drawn. */
async function picture(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

const canvas = (side) => html("canvas", { width: side, height: side, class: "live-raster" });

export function mount(element) {
  const { body, say, expose, glide } = frame(element, "network", title);
  const params = parameters(NETWORK);
  const shown = canvas(SIDE * SHOWN);
  const input = canvas(SIDE);
  const context = input.getContext("2d", { willReadFrequently: true });
  const drawing = panel(SIDE * UNIT, SIDE * UNIT, "A photograph with an object to drag, and the points of the network");
  const ground = svg("rect", { width: SIDE * UNIT, height: SIDE * UNIT, fill: "transparent" });
  const marks = svg("g", { "pointer-events": "none" });
  drawing.append(ground, marks);
  surface(drawing, ground, (place) => aim(place.map((at) => at / UNIT)));
  const ring = svg("circle", { class: "live-thing-ring" });
  const grip = handle(drawing, {
    label: "Object",
    shape: ring,
    reach: 40,
    drag: (place) => aim(place.map((at) => at / UNIT)),
    nudge: (step, fine) => aim(state.place.map((at, axis) => at + step[axis] * (fine ? 1 : 6))),
  });
  const answers = html("div", { class: "live-answers" });
  const words = html("p", { class: "live-note" });
  const rate = html("p", { class: "live-quiet live-number", style: "margin: 0" });
  const things = Object.entries({ ...SCENERY.objects, [NOTHING]: "" }).map(([name, address]) =>
    thing(name, address, () => change({ kind: name })),
  );
  const grounds = Object.entries(SCENERY.photographs).map(([name, address]) =>
    thing(name, address, () => lay(name, address), "live-wide-thing"),
  );
  const file = html("input", {
    type: "file",
    accept: "image/*",
    class: "live-spoken",
    "aria-label": "your own picture",
    tabindex: -1,
  });
  file.addEventListener("change", () => file.files[0] && own(file.files[0]));
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    const [dropped] = event.dataTransfer.files;
    if (dropped?.type.startsWith("image/")) own(dropped);
  });
  const moving = choice({
    label: "offsets",
    options: [
      ["own", "of the network"],
      ["zero", "zero"],
    ],
    value: "own",
    change: (offsets) => change({ offsets }),
  });
  const size = slider({
    label: "size",
    least: 8,
    most: 20,
    step: 0.5,
    value: 13,
    text: (radius) => `${Math.round(2 * radius)} pixels`,
    change: (radius) => change({ radius }),
  });
  body.append(
    html(
      "div",
      { class: "live-part" },
      html("div", { class: "live-stack live-scene" }, shown, drawing),
      html(
        "div",
        { class: "live-row" },
        html("div", { class: "live-things", role: "group", "aria-label": "photograph" }, ...grounds),
        button("your own picture …", () => file.click()),
        file,
      ),
    ),
    html(
      "div",
      { class: "live-part" },
      html("div", { class: "live-things", role: "group", "aria-label": "object" }, ...things),
      size.element,
      moving.element,
      answers,
      words,
      html("div", { class: "live-row" }, button("let it wander", wander)),
      rate,
    ),
  );
  const state = { kind: "ladybug", place: [80, 80], radius: 13, offsets: "own", photograph: "chelsea" };
  const dark = new Uint8ClampedArray(4 * SIDE * SIDE);
  let last = { pixels: dark, features: spotFeatures(dark, SIDE, params, NETWORK) };
  let background;
  const pictures = {};
  const spent = []; // milliseconds of the last passes

  function aim(place) {
    change({ place: place.map((at) => clip(at, 4, SIDE - 4)) });
  }

  /** The reader's own picture: it stays in the page. */
  async function own(chosen) {
    const address = URL.createObjectURL(chosen);
    try {
      await lay("own", address);
    } catch {
      words.textContent = "This file is not a picture that the browser can read.";
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  async function lay(name, address) {
    background = middle(await picture(address));
    change({ photograph: name });
  }

  /** Move the object along a curve for some seconds. */
  function wander() {
    const begin = performance.now();
    let passes = 0;
    const [y, x] = state.place;
    glide((share) => {
      const turn = 2 * Math.PI * share;
      aim([
        y + (80 - y) * Math.sin(turn / 2) + 46 * Math.sin(2 * turn),
        x + (80 - x) * Math.sin(turn / 2) + 56 * Math.sin(3 * turn),
      ]);
      passes += 1;
      if (share === 1)
        expose({ ...JSON.parse(element.dataset.state), rate: passes / ((performance.now() - begin) / 1000) });
    }, 8000);
  }

  function change(wanted) {
    Object.assign(state, wanted);
    if (background) draw();
  }

  /** Draw the scene on a canvas. */
  function compose(target, scale) {
    const pen = target.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(background, 0, 0, SIDE * scale, SIDE * scale);
    if (state.kind === NOTHING) return;
    const [y, x] = state.place.map((at) => at * scale);
    const radius = state.radius * scale;
    pen.drawImage(pictures[state.kind], x - radius, y - radius, 2 * radius, 2 * radius);
  }

  function draw() {
    compose(shown, SHOWN);
    compose(input, 1);
    const pixels = context.getImageData(0, 0, SIDE, SIDE).data;
    const begin = performance.now();
    last = changedFeatures(last, pixels, SIDE, params, NETWORK);
    const result = spotAnswers(last.features, params, state.offsets === "own");
    spent.push(performance.now() - begin);
    if (spent.length > 10) spent.shift();
    const milliseconds = [...spent].sort((a, b) => a - b)[Math.floor(spent.length / 2)];
    const here = state.kind !== NOTHING;
    grip.element.classList.toggle("live-idle", !here);
    grip.at(state.place.map((at) => at * UNIT));
    grip.describe(`row ${Math.round(state.place[0])}, column ${Math.round(state.place[1])}`, state.place[0]);
    ring.setAttribute("r", here ? state.radius * UNIT + 3 : 0);
    marks.replaceChildren(...drawPoints(result));
    const shares = meanAnswers(result, state);
    answers.replaceChildren(...drawAnswers(shares));
    moving.show(state.offsets);
    size.show(state.radius);
    [...things, ...grounds].forEach((each) =>
      each.setAttribute("aria-pressed", String([state.kind, state.photograph].includes(each.name))),
    );
    const on = result.points.flat().filter((point) => distance(point, state) < state.radius).length;
    const still =
      result.references.filter((point) => distance(point, state) < state.radius).length * result.points.length;
    words.textContent = here
      ? `${on} of ${result.points.flat().length} points are on the object; without offsets ${still} would be.`
      : "There is no object: the right answer is nothing.";
    rate.textContent = `one pass of the network: ${Math.round(milliseconds)} ms`;
    const best = Object.entries(shares).sort((a, b) => b[1] - a[1])[0];
    say(`The network answers ${best[0]}, ${Math.round(100 * best[1])} percent. ${words.textContent}`);
    expose({ ...state, points: result.points, shares, on, still, milliseconds });
  }

  (async () => {
    const loaded = await Promise.all(
      Object.entries(SCENERY.objects).map(async ([name, address]) => [name, cut(await picture(address))]),
    );
    Object.assign(pictures, Object.fromEntries(loaded));
    for (let n = 0; n < 3; n += 1) spotAnswers(spotFeatures(dark, SIDE, params, NETWORK), params); // compiled by then
    background = middle(await picture(SCENERY.photographs[state.photograph]));
    draw();
  })();
}

/** The middle square of a picture, as a canvas. */
function middle(image) {
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  const [left, top] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
  const square = canvas(SIDE * SHOWN);
  const pen = square.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, left, top, side, side, 0, 0, square.width, square.height);
  return square;
}

/** A button with a picture of an object or a photograph. */
function thing(name, address, click, kind = "") {
  const label = address ? html("img", { src: address, alt: "" }) : "–";
  const element = html(
    "button",
    { type: "button", class: `live-thing ${kind}`, "aria-label": name, title: name, name },
    label,
  );
  element.addEventListener("click", click);
  return element;
}

/** The square around the opaque part of a picture, as the package cuts it. */
function cut(image) {
  const whole = html("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const pen = whole.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const { data } = pen.getImageData(0, 0, whole.width, whole.height);
  let [top, left, bottom, right] = [whole.height, whole.width, 0, 0];
  for (let y = 0; y < whole.height; y += 1)
    for (let x = 0; x < whole.width; x += 1)
      if (data[4 * (y * whole.width + x) + 3] > 5)
        [top, left, bottom, right] = [
          Math.min(top, y),
          Math.min(left, x),
          Math.max(bottom, y + 1),
          Math.max(right, x + 1),
        ];
  const half = Math.max(right - left, bottom - top) / 2 + 2;
  const square = canvas(128);
  square
    .getContext("2d")
    .drawImage(whole, (left + right) / 2 - half, (top + bottom) / 2 - half, 2 * half, 2 * half, 0, 0, 128, 128);
  return square;
}

/** Input pixels from a point of the map, or a position, to the object's center. */
function distance([y, x], { place, kind }) {
  if (kind === NOTHING) return Infinity;
  return Math.hypot(MAP * (y + 0.5) - place[0], MAP * (x + 0.5) - place[1]);
}

/** The mean probability of each class over the positions off the object. */
function meanAnswers({ size, classes, probabilities }, state) {
  const sums = Array(classes).fill(0);
  let count = 0;
  for (let position = 0; position < size[0] * size[1]; position += 1) {
    const place = [Math.floor(position / size[1]), position % size[1]];
    if (distance(place, state) < state.radius + 3) continue;
    count += 1;
    for (let n = 0; n < classes; n += 1) sums[n] += probabilities[position * classes + n];
  }
  return Object.fromEntries(NETWORK.classes.map((name, n) => [name, sums[n] / count]));
}

function drawAnswers(shares) {
  const ranked = Object.entries(shares)
    .sort((a, b) => b[1] - a[1])
    .slice(0, 3);
  return ranked.flatMap(([name, share], n) => {
    const bar = html("span", {});
    bar.style.width = `${100 * share}%`;
    return [
      html("b", { class: n ? "" : "live-best" }, name),
      html("div", { class: "live-track" }, bar),
      html("output", {}, `${fixed(100 * share, 0)} %`),
    ];
  });
}

/** The points of both groups with the attention that they receive, and where they would be without offsets. */
function drawPoints({ points, references, received }) {
  const at = (point) => point.map((place) => MAP * (place + 0.5) * UNIT);
  const homes = references.map((point) => {
    const [cy, cx] = at(point);
    return svg("circle", { class: "live-home", cx, cy, r: 4 });
  });
  const moved = points.flatMap((group, g) =>
    group.flatMap((point, n) => {
      const [[y, x], [cy, cx]] = [at(references[n]), at(point)];
      return [
        svg("path", { class: "live-tether", d: `M${x} ${y}L${cx.toFixed(1)} ${cy.toFixed(1)}` }),
        svg("circle", {
          class: `live-key ${g ? "live-two" : "live-one"}`,
          cx,
          cy,
          r: 3.5 + 26 * Math.sqrt(received[g][n] / 2),
        }),
      ];
    }),
  );
  return [...homes, ...moved];
}
