"""`python -m demo.screenshots`: pictures for the README and the docs, from what `make demo` left."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from benchmarks.browser import SETTLED, open_browser
from benchmarks.common import run_driver
from client.errors import ClientError
from demo.__main__ import REPOSITORY, run
from server.local import run_triton

ROOT = Path(__file__).resolve().parent.parent
SLIDE = "test-24B"
REAL_SLIDE = "CMU-1-Small-Region"
STUDY = ROOT / "build" / "screenshots"
SLIDE_FILE = ROOT / "build" / "demo-cohort" / "slides" / f"{SLIDE}.tiff"
LONGEST_PX = 1200
"""Of a picture: no file is larger than 150 kB."""


def screenshots(
    out: Annotated[list[Path] | None, typer.Option(help="Folders of results [default: the demo's].")] = None,
    images: Annotated[Path, typer.Option(help="Folder for the pictures.")] = ROOT / "docs" / "images",
) -> None:
    """Take pictures of maps, the strongest tiles, the tissue, the viewer and a training run's report."""
    folders = out or [Path("out"), Path("out", "cohort")]
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        tissue = ["-m", "client", "tissue", str(SLIDE_FILE), "--out", made]
        if subprocess.run([sys.executable, *tissue], check=False).returncode:
            raise ClientError("there is nothing to show: run make demo first")
        pictures = {
            "map.jpg": folders[0] / f"{SLIDE}-partition_shap-lesion.png",
            "map-benign.jpg": folders[0] / f"{REAL_SLIDE}-partition_shap-benign.png",
            "strongest.jpg": folders[0] / f"{SLIDE}-partition_shap-lesion-strongest.png",
            "tissue.jpg": Path(made, "thumbnails", f"{SLIDE}.jpg"),
        }
        for name, path in pictures.items():
            with Image.open(path) as picture:
                save(picture.convert("RGB"), images / name)
    show_viewer(folders, images)
    show_report(images)


def show_report(images: Path) -> None:
    """Take the picture of the report of a model that errs: trained for three epochs from random weights."""
    report = STUDY / "run" / "report" / "report.png"
    if not report.exists():
        run("training", "make-cohort", "--out", str(STUDY), "--patients", "6", "2", "4", "--seed", "7")
        table = [line.split(",")[:4] for line in (STUDY / "labels.csv").read_text().splitlines()]
        labels = STUDY / "own.csv"  # without the splits, as in the tutorial
        labels.write_text("".join(",".join(row) + "\n" for row in table))
        with run_triton(REPOSITORY, log=STUDY / "triton.log") as server:
            run("client", "batch", str(labels), "--out", str(STUDY / "results"), "--url", server.url)
        features, recipe = STUDY / "results", STUDY / "own.yaml"
        recipe.unlink(missing_ok=True)
        run("training", "init-recipe", str(labels), "--features", str(features), "--out", str(recipe))
        about = ("--config", str(recipe), "--out", str(STUDY / "run"), "--quiet")
        changes = ("--set", "optim.epochs=3", "--set", "slide_weights=random_init")
        run("training", "finetune", *about, *changes)
    with Image.open(report) as picture:
        small = picture.convert("RGB").resize((picture.width * 2 // 3, picture.height * 2 // 3))
        small.quantize(64).save(images / "report.png", optimize=True)


def show_viewer(folders: list[Path], images: Path) -> None:
    """Take pictures of the viewer's list and of a map on its slide."""
    from selenium.webdriver import ActionChains

    command = [sys.executable, "-m", "client", "view", *map(str, folders), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if " at " not in line:
                raise ClientError("there is nothing to show: run make demo first")
            url = line.split(" at ")[1].split(" until")[0]
            browser = open_browser((1500, 670))
            try:
                browser.implicitly_wait(20)
                browser.get(url)
                browser.find_element("css selector", "#list td")
                browser.execute_async_script(
                    "const [done] = arguments;"
                    "const wait = () => [...document.images].every((one) => one.complete)"
                    " ? setTimeout(done, 300) : setTimeout(wait, 100);"
                    "wait();"
                )
                save(shown_by(browser), images / "viewer-list.jpg")
                browser.set_window_size(1500, 940)
                browser.get(f"{url}#slide={SLIDE}&class=lesion&layers=map:75,tissue:100,sets:100")
                browser.execute_async_script(SETTLED)
                ActionChains(browser).send_keys("n", "0").perform()  # the strongest tile, on the whole slide
                browser.execute_async_script("setTimeout(arguments[0], 1000)")
                browser.execute_async_script(SETTLED)
                save(shown_by(browser), images / "viewer-map.jpg")
            finally:
                browser.quit()
        finally:
            server.terminate()


def shown_by(browser: Any) -> Image.Image:
    """What the browser shows."""
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def save(picture: Image.Image, path: Path) -> None:
    """Save a picture as small as it may be without visible loss."""
    picture.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
    picture.save(path, quality=72, optimize=True, progressive=True)


if __name__ == "__main__":
    run_driver(screenshots)
