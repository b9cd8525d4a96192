/**
 * Shared parts of the live figures: elements, handles for mouse, touch and keys, controls, numbers as text.
 *
 * A figure draws into panels (SVG with a fixed viewBox), lets handles change its state, and then redraws. Colors,
 * fonts and layout are in docs/css/figures.css.
 */

import { clip } from "./kernel.mjs";

const SVG = "http://www.w3.org/2000/svg";

// ------------------------------------------------------------------------------------------------ elements

/** Set attributes; `undefined` and `false` remove one. */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

/** An SVG element. Children may be strings. */
export function svg(tag, attributes = {}, ...children) {
  const element = set(document.createElementNS(SVG, tag), attributes);
  element.append(...children.flat());
  return element;
}

/** An HTML element. Children may be strings. */
export function html(tag, attributes = {}, ...children) {
  const element = set(document.createElement(tag), attributes);
  element.append(...children.flat());
  return element;
}

/** An HTML element from markup that we write ourselves, such as `<i>p</i>`. */
export function markup(tag, attributes, content) {
  const element = html(tag, attributes);
  element.innerHTML = content;
  return element;
}

/** A drawing area of `width` × `height` units, as wide as its container. */
export function panel(width, height, label, attributes = {}) {
  return svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "live-panel",
    role: "group",
    "aria-label": label,
    ...attributes,
  });
}

/** A canvas of one picture element per pixel of a map [height, width], as wide as its container. */
export function raster([height, width], attributes = {}) {
  const element = html("canvas", { width, height, class: "live-raster", ...attributes });
  const context = element.getContext("2d");
  /** Paint all pixels; `color(pixel)` returns red, green, blue and alpha in 0 … 255. */
  const fill = (color) => {
    const image = context.createImageData(width, height);
    for (let pixel = 0; pixel < height * width; pixel += 1) image.data.set(color(pixel), 4 * pixel);
    context.putImageData(image, 0, 0);
  };
  return { element, fill };
}

/** Empty the container of a figure and set up its frame. */
export function frame(element, name, label) {
  element.replaceChildren();
  element.classList.add("live", `live-${name}`);
  set(element, { role: "group", "aria-label": label });
  const spoken = html("div", { class: "live-spoken", "aria-live": "polite" });
  let waiting;
  /** Announce a sentence to a screen reader once the figure stops changing. */
  const say = (sentence) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => (spoken.textContent = sentence), 500);
  };
  /** Expose the figure's state to tests. */
  const expose = (state) => (element.dataset.state = JSON.stringify(state));
  let moving = 0;
  /** Call `step(share)` with shares from 0 to 1 over some time, until a key, the pointer or another animation stops it. */
  const glide = (step, milliseconds = 450) => {
    const mine = (moving += 1);
    const begin = performance.now();
    const next = (now) => {
      if (mine !== moving) return;
      const share = clip((now - begin) / milliseconds, 0, 1);
      step(share < 1 ? share * share * (3 - 2 * share) : 1);
      if (share < 1) requestAnimationFrame(next);
    };
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) step(1);
    else requestAnimationFrame(next);
  };
  for (const kind of ["pointerdown", "keydown"]) element.addEventListener(kind, () => (moving += 1), true);
  const body = html("div", { class: "live-body" });
  element.append(body, spoken);
  return { body, say, expose, glide };
}

// ------------------------------------------------------------------------------------------------ handles

const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The position of an event, in units of a panel. */
function place(panel, event) {
  const matrix = panel.getScreenCTM().inverse();
  const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
  return [y, x];
}

/**
 * A group that can be dragged, and moved with the arrow keys while it has the focus.
 *
 * `drag([y, x])` receives positions in units of the panel, `nudge([down, right], fine)` the arrow keys (fine with
 * shift). `shape` are its visible elements, drawn around (0, 0). `at([y, x])` sets its position, `describe` its label.
 */
export function handle(
  panel,
  { label, shape, drag, nudge, reach = 20, focus = () => {}, hint = "Arrow keys move it, finely with shift." },
) {
  const group = svg(
    "g",
    { class: "live-handle", tabindex: 0, role: "slider", "aria-label": `${label}. ${hint}`, "aria-valuenow": 0 },
    svg("circle", { class: "live-hit", r: reach }),
    svg("circle", { class: "live-ring", r: Math.min(reach, 14) }),
    shape,
  );
  let [center, grabbed] = [[0, 0], null];
  group.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    const [y, x] = place(panel, event);
    grabbed = [center[0] - y, center[1] - x];
    group.setPointerCapture(event.pointerId);
    group.classList.add("live-grabbed");
    group.focus({ preventScroll: true });
    event.preventDefault();
    event.stopPropagation();
  });
  group.addEventListener("pointermove", (event) => {
    if (!grabbed) return;
    const [y, x] = place(panel, event);
    drag([y + grabbed[0], x + grabbed[1]]);
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    group.addEventListener(end, () => {
      grabbed = null;
      group.classList.remove("live-grabbed");
    });
  }
  group.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    nudge(KEYS[event.key], event.shiftKey);
  });
  group.addEventListener("focus", focus);
  panel.append(group);
  return {
    element: group,
    at([y, x]) {
      center = [y, x];
      set(group, { transform: `translate(${round(x)} ${round(y)})` });
    },
    describe: (text, value = 0) => set(group, { "aria-valuetext": text, "aria-valuenow": round(value) }),
  };
}

