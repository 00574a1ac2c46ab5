"""The page in a real browser, on what the commands write."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide.deepzoom
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.browser import SETTLED
from client.outputs.records import read_record, write_record
from client.slides.mirror import CACHE
from tests.client.conftest import Run
from tests.client.viewer.conftest import BLACK, TILE
from tests.support.served import wait_until
from tests.support.web import serve_files

NAME = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def address(
    serve: Callable[..., AbstractContextManager[str]],
    explained: Path,
    coarse: Path,
    triton_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A server that shows the demo's slide, with an annotation of a hostile name, and the coarse one."""
    folder = tmp_path_factory.mktemp("annotations")
    square = [[200, 200], [800, 200], [800, 800], [200, 200]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square]},
        "properties": {"name": NAME, "classification": {"name": "tumour", "color": [200, 0, 0]}},
    }
    collection = {"type": "FeatureCollection", "features": [feature]}
    (folder / "CMU-1-Small-Region.geojson").write_text(json.dumps(collection))
    with serve(explained, coarse, "--annotations", folder, "--url", triton_url) as url:
        yield url


def show(browser: Any, url: str) -> None:
    """Open a view and wait until OpenSeadragon says that all of it is loaded."""
    browser.get("about:blank")
    browser.get(url)
    assert browser.execute_async_script(SETTLED)
    wait_until(lambda: "looking for the server" not in text(browser, "body"))


def text(browser: Any, selector: str) -> str:
    """What an element shows, read in one step as the page may replace the element; "" where there is none."""
    script = "return document.querySelector(arguments[0])?.innerText ?? ''"
    return str(browser.execute_script(script, selector))


def draw(browser: Any, **change: Any) -> str:
    """Change the view; the map's layer as it is drawn then."""
    browser.execute_script("viewer.change(arguments[0])", change)
    browser.execute_async_script(SETTLED)
    return str(browser.execute_script("return document.querySelector('[data-layer=map]').toDataURL()"))


def screenshot(browser: Any) -> NDArray[np.uint8]:
    """What is on the screen, RGB."""
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))


