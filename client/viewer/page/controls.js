// The panel on the left: class and map, colour scale, threshold, the layers.

import { diverging, sequential, STEPS } from "./colours.js";
import { el, select, signed } from "./dom.js";
import { labelOf, LAYERS, largest, own } from "./layers.js";
import { column, isTileHead, noiseFloor } from "./slide.js";

/**
 * Fill `parent`; `state` is the page's and `panes` what is shown. `change(part)` merges a part into the state.
 * `look(pane)` says what a pane draws. Returns a function that brings figures up to date.
 */
export function showControls(parent, { state, panes, look, change, jump, load }) {
  const { slide } = panes[0];
  const classes = [...new Set(slide.maps.flatMap((map) => map.classes))];
  const figures = el("div", { className: "figures" });
  const update = () => figures.replaceChildren(...legend(look(panes[0])), ...further(slide, look(panes[0])));
  parent.replaceChildren(
    slide.maps.length
      ? el(
          "section",
          {},
          select("Class", classes, state.cls, (cls) => change({ cls })),
          ...panes.map((pane, i) => mapChoice(pane, i, look, change, panes.length)),
          figures,
          limitChoice(state, change, panes.length),
          thresholdSlider(state, look(panes[0]), change),
        )
      : el("p", { className: "quiet" }, "No map is stored of this slide: run attribute on it."),
    el("section", {}, el("h2", {}, "Layers"), LAYERS.map((layer, i) => layerRow(layer, i, state, panes, look, change))),
    el(
      "section",
      {},
      el("h2", {}, "Annotations"),
      annotationList(panes[0], jump),
      el("label", { className: "file" }, "Add GeoJSON … ", fileInput(load)),
    ),
    el("section", {}, el("h2", {}, "View"), rotationSlider(state, change), greySwitch(state, change)),
  );
  update();
  return update;
}

function mapChoice(pane, index, look, change, count) {
  const shown = look(pane).map;
  const label = count > 1 ? ["Map on the left", "Map on the right"][index] : "Map";
  return select(label, pane.slide.maps.map((map) => [map.name, mapName(map)]), shown?.name, (name) =>
    change(index ? { besideMap: name } : { map: name }),
  );
}

const mapName = (map) => isTileHead(map) ? "tile head's probability" : map.name.replace(/_(look|place)$/, ", by $1") + (map.about.grouping ? ` (by ${map.about.grouping})` : "");

function colourBar(colours) {
  const bar = el("canvas", { className: "bar", width: STEPS + 1, height: 1 });
  const ctx = bar.getContext("2d");
  colours.forEach((colour, i) => {
    ctx.fillStyle = colour;
    ctx.fillRect(i, 0, 1, 1);
  });
  return bar;
}

const ends = (...texts) => el("div", { className: "ends" }, texts.map((text) => el("span", {}, text)));

/** The colour bars of the other layers that are on. */
function further(slide, look) {
  const found = [];
  const { map, cls, opacity } = look;
  const alone = slide.maps.find((one) => one.name === "keep_one");
  if (alone && opacity("alone")) {
    const limit = alone.limits[alone.classes.indexOf(cls)] || 1;
    found.push(el("div", {}, "Keep one"), colourBar(diverging), ends(signed(-limit), "0", signed(limit)));
  }
  for (const [id, name, values] of [["error", "Standard error", map?.stderr], ["leaf", "Leaf size (log)", map?.leaf_size]]) {
    if (!values || !opacity(id)) continue;
    const shown = id === "error" ? column(map, values, cls) : values;
    found.push(el("div", {}, name), colourBar(sequential), ends(id === "error" ? "0" : "1", largest(shown).toPrecision(3)));
  }
  return found;
}

