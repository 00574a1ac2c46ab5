// A bar of a round length in µm, from the slide's true mpp.

import { el } from "./dom.js";

const LONGEST = 180; // CSS px

export class ScaleBar {
  constructor(parent) {
    this.line = el("div", { className: "line" });
    this.text = el("div");
    this.box = el("div", { className: "scalebar" }, this.text, this.line);
    parent.append(this.box);
  }

  /** `micron`: CSS pixels per µm; null where the scale is unknown. */
  show(micron) {
    this.box.hidden = !micron;
    if (!micron) return;
    const power = 10 ** Math.floor(Math.log10(LONGEST / micron));
    const length = [5, 2, 1].map((n) => n * power).find((one) => one * micron <= LONGEST);
    this.text.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
    this.line.style.width = `${length * micron}px`;
  }
}
