// One slide on the screen: OpenSeadragon, the layers over it, the scale bar and what the pointer is on.

import { tileUrl } from "./api.js";
import { el, signed } from "./dom.js";
import { drawLayer, LAYERS } from "./layers.js";
import { Overlay, placement } from "./overlay.js";
import { ScaleBar } from "./scalebar.js";
import { column, corner, ordered, tileAt } from "./slide.js";

const BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";

export class Pane {
  /**
   * `look(pane)` says what to draw: {map, cls, limit, threshold, opacity(id)}; `events` has select(pane, row),
   * moved(pane) and problem(text).
   */
  constructor(parent, slide, look, events) {
    this.slide = slide;
    this.look = () => look(this);
    this.selected = -1;
    this.shape = null; // an area that is asked about, in level-0 px
    this.question = null; // what is asked about: {area} or {tiles}
    this.answer = null;
    this.asking = null; // what takes the question back
    this.loaded = false;
    this.title = el("div", { className: "title" }, slide.slide_id);
    this.tip = el("div", { className: "tip", hidden: true });
    this.frame = el("div", { className: "pane" }, this.title, this.tip);
    this.tipRow = -1;
    parent.append(this.frame);
    this.viewer = OpenSeadragon({
      element: this.frame.appendChild(el("div", { className: "slide" })),
      tileSources: tileSource(slide),
      prefixUrl: "",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorSizeRatio: 0.16,
      navigatorAutoFade: false,
      animationTime: 0.3,
      minZoomImageRatio: 0.5,
      maxZoomPixelRatio: 8,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      timeout: 60000,
    });
    this.viewer.innerTracker.keyHandler = null; // keys.js has them all
    this.viewer.innerTracker.keyDownHandler = null;
    this.overlay = new Overlay(this.viewer, [...LAYERS.map(({ id }) => id), "marks"], {
      draw: (id, ctx, view) => (id === "marks" ? this.marks(ctx, view) : drawLayer(id, ctx, view, slide, this.look())),
      opacity: (id) => (id === "marks" ? 1 : this.look().opacity(id)),
    });
    this.bar = new ScaleBar(this.viewer.canvas);
    this.viewer.addHandler("open", () => {
      this.viewer.world.getItemAt(0).addHandler("fully-loaded-change", ({ fullyLoaded }) => (this.loaded = fullyLoaded));
      this.home(true);
      events.opened?.(this);
    });
    this.viewer.addHandler("update-viewport", () => {
      this.bar.show(slide.mpp ? this.zoom / slide.mpp[0] : null);
      events.moved(this);
    });
    this.viewer.addHandler("tile-load-failed", ({ tile }) => {
      events.problem(`${slide.slide_id}: a part of the slide cannot be read (level ${tile.level}, ${tile.x}, ${tile.y})`);
    });
    this.viewer.addHandler("open-failed", ({ message }) => events.problem(`${slide.slide_id}: ${message}`));
    this.viewer.addHandler("canvas-click", (event) => {
      if (event.quick) events.select(this, this.rowAt(event.position), event.originalEvent.shiftKey);
    });
    this.frame.addEventListener("pointermove", (event) => this.hover(event), true);
    this.frame.addEventListener("pointerleave", () => (this.tip.hidden = true));
  }

  /** CSS pixels per level-0 pixel. */
  get zoom() {
    const [a, b] = placement(this.viewer) || [1, 0];
    return Math.hypot(a, b);
  }

  /** The level-0 pixel in the middle. */
  get centre() {
    const item = this.viewer.world.getItemAt(0);
    if (!item) return [0, 0];
    const { x, y } = item.viewportToImageCoordinates(this.viewer.viewport.getCenter(true));
    return [x, y];
  }

  get rotation() {
    return this.viewer.viewport.getRotation();
  }

  /** Show a place: centre [x, y] in level-0 px, CSS pixels per level-0 pixel, degrees. */
  goTo({ centre, zoom, rotation }, immediately = true) {
    const { viewport, world } = this.viewer;
    const item = world.getItemAt(0);
    if (!item) return;
    if (rotation !== undefined && rotation !== viewport.getRotation()) viewport.setRotation(rotation, immediately);
    if (zoom) viewport.zoomTo(item.imageToViewportZoom(zoom), null, immediately);
    if (centre) viewport.panTo(item.imageToViewportCoordinates(...centre, true), immediately);
  }