/** The colour bar, what it means, and the noise below which values are hatched. */
function legend({ map, cls, limit }) {
  if (!map) return [];
  if (isTileHead(map))
    return [
      colourBar([...sequential].reverse()),
      ends("0", "1"),
      el("div", { className: "quiet" }, `probability of ${cls} by the tile head, which saw each tile alone: no attribution`),
    ];
  const floor = noiseFloor(map, cls);
  const { base, full, classes } = map.about;
  const at = classes.indexOf(cls);
  return [
    colourBar(diverging),
    ends(signed(-limit), "0", signed(limit)),
    el("div", { className: "ends quiet" }, el("span", {}, `opposes ${cls}`), el("span", {}, `supports ${cls}`)),
    floor === null ? null : el("div", { className: "quiet" }, `hatched: within the noise, below ${floor.toPrecision(2)}`),
    Array.isArray(full) && Array.isArray(base)
      ? el("div", { className: "quiet" }, `${words(map.about.score)}: slide ${signed(full[at])}, empty slide ${signed(base[at])}`)
      : null,
  ].filter(Boolean);
}

const words = (score) => String(score || "score").replace("_", "-");

function limitChoice(state, change, count) {
  const fixed = Number(state.limit) > 0;
  const number = el("input", {
    type: "number", min: 0, step: "any", ariaLabel: "Fixed limit", hidden: !fixed, value: fixed ? state.limit : 1,
    onchange: () => Number(number.value) > 0 && change({ limit: number.value }),
  });
  const choices = [["slide", count > 1 ? "of these slides" : "of this slide"], ["all", "one for all slides"], ["fixed", "fixed"]];
  const list = select("Colour limit", choices, fixed ? "fixed" : state.limit, (limit) =>
    change({ limit: limit === "fixed" ? number.value : limit }),
  );
  return el("div", {}, list, number);
}

function thresholdSlider(state, { limit }, change) {
  const text = el("output", {}, state.threshold ? `from ${Number(state.threshold).toPrecision(2)}` : "all values");
  const slider = el("input", {
    id: "threshold", type: "range", min: 0, max: 100, ariaLabel: "Threshold",
    value: Math.round((100 * state.threshold) / limit) || 0,
    oninput: () => {
      const threshold = Number(((slider.value / 100) * limit).toPrecision(4));
      text.textContent = threshold ? `from ${threshold.toPrecision(2)}` : "all values";
      change({ threshold }, false);
    },
  });
  return el("label", { className: "field" }, el("span", {}, "Show"), slider, text);
}

function layerRow({ id, label, needs }, index, state, panes, look, change) {
  const layer = state.layers.get(id);
  const there = panes.some((pane) => needs(pane.slide, look(pane).map));
  const put = (part, whole) => {
    state.layers.set(id, { ...state.layers.get(id), ...part });
    change({}, whole);
  };
  return el(
    "div",
    { className: there ? "row" : "row missing", title: there ? `key ${index + 1}` : "this slide has none" },
    el("label", {}, el("input", { type: "checkbox", id: `layer-${id}`, checked: layer.on && there, disabled: !there, onchange: (event) => put({ on: event.target.checked }, false) }), label),
    el("input", { type: "range", min: 5, max: 100, value: 100 * layer.opacity, disabled: !there, ariaLabel: `Opacity of ${label}`, oninput: (event) => put({ opacity: event.target.value / 100 }, false) }),
  );
}

/** The names of annotations, each of which jumps to its place. */
function annotationList(pane, jump) {
  const items = own(pane.slide).flatMap((file) =>
    file.features.map((feature) => {
      const show = () => jump(pane, feature.geometry, file.origin);
      return el("li", {}, el("button", { type: "button", onclick: show }, labelOf(feature) || "(no name)"));
    }),
  );
  return items.length ? el("ul", { id: "annotations" }, items) : el("p", { className: "quiet" }, "none");
}

function fileInput(load) {
  return el("input", { type: "file", accept: ".geojson,.json", onchange: (event) => event.target.files[0] && load(event.target.files[0]) });
}

function greySwitch(state, change) {
  const box = el("input", { type: "checkbox", checked: state.grey, onchange: () => change({ grey: box.checked }, false) });
  return el("label", {}, box, "Slide in grey");
}

function rotationSlider(state, change) {
  const text = el("output", {}, `${state.rotation}°`);
  const slider = el("input", {
    type: "range", min: 0, max: 345, step: 15, value: state.rotation, ariaLabel: "Rotation",
    oninput: () => {
      text.textContent = `${slider.value}°`;
      change({ rotation: Number(slider.value) }, false);
    },
  });
  return el("label", { className: "field" }, el("span", {}, "Rotation"), slider, text);
}
