// node compare_kernel.mjs CASES.json KERNEL.mjs [KERNEL.mjs ...]
//
// Call the functions of each kernel with the arguments of every case and compare the results with the expected ones.
// Print a JSON list: for each kernel the number of cases that it passed, by function, and the first failures.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const TOLERANCE = 1e-12;

/** Compositions of kernel functions, as the figures use them, that are one function in the spec. */
function derived(kernel) {
  const scatter = (found, [height, width]) => {
    const map = Array(height * width).fill(0);
    for (const { row, column, inside, weight } of found) if (inside) map[row * width + column] += weight;
    return map;
  };
  const picture = (bytes, size, sharpness, near) => kernel.pictureOf(bytes, size, sharpness, near);
  return {
    painted: (bytes, size, sharpness, near, points) => kernel.paint(picture(bytes, size, sharpness, near), points),
    gradientOf: (bytes, size, sharpness, near, points) =>
      kernel.paintGradient(picture(bytes, size, sharpness, near), points),
    weightsOf: (bytes, size, sharpness, near, points, pixel) => {
      const found = picture(bytes, size, sharpness, near);
      return kernel.queryWeights(found, points, kernel.readings(found, points), pixel);
    },
    weightMap: (point, size) => scatter(kernel.corners(point, size), size),
    windowSum: (table, size, point) => {
      const windows = kernel.biasWindows(table, size, point);
      return windows[0].picture.map((_, m) =>
        windows.reduce((sum, { weight, picture }) => sum + weight * picture[m], 0),
      );
    },
    windowPlaces: (size, point) => kernel.biasWindows([], size, point).map(({ top, left }) => [top, left]),
  };
}

function agrees(found, expected, exact) {
  if (ArrayBuffer.isView(found)) return agrees(Array.from(found), expected, exact);
  if (Array.isArray(expected)) {
    return (
      Array.isArray(found) &&
      found.length === expected.length &&
      expected.every((value, n) => agrees(found[n], value, exact))
    );
  }
  if (expected !== null && typeof expected === "object") {
    const keys = Object.keys(expected);
    return (
      found !== null &&
      typeof found === "object" &&
      Object.keys(found).length === keys.length &&
      keys.every((key) => agrees(found[key], expected[key], exact))
    );
  }
  if (exact || typeof expected !== "number" || !Number.isFinite(expected)) return Object.is(found, expected);
  return Math.abs(found - expected) <= TOLERANCE * Math.max(1, Math.abs(expected));
}

async function run(path, cases) {
  const kernel = await import(pathToFileURL(path));
  const functions = { ...kernel, ...derived(kernel) };
  // JSON cannot hold conventions and non-finite numbers: both are passed by name.
  const revive = (_, value) => {
    if (value?.convention) return kernel.CONVENTIONS[value.convention];
    return value?.number ? Number(value.number) : value;
  };
  const [passed, failures] = [{}, []];
  for (const one of JSON.parse(cases, revive)) {
    const found = functions[one.function](...one.arguments);
    passed[one.function] ??= 0;
    if (agrees(found, one.expected, one.exact)) passed[one.function] += 1;
    else failures.push({ ...one, found });
  }
  return { passed, failed: failures.length, functions: [...new Set(failures.map((one) => one.function))], failures };
}

const [cases, ...kernels] = process.argv.slice(2);
const reports = [];
for (const kernel of kernels) reports.push(await run(kernel, readFileSync(cases, "utf8")));
for (const report of reports) report.failures.length = Math.min(report.failures.length, 3);
console.log(JSON.stringify(reports));
