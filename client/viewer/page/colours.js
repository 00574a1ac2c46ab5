// Colour scales that people with any colour vision tell apart: a diverging one about 0, and a sequential one.

// ColorBrewer's RdBu, reversed: the scale of the maps that `attribute` draws.
const DIVERGING = [
  [5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
  [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31],
];
// Cividis at nine places.
const SEQUENTIAL = [
  [0, 34, 78], [35, 62, 108], [67, 78, 108], [93, 96, 110], [124, 123, 120],
  [149, 143, 120], [180, 170, 108], [221, 201, 85], [254, 232, 56],
];
export const STEPS = 128;

function scale(anchors) {
  return Array.from({ length: STEPS + 1 }, (_, step) => {
    const at = (step / STEPS) * (anchors.length - 1);
    const low = Math.min(Math.floor(at), anchors.length - 2);
    const mixed = anchors[low].map((from, i) => Math.round(from + (at - low) * (anchors[low + 1][i] - from)));
    return `rgb(${mixed.join(",")})`;
  });
}

export const diverging = scale(DIVERGING);
export const sequential = scale(SEQUENTIAL);

/** Step of a value on the diverging scale with a limit. */
export const signedStep = (value, limit) =>
  Math.round((0.5 + 0.5 * Math.max(-1, Math.min(1, value / limit))) * STEPS);

/** Step of a part, 0 to 1, on the sequential scale. */
export const partStep = (part) => Math.round(Math.max(0, Math.min(1, part)) * STEPS);
