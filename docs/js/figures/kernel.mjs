/**
 * Mathematics of the live figures: functions of `dat_ref` for one point, one query or one system at a time.
 *
 * Points, sizes and queries are [y, x]. Positions are in pixels of the map, and 0 is the center of the first pixel,
 * unless a name says "normalised". Maps and tables are flat arrays, row by row. This module draws nothing.
 *
 * tests/test_figures_kernel.py compares every function with the NumPy spec.
 */

// ------------------------------------------------------------------------------------------------ conventions

const CELLS = { shift: 0.5, gap: 0, degenerate: 0 };
const CORNERS = { shift: 0, gap: 1, degenerate: 0 };
const SHIFTED = { shift: 0.5, gap: 1, degenerate: Infinity };

/** As `dat_ref.Convention`: spacing of keys, spacing of queries, and whether ±1 are the outermost pixel centers. */
export const CONVENTIONS = {
  CELL_CENTER: { reference: CELLS, query: CELLS, alignCorners: false },
  PAPER: { reference: CORNERS, query: CORNERS, alignCorners: true },
  CVPR2022: { reference: CELLS, query: CELLS, alignCorners: true },
  DATPP2023: { reference: SHIFTED, query: CORNERS, alignCorners: true },
};

/** Normalized coordinate of point `index` of `count`: 2 (i + shift) / (n - gap) - 1. */
export function coordinate({ shift, gap, degenerate }, index, count) {
  return count === gap ? degenerate : (2 * (index + shift)) / (count - gap) - 1;
}

/** Normalized distance between neighbors. */
export function pitch({ gap }, count) {
  return 2 / Math.max(count - gap, 1);
}

/** d pixel/dn = (H - a)/2 on an axis of `length` pixels. */
export function pixelsPerUnit(length, { alignCorners }) {
  return (length - (alignCorners ? 1 : 0)) / 2;
}

/** pixel(n) = (n + 1)/2 · (H - a) - (1 - a)/2 on an axis of `length` pixels. */
export function toPixels(normalised, length, convention) {
  return (normalised + 1) * pixelsPerUnit(length, convention) - (convention.alignCorners ? 0 : 0.5);
}

/** The inverse of `toPixels`; 0 where all coordinates map to one pixel. */
export function fromPixels(pixel, length, convention) {
  const scale = pixelsPerUnit(length, convention);
  return scale > 0 ? (pixel + (convention.alignCorners ? 0 : 0.5)) / scale - 1 : 0;
}

/** The reference points of a key grid, normalized, row by row. */
export function referencePoints(keySize, convention) {
  return places(keySize).map((key) => key.map((index, axis) => coordinate(convention.reference, index, keySize[axis])));
}

/** The queries in pixels, one for each pixel, row by row: integers in the two consistent conventions. */
export function queryPixels(size, convention) {
  return places(size).map((query) =>
    query.map((index, axis) => toPixels(coordinate(convention.query, index, size[axis]), size[axis], convention)),
  );
}

/** All [row, column] of a grid, row by row. */
export function places([rows, columns]) {
  return Array.from({ length: rows * columns }, (_, n) => [Math.floor(n / columns), n % columns]);
}

// ------------------------------------------------------------------------------------------------ offsets

/** The largest normalized offset under TANH_CELLS: s/2 key cells. */
export function offsetLimit(range, keys, convention) {
  return (range / 2) * pitch(convention.reference, keys);
}

/** p̃ from p and the raw offset Δ on one axis, all normalized; `limit` is the result of `offsetLimit`. */
export function boundPoint(raw, reference, bound, limit) {
  if (bound === "TANH_CELLS") return reference + limit * Math.tanh(raw);
  if (bound === "TANH_COORDINATES") return Math.tanh(reference + raw);
  if (bound === "CLAMP") return clip(reference + raw, -1, 1);
  if (bound === "RAW") return reference + raw;
  return clip(reference, -1, 1); // NONE
}

/** ∂p̃/∂Δ on one axis. */
export function boundSlope(raw, reference, bound, limit) {
  if (bound === "TANH_CELLS") return limit * (1 - Math.tanh(raw) ** 2);
  if (bound === "TANH_COORDINATES") return 1 - Math.tanh(reference + raw) ** 2;
  if (bound === "CLAMP") return Math.abs(reference + raw) <= 1 ? 1 : 0;
  return bound === "RAW" ? 1 : 0;
}

/** The raw offset, at most `largest`, that moves a point under TANH_CELLS as near to `point` as s allows. */
export function rawTowards(point, reference, limit, largest) {
  const share = clip((point - reference) / limit, -1, 1);
  return clip(Math.atanh(share), -largest, largest);
}

// ------------------------------------------------------------------------------------------------ sampling

/**
 * The four pixels around a point: {row, column, inside, weight, slope: [∂weight/∂y, ∂weight/∂x]}.
 *
 * Derivatives are right-hand derivatives; outside the map all values are zero.
 */