def largest(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Left, top, right and bottom of the largest connected part."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    x, y, width, height, _ = stats[1:][np.argmax(stats[1:, cv2.CC_STAT_AREA])]
    return np.array([x, y, x + width, y + height])


@pytest.mark.parametrize("zoom", [0.13, 0.3, 1.0])
def test_a_tile_of_the_map_lies_on_the_slides_tile(browser: Any, address: str, zoom: float) -> None:
    x, y = ((place + 0.5) * TILE for place in BLACK)
    at = f"{address}#slide=coarse&class=lesion&x={x}&y={y}&zoom={zoom}&layers="
    show(browser, f"{at}none")
    slide = largest(screenshot(browser).max(axis=2) < 100)
    show(browser, f"{at}map:100")
    red, green, blue = np.moveaxis(screenshot(browser).astype(int), 2, 0)
    drawn = largest((abs(red - 103) < 20) & (green < 20) & (abs(blue - 31) < 20))
    assert abs(slide[2] - slide[0] - TILE * zoom) <= 1
    assert abs(drawn - slide).max() <= 1


def test_what_is_drawn_follows_class_threshold_scale_and_layers(browser: Any, address: str) -> None:
    show(browser, f"{address}#slide=CMU-1-Small-Region")
    first = draw(browser)
    assert draw(browser, cls="lesion") != first
    assert draw(browser, cls="benign") == first
    assert draw(browser, threshold=0.2) != first
    assert draw(browser, threshold=0, limit="10") != first
    assert draw(browser, limit="slide", map="keep_one") != first
    browser.find_element("id", "layer-map").click()
    assert browser.execute_script("return document.querySelector('[data-layer=map]').hidden")
    grid = "return document.querySelector('[data-layer=grid]').hidden"
    assert browser.execute_script(grid)
    browser.find_element("id", "layer-grid").click()
    assert not browser.execute_script(grid)
    assert "grid" in browser.execute_async_script(
        "setTimeout(() => arguments[0](location.hash), 400)"
    )  # the link keeps it


def test_texts_of_files_are_never_html(browser: Any, address: str) -> None:
    show(browser, f"{address}#slide=CMU-1-Small-Region")
    assert text(browser, "#annotations button") == NAME
    assert (
        browser.execute_script("return document.querySelectorAll('#annotations img, body script').length")
        == 0
    )
    assert browser.title == "GigaPath viewer"


def test_a_click_shows_the_tile_and_the_keyboard_moves_on(browser: Any, address: str) -> None:
    from selenium.webdriver import ActionChains

    show(browser, f"{address}#slide=CMU-1-Small-Region")
    ActionChains(browser).send_keys("n").perform()
    strongest = text(browser, "#tile")
    assert "rank 1 of 54" in strongest
    browser.execute_async_script(SETTLED)
    ActionChains(browser).move_to_element(browser.find_element("css selector", ".pane")).click().perform()
    assert text(browser, "#tile") == strongest
    assert "rank 1 of 54" in text(browser, ".tip")
    ActionChains(browser).send_keys("t").perform()
    assert "noise floor" in text(browser, "dialog")
    ActionChains(browser).send_keys("\ue00c").perform()


def test_the_answer_about_a_drawn_area_is_that_of_the_command(
    browser: Any,
    address: str,
    run_client: Run,
    triton_url: str,
    explained: Path,
    coarse: Path,
    tmp_path: Path,
) -> None:
    from selenium.webdriver import ActionChains

    show(browser, f"{address}#slide=CMU-1-Small-Region&class=benign")
    browser.find_element("css selector", "#ask option[value=coarse]").click()
    browser.find_element("id", "draw").click()
    pen = ActionChains(browser).move_to_element(browser.find_element("css selector", ".pane"))
    pen.move_by_offset(-100, -200).click_and_hold()
    for step in ((180, 10), (0, 150), (-90, 30), (-80, -20), (-10, -100)):
        pen.move_by_offset(*step)
    pen.release().perform()
    wait_until(lambda: bool(text(browser, "#answer")))
    shown = text(browser, "#answer")
    area, answer = browser.execute_script("return [viewer.panes[0].question.area, viewer.panes[0].answer]")
    drawn = tmp_path / "area.geojson"
    drawn.write_text(json.dumps({"geometry": {"type": "Polygon", "coordinates": [[*area, area[0]]]}}))
    h5, bank = explained / "CMU-1-Small-Region.h5", coarse / "coarse.h5"
    for change, options in {"remove": (), "keep": (), "replace": ("--bank", bank)}.items():
        given = ("--change", change, *options, "--url", triton_url, "--out", tmp_path)
        assert run_client("counterfactual", h5, drawn, *given).code == 0
        with next(tmp_path.glob(f"*-counterfactual-{change}.csv")).open() as file:
            rows = list(csv.reader(file))[1:]
        wanted = [float(row[4]) for row in rows]
        assert answer["effects"][change]["mean"] == pytest.approx(wanted, abs=1e-6)
        assert {int(row[2]) for row in rows} == {len(answer["tiles"])}
    assert 5 < len(answer["tiles"]) < 50
    assert f"{len(answer['tiles'])} tiles, benign" in shown


def test_the_list_sorts_filters_and_opens(browser: Any, address: str) -> None:
    browser.get("about:blank")
    browser.get(address)
    names = "#list tbody td:nth-child(2)"

    def listed() -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.innerText)"
        return list(browser.execute_script(script, names))

    wait_until(lambda: bool(listed()))
    assert listed() == ["CMU-1-Small-Region", "coarse"]
    browser.find_element("css selector", "#list th button").click()
    assert listed() == ["coarse", "CMU-1-Small-Region"]
    browser.find_element("css selector", "#list input").send_keys("coa")
    assert listed() == ["coarse"]
    browser.find_element("css selector", names).click()
    assert browser.execute_async_script(SETTLED)
    assert text(browser, "#bar strong") == "coarse"


