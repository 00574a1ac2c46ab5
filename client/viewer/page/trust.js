// The drawer that says how far to trust what is shown: warnings in words, figures, contract, digests, versions.

import { el } from "./dom.js";
import { isTileHead } from "./slide.js";

const FIGURES = [
  ["srg", "SRG", "gain of the map over its reverse; must exceed that of random maps"],
  ["random_srg", "SRG of random maps", ""],
  ["noise_floor", "noise floor", "change of a tile's value when the same tiles are shifted; smaller values are hatched"],
  ["position_sensitivity", "position sensitivity", "change of the slide's score under the same shifts"],
  ["agreement", "agreement", "rank correlation with the map of another occluder, over coarse regions"],
  ["other_occluder", "the other occluder", ""],
  ["redundancy", "redundancy", "near 1: any region can be spared; near 0: they add up"],
  ["unresolved", "unresolved", "part of the values that several tiles share evenly"],
  ["completeness_gap", "completeness gap", "sum of the values less the difference of full and empty slide"],
  ["score_elsewhere", "score elsewhere", "of slides of another class"],
  ["full", "full slide", ""],
  ["base", "empty slide", ""],
];
const CURVES = ["curve_fractions", "deletion", "lif", "insertion"];

/** Every warning about a slide and a map, in words. */
export function warnings(slide, map) {
  const found = [...slide.problems];
  if (slide.contract?.trained === false) found.push("The weights are untrained: scores and maps mean nothing.");
  if (map?.about.embeddings_doubt) found.push(map.about.embeddings_doubt);
  if (map && map.about.export_id && slide.about?.export_id && map.about.export_id !== slide.about.export_id)
    found.push(`The map was made with export ${map.about.export_id}, the scores with ${slide.about.export_id}.`);
  for (const text of map?.about.warnings || []) found.push(text);
  if (map && !isTileHead(map) && map.about.noise_floor === undefined) found.push("The reliability of this map was not measured.");
  return found;
}

export function showTrust(dialog, panes, look) {
  dialog.replaceChildren(
    el("button", { type: "button", className: "close", ariaLabel: "Close", onclick: () => dialog.close() }, "×"),
    ...panes.map((pane) => trust(pane.slide, look(pane).map)),
  );
  dialog.showModal();
}

function trust(slide, map) {
  const about = map?.about || {};
  const found = warnings(slide, map);
  return el(
    "article",
    {},
    el("h1", {}, slide.slide_id),
    el("h2", {}, "Warnings"),
    found.length ? el("ul", { className: "warnings" }, found.map((text) => el("li", {}, text))) : el("p", {}, "None."),
    map ? [el("h2", {}, `Map ${map.name}`), table(FIGURES.filter(([key]) => key in about).map(([key, name, meaning]) => [name, short(about[key]), meaning]))] : null,
    map ? rest("How it was made", about, [...FIGURES.map(([key]) => key), ...CURVES, "warnings", "beats_random", "groupings_alike"]) : null,
    rest("Slide and embeddings", { ...slide.record, mpp_read: slide.mpp, ...slide.about }, []),
    slide.contract ? rest("Contract of the export", slide.contract, []) : null,
  );
}

const rest = (heading, values, without) => [
  el("h2", {}, heading),
  table(flat(values).filter(([key]) => !without.includes(key)).map(([key, value]) => [key, short(value), ""])),
];

function* entries(values, before = "") {
  for (const [key, value] of Object.entries(values || {})) {
    if (value && typeof value === "object" && !Array.isArray(value)) yield* entries(value, `${before}${key}.`);
    else yield [before + key, value];
  }
}
const flat = (values) => [...entries(values)];

const table = (rows) => el("table", { className: "facts" }, rows.map(([name, value, meaning]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value), meaning ? el("td", { className: "quiet" }, meaning) : null)));

function short(value) {
  if (Array.isArray(value)) return value.map(short).join(", ");
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(4)));
  return String(value);
}
