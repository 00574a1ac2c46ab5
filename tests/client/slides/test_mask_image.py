"""Masks as people have them: labels, overlays, bilevel TIFFs, probabilities, pyramids, crops."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image

from client.errors import MaskError
from client.slides.mask_image import read_mask_image
from client.slides.slide import open_slide
from client.slides.tissue import mask_from_image

DRAWN = np.zeros((60, 80), np.bool_)
DRAWN[10:30, 20:60] = True
Write = Callable[[Path], Any]


def labels(path: Path) -> None:
    """Label 1 in the red channel, as PANDA's masks have it."""
    Image.fromarray(np.stack([DRAWN, DRAWN * 0, DRAWN * 0], axis=2).astype(np.uint8)).save(path, "png")


def overlay(path: Path) -> None:
    Image.fromarray(np.dstack([np.full((60, 80, 3), 255), DRAWN * 128]).astype(np.uint8)).save(path, "png")


def palette(path: Path) -> None:
    image = Image.fromarray(DRAWN.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.save(path, "png")


def planar_tiff(path: Path) -> None:
    tifffile.imwrite(path, np.stack([DRAWN] * 3).astype(np.uint8), photometric="rgb", planarconfig="separate")


def overlay_tiff(path: Path) -> None:
    rgba = np.dstack([np.full((60, 80, 3), 255), DRAWN * 128]).astype(np.uint8)
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])


def probabilities(path: Path) -> None:
    values = np.where(DRAWN, 0.7, 0.2).astype(np.float32)
    values[0, 0] = np.nan
    tifffile.imwrite(path, values)