export function corners(point, size) {
  const [y, x] = point.map((value, axis) => clip(value, -2, size[axis] + 1));
  const [top, left] = [Math.floor(y), Math.floor(x)];
  const [below, right] = [y - top, x - left];
  const found = [];
  for (const [row, weightY, signY] of [
    [top, 1 - below, -1],
    [top + 1, below, 1],
  ]) {
    for (const [column, weightX, signX] of [
      [left, 1 - right, -1],
      [left + 1, right, 1],
    ]) {
      const inside = row >= 0 && row < size[0] && column >= 0 && column < size[1];
      const share = inside ? 1 : 0;
      const slope = [share * signY * weightX, share * signX * weightY];
      found.push({ row, column, inside, weight: share * weightY * weightX, slope });
    }
  }
  return found;
}

/** φ(map; point) with its gradient at the point: {value, slope: [y, x]}; {value: NaN} for a NaN point. */
export function sample(map, size, point) {
  if (point.some(Number.isNaN)) return { value: NaN, slope: [NaN, NaN] };
  const read = { value: 0, slope: [0, 0] };
  for (const { row, column, inside, weight, slope } of corners(point, size)) {
    if (!inside) continue;
    const pixel = map[row * size[1] + column];
    read.value += weight * pixel;
    read.slope[0] += slope[0] * pixel;
    read.slope[1] += slope[1] * pixel;
  }
  return read;
}

/** The pixel nearest to a point, 0 outside the map, with its gradient at the point, which is zero. */
export function sampleNearest(map, size, point) {
  return { value: sample(map, size, point.map(Math.round)).value, slope: [0, 0] };
}

/** φ along one axis through a point, as the vertices of a piecewise linear curve: [[position, value], …]. */
export function profile(map, size, point, axis) {
  return Array.from({ length: size[axis] + 2 }, (_, n) => {
    const place = [...point];
    place[axis] = n - 1;
    return [n - 1, sample(map, size, place).value];
  });
}

// ------------------------------------------------------------------------------------------------ position bias

/** Table cells per pixel of displacement on one axis: 1 for a table that was built for this map. */
export function tableScale(tableLength, length, convention, resolution = "fractions") {
  if (resolution === "pixels") return 1;
  const aligned = convention.alignCorners ? 1 : 0;
  return ((tableLength + 1) / 2 - aligned) / Math.max(length - aligned, 1);
}

/** Table position, on one axis, of the displacement of a query from a point. */
export function tablePosition(query, point, tableLength, scale = 1) {
  return (query - point) * scale + Math.floor((tableLength - 1) / 2);
}

/** B[m] of a point for all queries: the table at each displacement. `scale` is [y, x]. */
export function tableBias(table, tableSize, point, queries, scale = [1, 1]) {
  return queries.map((query) => {
    const place = query.map((q, axis) => tablePosition(q, point[axis], tableSize[axis], scale[axis]));
    return sample(table, tableSize, place).value;
  });
}

/**
 * The four windows of the table whose weighted sum is the bias of a point over a map of `size`. Queries must be
 * integer pixels, and the table must be built for this map: {top, left, weight, picture}.
 */
export function biasWindows(table, size, point) {
  const tableSize = size.map((length) => 2 * length - 1);
  const start = point.map((place, axis) => size[axis] - 1 - place); // table position of query (0, 0)
  const [top, left] = start.map(Math.floor);
  const [below, right] = [start[0] - top, start[1] - left];
  const entry = (row, column) =>
    row < 0 || column < 0 || row >= tableSize[0] || column >= tableSize[1] ? 0 : table[row * tableSize[1] + column];
  return places([2, 2]).map(([down, across]) => ({
    top: top + down,
    left: left + across,
    weight: (down ? below : 1 - below) * (across ? right : 1 - right),
    picture: places(size).map(([y, x]) => entry(top + down + y, left + across + x)),
  }));
}

// ------------------------------------------------------------------------------------------------ cost

/**
 * Cost of each system for one image, term by term: multiply-adds, and four-byte elements stored for the backward pass.
 * A formula is a sum of products of the symbols that `symbols` returns. M is the number of heads.
 */
