// The slides of the folders as a table: thumbnail, outcome, scores, what is known of them.

import { tileUrl } from "./api.js";
import { el } from "./dom.js";

const THUMBNAIL_LEVEL = 7; // at most 128 px, which is one tile of any slide

const dash = (value) => (value === null || value === undefined || value === "" ? "–" : value);
const count = (value) => (value ? String(value) : "");

/** The columns: heading, what to sort by, what to show. */
function columns(slides) {
  const classes = [...new Set(slides.flatMap((slide) => Object.keys(slide.scores)))];
  const folders = new Set(slides.map((slide) => slide.folder)).size > 1;
  return [
    { name: "slide", value: (s) => s.slide_id, show: (s) => s.slide_id },
    { name: "status", value: (s) => s.status, show: (s) => status(s) },
    ...classes.map((name) => ({
      name,
      value: (s) => s.scores[name] ?? -1,
      show: (s) => (name in s.scores ? score(s.scores[name]) : "–"),
      number: true,
    })),
    { name: "tiles", value: (s) => s.tiles ?? -1, show: (s) => dash(s.tiles), number: true },
    { name: "failed tiles", value: (s) => s.invalid_tiles ?? -1, show: (s) => count(s.invalid_tiles), number: true },
    { name: "mpp", value: (s) => s.mpp ?? -1, show: (s) => (s.mpp ? s.mpp.toPrecision(4) : "–"), number: true },
    { name: "maps", value: (s) => s.maps.length, show: (s) => s.maps.join(", ") || "–" },
    { name: "warnings", wide: true, value: (s) => s.warnings.length, show: (s) => s.warnings.map((text) => el("div", {}, text)) },
    ...(folders ? [{ name: "folder", value: (s) => s.folder, show: (s) => s.folder }] : []),
  ];
}

function status(slide) {
  return [el("span", { className: `status ${slide.status}` }, slide.status), slide.reason ? el("div", {}, slide.reason) : null];
}

function score(value) {
  return el("span", { className: "score" }, el("meter", { min: 0, max: 1, value }), value.toFixed(3));
}

/** Slides to choose from: key and name, with the folder where there are several. */
export function choices(slides) {
  const several = new Set(slides.map(({ folder }) => folder)).size > 1;
  return slides.map(({ key, slide_id, folder }) => [key, several ? `${slide_id} (${folder})` : slide_id]);
}

/** Fill `parent` with the list; `open(key)` shows a slide. */
export function showList(parent, slides, open) {
  let [sorted, ascending, wanted] = ["slide", true, ""];
  const body = el("tbody");
  const shown = el("span", { className: "quiet" });
  const different = new Set(slides.map((slide) => slide.slide_id)).size;
  const noun = different < slides.length ? `results of ${different} slide${different > 1 ? "s" : ""}` : "slides"; // of several exports
  const cells = columns(slides);
  const heads = cells.map((cell) =>
    el("th", { scope: "col" }, el("button", { type: "button", onclick: () => sort(cell.name) }, cell.name)),
  );
  const filter = el("input", {
    type: "search",
    placeholder: "Filter by name, status, warning …",
    ariaLabel: "Filter",
    oninput: () => {
      wanted = filter.value.toLowerCase();
      fill();
    },
  });
  function sort(name) {
    ascending = sorted === name ? !ascending : cells.find((cell) => cell.name === name).number !== true;
    sorted = name;
    fill();
  }
  function fill() {
    const { value } = cells.find((cell) => cell.name === sorted);
    heads.forEach((head, i) => {
      head.ariaSort = cells[i].name === sorted ? (ascending ? "ascending" : "descending") : "none";
    });
    const matching = slides.filter((slide) =>
      [slide.key, slide.status, slide.reason, slide.folder, ...slide.maps, ...slide.warnings].join("\n").toLowerCase().includes(wanted),
    );
    matching.sort((a, b) => (ascending ? 1 : -1) * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    body.replaceChildren(...matching.map((slide) => line(slide, cells, open)));
    shown.textContent = `${matching.length} of ${slides.length} ${noun}`;
  }
  fill();
  parent.replaceChildren(
    el("div", { className: "tools" }, filter, shown),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}), heads)), body),
  );
}

function line(slide, cells, open) {
  const thumbnail = el("img", {
    loading: "lazy",
    alt: "",
    src: tileUrl(slide.key, THUMBNAIL_LEVEL, 0, 0),
    onerror: () => thumbnail.replaceWith(el("span", { className: "quiet" }, "no image")),
  });
  const show = () => open(slide.key);
  return el(
    "tr",
    {
      tabIndex: 0,
      onclick: show,
      onkeydown: ({ key }) => key === "Enter" && show(),
    },
    el("td", { className: "thumbnail" }, thumbnail),
    cells.map((cell) => el("td", { className: cell.number ? "number" : cell.wide && slide.warnings.length ? "wide" : "" }, cell.show(slide))),
  );
}
