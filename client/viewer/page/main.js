// The page: reads the address, shows the list or one or two slides, and keeps the address up to date.

import { isExport, readLimits, readServer, readSlides } from "./api.js";
import { askAbout, askPanel, drawArea } from "./ask.js";
import { link } from "./compare.js";
import { showControls } from "./controls.js";
import { showDetails } from "./details.js";
import { el, select } from "./dom.js";
import { listen, showKeys } from "./keys.js";
import { LAYERS } from "./layers.js";
import { choices, showList } from "./list.js";
import { Pane } from "./pane.js";
import { column, corner, findMap, loadSlide, ordered } from "./slide.js";
import { format, parse } from "./state.js";
import { showTrust, warnings } from "./trust.js";

const at = (id) => document.getElementById(id);
const bar = at("bar");
const list = at("list");
const view = at("view");
const drawer = at("drawer");

let state = parse(location.hash);
let slides = [];
let server = null; // what is known of the served model
let bank = ""; // the slide whose tiles replace an area
let stopDrawing = null;
let limits = null; // of every map and class, over all slides
let panes = [];
let active = null; // the pane that the pointer was on last
let updateControls = () => {};
let visit = 0; // counts what was opened, so that a slow answer to an earlier visit is dropped

// What is drawn ---------------------------------------------------------------------------------------------------

/** What a pane draws: its map, the class, the value of the strongest colours, the threshold, opacities. */
function look(pane) {
  const map = findMap(pane.slide, panes.indexOf(pane) === 1 ? state.besideMap : state.map);
  const cls = map && !map.classes.includes(state.cls) ? firstClass(map) : state.cls;
  const opacity = (id) => (state.layers.get(id).on ? state.layers.get(id).opacity : 0);
  return { map, cls, limit: map ? limitOf(map, cls) : 1, threshold: state.threshold, opacity };
}

const firstClass = (map) => (map.classes.includes(map.about.target) ? map.about.target : map.classes[0]);
const own = (map, cls) => map.limits[map.classes.indexOf(cls)] || 1;

function limitOf(map, cls) {
  if (Number(state.limit) > 0) return Number(state.limit);
  if (state.limit === "all") return limits?.[map.name]?.[cls] || own(map, cls);
  // Side by side, two maps have one scale: else the paler one would look stronger than it is.
  const shown = panes.map((pane, i) => findMap(pane.slide, i ? state.besideMap : state.map));
  return Math.max(own(map, cls), ...shown.filter((one) => one?.classes.includes(cls)).map((one) => own(one, cls)));
}

// Changes ---------------------------------------------------------------------------------------------------------

/** Merge a part into the state and draw; `whole`: the panels too. */
async function change(part, whole = true) {
  Object.assign(state, part);
  if (state.limit === "all" && !limits) {
    try {
      limits = await readLimits();
    } catch (error) {
      say(error.message);
    }
  }
  if (part.rotation !== undefined) for (const pane of panes) pane.goTo({ rotation: part.rotation });
  at("panes").classList.toggle("grey", state.grey);
  if (whole) panels();
  updateControls();
  for (const pane of panes) pane.redraw();
  remember();
}

function panels() {
  updateControls = showControls(at("controls"), { state, panes, look, change, jump, load });
  details();
  header();
  for (const pane of panes) pane.title.textContent = [pane.slide.key, look(pane).map?.name].filter(Boolean).join(": ");
}

function details() {
  const pane = active;
  const question = isExport()
    ? null
    : askPanel({ server, slides, pane, cls: look(pane).cls, bank, draw, clear, setBank: (key) => ((bank = key), again()) });
  showDetails(at("details"), pane, look(pane), { go, open: openTile, question });
}

// Questions -------------------------------------------------------------------------------------------------------

function draw() {
  stopDrawing?.();
  const pane = active;
  pane.shape = pane.question = pane.answer = null;
  stopDrawing = drawArea(pane, (area) => {
    stopDrawing = null;
    pane.shape = area;
    pane.redraw();
    if (area) question(pane, { area });
  });
}

const question = (pane, asked) => askAbout(pane, asked, bank, () => panes.includes(pane) && pane === active && details());
const again = () => active.question && question(active, active.question);

function clear() {
  active.asking?.abort();
  active.shape = active.question = active.answer = null;
  active.redraw();
  details();
}

/** Add a tile to the question, or take it out. */
function pick(pane, row) {
  const tiles = new Set(pane.question?.tiles);
  if (!tiles.delete(row)) tiles.add(row);
  pane.shape = null;
  active = pane;
  if (!tiles.size) return clear();
  question(pane, { tiles: [...tiles] });
  return pane.redraw();
}

