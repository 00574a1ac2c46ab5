// Two panes in step: the same place in µm, the same scale in µm per screen pixel, the same rotation.

/**
 * Keep two panes in step from here on; `leads(pane)` says which of them the other follows. Slides of one size lie
 * on each other, others keep their distance.
 */
export function link(left, right, leads) {
  const micron = (pane) => pane.slide.mpp || [1, 1];
  const place = (pane) => pane.centre.map((value, i) => value * micron(pane)[i]);
  const same = left.slide.dimensions.every((side, i) => side === right.slide.dimensions[i]);
  const offset = same ? [0, 0] : place(right).map((value, i) => value - place(left)[i]);
  const follow = (from, to, sign) => {
    const centre = place(from).map((value, i) => (value + sign * offset[i]) / micron(to)[i]);
    to.goTo({ centre, zoom: (from.zoom / micron(from)[0]) * micron(to)[0], rotation: from.rotation });
  };
  left.viewer.addHandler("update-viewport", () => leads(left) && follow(left, right, 1));
  right.viewer.addHandler("update-viewport", () => leads(right) && follow(right, left, -1));
  follow(left, right, 1);
}
