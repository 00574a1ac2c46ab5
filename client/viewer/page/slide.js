// One slide's tiles and maps as typed arrays, and what can be looked up in them.

import { readSlide, unpack } from "./api.js";

/** Read a slide. Tiles are rows 0..count-1; a map's value of a row and class is `values[row * classes + class]`. */
export async function loadSlide(key) {
  const raw = await readSlide(key);
  const tiles = raw.tiles;
  const slide = {
    ...raw,
    coords: tiles ? unpack(tiles.coords) : new Int32Array(),
    valid: tiles ? unpack(tiles.valid) : new Uint8Array(),
    tissue: tiles ? unpack(tiles.tissue) : new Float32Array(),
    size: tiles ? tiles.size : [1, 1],
    maps: raw.maps.map((map) => ({
      ...map,
      values: unpack(map.values),
      stderr: map.stderr && unpack(map.stderr),
      leaf_size: map.leaf_size && unpack(map.leaf_size),
    })),
  };
  slide.count = slide.valid.length;
  slide.dimensions = raw.dimensions || extent(slide);
  slide.cells = cells(slide);
  return slide;
}

function extent(slide) {
  const ends = [1, 1];
  for (let i = 0; i < slide.coords.length; i++) ends[i % 2] = Math.max(ends[i % 2], slide.coords[i] + slide.size[i % 2]);
  return ends;
}

/** Tiles by the cell of a grid of their own size that holds their corner. */
function cells(slide) {
  const found = new Map();
  for (let row = 0; row < slide.count; row++) {
    const cell = `${Math.floor(slide.coords[2 * row] / slide.size[0])},${Math.floor(slide.coords[2 * row + 1] / slide.size[1])}`;
    if (!found.has(cell)) found.set(cell, []);
    found.get(cell).push(row);
  }
  return found;
}

/** The tile at a place in level-0 px, or -1. */
export function tileAt(slide, x, y) {
  const [width, height] = slide.size;
  const column = Math.floor(x / width);
  const line = Math.floor(y / height);
  for (const [dx, dy] of [[0, 0], [-1, 0], [0, -1], [-1, -1]]) {
    for (const row of slide.cells.get(`${column + dx},${line + dy}`) || []) {
      const [left, top] = corner(slide, row);
      if (x >= left && x < left + width && y >= top && y < top + height) return row;
    }
  }
  return -1;
}

export const corner = (slide, row) => [slide.coords[2 * row], slide.coords[2 * row + 1]];

/** The map of a name, else the first that is not of single tiles, else null. */
export function findMap(slide, name) {
  return slide.maps.find((map) => map.name === name) || slide.maps.find((map) => map.name !== "keep_one") || slide.maps[0] || null;
}

const columns = new WeakMap();
const orders = new WeakMap();

/** A class's values of a map, one per row; made once. */
export function column(map, values, name) {
  if (!columns.has(values)) columns.set(values, new Map());
  const made = columns.get(values);
  if (!made.has(name)) made.set(name, makeColumn(map, values, name));
  return made.get(name);
}

function makeColumn(map, values, name) {
  const index = map.classes.indexOf(name);
  const size = map.classes.length;
  const found = new Float32Array(values.length / size);
  for (let row = 0; row < found.length; row++) found[row] = index < 0 ? NaN : values[row * size + index];
  return found;
}

/** The rows with a value, the largest first, and each row's rank from 1 on (0 without a value); made once. */
export function ordered(values) {
  if (!orders.has(values)) {
    const rows = [];
    for (let row = 0; row < values.length; row++) if (Number.isFinite(values[row])) rows.push(row);
    rows.sort((a, b) => values[b] - values[a]);
    const rank = new Int32Array(values.length);
    rows.forEach((row, i) => (rank[row] = i + 1));
    orders.set(values, { rows, rank });
  }
  return orders.get(values);
}

/** Whether a map shows the tile head's probabilities, from 0 to 1, and no attribution. */
export const isTileHead = (map) => map?.name === "tile_head";

/** Smaller values of a class are noise; null where it was not measured for this class. */
export function noiseFloor(map, name) {
  const { noise_floor: floor, target, score } = map.about;
  if (floor === undefined) return null;
  const mirrored = map.classes.length === 2 && score === "log_odds";
  return target === name || mirrored ? floor : null;
}