def turned(path: Path) -> None:
    """Upside down, with the orientation by which viewers turn it back."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.fromarray(DRAWN[::-1, ::-1].astype(np.uint8)).save(path, "png", exif=exif)


def labels_on_white(path: Path) -> None:
    """As QuPath exports annotations: label 0 shown in white."""
    image = Image.fromarray(DRAWN.astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 200, 0, 0])
    image.save(path, "png")


def black_after_white(path: Path) -> None:
    """A palette in the order of its use."""
    image = Image.fromarray((~DRAWN).astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(path, "png")


def turned_tiff(path: Path) -> None:
    tifffile.imwrite(path, DRAWN[::-1, ::-1].astype(np.uint8), extratags=[(274, "H", 1, 3, True)])


WRITE: dict[str, Write] = {
    "labels": labels,
    "overlay": overlay,
    "palette": palette,
    "bilevel TIFF where 1 is black": lambda path: tifffile.imwrite(path, DRAWN, photometric="miniswhite"),
    "bilevel TIFF where 1 is white": lambda path: Image.fromarray(DRAWN).save(path, "tiff"),
    "16-bit labels": lambda path: Image.fromarray(DRAWN.astype(np.uint16)).save(path, "png"),
    "32-bit labels": lambda path: tifffile.imwrite(path, DRAWN.astype(np.int32)),
    "probabilities": probabilities,
    "planar": planar_tiff,
    "turned": turned,
    "overlay TIFF": overlay_tiff,
    "turned TIFF": turned_tiff,
    "palette on white": labels_on_white,
    "palette of white and black": black_after_white,
    "JPEG": lambda path: Image.fromarray(DRAWN).convert("L").save(path, "jpeg", quality=30),
    "JPEG of labels": lambda path: Image.fromarray(DRAWN.astype(np.uint8) * 20).save(path, "jpeg"),
    "TIFF of JPEG": lambda path: tifffile.imwrite(path, DRAWN.astype(np.uint8) * 255, compression="jpeg"),
}


@pytest.mark.parametrize("kind", WRITE)
def test_what_is_drawn(tmp_path: Path, kind: str) -> None:
    WRITE[kind](tmp_path / "mask")
    assert np.array_equal(read_mask_image(tmp_path / "mask", (80, 60), 4096), DRAWN)


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_inks_are_refused(tmp_path: Path, kind: str) -> None:
    Image.fromarray(DRAWN).convert("RGB").convert("CMYK").save(tmp_path / "mask", kind)
    with pytest.raises(MaskError, match="in CMYK, whose 0 is white"):
        read_mask_image(tmp_path / "mask", (80, 60), 4096)


def test_of_a_pyramid_the_level_that_is_needed_is_read(tmp_path: Path) -> None:
    large: NDArray[np.uint8] = np.kron(DRAWN, np.ones((16, 16))).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "m.tif") as file:
        for step, subfile in ((1, 0), (4, 1), (16, 1)):
            file.write(large[::step, ::step], tile=(64, 64), compression="deflate", subfiletype=subfile)
    assert read_mask_image(tmp_path / "m.tif", (80, 60), 4096).shape == (60, 80)
    assert read_mask_image(tmp_path / "m.tif", (100, 60), 4096).shape == (240, 320)
    small = read_mask_image(tmp_path / "m.tif", (1280, 960), 80)
    assert np.array_equal(small, DRAWN)


def test_a_mask_of_a_slides_bounds_lies_in_them(tmp_path: Path, leica_slide: Path) -> None:
    with open_slide(leica_slide) as slide:  # 2000x1500 px; bounds (300, 200, 1000, 700)
        Image.new("L", (100, 70), 1).save(tmp_path / "bounds.png")
        mask = mask_from_image(tmp_path / "bounds.png", slide)
        level0 = [np.array(part) * mask.downsample[0] for part in np.nonzero(mask.mask)]
        assert (level0[1].min(), level0[0].min()) == pytest.approx((300, 200), abs=16)
        assert (level0[1].max(), level0[0].max()) == pytest.approx((1300, 900), abs=32)
        Image.new("L", (100, 75), 1).save(tmp_path / "whole.png")
        assert mask_from_image(tmp_path / "whole.png", slide).mask.all()
        assert slide.notes == ["mask whole.png covers 100% of the slide: is its background 0?"]
        Image.new("L", (100, 50), 1).save(tmp_path / "neither.png")
        with pytest.raises(MaskError, match="not the shape"):
            mask_from_image(tmp_path / "neither.png", slide)
        Image.new("L", (10, 7), 1).save(tmp_path / "either.png")
        mask_from_image(tmp_path / "either.png", slide)
        assert "mask either.png is taken for one of the whole slide, not of its bounds" in slide.notes


@pytest.mark.filterwarnings("error")
def test_the_limit_of_a_mask_is_ours(tmp_path: Path) -> None:
    """Pillow warns from 90 million pixels on, and calls twice as many an attack."""
    Image.new("1", (1000, 300)).save(tmp_path / "a.png")
    header = bytearray((tmp_path / "a.png").read_bytes())
    for size, message in (((12_000, 12_000), "truncated"), ((30_000, 9_000), "30000x9000 px are too many")):
        header[16:24] = struct.pack(">II", *size)
        header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
        (tmp_path / "b.png").write_bytes(header)
        with pytest.raises(MaskError, match=message):
            read_mask_image(tmp_path / "b.png", (1000, 300), 1000)


def test_a_tiff_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(50))
    with pytest.raises(MaskError, match="no readable mask image"):
        read_mask_image(tmp_path / "m.tif", (80, 60), 4096)
    with tifffile.TiffWriter(tmp_path / "circle.tif") as file:
        for _ in range(3):
            file.write(DRAWN.astype(np.uint8), metadata=None)
    with tifffile.TiffFile(tmp_path / "circle.tif") as file:
        offsets = [page.offset for page in file.pages]
    data = bytearray((tmp_path / "circle.tif").read_bytes())
    end = data.index(struct.pack("<I", offsets[2]), offsets[1])  # where the second page names the third
    data[end : end + 4] = struct.pack("<I", offsets[0])
    (tmp_path / "circle.tif").write_bytes(data)
    with pytest.raises(MaskError, match="lead back to an earlier one"):
        read_mask_image(tmp_path / "circle.tif", (80, 60), 4096)