export const COSTS = {
  deformable: {
    macs: {
      attention: "2 HW Ns C",
      "query and output": "2 HW C²",
      "key and value": "2 Ns C²",
      "offset network": "k² Ns C + 2 Ns C",
      sampling: "4 Ns C",
      bias: "4 HW Ns M",
    },
    kept: {
      attention: "HW Ns M + HW C",
      "query and output": "2 HW C",
      "key and value": "2 Ns C",
      "offset network": "3 Ns C + 8 Ns G + 4 Ns",
      sampling: "Ns C",
      bias: "HW Ns M",
    },
    symbols: ([height, width], { r, k, G }) => ({ Ns: Math.ceil(height / r) * Math.ceil(width / r), k, G }),
  },
  multi_head: {
    macs: {
      attention: "2 HW² C",
      "query and output": "2 HW C²",
      "key and value": "2 HW C²",
      bias: "4 HW² M",
    },
    kept: { attention: "HW² M + HW C", "query and output": "2 HW C", "key and value": "2 HW C" },
    symbols: () => ({}),
  },
  pyramid: {
    macs: {
      attention: "2 HW Nk C",
      "query and output": "2 HW C²",
      "key and value": "2 Nk C²",
      reduction: "r² Nk C²",
    },
    kept: {
      attention: "HW Nk M + HW C",
      "query and output": "2 HW C",
      "key and value": "2 Nk C",
      reduction: "2 Nk C",
    },
    symbols: ([height, width], { r }) => ({ Nk: Math.ceil(height / r) * Math.ceil(width / r), r }),
  },
  window: {
    macs: { attention: "2 HW⁺ w² C", "query and output": "2 HW C²", "key and value": "2 HW C²" },
    kept: {
      attention: "HW⁺ w² M + HW C + 4 HW⁺",
      "query and output": "HW⁺ C + HW C",
      "key and value": "2 HW⁺ C",
    },
    // HW⁺: pixels of the map padded to whole windows
    symbols: ([height, width], { w }) => ({ "HW⁺": Math.ceil(height / w) * Math.ceil(width / w) * w * w, w }),
  },
  neighborhood: {
    macs: { attention: "2 HW N C", "query and output": "2 HW C²", "key and value": "2 HW C²" },
    kept: {
      attention: "HW N M + HW C + 2 HW N",
      "query and output": "2 HW C",
      "key and value": "2 HW N C + 2 HW C",
    },
    symbols: (size, { K }) => ({ N: axisKernel(size[0], K) * axisKernel(size[1], K) }),
  },
  per_query: {
    macs: {
      attention: "2 HW N C",
      "query and output": "2 HW C²",
      "key and value": "2 HW C²",
      "offset network": "k² HW C + 2 HW N C",
      sampling: "8 HW N C G",
    },
    kept: {
      attention: "HW N M + HW C",
      "query and output": "2 HW C",
      "key and value": "2 HW C G",
      "offset network": "3 HW C + 4 HW N G",
      sampling: "2 HW N C",
    },
    symbols: (_, { K, k, G }) => ({ N: K * K, k, G }),
  },
  ms_deform: {
    macs: {
      attention: "HW P C M + HW P C",
      "query and output": "HW C²",
      "key and value": "HW C²",
      "offset network": "2 HW P C M",
      sampling: "4 HW P C",
    },
    kept: {
      attention: "HW P M + HW C",
      "query and output": "HW C",
      "key and value": "HW C",
      "offset network": "6 HW P M + 2 HW",
      sampling: "HW P C",
    },
    symbols: (_, { P }) => ({ P }),
  },
  ms_deform_dot: {
    macs: {
      attention: "2 HW P C",
      "query and output": "2 HW C²",
      "key and value": "2 HW C²",
      "offset network": "2 HW P C M",
      sampling: "8 HW P C",
    },
    kept: {
      attention: "HW P M + HW C",
      "query and output": "2 HW C",
      "key and value": "2 HW C",
      "offset network": "6 HW P M + 2 HW",
      sampling: "2 HW P C",
    },
    symbols: (_, { P }) => ({ P }),
  },
  dat_dcn: {
    macs: {
      attention: "HW P C M + HW P C",
      "query and output": "HW C²",
      "key and value": "HW C²",
      "offset network": "2 HW P C M",
      sampling: "4 HW P C",
    },
    kept: {
      attention: "HW P M + HW C",
      "query and output": "HW C",
      "key and value": "HW C",
      "offset network": "4 HW P M",
      sampling: "HW P C",
    },
    symbols: (_, { P }) => ({ P }),
  },
  deform_conv: {
    macs: { convolution: "HW N C²", "offset network": "3 HW k² N C G", sampling: "4 HW N C" },
    kept: { convolution: "HW C", "offset network": "5 HW N G" },
    symbols: (_, { k, G }) => ({ N: k * k, k, G }),
  },
};

/** The value of every symbol in the formulas of a system on a map of `size`. */
export function symbols(kind, size, config) {
  return { HW: size[0] * size[1], C: config.C, M: config.M, ...COSTS[kind].symbols(size, config) };
}

/** The value of a formula: products of numbers and symbols, some of them squared, joined by " + ". */
export function evaluate(formula, values) {
  const factor = (word) => {
    if (/^\d+$/.test(word)) return Number(word);
    return word.endsWith("²") ? values[word.slice(0, -1)] ** 2 : values[word];
  };
  const product = (words) => words.split(" ").reduce((sofar, word) => sofar * factor(word), 1);
  return formula.split(" + ").reduce((sum, words) => sum + product(words), 0);
}

/** [{name, macs, kept}] of a system, multiply-adds and bytes, in float32. */
export function terms(kind, size, config) {
  const { macs, kept } = COSTS[kind];
  const values = symbols(kind, size, config);
  return Object.keys({ ...macs, ...kept }).map((name) => ({
    name,
    macs: name in macs ? evaluate(macs[name], values) : 0,
    kept: name in kept ? 4 * evaluate(kept[name], values) : 0,
  }));
}

/** {macs, kept} of a system: the sum of its terms. */
export function cost(kind, size, config) {
  const sum = (part) => terms(kind, size, config).reduce((total, term) => total + term[part], 0);
  return { macs: sum("macs"), kept: sum("kept") };
}

// ------------------------------------------------------------------------------------------------ receptive field

/** The number of keys that a query sees on an axis, in a neighborhood of `kernel`. */
export function axisKernel(length, kernel, dilation = 1) {
  return Math.min(kernel, Math.max(Math.floor(length / dilation), 1));
}

/** The keys that a query sees on one axis in a (dilated) neighborhood. */
export function axisNeighbors(query, length, kernel, dilation = 1) {
  const keys = axisKernel(length, kernel, dilation);
  const [place, submap] = [Math.floor(query / dilation), query % dilation];
  const submapLength = Math.ceil((length - submap) / dilation);
  const start = clip(place - Math.floor(keys / 2), 0, submapLength - keys);
  return Array.from({ length: keys }, (_, n) => submap + dilation * (start + n));
}

