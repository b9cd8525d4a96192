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

// ------------------------------------------------------------------------------------------------ numbers

/** A number clipped to a range. */
export function clip(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
