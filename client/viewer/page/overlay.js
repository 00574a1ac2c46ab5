// Canvases over an OpenSeadragon viewer, one per layer, that follow it to the pixel.

/** Where level-0 pixels lie on the screen: x' = o + a x + c y, as [a, b, c, d, ox, oy] in CSS pixels. */
export function placement(viewer) {
  const item = viewer.world.getItemAt(0);
  if (!item) return null;
  const { x: width, y: height } = item.getContentSize();
  const at = (x, y) => viewer.viewport.pixelFromPoint(item.imageToViewportCoordinates(x, y, true), true);
  const [o, right, down] = [at(0, 0), at(width, 0), at(0, height)];
  return [
    (right.x - o.x) / width, (right.y - o.y) / width,
    (down.x - o.x) / height, (down.y - o.y) / height,
    o.x, o.y,
  ];
}

export class Overlay {
  /** `draw(id, ctx, view)` draws a layer; a layer that `shown(id)` denies is not touched. */
  constructor(viewer, ids, { draw, opacity }) {
    this.viewer = viewer;
    this.draw = draw;
    this.opacity = opacity;
    this.canvases = new Map();
    for (const id of ids) {
      const canvas = document.createElement("canvas");
      canvas.className = "layer";
      canvas.dataset.layer = id;
      viewer.canvas.append(canvas);
      this.canvases.set(id, canvas);
    }
    for (const event of ["update-viewport", "resize", "open"]) viewer.addHandler(event, () => this.redraw());
  }

  redraw() {
    const matrix = placement(this.viewer);
    if (!matrix) return;
    const ratio = globalThis.devicePixelRatio || 1;
    const { x: width, y: height } = this.viewer.viewport.getContainerSize();
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    const scaled = matrix.map((value) => value * ratio);
    for (const [id, canvas] of this.canvases) {
      const opacity = this.opacity(id);
      canvas.hidden = opacity === 0;
      if (canvas.hidden) continue;
      canvas.style.opacity = opacity;
      if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
      const ctx = canvas.getContext("2d");
      ctx.setTransform(1, 0, 0, 1, 0, 0);
      ctx.clearRect(0, 0, ...size);
      this.draw(id, ctx, { matrix: scaled, size, ratio, bounds: bounds(scaled, size) });
    }
  }
}

/** The level-0 rectangle [left, top, right, bottom] that a screen of `size` shows. */
function bounds([a, b, c, d, ox, oy], [width, height]) {
  const area = a * d - b * c;
  const corners = [[0, 0], [width, 0], [0, height], [width, height]].map(([x, y]) => [
    (d * (x - ox) - c * (y - oy)) / area,
    (a * (y - oy) - b * (x - ox)) / area,
  ]);
  const [xs, ys] = [corners.map(([x]) => x), corners.map(([, y]) => y)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}
