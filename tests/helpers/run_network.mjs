// node run_network.mjs IMAGES.json KERNEL.mjs NETWORK.mjs
//
// Run the network of the page on every image {pixels, side, moving}. Print a JSON list of its outputs, flat.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [images, kernel, network] = process.argv.slice(2);
const { parameters, spot } = await import(pathToFileURL(kernel));
const { NETWORK } = await import(pathToFileURL(network));
const params = parameters(NETWORK);

const results = JSON.parse(readFileSync(images, "utf8")).map(({ pixels, side, moving }) => {
  const canvas = new Uint8ClampedArray(4 * side * side);
  pixels.forEach((value, n) => (canvas[4 * Math.floor(n / 3) + (n % 3)] = value));
  const { logits, points, references, received } = spot(canvas, side, params, NETWORK, moving);
  return {
    logits: [...logits],
    points: points.flat(2),
    references: references.flat(),
    received: received.flatMap((group) => [...group]),
  };
});
console.log(JSON.stringify(results));