  /** The part of the slide that was scanned, or all of it. */
  home(immediately = false) {
    const item = this.viewer.world.getItemAt(0);
    if (this.slide.bounds) this.viewer.viewport.fitBounds(item.imageToViewportRectangle(...this.slide.bounds), immediately);
    else this.viewer.viewport.goHome(immediately);
  }

  redraw() {
    this.overlay.redraw();
  }

  /** Level-0 px of a place in CSS pixels of the pane. */
  imageAt(position) {
    const item = this.viewer.world.getItemAt(0);
    const { x, y } = item.viewportToImageCoordinates(this.viewer.viewport.pointFromPixel(position, true), true);
    return [x, y];
  }

  rowAt(position) {
    return this.viewer.world.getItemAt(0) ? tileAt(this.slide, ...this.imageAt(position)) : -1;
  }

  /** Show a tile's figures at the pointer. */
  hover(event) {
    const box = this.frame.getBoundingClientRect();
    const at = new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top);
    const row = this.rowAt(at);
    this.tip.hidden = row < 0;
    if (row < 0) return;
    if (row !== this.tipRow) this.tip.replaceChildren(...this.describe(row).map((line) => el("div", {}, line)));
    this.tipRow = row;
    this.tip.style.left = `${Math.min(at.x + 14, box.width - 200)}px`;
    this.tip.style.top = `${Math.min(at.y + 14, box.height - 80)}px`;
  }

  /** A tile's figures, a line each. */
  describe(row) {
    const { map, cls } = this.look();
    const lines = [];
    if (map) {
      const values = column(map, map.values, cls);
      const error = map.stderr && column(map, map.stderr, cls)[row];
      const { rows, rank } = ordered(values);
      lines.push(`${cls} ${signed(values[row])}${error ? ` ± ${error.toPrecision(2)}` : ""}`);
      if (rank[row]) lines.push(`rank ${rank[row]} of ${rows.length}`);
      if (map.leaf_size) lines.push(`value shared by ${Number(map.leaf_size[row].toFixed(1))} tile${map.leaf_size[row] === 1 ? "" : "s"}`);
    }
    if (!this.slide.valid[row]) lines.push("not decoded, so not scored");
    lines.push(`level-0 (${corner(this.slide, row).join(", ")}), tissue ${percent(this.slide.tissue[row])}`);
    return lines;
  }

  /** The selected tile and the area that is asked about. */
  marks(ctx, view) {
    const [a, b, c, d, ox, oy] = view.matrix;
    const place = ([x, y]) => [ox + a * x + c * y, oy + b * x + d * y];
    const trace = (points, closed) => {
      for (const [colour, wide] of [["white", 5], ["black", 2.5]]) {
        ctx.beginPath();
        points.map(place).forEach((point, i) => (i ? ctx.lineTo(...point) : ctx.moveTo(...point)));
        if (closed) ctx.closePath();
        [ctx.strokeStyle, ctx.lineWidth] = [colour, wide * view.ratio];
        ctx.stroke();
      }
    };
    if (this.selected >= 0) trace(this.outline(this.selected), true);
    for (const row of this.question?.tiles || []) trace(this.outline(row), true);
    if (this.shape?.length) trace(this.shape, !this.drawing);
  }

  outline(row) {
    const [x, y] = corner(this.slide, row);
    const [width, height] = this.slide.size;
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]];
  }

  close() {
    this.asking?.abort();
    this.viewer.destroy();
    this.frame.remove();
  }
}

const percent = (part) => (Number.isFinite(part) ? `${Math.round(100 * part)} %` : "unknown");

function tileSource(slide) {
  const [width, height] = slide.dimensions;
  if (!slide.deep_zoom) return { width, height, tileSize: Math.max(width, height), minLevel: 0, maxLevel: 0, getTileUrl: () => BLANK };
  const { tile, levels } = slide.deep_zoom;
  return {
    width,
    height,
    tileSize: tile,
    minLevel: 0,
    maxLevel: levels - 1,
    getTileUrl: (level, x, y) => tileUrl(slide.key, level, x, y),
  };
}
