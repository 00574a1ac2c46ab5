"""The tissue mask on real tissue put on every kind of glass, under every kind of pen; masks of one's own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from client.errors import MaskError
from client.slides.slide import open_slide
from client.slides.tissue import (
    TissueMask,
    mask_from_annotations,
    mask_from_file,
    mask_from_image,
    segment,
    tissue_mask,
)
from tests.support.pyramid import write_pyramid

Rgb = NDArray[np.float64]
Mask = NDArray[np.bool_]

HEIGHT, WIDTH = 500, 700  # 4 x 5.6 mm at 8 microns per pixel
GLASS = {
    "white": (255, 255, 255),
    "scanner": (243, 243, 243),
    "grey": (215, 215, 220),
    "dark grey": (185, 185, 190),
    "yellowish": (240, 234, 215),
    "warm": (240, 230, 205),
    "blue at 0.85": (243, 243, 206),
    "under-exposed": (122, 122, 122),
    "dark": (85, 85, 85),
}
# Vectors of optical density (Ruifrok and Johnston, 2001): two stains in place of haematoxylin and eosin.
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
BLUE = (0.80, 0.59, 0.11)
DAB, SILVER = (0.27, 0.57, 0.78), (0.58, 0.58, 0.58)


def times(strength: float, stain: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = stain
    return strength * red, strength * green, strength * blue


STAINS = {
    "AEC": (HAEMATOXYLIN, (0.27, 0.68, 0.68), 0.94),
    "haematoxylin alone": (HAEMATOXYLIN, (0.0, 0.0, 0.0), 0.92),
    "Masson's trichrome": (BLUE, (0.10, 0.74, 0.67), 0.9),
    "PAS": (HAEMATOXYLIN, (0.18, 0.97, 0.15), 0.97),
    "Alcian blue": (HAEMATOXYLIN, (0.87, 0.46, 0.16), 0.95),
    "DAB as strong as haematoxylin": (HAEMATOXYLIN, DAB, 0.97),  # the two add up to grey
    "strong DAB": (HAEMATOXYLIN, times(2, DAB), 0.96),
    "black DAB": (HAEMATOXYLIN, times(4, DAB), 0.96),
    "silver on nuclear fast red": (SILVER, times(0.5, (0.21, 0.85, 0.48)), 0.96),
    "silver on light green": (SILVER, times(0.4, (0.9, 0.3, 0.5)), 0.95),
    "silver on haematoxylin": (times(0.5, HAEMATOXYLIN), SILVER, 0.9),
    "Azan": ((0.85, 0.51, 0.11), (0.07, 0.98, 0.20), 0.95),
}
PENS = {
    "blue": (30, 50, 160),
    "pure blue": (0, 0, 200),
    "light blue": (60, 130, 220),
    "green": (20, 130, 60),
    "dark green": (0, 80, 40),
    "black": (25, 25, 30),
    "red": (200, 20, 30),
}
STROKES = [
    [(20, 20), (20, 480), (680, 480), (680, 20), (30, 25)],  # a frame around everything
    [(300, 60), (330, 250), (290, 300)],  # into tissue
    [(560, 250), (600, 330), (570, 460)],
    [(100, 100), (260, 230)],  # across tissue
]


@pytest.fixture(scope="module")
def tissue(picture: NDArray[np.uint8]) -> Rgb:
    """The light that real tissue lets through, 0 to 1: dense epithelium and stroma, mirrored to fill all."""
    small = cv2.resize(picture, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)
    patch = small[110:185, 46:105] / 243
    block = np.concatenate([patch, patch[:, ::-1]], axis=1)
    block = np.concatenate([block, block[::-1]], axis=0)
    return np.tile(block, (4, 6, 1))[:HEIGHT, :WIDTH]


def shapes() -> Mask:
    """Five pieces of tissue: the truth."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    for centre, axes, angle in [
        ((180, 160), (110, 80), 20),
        ((480, 150), (90, 110), 70),
        ((150, 380), (60, 60), 0),
        ((420, 390), (160, 50), 170),
        ((640, 420), (30, 40), 0),
    ]:
        cv2.ellipse(drawn, centre, axes, angle, 0, 360, 1, -1)
    return drawn.astype(bool)


