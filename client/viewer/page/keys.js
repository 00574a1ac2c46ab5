// The keyboard.

import { el } from "./dom.js";
import { LAYERS } from "./layers.js";

/** What each key does, in words; the page gives the actions by these names. */
export const KEYS = [
  ["Arrows", "move", ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"]],
  ["+ −", "zoom", ["+", "=", "-"]],
  ["0", "whole slide", ["0"]],
  [`1 to ${LAYERS.length}`, "layer on or off", LAYERS.map((_, i) => String(i + 1))],
  ["n p", "next or previous of the strongest tiles", ["n", "p"]],
  ["c", "next class", ["c"]],
  ["m", "next map", ["m"]],
  ["[ ]", "lower or raise the threshold", ["[", "]"]],
  ["r R", "rotate by 15°", ["r", "R"]],
  ["g", "slide in grey", ["g"]],
  ["o", "overview on or off", ["o"]],
  ["a", "ask: draw an area", ["a"]],
  ["t", "how far to trust it", ["t"]],
  ["l", "list of slides", ["l"]],
  ["Esc", "stop drawing, close", ["Escape"]],
  ["?", "these keys", ["?"]],
];

/** Call `act(key)` for the keys above, unless a text is being typed. */
export function listen(act) {
  const known = new Set(KEYS.flatMap(([, , keys]) => keys));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || !known.has(event.key)) return;
    if (typing && event.key !== "Escape") return;
    if (event.key !== "Escape") event.preventDefault();
    act(event.key);
  });
}

export function showKeys(dialog) {
  dialog.replaceChildren(
    el("button", { type: "button", className: "close", ariaLabel: "Close", onclick: () => dialog.close() }, "×"),
    el("h1", {}, "Keys"),
    el("table", { className: "facts" }, KEYS.map(([key, text]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, text)))),
  );
  dialog.showModal();
}