async function findServer() {
  if (isExport()) return;
  try {
    server = await readServer();
  } catch (error) {
    server = { error: error.message };
  }
  if (panes.length) details();
}

let pending = 0;
function remember() {
  clearTimeout(pending);
  pending = setTimeout(() => {
    const hash = format(state);
    if (hash !== location.hash.slice(1)) history.replaceState(null, "", `#${hash}`);
  }, 250);
}

function moved(pane) {
  if (pane !== panes[0]) return;
  Object.assign(state, { centre: pane.centre, zoom: pane.zoom, rotation: pane.rotation });
  remember();
}

function choose(pane, row, together = false) {
  if (together && row >= 0 && server && !server.error) return pick(pane, row);
  for (const one of panes) one.selected = -1;
  pane.selected = row;
  active = pane;
  details();
  for (const one of panes) one.redraw();
  return undefined;
}

/** Show a tile of a pane, large. */
function go(pane, row) {
  const [x, y] = corner(pane.slide, row);
  active = pane;
  pane.goTo({ centre: [x + pane.slide.size[0] / 2, y + pane.slide.size[1] / 2], zoom: 300 / pane.slide.size[0] }, false);
  choose(pane, row);
}

/** Show an annotation. */
function jump(pane, geometry, [dx, dy]) {
  const points = JSON.stringify(geometry?.coordinates || []).match(/\[-?[\d.e+-]+,-?[\d.e+-]+/g) || [];
  const places = points.map((text) => text.slice(1).split(",").map(Number));
  if (!places.length) return;
  const [xs, ys] = [places.map(([x]) => x + dx), places.map(([, y]) => y + dy)];
  const size = Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys), 500);
  const centre = [(Math.min(...xs) + Math.max(...xs)) / 2, (Math.min(...ys) + Math.max(...ys)) / 2];
  pane.goTo({ centre, zoom: (0.7 * pane.frame.clientHeight) / size }, false);
}

/** Add the user's own GeoJSON, which stays in this page. */
async function load(file) {
  try {
    const content = JSON.parse(await file.text());
    const features = Array.isArray(content) ? content : content.features || [content];
    panes[0].slide.annotations.push({ name: file.name, origin: panes[0].slide.origin || [0, 0], features });
    state.layers.get("annotations").on = true;
    change({});
  } catch {
    say(`${file.name} is no GeoJSON: export annotations from QuPath as GeoJSON.`);
  }
}

// Messages and the bar ---------------------------------------------------------------------------------------------

function say(text) {
  const messages = at("messages");
  if ([...messages.children].some((one) => one.firstChild.textContent === text) || messages.children.length > 4) return;
  const close = el("button", { type: "button", ariaLabel: "Dismiss", onclick: () => message.remove() }, "×");
  const message = el("div", { className: "problem" }, el("span", {}, text), close);
  messages.append(message);
}

function header() {
  const name = el("a", { href: "#", className: "name", onclick: leave }, "Slides");
  if (!panes.length) return bar.replaceChildren(el("strong", {}, "GigaPath viewer"));
  const found = panes.flatMap((pane) => warnings(pane.slide, look(pane).map));
  const scores = Object.entries(panes[0].slide.scores).map(([cls, value]) => `${cls} ${value.toFixed(3)}`);
  const others = [["", "nothing"], ...choices(slides)];
  bar.replaceChildren(
    name,
    el("strong", {}, panes[0].slide.slide_id),
    el("span", { className: "quiet" }, scores.join(" · ")),
    el("span", { className: "gap" }),
    select("Compare with", others, state.beside || "", (beside) => visitSlide({ beside: beside || null, besideMap: null })),
    button(found.length ? `Trust: ${found.length} warning${found.length > 1 ? "s" : ""}` : "Trust", () => showTrust(drawer, panes, look), found.length ? "warned" : ""),
    button("Copy link", () => navigator.clipboard?.writeText(location.href)),
    button("Keys", () => showKeys(drawer)),
  );
}

const button = (text, onclick, className = "") => el("button", { type: "button", onclick, className }, text);

// Visits ------------------------------------------------------------------------------------------------------------

function leave(event) {
  event.preventDefault();
  history.pushState(null, "", location.pathname + location.search);
  visitAddress();
}

function visitSlide(part) {
  Object.assign(state, part);
  history.pushState(null, "", `#${format(state)}`);
  return visitAddress();
}

const openSlide = (key) => visitSlide({ ...parse(""), slide: key, cls: state.cls, layers: state.layers, limit: state.limit });

async function openTile(key, row) {
  await openSlide(key);
  const [pane] = panes;
  if (pane) pane.viewer.addOnceHandler("open", () => go(pane, row));
}