def compose(light: Rgb, glass: tuple[int, int, int], pen: tuple[int, int, int] | None, cover: float) -> Rgb:
    """Tissue of `shapes` on unevenly lit glass with strokes of a pen that covers to a part."""
    lit = np.array(glass) * (1 - 0.06 * np.linspace(0, 1, WIDTH))[None, :, None]
    scene = np.where(shapes()[..., None], light * lit, lit * np.ones((HEIGHT, WIDTH, 1)))
    if pen:
        ink = cover * stroke_mask()[..., None]
        scene = scene * (1 - ink) + np.array(pen) * ink
    return scene


def stroke_mask() -> NDArray[np.float64]:
    """0 to 1, soft at the edges."""
    ink = np.zeros((HEIGHT, WIDTH), np.uint8)
    for points in STROKES:
        cv2.polylines(ink, [np.array(points)], False, 255, 9, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(ink, (0, 0), 1), np.float64) / 255


def photograph(scene: Rgb) -> NDArray[np.uint8]:
    """With the sensor's noise."""
    noise = np.random.default_rng(0).normal(0, 2.5, scene.shape)
    return np.clip(np.rint(scene + noise), 0, 255).astype(np.uint8)


def overlap(found: Mask, truth: Mask) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("glass", GLASS)
def test_tissue_on_glass(tissue: Rgb, glass: str) -> None:
    found = segment(photograph(compose(tissue, GLASS[glass], None, 0)))
    assert overlap(found, shapes()) > 0.97


@pytest.mark.parametrize("stain", STAINS)
def test_stains_other_than_haematoxylin_and_eosin(tissue: Rgb, stain: str) -> None:
    """The densities of the real tissue's two stains, rendered in the colours of two others."""
    first, second, least = STAINS[stain]
    scene = compose(restained(tissue, first, second), GLASS["scanner"], None, 0)
    assert overlap(segment(photograph(scene)), shapes()) > least


def restained(tissue: Rgb, first: tuple[float, ...], second: tuple[float, ...]) -> Rgb:
    """Tissue with other stains in place of haematoxylin and eosin, in the same amounts."""
    amounts = np.clip(-np.log(np.clip(tissue, 0.02, 1)) @ np.linalg.pinv([HAEMATOXYLIN, EOSIN]), 0, None)
    return np.asarray(np.exp(-amounts @ np.array([first, second])))


@pytest.mark.parametrize("pen", ["black", "dark green", "blue"])
def test_pen_on_strong_dab_is_not_tissue(tissue: Rgb, pen: str) -> None:
    strong = restained(tissue, HAEMATOXYLIN, times(2, DAB))
    found = segment(photograph(compose(strong, GLASS["scanner"], PENS[pen], 1.0)))
    assert found[stroke_mask() > 0.3].mean() < 0.06


def test_what_is_implausible_is_noted(tissue: Rgb, tmp_path: Path) -> None:
    def notes(scene: Rgb) -> str:
        large = np.repeat(np.repeat(photograph(scene), 4, axis=0), 4, axis=1)
        with open_slide(write_pyramid(tmp_path / "a.tif", large, mpp=2.0)) as slide:
            tissue_mask(slide)
            return "; ".join(slide.notes)

    assert notes(compose(tissue, GLASS["scanner"], PENS["black"], 1.0)) == ""
    assert "dark: its glass has a brightness of 8" in notes(compose(tissue, GLASS["dark"], None, 0))
    assert "of the slide is taken for tissue" in notes(tissue * 243)
    bare = np.full_like(tissue, 243.0)
    bare[100:300, 100:300] = PENS["blue"]
    assert "100% of what is coloured is taken for pen" in notes(bare)
    silver = restained(tissue, SILVER, SILVER)
    assert "100% of what is dark has no colour and is taken for ink" in notes(
        compose(silver, GLASS["scanner"], None, 0)
    )


