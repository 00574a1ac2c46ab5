"""The viewer on a slide of 40,000 x 36,000 px with 20,000 tiles and maps of 3 classes.

Time to the first tile and to the whole view in a real browser, frames while it moves with the map on, and the
memory of the server. Writes docs/benchmarks/viewer.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import typer

from benchmarks.browser import open_browser
from benchmarks.common import MACHINE, PAGES, REAL_SLIDE, WORK, Pages, peak_bytes, table, write_page
from client.slides.slide import open_slide
from tests.support.pyramid import write_pyramid

SIZE = (40_000, 36_000)
TILES, CLASSES, WIDTH = 20_000, ("benign", "lesion", "other"), 1536
MOST_SECONDS, MOST_MB, MOST_PAGE_MB = 2.0, 500, 1.0
STARTED = """
const done = arguments[arguments.length - 1];
const wait = () => {
  const item = viewer.panes[0]?.viewer.world.getItemAt(0);
  if (!item) return requestAnimationFrame(wait);
  if (item.getFullyLoaded()) return done(performance.now());
  item.addHandler("fully-loaded-change", (event) => event.fullyLoaded && done(performance.now()));
};
wait();
"""
FIRST = """
return Math.min(...performance.getEntriesByType("resource")
  .filter((one) => one.name.includes("_files/")).map((one) => one.responseEnd));
"""
PAGE = """
return performance.getEntriesByType("resource")
  .filter((one) => !one.name.includes("_files/") && !one.name.includes("/api/"))
  .reduce((sum, one) => sum + one.encodedBodySize, 0);
"""
FRAMES = """
const done = arguments[arguments.length - 1];
const pane = viewer.panes[0];
const times = [];
const [x, y] = [20000, 18000];
const frame = (now) => {
  times.push(now);
  const step = times.length;
  const centre = [x + 9000 * Math.sin(step / 20), y + 6000 * Math.sin(step / 31)];
  pane.goTo({ centre, zoom: 0.03 * (1 + step / 40) });
  step < 180 ? requestAnimationFrame(frame) : done(times.slice(1).map((time, i) => time - times[i]));
};
requestAnimationFrame(frame);
"""


def main(
    pages: Pages = PAGES,
    visits: Annotated[int, typer.Option(min=1, help="Visits of the page; the median counts.")] = 5,
) -> None:
    """Measure the viewer on a large slide."""
    out = large_results()
    browser = open_browser((1500, 950))
    slide = ("--slide", str(out / "large.tif"), "--port", "0")
    command = [sys.executable, "-m", "client", "view", str(out), *slide]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].split(" until")[0] + "#slide=large"
            measured = [visit(browser, url) for _ in range(visits)]
            frames = browser.execute_async_script(FRAMES)
            drawn = [draw_seconds(browser) for _ in range(10)]
            memory = peak_bytes(server.pid) / 1e6
        finally:
            server.terminate()
            browser.quit()
    first, whole, page = (statistics.median(one[i] for one in measured) for i in range(3))
    late = float(np.percentile(frames, 95))
    rows = [
        f"first tile of the slide, s | {first:.2f} | {MOST_SECONDS:g}",
        f"the whole view, s | {whole:.2f} | ",
        f"page without the slide, MB | {page / 1e6:.2f} | {MOST_PAGE_MB:g}",
        f"time between frames while moving, median, ms | {statistics.median(frames):.0f} | ",
        f"the same, 95th percentile, ms | {late:.0f} | ",
        f"drawing all 20,000 tiles of the map, ms | {1000 * statistics.median(drawn):.0f} | ",
        f"server's peak memory, MB | {memory:.0f} | {MOST_MB}",
    ]
    text = f"""# Viewer

`make bench NAME=viewer`: a slide of {SIZE[0]:,} x {SIZE[1]:,} px with {TILES:,} tiles, embeddings of
width {WIDTH} and a map of {len(CLASSES)} classes, in headless chromium without a GPU, which draws in
software. Median of {visits} visits, each with an empty cache of the browser. {MACHINE}.

{table("measured | | allowed", rows)}
"""
    passed = first <= MOST_SECONDS and memory <= MOST_MB and page <= MOST_PAGE_MB * 1e6
    write_page(pages / "viewer.md", text, passed=passed)


def visit(browser: Any, url: str) -> tuple[float, float, float]:
    """Seconds to the first tile and to the whole view, and the page's bytes."""
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.get("about:blank")
    browser.get(url)
    whole = browser.execute_async_script(STARTED) / 1000
    return browser.execute_script(FIRST) / 1000, whole, browser.execute_script(PAGE)


def draw_seconds(browser: Any) -> float:
    """How long the browser takes to draw the whole map once, with what it draws forced to be done."""
    start = time.perf_counter()
    browser.execute_script(
        "viewer.panes[0].home(true); viewer.panes[0].redraw();"
        "document.querySelector('[data-layer=map]').getContext('2d').getImageData(0, 0, 1, 1)"
    )
    return time.perf_counter() - start


def large_results() -> Path:
    """The slide and what `score` and `attribute` would have written for it; made once."""
    out, slide = WORK / "viewer", WORK / "viewer" / "large.tif"
    if (out / "large.h5").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    with open_slide(REAL_SLIDE) as real:
        tissue = real.read(0, (768, 512), (1024, 1024))
    write_pyramid(slide, tissue, size=SIZE, levels=(1, 4, 16))
    rng = np.random.default_rng(0)
    columns, lines = (side // 256 for side in SIZE)
    cells = np.sort(rng.permutation(columns * lines)[:TILES])
    coords = np.stack([cells % columns, cells // columns], axis=1) * 256
    part = out / "large.part"
    with h5py.File(part, "w") as file:
        file["coords"] = coords
        file["coords"].attrs.update({"tile_size_level0": (256, 256), "name": "large"})
        file["coords"].attrs.update(dict(zip(("level0_width", "level0_height"), SIZE, strict=True)))
        file["features"] = rng.standard_normal((TILES, WIDTH), dtype=np.float32)
        for name in ("attribution_partition_shap", "attribution_keep_one"):
            file[name] = rng.standard_normal((TILES, len(CLASSES)))
            file[name].attrs["classes"] = CLASSES
    part.replace(out / "large.h5")
    return out
