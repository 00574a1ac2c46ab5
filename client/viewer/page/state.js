// What the page shows, in the address, so that a link opens the same view.

import { LAYERS } from "./layers.js";

/** The state of an address's part after #. */
export function parse(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const number = (name) => (given.has(name) && Number.isFinite(Number(given.get(name))) ? Number(given.get(name)) : null);
  const layers = new Map(LAYERS.map(({ id, opacity, on }) => [id, { on: Boolean(on), opacity }]));
  if (given.has("layers")) {
    for (const layer of layers.values()) layer.on = false;
    for (const part of given.get("layers").split(",")) {
      const [id, percent] = part.split(":");
      if (layers.has(id)) layers.set(id, { on: true, opacity: Math.min(1, Math.max(0, Number(percent) / 100 || 0)) });
    }
  }
  return {
    slide: given.get("slide"),
    map: given.get("map"),
    cls: given.get("class"),
    beside: given.get("beside"),
    besideMap: given.get("beside-map"),
    centre: number("x") === null || number("y") === null ? null : [number("x"), number("y")],
    zoom: number("zoom"),
    rotation: number("rotation") || 0,
    threshold: number("threshold") || 0,
    limit: given.get("limit") || "slide",
    grey: given.has("grey"),
    layers,
  };
}

/** The address's part of a state. */
export function format(state) {
  const found = new URLSearchParams();
  const put = (name, value) => value !== null && value !== undefined && value !== "" && found.set(name, value);
  put("slide", state.slide);
  if (!state.slide) return "";
  put("map", state.map);
  put("class", state.cls);
  put("beside", state.beside);
  put("beside-map", state.besideMap);
  if (state.centre) {
    put("x", state.centre[0].toFixed(1));
    put("y", state.centre[1].toFixed(1));
    put("zoom", state.zoom.toPrecision(5));
  }
  if (state.rotation) put("rotation", state.rotation);
  if (state.threshold) put("threshold", state.threshold);
  if (state.limit !== "slide") put("limit", state.limit);
  if (state.grey) put("grey", 1);
  const layers = [...state.layers].filter(([, { on }]) => on);
  put("layers", layers.map(([id, { opacity }]) => `${id}:${Math.round(100 * opacity)}`).join(",") || "none");
  return found.toString();
}
