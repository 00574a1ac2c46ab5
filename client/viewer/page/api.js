// Where data come from: the server, or the scripts that a static export carries (a page on disk can fetch nothing).

const stored = () => globalThis.viewerData;

/** JSON from the server; an answer that says what is wrong becomes an Error with that text. */
async function fetched(path, options) {
  const response = await fetch(path, options);
  const text = await response.text();
  if (response.ok) return JSON.parse(text);
  let reason = text;
  try {
    reason = JSON.parse(text).error;
  } catch {
    // not JSON: the text itself
  }
  throw new Error(reason || `the server answered ${response.status}`);
}

/** One of an export's data scripts, loaded once. */
function script(name) {
  if (name in stored()) return Promise.resolve(stored()[name]);
  return new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = `data/${encodeURIComponent(name)}.js`;
    element.onload = () => resolve(stored()[name]);
    element.onerror = () => reject(new Error(`the export holds no ${name}`));
    document.head.append(element);
  });
}

export const isExport = () => stored() !== undefined;
export const readSlides = () => (isExport() ? script("slides") : fetched("api/slides"));
export const readLimits = () => (isExport() ? script("limits") : fetched("api/limits"));
export const readSlide = (key) =>
  isExport() ? script(`slide-${key}`) : fetched(`api/slides/${encodeURIComponent(key)}`);
export const readNeighbours = (key, row, everywhere) =>
  fetched(`api/slides/${encodeURIComponent(key)}/neighbours/${row}?everywhere=${everywhere ? 1 : 0}`);
export const readServer = () => fetched("api/server");

/** Ask the model about a change; `signal` takes the question back. */
export const ask = (key, question, signal) =>
  fetched(`api/slides/${encodeURIComponent(key)}/ask`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
    signal,
  });

export const tileUrl = (key, level, column, row) =>
  `slides/${encodeURIComponent(key)}_files/${level}/${column}_${row}.jpeg`;
export const innerMapUrl = (key, x, y) => `slides/${encodeURIComponent(key)}/maps/${x}_${y}.png`;

const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

/** The numbers of a packed array. */
export function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  return new TYPES[packed.type](bytes.buffer);
}
