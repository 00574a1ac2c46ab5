// What can lie over a slide, and how each layer is drawn.

import { diverging, partStep, sequential, signedStep } from "./colours.js";
import { column, isTileHead, noiseFloor } from "./slide.js";

const FAINT = 0.3; // opacity, within the layer, of the weakest values
const LINES = { grid: "#20202060", tissue: "#146e3c", failed: "#7a0177", sufficient: "#c81e3c", necessary: "#f09614" };

/** The layers from the lowest to the highest: name, opacity at first, and what a slide needs to have it. */
export const LAYERS = [
  { id: "map", label: "Attribution or tile head", opacity: 0.65, on: true, needs: (slide, map) => map },
  { id: "alone", label: "Keep one", opacity: 0.65, needs: (slide) => slide.maps.some((map) => map.name === "keep_one") },
  { id: "error", label: "Standard error", opacity: 0.65, needs: (slide, map) => map?.stderr },
  { id: "leaf", label: "Leaf size", opacity: 0.65, needs: (slide, map) => map?.leaf_size },
  { id: "grid", label: "Tile grid", opacity: 0.8, needs: (slide) => slide.count },
  { id: "failed", label: "Tiles that failed", opacity: 1, on: true, needs: (slide) => slide.valid.includes(0) },
  { id: "tissue", label: "Tissue contours", opacity: 1, needs: (slide) => slide.annotations.some(isTissue) },
  { id: "sets", label: "Sufficient, necessary", opacity: 1, needs: (slide) => slide.sets.length },
  { id: "annotations", label: "Annotations", opacity: 1, on: true, needs: (slide) => own(slide).length },
];

const isTissue = (file) => file.features.some((feature) => feature.properties?.classification?.name === "Tissue");
export const own = (slide) => slide.annotations.filter((file) => !isTissue(file) && !file.name.endsWith("-evidence.geojson"));

/** Draw a layer of a slide; `look` says map, class, limit and threshold. */
export function drawLayer(id, ctx, view, slide, look) {
  const { map, cls } = look;
  if (id === "map" && isTileHead(map)) partCells(ctx, view, slide, column(map, map.values, cls), (value) => 1 - value, veil);
  else if (id === "map" && map) signedCells(ctx, view, slide, column(map, map.values, cls), look.limit, look.threshold, noiseFloor(map, cls));
  if (id === "alone") {
    const alone = slide.maps.find((one) => one.name === "keep_one");
    if (alone) signedCells(ctx, view, slide, column(alone, alone.values, cls), alone.limits[alone.classes.indexOf(cls)] || 1, 0, null);
  }
  if (id === "error" && map?.stderr) partCells(ctx, view, slide, column(map, map.stderr, cls), (value, most) => value / most);
  if (id === "leaf" && map?.leaf_size) partCells(ctx, view, slide, map.leaf_size, (value, most) => (most > 1 ? Math.log(value) / Math.log(most) : 0));
  if (id === "grid") outline(ctx, view, slide, rows(slide), LINES.grid, 1);
  if (id === "failed") {
    const failed = rows(slide).filter((row) => !slide.valid[row]);
    outline(ctx, view, slide, failed, LINES.failed, 3, true);
  }
  if (id === "sets") for (const set of slide.sets) if (set.class === cls) outline(ctx, view, slide, set.rows, LINES[set.kind], set.kind === "sufficient" ? 4 : 2);
  if (id === "tissue") for (const file of slide.annotations.filter(isTissue)) shapes(ctx, view, file, LINES.tissue);
  if (id === "annotations") for (const file of own(slide)) shapes(ctx, view, file);
}

const rows = (slide) => Array.from({ length: slide.count }, (_, row) => row);

/** Call `paint` with each visible row that has a value, its pixel rectangle given by `edges`. */
function visible(view, slide, values, paint) {
  const [left, top, right, bottom] = view.bounds;
  const [width, height] = slide.size;
  const { coords } = slide;
  for (let row = 0; row < slide.count; row++) {
    const [x, y] = [coords[2 * row], coords[2 * row + 1]];
    if (x > right || y > bottom || x + width < left || y + height < top) continue;
    if (!values || Number.isFinite(values[row])) paint(row, x, y);
  }
}

/** A function that fills a tile: on whole pixels that neighbours share where the slide is upright, else turned. */
function filler(ctx, view, slide) {
  const [a, b, c, d, ox, oy] = view.matrix;
  const [width, height] = slide.size;
  if (Math.abs(b) < 1e-9 && Math.abs(c) < 1e-9 && a > 0 && d > 0) {
    return (x, y) => {
      const [x0, y0] = [Math.round(ox + a * x), Math.round(oy + d * y)];
      ctx.fillRect(x0, y0, Math.max(1, Math.round(ox + a * (x + width)) - x0), Math.max(1, Math.round(oy + d * (y + height)) - y0));
    };
  }
  ctx.setTransform(...view.matrix);
  return (x, y) => ctx.fillRect(x, y, width, height);
}