/** The keys that a query sees on one axis in its (shifted) window: on the same side of the seam, inside the map. */
export function axisWindow(query, length, window, shift = 0) {
  const filled = Math.ceil(length / window) * window;
  const windowOf = (pixel) => Math.floor(((pixel - shift + filled) % filled) / window);
  const sees = (pixel) => windowOf(pixel) === windowOf(query) && pixel < shift === query < shift;
  return Array.from({ length }, (_, pixel) => pixel).filter(sees);
}

/** The pixels that points read with a weight other than zero: an array of booleans, row by row. */
export function sampledPixels(points, size) {
  return places(size).map(([row, column]) =>
    points.some(([y, x]) => Math.abs(y - row) < 1 && Math.abs(x - column) < 1),
  );
}

/**
 * The pixels that a query reaches as keys or values: an array of booleans, row by row.
 *
 * A system is {kind, ...}: "whole" · "window" with w and shift · "neighborhood" with K and dilation · "points", which
 * uses the `points` of this query.
 */
export function receptiveField(system, query, size, points = []) {
  if (system.kind === "whole") return places(size).map(() => true);
  if (system.kind === "points") return sampledPixels(points, size);
  const seen = query.map((place, axis) =>
    system.kind === "window"
      ? axisWindow(place, size[axis], system.w, system.shift)
      : axisNeighbors(place, size[axis], system.K, system.dilation),
  );
  return places(size).map(([row, column]) => seen[0].includes(row) && seen[1].includes(column));
}

// ------------------------------------------------------------------------------------------------ coverage

/** The pixels of one axis that the points of a fixed grid read: an array of booleans. */
export function readAxis(length, stride) {
  const convention = CONVENTIONS.CELL_CENTER;
  const keys = Math.ceil(length / stride);
  const points = Array.from({ length: keys }, (_, n) =>
    clip(toPixels(coordinate(convention.reference, n, keys), length, convention), 0, length - 1),
  );
  return Array.from({ length }, (_, pixel) => points.some((point) => Math.abs(point - pixel) < 1 - 1e-9));
}

/** The share of a target's positions at which a fixed grid reads some of its pixels. */
export function hitRate(size, stride, target) {
  const [rows, columns] = size.map((length, axis) => {
    const read = readAxis(length, stride);
    const starts = Array.from({ length: length - target[axis] + 1 }, (_, start) => start);
    return starts.filter((start) => read.slice(start, start + target[axis]).includes(true)).length / starts.length;
  });
  return rows * columns;
}

/** The highest accuracy with keys on a fixed grid that sees the target with probability `hits`. */
export function fixedGridBound(hits, classes) {
  return hits + (1 - hits) / classes;
}

// ------------------------------------------------------------------------------------------------ painting

/**
 * A picture to paint from a few readings: planes [red, green, blue, squared norm], each minus 1/2 before the norm.
 *
 * A query of color a attends to a reading (b, |b|²) with the logit β (2 a·b - |b|²) + B, where the position bias B
 * interpolates -d²/(2 near²) between whole displacements d. `bytes` are red, green, blue, pixel by pixel.
 */
export function pictureOf(bytes, size, sharpness, near) {
  const count = size[0] * size[1];
  const planes = [0, 1, 2, 3].map(() => new Float64Array(count));
  for (let m = 0; m < count; m += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      const value = bytes[3 * m + channel] / 255 - 0.5;
      planes[channel][m] = value;
      planes[3][m] += value * value;
    }
  }
  return { size, planes, sharpness, near };
}

/** The four planes at each point, with their slopes: [{value: [4], slope: [4][y, x]}]. */
export function readings({ planes, size }, points) {
  return points.map((point) => {
    const read = planes.map((plane) => sample(plane, size, point));
    return { value: read.map(({ value }) => value), slope: read.map(({ slope }) => slope) };
  });
}

/**
 * The two table entries next to a displacement on one axis of the map: {value, mass, slope, massSlope}.
 *
 * `value` is the weighted sum of their -d²/(2 near²), `mass` the sum of the weights: 1 inside the table, less at its
 * border, where entries outside are zero. Slopes are with respect to the point, which is the displacement subtracted
 * from the query. The bias of a query and a point is value_y mass_x + mass_y value_x.
 */
export function axisBias({ near }, length, displacement) {
  const below = Math.floor(displacement);
  const share = displacement - below;
  const found = { value: 0, mass: 0, slope: 0, massSlope: 0 };
  for (let step = 0; step < 2; step += 1) {
    const entry = below + step;
    if (Math.abs(entry) > length - 1) continue;
    const [weight, sign] = step ? [share, -1] : [1 - share, 1];
    const bias = -(entry * entry) / (2 * near * near);
    found.value += weight * bias;
    found.mass += weight;
    found.slope += sign * bias;
    found.massSlope += sign;
  }
  return found;
}

/** `axisBias` of all points and all queries on both axes: [rows, columns], each [point][query]. */
function biasAxes(picture, points) {
  return picture.size.map((length, axis) =>
    points.map((point) => Array.from({ length }, (_, query) => axisBias(picture, length, query - point[axis]))),
  );
}