def test_a_slide_that_several_exports_scored_has_one_name(
    browser: Any, serve: Callable[..., AbstractContextManager[str]], explained: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(explained, tmp_path / "other")
    with serve(explained, other) as url:
        browser.get("about:blank")
        browser.get(url)
        browser.implicitly_wait(10)
        names = browser.find_elements("css selector", "#list tbody td:nth-child(2)")
        assert [cell.text for cell in names] == ["CMU-1-Small-Region"] * 2
        assert browser.find_element("css selector", "#list .tools .quiet").text == "2 of 2 results of 1 slide"
        names[1].click()
        assert browser.execute_async_script(SETTLED)
        beside = browser.find_element("css selector", "#bar select").text.split("\n")
        assert [name.strip() for name in beside[1:]] == [
            f"CMU-1-Small-Region ({explained})",
            f"CMU-1-Small-Region ({other})",
        ]


def test_two_maps_stay_in_step(browser: Any, address: str) -> None:
    show(browser, f"{address}#slide=CMU-1-Small-Region&beside=coarse")
    browser.execute_script("viewer.panes[0].goTo({centre: [1000, 900], zoom: 0.5})")
    browser.execute_async_script(SETTLED)
    scales = browser.execute_script("return viewer.panes.map((p) => p.zoom / p.slide.mpp[0])")
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert scales[0] == pytest.approx(0.5 / 0.499, rel=1e-4)


def test_a_slide_on_a_server_looks_as_its_file_does(
    browser: Any,
    address: str,
    serve: Callable[..., AbstractContextManager[str]],
    explained: Path,
    real_slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    out, slide_id = Path(shutil.copytree(explained, tmp_path / "out")), real_slide.stem
    record = read_record(out, slide_id)
    assert record
    with serve_files({"a%20folder/S%231.svs": real_slide.read_bytes()}) as files:
        write_record(out, replace(record, path=f"{files.address}/a folder/S%231.svs"))
        browser.get_log("browser")
        with serve(out) as url:
            show(browser, f"{url}#slide={slide_id}&layers=none")
            shown = screenshot(browser)[60:600, 250:1000]
            assert browser.get_log("browser") == []
    show(browser, f"{address}#slide={slide_id}&layers=none")
    difference = np.abs(np.subtract(shown, screenshot(browser)[60:600, 250:1000], dtype=int))
    assert difference.mean() < 2  # its tiles are encoded once more
    assert shown.std() > 20


def test_the_page_is_small_and_logs_no_error(browser: Any, address: str) -> None:
    browser.get_log("browser")
    show(browser, f"{address}#slide=CMU-1-Small-Region")
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').filter((r) => !r.name.includes('/slides/'))"
        ".reduce((sum, r) => sum + r.encodedBodySize, 0)"
    )
    assert 100_000 < loaded < 1_000_000
    everything = "map,alone,error,leaf,grid,failed,tissue,sets,annotations".replace(",", ":90,")
    show(browser, f"{address}#slide=CMU-1-Small-Region&rotation=30&grey=1&layers={everything}:90")
    assert browser.execute_script("return viewer.panes[0].rotation") == 30
    assert browser.get_log("browser") == []


def test_an_export_opens_from_the_disk(browser: Any, run_client: Run, coarse: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    assert run_client("view", coarse, "--export", page).code == 0
    assert "choose another path" in run_client("view", coarse, "--export", page).err
    assert (page / "page" / "openseadragon" / "LICENSE.txt").is_file()
    tiles = openslide.deepzoom.DeepZoomGenerator(openslide.OpenSlide(coarse.parent / "coarse.tif"), 256, 0)
    written = [
        len(list((page / "slides" / "coarse_files" / str(n)).iterdir())) for n in range(tiles.level_count)
    ]
    assert written == [columns * rows for columns, rows in tiles.level_tiles]
    browser.get_log("browser")
    show(browser, f"{(page / 'index.html').as_uri()}#slide=coarse&beside=coarse&limit=all")
    assert len(browser.find_elements("css selector", ".pane")) == 2
    assert not browser.find_elements("id", "ask")
    at = f"{(page / 'index.html').as_uri()}#slide=coarse&class=lesion&layers=map:100"
    show(browser, at)
    assert (abs(screenshot(browser).astype(int) - (103, 0, 31)).max(axis=2) < 20).any()
    assert browser.get_log("browser") == []