@pytest.mark.parametrize("cover", [1.0, 0.7])
@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("glass", ["white", "dark grey"])
def test_pen_is_not_tissue(tissue: Rgb, glass: str, pen: str, cover: float) -> None:
    found = segment(photograph(compose(tissue, GLASS[glass], PENS[pen], cover)))
    inked = stroke_mask() > 0.3
    assert overlap(found, shapes() & ~inked) > 0.95
    assert found[inked].mean() < 0.06


@pytest.mark.parametrize(
    ("glass", "strength"), [("white", 0.2), ("grey", 0.35), ("yellowish", 0.6), ("white", 1.5)]
)
def test_pale_and_dark_stains(tissue: Rgb, glass: str, strength: float) -> None:
    """Beer-Lambert: density, not light, is in proportion to the stain."""
    found = segment(photograph(compose(tissue**strength, GLASS[glass], None, 0)))
    assert overlap(found, shapes()) > 0.96


@pytest.mark.parametrize(
    ("glass", "pen"), [*((glass, None) for glass in GLASS), *(("scanner", pen) for pen in PENS)]
)
def test_empty_slides_have_no_tissue(glass: str, pen: str | None) -> None:
    bare = np.ones((HEIGHT, WIDTH, 3))
    scene = np.array(GLASS[glass]) * bare
    if pen:
        ink = stroke_mask()[..., None]
        scene = scene * (1 - ink) + np.array(PENS[pen]) * ink
    assert segment(photograph(scene)).mean() < 0.002


def test_all_tissue_is_all_tissue(tissue: Rgb) -> None:
    assert segment(photograph(tissue * 243)).mean() > 0.95


def test_the_real_slide(real_slide: Path) -> None:
    with open_slide(real_slide) as slide:
        found, bounds = tissue_mask(slide), slide.bounds
    assert found.downsample == (16.0, 16.0)
    assert found.mask.shape == (186, 139)
    assert found.source == "colour"
    assert 0.30 < found.fraction < 0.42
    assert found.mask[120:180, 50:100].all()  # the stroma in the lower half
    assert not found.mask[:60, :40].any()  # bare glass
    assert not found.mask[20:45, 75:85].all()  # a hole of 700 microns
    area = sum(polygon.area for polygon in found.contours(bounds))
    assert area == pytest.approx(found.mask.sum() * 256, rel=0.02)


def test_mask_image(real_slide: Path, tmp_path: Path) -> None:
    drawn = np.zeros((297, 222), np.uint8)
    drawn[100:200, 50:150] = 1  # a label image: 1 is tissue, though it looks black
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    with open_slide(real_slide) as slide:
        mask = mask_from_file(tmp_path / "mask.png", slide)
    assert np.array_equal(mask.mask, drawn > 0)
    assert mask.downsample == pytest.approx((10, 2967 / 297))
    assert mask.source == "image mask.png"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_mask_image_modes(real_slide: Path, tmp_path: Path, mode: str) -> None:
    drawn = np.zeros((297, 222), bool)
    drawn[100:200, 50:150] = True
    picture = Image.fromarray(drawn.astype(np.uint16) * 900) if mode == "I;16" else Image.fromarray(drawn)
    (picture if mode == "I;16" else picture.convert(mode)).save(tmp_path / "mask.png")
    with open_slide(real_slide) as slide:
        assert np.array_equal(mask_from_image(tmp_path / "mask.png", slide).mask, drawn)


def test_bad_mask_images(real_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (100, 100)).save(tmp_path / "square.png")
    with open_slide(real_slide) as slide:
        for name, said in [
            ("none.png", "no readable mask image"),
            ("text.png", "no readable mask image"),
            ("square.png", "100x100 px is not the shape of a 2220x2967 slide: cover all of it"),
        ]:
            with pytest.raises(MaskError, match=said) as error:
                mask_from_file(tmp_path / name, slide)
            assert "\n" not in str(error.value)


