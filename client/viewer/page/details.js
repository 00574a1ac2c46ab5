// The panel on the right: the selected tile, and the strongest tiles for and against the class.

import { innerMapUrl, isExport, readNeighbours } from "./api.js";
import { crop } from "./crop.js";
import { el, signed } from "./dom.js";
import { column, corner, ordered } from "./slide.js";

const STRONGEST = 8;
const SMALL = 72;

/** Fill `parent` for a pane; `go(pane, row)` shows a tile, `open(key, row)` one of another slide; `question` is a panel. */
export function showDetails(parent, pane, look, { go, open, question }) {
  parent.replaceChildren(...[question, tile(pane, { go, open }), strongest(pane, look, go)].filter(Boolean));
}

function tile(pane, { go, open }) {
  const { slide, selected: row } = pane;
  if (row < 0) return el("section", {}, el("h2", {}, "Tile"), el("p", { className: "quiet" }, "Click a tile."));
  const [x, y] = corner(slide, row);
  const picture = el("canvas", { className: "tile", width: slide.size[0], height: slide.size[1] });
  crop(picture, slide, x, y, ...slide.size, true);
  const inner = slide.tile_maps.some(([left, top]) => left === x && top === y);
  return el(
    "section",
    { id: "tile" },
    el("h2", {}, "Tile"),
    picture,
    pane.describe(row).map((line) => el("div", {}, line)),
    inner ? el("figure", {}, el("img", { alt: "Map inside the tile", src: innerMapUrl(slide.key, x, y) }), el("figcaption", {}, "Map inside this tile")) : null,
    isExport() ? null : neighbours(slide, row, pane, { go, open }),
  );
}

/** Buttons that find the tiles which look most like one. */
function neighbours(slide, row, pane, { go, open }) {
  const found = el("div", { className: "gallery", id: "neighbours" });
  const search = async (everywhere) => {
    found.replaceChildren(el("p", { className: "quiet" }, "searching …"));
    try {
      const near = await readNeighbours(slide.key, row, everywhere);
      found.replaceChildren(
        ...near.map((one) => {
          const here = one.slide.key === slide.key;
          const text = `${one.similarity.toFixed(3)}${here ? "" : ` ${one.slide.slide_id}`}`;
          return thumbnail(one.slide, ...one.corner, ...one.size, text, () => (here ? go(pane, one.row) : open(one.slide.key, one.row)));
        }),
      );
    } catch (error) {
      found.replaceChildren(el("p", { className: "problem" }, error.message));
    }
  };
  const button = (text, everywhere) => el("button", { type: "button", onclick: () => search(everywhere) }, text);
  return el("div", {}, el("h3", {}, "Tiles that look alike"), button("on this slide", false), button("in the folder", true), found);
}

function strongest(pane, look, go) {
  const { map, cls } = look;
  if (!map) return el("section");
  const values = column(map, map.values, cls);
  const { rows } = ordered(values);
  const lists = [
    [`Strongest for ${cls}`, rows.filter((row) => values[row] > 0).slice(0, STRONGEST)],
    [`Strongest against ${cls}`, rows.filter((row) => values[row] < 0).slice(-STRONGEST).reverse()],
  ];
  return el(
    "section",
    { id: "strongest" },
    lists.map(([heading, chosen]) => [
      el("h2", {}, heading),
      el(
        "div",
        { className: "gallery" },
        chosen.map((row) => thumbnail(pane.slide, ...corner(pane.slide, row), ...pane.slide.size, signed(values[row]), () => go(pane, row))),
      ),
    ]).flat(),
  );
}

function thumbnail(slide, x, y, width, height, text, click) {
  const canvas = el("canvas", { width: SMALL, height: SMALL });
  crop(canvas, slide, x, y, width, height);
  return el("button", { type: "button", className: "thumb", onclick: click, title: `(${x}, ${y})` }, canvas, el("span", {}, text));
}