function signedCells(ctx, view, slide, values, limit, threshold, floor) {
  const fill = filler(ctx, view, slide);
  const faint = [];
  visible(view, slide, values, (row, x, y) => {
    const size = Math.abs(values[row]);
    if (size < threshold) return;
    const noise = floor !== null && size < floor;
    if (noise) faint.push([x, y]);
    ctx.globalAlpha = noise ? FAINT : veil(size / limit);
    ctx.fillStyle = diverging[signedStep(values[row], limit)];
    fill(x, y);
  });
  ctx.globalAlpha = 1;
  ctx.fillStyle = hatching(ctx, view);
  for (const [x, y] of faint) fill(x, y);
  ctx.setTransform(1, 0, 0, 1, 0, 0);
}

export const largest = (values) => values.reduce((high, value) => (value > high ? value : high), 0);

/** Opacity of a part, 0 to 1: weak values veil the tissue less. */
const veil = (part) => Math.max(FAINT, Math.min(1, Math.sqrt(part)));

function partCells(ctx, view, slide, values, part, opacity = () => 1) {
  const most = largest(values);
  const fill = filler(ctx, view, slide);
  visible(view, slide, values, (row, x, y) => {
    ctx.globalAlpha = opacity(values[row]);
    ctx.fillStyle = sequential[partStep(part(values[row], most))];
    fill(x, y);
  });
  ctx.globalAlpha = 1;
  ctx.setTransform(1, 0, 0, 1, 0, 0);
}

/** Diagonal lines, as on the maps that `attribute` draws; as wide on the screen however the slide is turned. */
function hatching(ctx, view) {
  const period = Math.round(7 * view.ratio);
  const tile = new OffscreenCanvas(period, period);
  const line = tile.getContext("2d");
  line.strokeStyle = "rgb(90 90 90 / 70%)";
  line.lineWidth = Math.max(1, view.ratio);
  for (const shift of [-period, 0, period]) {
    line.moveTo(shift, period);
    line.lineTo(shift + period, 0);
  }
  line.stroke();
  const pattern = ctx.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix(ctx.getTransform()).inverse());
  return pattern;
}

function outline(ctx, view, slide, chosen, colour, wide, crossed = false) {
  const [left, top, right, bottom] = view.bounds;
  const [width, height] = slide.size;
  ctx.beginPath();
  ctx.setTransform(...view.matrix);
  for (const row of chosen) {
    const [x, y] = [slide.coords[2 * row], slide.coords[2 * row + 1]];
    if (x > right || y > bottom || x + width < left || y + height < top) continue;
    ctx.rect(x, y, width, height);
    if (crossed) for (const [from, to] of [[x, x + width], [x + width, x]]) {
      ctx.moveTo(from, y);
      ctx.lineTo(to, y + height);
    }
  }
  ctx.setTransform(1, 0, 0, 1, 0, 0);
  ctx.strokeStyle = colour;
  ctx.lineWidth = wide * view.ratio;
  ctx.stroke();
}

/** The rings, lines and points of a GeoJSON geometry, as lists of [x, y]. */
function* lines(geometry) {
  const { type, coordinates: parts, geometries } = geometry || {};
  if (type === "GeometryCollection") for (const one of geometries || []) yield* lines(one);
  else if (type === "Point") yield [parts];
  else if (type === "LineString" || type === "MultiPoint") yield parts;
  else if (type === "Polygon" || type === "MultiLineString") yield* parts;
  else if (type === "MultiPolygon") for (const polygon of parts) yield* polygon;
}

/** What an annotation is called: its name, else its class, in any of QuPath's forms. */
export function labelOf({ properties }) {
  const kind = properties?.classification;
  const names = kind?.name || kind?.names || kind || "";
  return String(properties?.name || (Array.isArray(names) ? names.join(": ") : typeof names === "string" ? names : ""));
}

function shapes(ctx, view, file, colour) {
  const [dx, dy] = file.origin;
  const [a, b, c, d, ox, oy] = view.matrix;
  const place = ([x, y]) => [ox + a * (x + dx) + c * (y + dy), oy + b * (x + dx) + d * (y + dy)];
  ctx.lineWidth = 2 * view.ratio;
  ctx.font = `${13 * view.ratio}px sans-serif`;
  for (const feature of file.features) {
    const rgb = feature.properties?.color || feature.properties?.classification?.color;
    ctx.strokeStyle = ctx.fillStyle = colour || (Array.isArray(rgb) ? `rgb(${rgb.map(Number).join(",")})` : "#00458b");
    let first = null;
    for (const line of lines(feature.geometry)) {
      const points = line.map(place);
      first ??= points[0];
      ctx.beginPath();
      if (points.length === 1) ctx.arc(...points[0], 4 * view.ratio, 0, 2 * Math.PI);
      else points.forEach((point, i) => (i ? ctx.lineTo(...point) : ctx.moveTo(...point)));
      ctx.stroke();
    }
    const label = labelOf(feature);
    if (!colour && first && label) {
      ctx.lineJoin = "round";
      const [style, wide] = [ctx.strokeStyle, ctx.lineWidth];
      ctx.strokeStyle = "white";
      ctx.lineWidth = 4 * view.ratio;
      ctx.strokeText(label, first[0] + 4, first[1] - 5);
      ctx.fillText(label, first[0] + 4, first[1] - 5);
      [ctx.strokeStyle, ctx.lineWidth] = [style, wide];
    }
  }
}
