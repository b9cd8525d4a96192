/** The photograph of the introduction: its map, its 24 points, and what its figures draw in common. */

import { LESSON } from "./data/lesson.mjs";
import { PHOTO } from "./data/photo.mjs";
import { clip, CONVENTIONS, pictureOf, places, referencePoints, toPixels } from "./kernel.mjs";
import { html, panel, raster, svg } from "./ui.mjs";

export const SIZE = LESSON.size;
export const KEYS = LESSON.keys;
export const STRIDE = SIZE[0] / KEYS[0]; // pixels of the map for one key cell
export const UNIT = 10; // drawing units per pixel of the map
const [HEIGHT, WIDTH] = SIZE.map((length) => length * UNIT);

const bytes = Uint8Array.from(atob(LESSON.pixels), (letter) => letter.charCodeAt(0));
/** The map, for an attention of some sharpness whose bias decreases within `near` pixels. */
export const pictureWith = (sharpness, near) => pictureOf(bytes, SIZE, sharpness, near);
export const PICTURE = pictureWith(LESSON.sharpness, LESSON.near);

/** Points in pixels of the map, [y, x]: those of the grid, and those that the first notebook's layer has learned. */
export const GRID = referencePoints(KEYS, CONVENTIONS.CELL_CENTER).map((point) =>
  point.map((place, axis) => toPixels(place, SIZE[axis], CONVENTIONS.CELL_CENTER)),
);
export const LEARNED = LESSON.learned;

/** The offset network's result in each cell: what the filters found, and the raw offset as their weighted sum. */
export const ACTIVATED = LESSON.activated;
export const POINTWISE = LESSON.pointwise;
export const RAW = ACTIVATED.map((found) =>
  POINTWISE.map((weights) => weights.reduce((sum, weight, n) => sum + weight * found[n], 0)),
);

/** A position in the drawing, [y, x], and back. */
export const toDrawing = (point) => point.map((place) => (place + 0.5) * UNIT);
export const fromDrawing = (spot) => spot.map((place) => place / UNIT - 0.5);

/** The point on the map that is nearest to a position. */
export const onMap = (point) => point.map((place, axis) => clip(place, 0, SIZE[axis] - 1));

/** The pixel [row, column] that is nearest to a position. */
export const nearestPixel = (point) => onMap(point).map(Math.round);

/** A color of the planes, minus 1/2 to 1/2, for a style. */
export const paintOf = (color) =>
  `rgb(${color
    .slice(0, 3)
    .map((part) => Math.round(255 * (part + 0.5)))
    .join(" ")})`;

/** The color of a pixel [row, column]. */
export const colorAt = ([row, column]) => PICTURE.planes.slice(0, 3).map((plane) => plane[row * SIZE[1] + column]);

/** The photograph as a drawing area; `above` elements lie between it and the drawing. */
export function photograph(label, ...above) {
  const drawing = panel(WIDTH, HEIGHT, label);
  const shown = html("img", { src: PHOTO.address, alt: "", class: "live-raster" });
  return { drawing, element: html("div", { class: "live-stack" }, shown, ...above, drawing) };
}

/** A layer over the photograph: `light(pixel)` in 0 … 1 is dark at 0 and glows at 1. */
export function shade() {
  const { element, fill } = raster(SIZE, { "aria-hidden": true });
  const [dark, glow] = [
    [8, 14, 20, 165],
    [255, 170, 60, 190],
  ];
  const mix = (share) => dark.map((part, n) => part + share * (glow[n] - part));
  return { element, cast: (light) => fill((pixel) => mix(light(pixel))) };
}

/** The cells of the key grid, as lines. */
export function cells() {
  const lines = [];
  for (let row = 1; row < KEYS[0]; row += 1) lines.push(`M0 ${row * STRIDE * UNIT}h${WIDTH}`);
  for (let column = 1; column < KEYS[1]; column += 1) lines.push(`M${column * STRIDE * UNIT} 0v${HEIGHT}`);
  return svg("path", { class: "live-cells", d: lines.join("") });
}

/** A painting: the canvas, and a function that shows the result of `paint`. */
export function easel(label) {
  const { element, fill } = raster(SIZE, { role: "img", "aria-label": label });
  const byte = (plane, pixel) => 255 * (plane[pixel] + 0.5);
  return {
    element,
    show: ({ colors }) => fill((pixel) => [...colors.map((plane) => byte(plane, pixel)), 255]),
    /** Show where the painting is wrong: the square root of each pixel's error. */
    showErrors: ({ errors }) =>
      fill((pixel) => [213, 94, 0, Math.min(190, 300 * Math.max(Math.sqrt(errors[pixel]) - 0.08, 0))]),
  };
}

/** The name of a point for a screen reader. */
export const nameOf = (n) =>
  `Point ${places(KEYS)
    [n].map((index) => index + 1)
    .join(", ")}`;

/** Error of a painting in thousandths. */
export const thousandths = (error) => (1000 * error).toFixed(1);
