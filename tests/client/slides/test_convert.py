"""Plain pictures become slides that OpenSlide reads, with their scale; what can't is refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image

from client.batch.manifest import read_work_list
from client.reading.stream import read_tiles
from client.slides.convert import convert_picture
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles

Run = Callable[..., Any]
# How a picture is stored so that an orientation turns it back.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["tif", "png", "jpg"])
def test_a_picture_becomes_a_slide_with_its_scale(
    kind: str, picture: NDArray[np.uint8], run_client: Run, tmp_path: Path
) -> None:
    pixels = picture[1000:2500, 300:2001]
    plain = tmp_path / f"scan.{kind}"
    if kind == "tif":  # strips, and a resolution of 0.25 mpp
        tifffile.imwrite(
            plain, pixels, photometric="rgb", resolution=(40_000, 40_000), resolutionunit="CENTIMETER"
        )
        given: tuple[object, ...] = ()
    else:
        Image.fromarray(pixels).save(plain, quality=95)
        given = ("--mpp", 0.25)
    done = run_client("convert", plain, "--out", tmp_path / "slides", *given)
    assert done.code == 0, done.err
    with open_slide(tmp_path / "slides" / "scan.tiff") as slide:
        assert slide.vendor == "generic-tiff"
        assert (slide.dimensions, len(slide.level_dimensions)) == ((1701, 1500), 2)
        np.testing.assert_allclose(slide.mpp, 0.25, rtol=1e-6)
        again = slide.read(0, (0, 0), slide.dimensions)
        plan = plan_tiles(slide, None)
    assert np.abs(again.astype(int) - pixels).mean() < 5  # JPEG, not another picture or other colours
    assert all(batch.valid.all() for batch in read_tiles(plan, workers=1))


def test_a_table_gives_each_picture_its_mpp(run_client: Run, tmp_path: Path) -> None:
    for name, mode in (("grey", "L"), ("clear", "RGBA"), ("unknown", "RGB")):
        Image.new(mode, (300, 300)).save(tmp_path / f"{name}.png")
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((300, 300, 3), np.uint16))
    table = tmp_path / "scans.csv"
    table.write_text("slide_id,path,mpp\ng,grey.png,0.5\nc,clear.png,0.25\nu,unknown.png,\nd,deep.tif,0.5\n")
    done = run_client("convert", table, "--out", tmp_path / "slides")
    assert done.code == 1
    assert "unknown.png: no plausible microns per pixel: give --mpp" in done.err
    assert "uint16: save it as RGB with 8 bits" in done.err
    assert sorted(path.name for path in (tmp_path / "slides").iterdir()) == ["c.tiff", "g.tiff"]
    with open_slide(tmp_path / "slides" / "c.tiff") as slide:
        assert slide.mpp[0] == pytest.approx(0.25)
        assert (slide.read(0, (0, 0), (256, 256)) == 255).all()  # transparent is white
    again = run_client("convert", tmp_path / "grey.png", "--out", tmp_path / "slides", "--mpp", 0.5)
    assert again.code == 0
    assert "exists" in run_client("convert", tmp_path / "grey.png", "--out", tmp_path / "slides").err


def test_a_table_of_pictures_is_a_manifest_of_the_slides_made_of_them(
    run_client: Run, tmp_path: Path
) -> None:
    for name in ("one.png", "two.jpg"):
        Image.new("RGB", (300, 300)).save(tmp_path / name)
    (tmp_path / "scans.csv").write_text("Slide,mpp\none.png,0.5\ntwo.jpg,0.5\n")
    done = run_client("convert", tmp_path / "scans.csv", "--out", tmp_path / "slides")
    assert done.code == 0, done.err
    work_list = read_work_list(tmp_path / "scans.csv", tmp_path / "slides")
    assert [(slide.slide_id, slide.path.name) for slide in work_list.slides] == [
        ("one", "one.tiff"),
        ("two", "two.tiff"),
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tif", "png"])
def test_a_picture_is_turned_as_viewers_show_it(orientation: int, kind: str, tmp_path: Path) -> None:
    """Of a TIFF that is the largest page, not the label before it; its scale is turned too."""
    shown = Image.fromarray(np.kron(np.array([[0, 40, 80], [120, 160, 200]]), np.ones((60, 50))).astype("u1"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = shown if orientation == 1 else shown.transpose(STORED[orientation])
    source, target = tmp_path / f"scan.{kind}", tmp_path / "slide.tiff"
    if kind == "png":
        stored.save(source, exif=exif)
    else:
        fine_x = 20_000, 10_000
        options: dict[str, Any] = {"photometric": "minisblack", "metadata": None}
        with tifffile.TiffWriter(source) as file:
            file.write(np.full((50, 60), 255, np.uint8), **options)
            file.write(
                np.asarray(stored),
                extratags=[(274, "H", 1, orientation, True)],
                resolution=fine_x if orientation < 5 else fine_x[::-1],
                resolutionunit="CENTIMETER",
                **options,
            )
    scale, _ = convert_picture(source, target, 0.5 if kind == "png" else None)
    assert scale == ((0.5, 0.5) if kind == "png" else (0.5, 1.0))
    again = tifffile.imread(target, level=0)[..., 0]
    assert again.shape == (120, 150)
    assert np.abs(again.astype(int) - np.asarray(shown)).mean() < 3
