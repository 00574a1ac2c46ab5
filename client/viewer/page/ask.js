// Questions to the served model about an area or some tiles: what if they were gone, alone, or benign?

import { ask } from "./api.js";
import { el, select, signed } from "./dom.js";
import { choices } from "./list.js";

const CHANGES = [
  ["remove", "without it"],
  ["keep", "with it alone"],
  ["replace", "with benign tiles there"],
];
const CLOSE = 3; // CSS px between the points of a drawn line

/** Let the user draw round an area of a pane; `done(points)` gets level-0 px, null where it was given up. */
export function drawArea(pane, done) {
  const { canvas } = pane.viewer;
  const points = [];
  let last = null;
  pane.viewer.setMouseNavEnabled(false);
  pane.frame.classList.add("drawing");
  const stop = (result) => {
    pane.viewer.setMouseNavEnabled(true);
    pane.frame.classList.remove("drawing");
    for (const [name, listener] of Object.entries(listeners)) canvas.removeEventListener(name, listener, true);
    pane.drawing = false;
    done(result);
  };
  const add = (event) => {
    const box = canvas.getBoundingClientRect();
    const at = new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top);
    if (last && last.distanceTo(at) < CLOSE) return;
    last = at;
    points.push(pane.imageAt(at));
    pane.shape = points;
    pane.redraw();
  };
  const listeners = {
    pointerdown: (event) => {
      pane.drawing = true;
      canvas.setPointerCapture(event.pointerId);
      add(event);
    },
    pointermove: (event) => pane.drawing && add(event),
    pointerup: () => pane.drawing && stop(points.length > 2 ? points : null),
  };
  for (const [name, listener] of Object.entries(listeners)) canvas.addEventListener(name, listener, true);
  return () => stop(null);
}

/**
 * The panel of questions. `page` has server (null while it is not known), slides, cls, pane, draw() and clear().
 * The question itself is kept in `pane.question`, {area} or {tiles}, with `pane.answer`.
 */
export function askPanel(page) {
  const { server, pane } = page;
  const section = el("section", { id: "ask" }, el("h2", {}, "Ask the model"));
  if (!server) section.append(el("p", { className: "quiet" }, "looking for the server …"));
  else if (server.error)
    section.append(el("p", { className: "quiet", title: server.error }, `No server answers${server.url ? ` at ${server.url}` : ""}: areas cannot be asked about.`));
  else section.append(...tools(page));
  if (pane.answer) section.append(result(pane.answer, page.cls));
  return section;
}

function tools(page) {
  const { pane } = page;
  const others = page.slides.filter((slide) => slide.tiles && slide.key !== pane.slide.key);
  const hint = pane.question ? null : el("p", { className: "quiet" }, "Draw round an area, or pick tiles with Shift and a click.");
  return [
    el(
      "p",
      {},
      el("button", { type: "button", id: "draw", onclick: page.draw }, "Draw an area"),
      pane.question ? el("button", { type: "button", onclick: page.clear }, "Clear") : null,
    ),
    select("Benign tiles from", [["", "no slide"], ...choices(others)], page.bank ?? "", page.setBank),
    hint,
  ].filter(Boolean);
}

/** Ask; an earlier question of the pane is taken back. */
export async function askAbout(pane, question, bank, changed) {
  pane.asking?.abort();
  pane.asking = new AbortController();
  const { signal } = pane.asking;
  pane.question = question;
  pane.answer = { waiting: true };
  changed();
  try {
    pane.answer = await ask(pane.slide.key, bank ? { ...question, bank } : question, signal);
  } catch (error) {
    if (signal.aborted) return;
    pane.answer = { error: error.message };
  }
  if (!signal.aborted) changed();
}

const probability = (logOdds) => (1 / (1 + Math.exp(-logOdds))).toFixed(3);

function result(answer, cls) {
  if (answer.waiting) return el("p", { className: "quiet" }, "asking …");
  if (answer.error) return el("p", { className: "problem" }, answer.error);
  const at = Math.max(0, answer.classes.indexOf(cls));
  const row = (text, value, change, error) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, text),
      el("td", {}, signed(value)),
      el("td", {}, probability(value)),
      el("td", {}, change === null ? "" : `${signed(change)}${error ? ` ± ${error.toPrecision(2)}` : ""}`),
    );
  const rows = CHANGES.filter(([change]) => change in answer.effects).map(([change, text]) => {
    const { mean, stderr } = answer.effects[change];
    return row(text, answer.full[at] + mean[at], mean[at], stderr?.[at]);
  });
  return el(
    "div",
    { id: "answer" },
    el("div", {}, `${answer.tiles.length} tile${answer.tiles.length === 1 ? "" : "s"}, ${answer.classes[at]}:`),
    el("table", {}, el("tr", {}, ["slide", "log-odds", "probability", "change"].map((text) => el("th", { scope: "col" }, text))), row("as it is", answer.full[at], null), rows),
    answer.doubt ? el("p", { className: "problem" }, answer.doubt) : null,
  );
}
