// node run_network.mjs IMAGES.json KERNEL.mjs NETWORK.mjs
//
// Run the network of the page on every image {pixels, side, moving}, each as a change of the one before if it has the
// same size. Print a JSON list of its outputs, flat, and the largest difference from features that are computed again.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [images, kernel, network] = process.argv.slice(2);
const { changedFeatures, parameters, spotAnswers, spotFeatures } = await import(pathToFileURL(kernel));
const { NETWORK } = await import(pathToFileURL(network));
const params = parameters(NETWORK);

let last;
const results = JSON.parse(readFileSync(images, "utf8")).map(({ pixels, side, moving }) => {
  const canvas = new Uint8ClampedArray(4 * side * side);
  pixels.forEach((value, n) => (canvas[4 * Math.floor(n / 3) + (n % 3)] = value));
  const whole = spotFeatures(canvas, side, params, NETWORK);
  last =
    last?.pixels.length === canvas.length
      ? changedFeatures(last, canvas, side, params, NETWORK)
      : { pixels: canvas, features: whole };
  const change = last.features.data.reduce((most, value, n) => Math.max(most, Math.abs(value - whole.data[n])), 0);
  const { logits, points, references, received } = spotAnswers(last.features, params, moving);
  return {
    logits: [...logits],
    points: points.flat(2),
    references: references.flat(),
    received: received.flatMap((group) => [...group]),
    change,
  };
});
console.log(JSON.stringify(results));
