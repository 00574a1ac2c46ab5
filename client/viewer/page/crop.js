// A piece of a slide put together from its Deep Zoom tiles.

import { tileUrl } from "./api.js";

/** Draw the level-0 square at (x, y), `width` wide, over all of `canvas`; `full`: from the finest level. */
export async function crop(canvas, { key, deep_zoom: zoom, dimensions }, x, y, width, height, full = false) {
  if (!zoom) return;
  let factor = 1;
  while (!full && width / (2 * factor) >= canvas.width) factor *= 2;
  const level = zoom.levels - 1 - Math.round(Math.log2(factor));
  const side = zoom.tile * factor;
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = "white";
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  const scale = [canvas.width / width, canvas.height / height];
  const jobs = [];
  const [right, bottom] = [Math.min(x + width, dimensions[0]), Math.min(y + height, dimensions[1])];
  for (let column = Math.floor(x / side); column * side < right; column++) {
    for (let row = Math.floor(y / side); row * side < bottom; row++) {
      jobs.push(
        picture(tileUrl(key, level, column, row)).then((image) =>
          ctx.drawImage(
            image,
            (column * side - x) * scale[0],
            (row * side - y) * scale[1],
            image.width * factor * scale[0],
            image.height * factor * scale[1],
          ),
        ),
      );
    }
  }
  await Promise.allSettled(jobs);
}

function picture(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}