/** The weights of one query, a pixel [row, column], over the points, by softmax. */
export function queryWeights(picture, points, read, [row, column]) {
  const { size, planes, sharpness } = picture;
  const [r, g, b] = planes.map((plane) => plane[row * size[1] + column]);
  const logits = points.map(([y, x], n) => {
    const [red, green, blue, norm] = read[n].value;
    const [down, across] = [axisBias(picture, size[0], row - y), axisBias(picture, size[1], column - x)];
    const bias = down.value * across.mass + down.mass * across.value;
    return sharpness * (2 * (r * red + g * green + b * blue) - norm) + bias;
  });
  const largest = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/**
 * Paint every pixel as the weighted mean of the colors at the points: {colors, weights, errors, error}.
 *
 * `colors` are the three planes of the result, `weights` (queries × points), `errors` the squared error of each pixel,
 * and `error` their mean.
 */
export function paint(picture, points, read = readings(picture, points)) {
  const { size, sharpness } = picture;
  const [reds, greens, blues] = picture.planes;
  const [queries, keys] = [size[0] * size[1], points.length];
  const [down, across] = biasAxes(picture, points);
  const values = Float64Array.from(read.flatMap(({ value }) => value));
  const weights = new Float64Array(queries * keys);
  const colors = [0, 1, 2].map(() => new Float64Array(queries));
  const errors = new Float64Array(queries);
  const logits = new Float64Array(keys);
  let error = 0;
  for (let m = 0; m < queries; m += 1) {
    const [row, column] = [Math.floor(m / size[1]), m % size[1]];
    const r = reds[m];
    const g = greens[m];
    const b = blues[m];
    let largest = -Infinity;
    for (let n = 0; n < keys; n += 1) {
      const at = 4 * n;
      const content = 2 * (r * values[at] + g * values[at + 1] + b * values[at + 2]) - values[at + 3];
      const y = down[n][row];
      const x = across[n][column];
      logits[n] = sharpness * content + y.value * x.mass + y.mass * x.value;
      if (logits[n] > largest) largest = logits[n];
    }
    let total = 0;
    for (let n = 0; n < keys; n += 1) total += logits[n] = Math.exp(logits[n] - largest);
    let [red, green, blue] = [0, 0, 0];
    for (let n = 0; n < keys; n += 1) {
      const weight = logits[n] / total;
      weights[m * keys + n] = weight;
      red += weight * values[4 * n];
      green += weight * values[4 * n + 1];
      blue += weight * values[4 * n + 2];
    }
    colors[0][m] = red;
    colors[1][m] = green;
    colors[2][m] = blue;
    errors[m] = (red - r) ** 2 + (green - g) ** 2 + (blue - b) ** 2;
    error += errors[m] / queries;
  }
  return { colors, weights, errors, error };
}

/**
 * The gradient of the painting's error at every point, by its two paths: {features, bias}, each [[y, x], …].
 *
 * Features: the color that a point reads is both value and key. Bias: the displacement from a query to the point.
 */
export function paintGradient(picture, points) {
  const { size, planes, sharpness } = picture;
  const [queries, keys] = [size[0] * size[1], points.length];
  const read = readings(picture, points);
  const { colors, weights } = paint(picture, points, read);
  const [down, across] = biasAxes(picture, points);
  const onRead = points.map(() => [0, 0, 0, 0]); // ∂L/∂ what each point reads
  const bias = points.map(() => [0, 0]);
  for (let m = 0; m < queries; m += 1) {
    const wrong = [0, 1, 2].map((channel) => (2 * (colors[channel][m] - planes[channel][m])) / queries);
    const mean = wrong.reduce((sum, part, channel) => sum + part * colors[channel][m], 0);
    const [row, column] = [Math.floor(m / size[1]), m % size[1]];
    for (let n = 0; n < keys; n += 1) {
      const weight = weights[m * keys + n];
      const { value } = read[n];
      const onLogit = weight * (wrong[0] * value[0] + wrong[1] * value[1] + wrong[2] * value[2] - mean);
      for (let channel = 0; channel < 3; channel += 1)
        onRead[n][channel] += weight * wrong[channel] + 2 * sharpness * onLogit * planes[channel][m];
      onRead[n][3] -= sharpness * onLogit;
      const [y, x] = [down[n][row], across[n][column]];
      bias[n][0] += onLogit * (y.slope * x.mass + y.massSlope * x.value);
      bias[n][1] += onLogit * (y.value * x.massSlope + y.mass * x.slope);
    }
  }
  const features = read.map(({ slope }, n) =>
    [0, 1].map((axis) => slope.reduce((sum, pair, plane) => sum + onRead[n][plane] * pair[axis], 0)),
  );
  return { features, bias };
}

// ------------------------------------------------------------------------------------------------ the network

/*
 * `dat_spot`, the network of the package. A map is {data, size, dim}: a Float32Array, pixel by pixel, the
 * channels of a pixel next to each other. `params` maps the names of the package's file to Float32Arrays.
 */

/** The weights of the network by name, from their base64 text. */
export function parameters({ weights, lengths }) {
  const bytes = Uint8Array.from(atob(weights), (letter) => letter.charCodeAt(0));
  const flat = new Float32Array(bytes.buffer);
  let at = 0;
  return Object.fromEntries(Object.entries(lengths).map(([name, length]) => [name, flat.subarray(at, (at += length))]));
}

/** Exact GELU of all elements, in place: x Φ(x), with erfc from a Chebyshev fit (relative error below 1.2e-7). */
export function gelu(data) {
  for (let n = 0; n < data.length; n += 1) {
    const x = data[n];
    const z = Math.abs(x) * Math.SQRT1_2;
    const t = 1 / (1 + 0.5 * z);
    const series =
      -1.26551223 +
      t *
        (1.00002368 +
          t *
            (0.37409196 +
              t *
                (0.09678418 +
                  t *
                    (-0.18628806 +
                      t * (0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277))))))));
    const tail = 0.5 * t * Math.exp(series - z * z); // Φ(-|x|)
    data[n] = x * (x > 0 ? 1 - tail : tail);
  }
  return data;
}