/** Show what the address says. */
async function visitAddress() {
  state = parse(location.hash);
  const mine = ++visit;
  for (const pane of panes) pane.close();
  panes = [];
  stopDrawing = null;
  drawer.close();
  at("messages").replaceChildren();
  list.hidden = Boolean(state.slide);
  view.hidden = !state.slide;
  header();
  try {
    if (!state.slide || !slides.length) {
      slides = await readSlides();
      bank = "";
    }
    if (!state.slide) return showList(list, slides, openSlide);
    const keys = [state.slide, state.beside].filter(Boolean);
    const loaded = await Promise.all(keys.map(loadSlide));
    if (mine === visit) showPanes(loaded);
  } catch (error) {
    if (mine === visit) say(error.message);
  }
}

function showPanes(loaded) {
  const place = { centre: state.centre, zoom: state.zoom, rotation: state.rotation };
  const events = { select: choose, moved, problem: say, opened };
  at("panes").classList.toggle("two", loaded.length === 2); // before the viewers measure themselves
  panes = loaded.map((slide) => new Pane(at("panes"), slide, look, events));
  [active] = panes;
  for (const pane of panes) pane.frame.addEventListener("pointerenter", () => (active = pane));
  const map = look(panes[0]).map;
  state.cls = look(panes[0]).cls ?? state.cls;
  state.map = map?.name ?? null;
  if (panes[1]) state.besideMap ??= panes[1].slide.key === panes[0].slide.key ? otherMap(panes[1].slide, map) : map?.name;
  for (const { slide } of panes) for (const problem of slide.problems) say(`${slide.slide_id}: ${problem}`);
  change({});
  findServer();
  let left = panes.length;
  function opened(pane) {
    if (pane === panes[0]) pane.goTo(place);
    if (--left === 0 && panes.length === 2) link(...panes, (one) => one === active);
  }
}

const otherMap = (slide, map) => (slide.maps.find((one) => one !== map && one.name !== map?.name) || map)?.name;

// Keys --------------------------------------------------------------------------------------------------------------

const next = (choices, now, step = 1) => choices[(choices.indexOf(now) + step + choices.length) % choices.length];

function act(key) {
  if (key === "?") return showKeys(drawer);
  if (key === "Escape") return stopDrawing ? stopDrawing() : drawer.close();
  if (!panes.length) return undefined;
  const { viewport } = active.viewer;
  const { map, cls, limit } = look(active);
  const layer = LAYERS[Number(key) - 1];
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (key in arrows) {
    const step = viewport.deltaPointsFromPixels(new OpenSeadragon.Point(...arrows[key]).times(80));
    return viewport.panBy(step.rotate(-viewport.getRotation()));
  }
  if (layer) {
    const now = state.layers.get(layer.id);
    state.layers.set(layer.id, { ...now, on: !now.on });
    return change({});
  }
  switch (key) {
    case "+":
    case "=":
      return viewport.zoomBy(1.4);
    case "-":
      return viewport.zoomBy(1 / 1.4);
    case "0":
      return active.home();
    case "c":
      return map && change({ cls: next(map.classes, cls) });
    case "m":
      return map && change({ map: next(panes[0].slide.maps, findMap(panes[0].slide, state.map)).name });
    case "n":
    case "p": {
      if (!map) return undefined;
      const { rows } = ordered(column(map, map.values, cls));
      const start = rows.indexOf(active.selected);
      return go(active, start < 0 ? rows[0] : next(rows, active.selected, key === "n" ? 1 : -1));
    }
    case "[":
    case "]":
      return change({ threshold: Number(Math.min(limit, Math.max(0, state.threshold + (key === "]" ? 0.05 : -0.05) * limit)).toPrecision(4)) });
    case "r":
    case "R":
      return change({ rotation: (state.rotation + (key === "r" ? 15 : 345)) % 360 });
    case "o": {
      const { element } = active.viewer.navigator;
      return (element.hidden = !element.hidden);
    }
    case "a":
      return server && !server.error && draw();
    case "g":
      return change({ grey: !state.grey });
    case "t":
      return showTrust(drawer, panes, look);
    case "l":
      return leave(new Event("key"));
    default:
      return undefined;
  }
}

listen(act);
addEventListener("popstate", visitAddress);
addEventListener("hashchange", () => location.hash.slice(1) !== format(state) && visitAddress());
// For tests, and for whoever tries things in the browser's console.
globalThis.viewer = {
  get panes() {
    return panes;
  },
  get state() {
    return state;
  },
  go,
  change,
};
visitAddress();