/** Let a click or tap on a shape move something to that position; a mouse may continue by dragging. */
export function surface(panel, shape, drag) {
  let held = false;
  shape.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button) return;
    held = true;
    shape.setPointerCapture(event.pointerId);
    drag(place(panel, event));
    event.preventDefault();
  });
  shape.addEventListener("pointermove", (event) => held && drag(place(panel, event)));
  for (const end of ["pointerup", "pointercancel"]) shape.addEventListener(end, () => (held = false));
  shape.addEventListener("click", (event) => drag(place(panel, event)));
  shape.classList.add("live-surface");
}

/**
 * Handles of many points with one stop for the tab key: page up and page down select another point.
 *
 * `drag(n, [y, x])` receives positions in units of the panel, `nudge(n, [down, right], fine)` the arrow keys.
 */
export function handles(panel, { count, label, shape, reach, drag, nudge, focus = () => {} }) {
  const all = Array.from({ length: count }, (_, n) =>
    handle(panel, {
      label: label(n),
      shape: shape(n),
      reach,
      drag: (spot) => drag(n, spot),
      nudge: (step, fine) => nudge(n, step, fine),
      focus: () => {
        select(n);
        focus(n);
      },
      hint: "Arrow keys move it, finely with shift; page up and page down select another point.",
    }),
  );
  let chosen = 0;
  const select = (n) => {
    chosen = n;
    all.forEach(({ element }, other) => set(element, { tabindex: other === n ? 0 : -1 }));
  };
  panel.addEventListener("keydown", (event) => {
    const step = { PageUp: -1, PageDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    all[(chosen + step + count) % count].element.focus();
  });
  select(0);
  return { all, select };
}

// ------------------------------------------------------------------------------------------------ controls

let groups = 0;

/** A row of radio buttons. `options` are [value, label]. */
export function choice({ label, options, value, change }) {
  const name = `live-choice-${(groups += 1)}`;
  const inputs = options.map(([option]) =>
    html("input", { type: "radio", name, value: option, checked: option === value }),
  );
  const buttons = inputs.map((input, n) => {
    input.addEventListener("change", () => change(input.value));
    return html("label", {}, input, html("span", {}, options[n][1]));
  });
  const element = html("fieldset", { class: "live-choice" }, html("legend", {}, label), ...buttons);
  const show = (chosen) => inputs.forEach((input) => (input.checked = input.value === chosen));
  return { element, show };
}

/** A slider with its value next to it. */
export function slider({ label, least, most, step, value, text, change }) {
  const input = html("input", { type: "range", min: least, max: most, step, value });
  const output = html("output", { class: "live-number" });
  const show = (number) => {
    input.value = number;
    output.textContent = text(number);
    set(input, { "aria-valuetext": text(number) });
    input.style.setProperty("--share", `${(100 * (number - least)) / (most - least)}%`);
  };
  input.addEventListener("input", () => change(Number(input.value)));
  show(value);
  return { element: html("label", { class: "live-slider" }, html("span", {}, label), input, output), input, show };
}

/** A button. */
export function button(label, click) {
  const element = html("button", { type: "button", class: "live-button" }, label);
  element.addEventListener("click", click);
  return element;
}

// ------------------------------------------------------------------------------------------------ text

/** A number rounded for an attribute. */
export function round(value, digits = 2) {
  return Number(value.toFixed(digits)) + 0; // no -0
}

/** A number with a fixed number of decimals and a true minus sign. */
export function fixed(value, digits = 2) {
  return round(value, digits).toFixed(digits).replace("-", "−");
}

/** The same with its sign, unless it is zero. */
export function signed(value, digits = 2) {
  return (round(value, digits) > 0 ? "+" : "") + fixed(value, digits);
}

/** A whole number in groups of three digits. */
export function grouped(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** A large number with three digits and a prefix: 80.7 M. */
export function prefixed(value, unit = "") {
  const step = Math.min(Math.max(Math.floor(Math.log10(Math.max(value, 1)) / 3), 0), 4);
  const short = value / 1000 ** step;
  const digits = step === 0 ? 0 : short < 10 ? 2 : short < 100 ? 1 : 0;
  return `${short.toFixed(digits)} ${["", "k", "M", "G", "T"][step]}${unit}`;
}