/** A linear map of the channels of every pixel. */
export function linear({ data, size, dim }, weight, bias) {
  const [pixels, outputs] = [size[0] * size[1], weight.length / dim];
  const result = new Float32Array(pixels * outputs);
  multiply(weight, bias, data, pixels, dim, result, 0, outputs);
  return { data: result, size, dim: outputs };
}

/** result[to …] = rows of data · weightᵀ + bias, two rows and four outputs at a time: three times as fast as one by one. */
function multiply(weight, bias, data, rows, dim, result, to, outputs) {
  for (let row = 0; row < rows; row += 2) {
    const one = row * dim;
    const two = row + 1 < rows ? one + dim : one;
    const toOne = to + row * outputs;
    const toTwo = row + 1 < rows ? toOne + outputs : toOne;
    let output = 0;
    for (; output + 4 <= outputs; output += 4) {
      const first = output * dim;
      const second = first + dim;
      const third = second + dim;
      const fourth = third + dim;
      let a = 0;
      let b = 0;
      let c = 0;
      let d = 0;
      let e = 0;
      let f = 0;
      let g = 0;
      let h = 0;
      for (let n = 0; n < dim; n += 1) {
        const x = data[one + n];
        const y = data[two + n];
        const p = weight[first + n];
        const q = weight[second + n];
        const r = weight[third + n];
        const s = weight[fourth + n];
        a += p * x;
        b += q * x;
        c += r * x;
        d += s * x;
        e += p * y;
        f += q * y;
        g += r * y;
        h += s * y;
      }
      result[toOne + output] = a;
      result[toOne + output + 1] = b;
      result[toOne + output + 2] = c;
      result[toOne + output + 3] = d;
      result[toTwo + output] = e;
      result[toTwo + output + 1] = f;
      result[toTwo + output + 2] = g;
      result[toTwo + output + 3] = h;
    }
    for (; output < outputs; output += 1) {
      let [a, e] = [0, 0];
      for (let n = 0; n < dim; n += 1) {
        a += weight[output * dim + n] * data[one + n];
        e += weight[output * dim + n] * data[two + n];
      }
      result[toOne + output] = a;
      result[toTwo + output] = e;
    }
  }
  if (bias) for (let n = 0; n < rows * outputs; n += 1) result[to + n] += bias[n % outputs];
}

/** Layer norm over the channels of every pixel. */
export function layerNorm({ data, size, dim }, weight, bias) {
  const result = new Float32Array(data.length);
  for (let from = 0; from < data.length; from += dim) {
    let [mean, variance] = [0, 0];
    for (let channel = 0; channel < dim; channel += 1) mean += data[from + channel];
    mean /= dim;
    for (let channel = 0; channel < dim; channel += 1) variance += (data[from + channel] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / dim + 1e-5);
    for (let channel = 0; channel < dim; channel += 1)
      result[from + channel] = (data[from + channel] - mean) * scale * weight[channel] + bias[channel];
  }
  return { data: result, size, dim };
}

/** A convolution with zero padding `pad` on all sides; `weight` is (outputs, dim, kernel, kernel). */
export function convolve({ data, size, dim }, weight, bias, kernel, stride, pad) {
  const outputs = bias.length;
  const target = size.map((length) => Math.floor((length + 2 * pad - kernel) / stride) + 1);
  const result = new Float32Array(target[0] * target[1] * outputs);
  const length = dim * kernel * kernel;
  const patches = new Float32Array(target[1] * length); // of one row of the result
  for (let row = 0; row < target[0]; row += 1) {
    patches.fill(0);
    for (let column = 0; column < target[1]; column += 1) {
      for (let down = 0; down < kernel; down += 1) {
        const y = row * stride - pad + down;
        if (y < 0 || y >= size[0]) continue;
        for (let right = 0; right < kernel; right += 1) {
          const x = column * stride - pad + right;
          if (x < 0 || x >= size[1]) continue;
          const from = (y * size[1] + x) * dim;
          const to = column * length + down * kernel + right;
          for (let channel = 0; channel < dim; channel += 1)
            patches[to + channel * kernel * kernel] = data[from + channel];
        }
      }
    }
    multiply(weight, bias, patches, target[1], length, result, row * target[1] * outputs, outputs);
  }
  return { data: result, size: target, dim: outputs };
}