def square(x: float, y: float, side: float, name: str | None = None) -> dict[str, object]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {}),
    }


def test_annotations(real_slide: Path, tmp_path: Path) -> None:
    features = [
        square(160, 320, 640, "Tumour"),
        square(1600, 320, 320, "Stroma"),
        square(320, 480, 160, "Ignore*"),
    ]
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(json.dumps({"type": "FeatureCollection", "features": features}).encode()))
    with open_slide(real_slide) as slide:
        everything = mask_from_file(path, slide)
        tumour = mask_from_annotations(path, slide, frozenset({"Tumour"}))
    side = everything.downsample[0]
    for found, area, outline in [
        (everything, 640**2 + 320**2 - 160**2, 4 * (640 + 320 + 160)),
        (tumour, 640**2 - 160**2, 4 * (640 + 160)),
    ]:
        assert (
            0 <= found.mask.sum() * side**2 - area <= outline * side
        )  # what an outline touches belongs to it
    assert everything.source == "annotations a.geojson.gz"


@pytest.mark.parametrize(("size", "noted"), [((222, 297), False), ((223, 296), False), ((2240, 2967), True)])
def test_a_mask_that_is_padded_by_a_little_is_noted(
    real_slide: Path, tmp_path: Path, size: tuple[int, int], noted: bool
) -> None:
    Image.new("L", size).save(tmp_path / "m.png")
    with open_slide(real_slide) as slide:  # 2220x2967 px
        mask_from_image(tmp_path / "m.png", slide)
        assert slide.notes == ["mask m.png is not quite of the slide's shape: stretched by 0.9%"] * noted


def test_annotations_that_lie_outside_the_slide_in_part_are_noted(real_slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    with open_slide(real_slide) as slide:  # 2220x2967 px
        path.write_text(json.dumps(square(1600, 0, 625)))  # by hand, a little too far
        mask_from_file(path, slide)
        assert not slide.notes
        path.write_text(json.dumps(square(1720, 0, 1000)))
        mask_from_file(path, slide)
        assert slide.notes == ["50% of a.geojson lies outside the slide: is it of this one?"]


def test_annotations_start_at_the_bounds(leica_slide: Path, tmp_path: Path) -> None:
    """QuPath crops a slide to its bounds: its (0, 0) is not level 0's."""
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(square(0, 0, 320)))
    with open_slide(leica_slide) as slide:
        found: TissueMask = mask_from_annotations(path, slide)
    rows, columns = np.nonzero(found.mask)
    assert columns.min() * found.downsample[0] == pytest.approx(300, abs=16)
    assert (columns.max() + 1) * found.downsample[0] == pytest.approx(620, abs=16)
    assert rows.min() * found.downsample[1] == pytest.approx(200, abs=16)
    assert not slide.notes


def test_annotations_in_level_0_pixels_stay_where_they_are(leica_slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(square(960, 560, 320)))
    with open_slide(leica_slide) as slide:
        found = mask_from_file(path, slide, frame="level0")
        assert not slide.notes
        rows, columns = np.nonzero(found.mask)
        assert columns.min() * found.downsample[0] == pytest.approx(960, abs=16)
        assert rows.min() * found.downsample[1] == pytest.approx(560, abs=16)
        mask_from_file(path, slide)
        assert "a.geojson reaches beyond the slide's bounds" in slide.notes[0]
        assert "--mask-frame level0" in slide.notes[0]
        path.write_text(json.dumps(square(1010, 710, 320)))  # on level 0, beyond what was scanned
        with pytest.raises(
            MaskError, match=r"none of its areas lies on the 1000x700 px .* other --mask-frame"
        ):
            mask_from_file(path, slide)