/** A depthwise convolution of the channels from `first` on, zero outside; windows begin at `stride` i - `pad`. */
export function convolveChannels({ data, size, dim }, weight, bias, { kernel, stride, pad, target, first = 0 }) {
  const channels = bias.length;
  const result = new Float32Array(target[0] * target[1] * channels);
  for (let row = 0; row < target[0]; row += 1) {
    for (let column = 0; column < target[1]; column += 1) {
      const to = (row * target[1] + column) * channels;
      for (let channel = 0; channel < channels; channel += 1) {
        let sum = bias[channel];
        for (let down = 0; down < kernel; down += 1) {
          const y = row * stride - pad + down;
          if (y < 0 || y >= size[0]) continue;
          for (let right = 0; right < kernel; right += 1) {
            const x = column * stride - pad + right;
            if (x < 0 || x >= size[1]) continue;
            sum += weight[(channel * kernel + down) * kernel + right] * data[(y * size[1] + x) * dim + first + channel];
          }
        }
        result[to + channel] = sum;
      }
    }
  }
  return { data: result, size: target, dim: channels };
}

/** x + y, in place of y. */
function add(x, y) {
  for (let n = 0; n < y.data.length; n += 1) y.data[n] += x.data[n];
  return y;
}

const SPOT = { stride: 10, kernel: 11, range: 2, heads: 4, groups: 2 }; // of the deformable layer of `dat_spot`

/** A function that returns weight and bias of a part of the network by its name. */
const pairsOf = (params) => (name) => [params[`${name}.weight`], params[`${name}.bias`]];

function mlp(x, pair, name) {
  const hidden = linear(x, ...pair(`${name}.linear1`));
  gelu(hidden.data);
  return linear(hidden, ...pair(`${name}.linear2`));
}

/**
 * The first half of `dat_spot`: the map after the stem and the first block, where a position sees 15 × 15 pixels.
 *
 * `pixels` are red, green, blue and alpha in 0 … 255, as a canvas returns them. `box` = [top, left, bottom, right] is
 * the part of the image to use, multiples of 4.
 */
export function spotFeatures(pixels, side, params, { mean, deviation }, box = [0, 0, side, side]) {
  const [top, left, bottom, right] = box;
  const image = {
    data: new Float32Array((bottom - top) * (right - left) * 3),
    size: [bottom - top, right - left],
    dim: 3,
  };
  for (let y = top, to = 0; y < bottom; y += 1)
    for (let x = left; x < right; x += 1)
      for (let channel = 0; channel < 3; channel += 1, to += 1)
        image.data[to] = (pixels[4 * (y * side + x) + channel] / 255 - mean[channel]) / deviation[channel];

  const pair = pairsOf(params);
  const embed = (x, name) => layerNorm(convolve(x, ...pair(`${name}.projection`), 3, 2, 1), ...pair(`${name}.norm`));
  const halved = embed(image, "patch_embedding.0");
  gelu(halved.data);
  let x = embed(halved, "patch_embedding.1");

  const name = "stages.0.blocks.0";
  const local = { kernel: 3, stride: 1, pad: 1, target: x.size };
  x = add(x, convolveChannels(x, ...pair(`${name}.local_perception`), local));
  const normed = layerNorm(x, ...pair(`${name}.norm1`));
  // A window of one position has one key, whose weight is 1: only its value counts.
  const [qkv, shift] = pair(`${name}.attention.qkv`);
  const value = linear(normed, qkv.subarray((2 * qkv.length) / 3), shift.subarray((2 * shift.length) / 3));
  x = add(x, linear(value, ...pair(`${name}.attention.output`)));
  return add(x, mlp(layerNorm(x, ...pair(`${name}.norm2`)), pair, `${name}.mlp`));
}

const CELL = 4; // pixels of the image for one position of the map
const HALO = 2; // positions around a changed pixel's that can change, and around those that are needed to compute them

/**
 * `spotFeatures` of an image, where only the part that differs from another image is computed.
 *
 * `before` is {pixels, features} of that image, and the result is {pixels, features} of this one.
 */
export function changedFeatures(before, pixels, side, params, statistics) {
  const length = side / CELL;
  let [top, left, bottom, right] = [length, length, 0, 0]; // of the changed positions
  for (let n = 0; n < pixels.length; n += 1) {
    if (pixels[n] === before.pixels[n]) continue;
    const [y, x] = [Math.floor(n / 4 / side / CELL), Math.floor(((n >> 2) % side) / CELL)];
    [top, left, bottom, right] = [Math.min(top, y), Math.min(left, x), Math.max(bottom, y + 1), Math.max(right, x + 1)];
  }
  if (top >= bottom) return before;
  const grown = (by) => [top - by, left - by, bottom + by, right + by].map((edge) => clip(edge, 0, length));
  const [inner, outer] = [grown(HALO), grown(2 * HALO)];
  const box = outer.map((edge) => edge * CELL);
  const part = spotFeatures(pixels, side, params, statistics, box);
  const { dim } = part;
  const data = before.features.data.slice();
  for (let y = inner[0]; y < inner[2]; y += 1) {
    const from = ((y - outer[0]) * part.size[1] + inner[1] - outer[1]) * dim;
    const row = part.data.subarray(from, from + (inner[3] - inner[1]) * dim);
    data.set(row, (y * length + inner[1]) * dim);
  }
  return { pixels, features: { ...before.features, data } };
}

/**
 * The second half of `dat_spot`: {size, classes, logits, probabilities, points, references, received}.
 *
 * For each position the classes' probabilities; points and references of each group in pixels of the map; the attention
 * that each point receives (mean over heads and queries), by group. With `moving` false all offsets are zero.
 */
export function spotAnswers(features, params, moving = true) {
  const pair = pairsOf(params);
  const name = "stages.0.blocks.1";
  const normed = layerNorm(features, ...pair(`${name}.norm1`));
  const { output, points, references, received } = deformable(normed, pair, params, `${name}.attention`, moving);
  let x = add(features, output);
  x = add(x, mlp(layerNorm(x, ...pair(`${name}.norm2`)), pair, `${name}.mlp`));
  const logits = linear(layerNorm(x, ...pair("norm")), ...pair("head"));
  const probabilities = softmaxRows(logits.data, logits.dim);
  return { size: logits.size, classes: logits.dim, logits: logits.data, probabilities, points, references, received };
}

/** Softmax of consecutive rows of `count` numbers. */
function softmaxRows(data, count) {
  const result = new Float32Array(data.length);
  for (let from = 0; from < data.length; from += count) {
    let [largest, total] = [-Infinity, 0];
    for (let n = from; n < from + count; n += 1) largest = Math.max(largest, data[n]);
    for (let n = from; n < from + count; n += 1) total += result[n] = Math.exp(data[n] - largest);
    for (let n = from; n < from + count; n += 1) result[n] /= total;
  }
  return result;
}

/** The deformable layer: {output, points, references, received}. */
function deformable(x, pair, params, name, moving) {
  const { stride, kernel, range, heads, groups } = SPOT;
  const { size, dim } = x;
  const convention = CONVENTIONS.CELL_CENTER;
  const query = linear(x, ...pair(`${name}.query`));
  const keys = size.map((length) => Math.floor(length / stride));
  const normalised = referencePoints(keys, convention);
  const pixels = (point) => point.map((place, axis) => toPixels(place, size[axis], convention));
  const references = normalised.map(pixels);
  const limits = keys.map((count) => offsetLimit(range, count, convention));
  const share = dim / groups;
  const sampled = { data: new Float32Array(references.length * dim), size: keys, dim };
  const points = [];
  for (let group = 0; group < groups; group += 1) {
    const raw = offsets(query, group * share, pair, params, `${name}.offset_network`, stride, kernel);
    const moved = normalised.map((reference, n) =>
      pixels(
        reference.map((place, axis) => boundPoint(moving ? raw[2 * n + axis] : 0, place, "TANH_CELLS", limits[axis])),
      ),
    );
    points.push(moved);
    moved.forEach((point, n) => {
      for (const { row, column, inside, weight } of corners(point, size)) {
        if (!inside) continue;
        const from = (row * size[1] + column) * dim + group * share;
        const to = n * dim + group * share;
        for (let channel = 0; channel < share; channel += 1)
          sampled.data[to + channel] += weight * x.data[from + channel];
      }
    });
  }
  const key = linear(sampled, ...pair(`${name}.key`));
  const value = linear(sampled, ...pair(`${name}.value`));
  const { mixed, received } = attend(query, key, value, heads, groups);
  return { output: linear(mixed, ...pair(`${name}.output`)), points, references, received };
}

/** Raw offsets of a group, (y, x) for each key, from its channels of the queries. */
function offsets(query, first, pair, params, name, stride, kernel) {
  const pad = Math.floor((kernel - stride) / 2);
  const target = query.size.map((length) => Math.floor(length / stride));
  const windows = convolveChannels(query, ...pair(`${name}.depthwise`), { kernel, stride, pad, target, first });
  const normed = layerNorm(windows, ...pair(`${name}.norm`));
  gelu(normed.data);
  return linear(normed, params[`${name}.pointwise.weight`]).data;
}

/** Attention of all queries to the keys: {mixed, received: attention of each key by group}. */
function attend(query, key, value, heads, groups) {
  const { dim, size } = query;
  const [queries, keys, width] = [size[0] * size[1], key.size[0] * key.size[1], dim / heads];
  const mixed = new Float32Array(queries * dim);
  const received = Array.from({ length: groups }, () => new Float64Array(keys));
  const scale = 1 / Math.sqrt(width);
  const weights = new Float64Array(keys);
  for (let head = 0; head < heads; head += 1) {
    const group = received[Math.floor((head * groups) / heads)];
    const first = head * width;
    for (let m = 0; m < queries; m += 1) {
      const from = m * dim + first;
      let [largest, total] = [-Infinity, 0];
      for (let n = 0; n < keys; n += 1) {
        let logit = 0;
        for (let c = 0; c < width; c += 1) logit += query.data[from + c] * key.data[n * dim + first + c];
        weights[n] = logit * scale;
        if (weights[n] > largest) largest = weights[n];
      }
      for (let n = 0; n < keys; n += 1) total += weights[n] = Math.exp(weights[n] - largest);
      for (let n = 0; n < keys; n += 1) {
        const weight = weights[n] / total;
        group[n] += (weight * groups) / (queries * heads);
        for (let c = 0; c < width; c += 1) mixed[from + c] += weight * value.data[n * dim + first + c];
      }
    }
  }
  return { mixed: { data: mixed, size, dim }, received };
}

// ------------------------------------------------------------------------------------------------ numbers

/** A number clipped to a range. */
export function clip(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
