"""CZI that OpenSlide refuses: Zeiss's own pixels on every level, in files that Zeiss's own library wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from pylibCZIrw import czi

from client.arrays import Pixels
from client.errors import SlideError
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.slides.tissue import tissue_mask
from tests.support.czi import TILE, write_czi
from tests.support.pyramid import shrink

ORIGIN = (-300, 200)
KINDS: dict[str, dict[str, Any]] = {
    "uncompressed": {},
    "zstd": {"compression": "zstd1:ExplicitLevel=2;PreProcess=HiLoByteUnpack"},
    "jpeg xr": {"jpeg_xr": True},
    "thirds": {"factors": (1, 3, 9)},
    "no pyramid": {"factors": (1,)},
}


@contextmanager
def libczi(path: Path) -> Iterator[czi.CziReader]:
    reader = czi.CziReader(str(path))
    yield reader
    reader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_has_libczis_pixels(tmp_path: Path, picture: Pixels, kind: str) -> None:
    options = KINDS[kind]
    whole = picture[:1536, 600:2136]
    path = write_czi(tmp_path / "a.czi", whole, origin=ORIGIN, mpp=0.25, **options)
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(path)
    factors = options.get("factors", (1, 2, 4))
    with open_slide(path) as slide, libczi(path) as reference:
        assert slide.vendor == "zeiss"
        assert slide.mpp == pytest.approx((0.25, 0.25))
        assert slide.level_downsamples == factors
        assert slide.level_dimensions == tuple((1536 // factor, 1536 // factor) for factor in factors)
        for level, factor in enumerate(factors):
            size = slide.level_dimensions[level]
            found = slide.read(level, (0, 0), size)
            theirs = reference.read(roi=(*ORIGIN, *(side * factor for side in size)), zoom=1 / factor)
            rows, columns = theirs.shape[:2]
            assert min(rows, columns) >= size[0] - 1
            assert np.array_equal(found[:rows, :columns], theirs[..., ::-1])
            difference = np.abs(found.astype(int) - shrink(whole, factor))
            assert difference.mean() < (1 if kind == "jpeg xr" else 0.01)
            x, y = 101, 53
            part = slide.read(level, (x * factor, y * factor), (60, 70))
            assert np.array_equal(part, found[y : y + 70, x : x + 60])
        assert (slide.read(0, (1500, -40), (100, 30)) == 255).all()
        assert slide.read(0, (1500, -40), (100, 50))[40:, :36].min() < 255


def test_tiles_and_tissue_come_from_the_small_levels(tmp_path: Path, picture: Pixels) -> None:
    whole = picture[:2048, :2048]
    path = write_czi(tmp_path / "a.czi", whole, mpp=0.25, jpeg_xr=True)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, tissue_mask(slide))
        assert slide.notes == []
        level1 = slide.read(1, (0, 0), slide.level_dimensions[1])
    assert (plan.level, plan.downsample) == (1, 2.0)
    batches = list(read_tiles(plan))
    assert {batch.reader for batch in batches} == {"libCZI"}
    pixels = np.concatenate([batch.pixels for batch in batches])
    assert len(pixels) == 11
    for (x, y), tile in zip(plan.level_positions(), pixels, strict=True):
        assert np.array_equal(tile, level1[y : y + 224, x : x + 224])


def test_what_was_not_scanned_is_white(tmp_path: Path, picture: Pixels) -> None:
    path = write_czi(tmp_path / "a.czi", picture[1024:1536, 512:1024], factors=(1,), gaps=frozenset({(1, 0)}))
    with open_slide(path) as slide:
        pixels = slide.read(0, (0, 0), (512, 512))
    assert (pixels[:TILE, TILE:] == 255).all()
    assert np.array_equal(pixels[TILE:], picture[1024 + TILE : 1536, 512:1024])


def test_without_the_extra_a_line_says_what_to_do(
    tmp_path: Path, picture: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_czi(tmp_path / "a.czi", picture[:512, :512], jpeg_xr=True)
    monkeypatch.setitem(sys.modules, "pylibCZIrw.czi", None)
    with pytest.raises(SlideError) as error:
        open_slide(path)
    assert str(error.value).endswith("pip install 'gigapath-triton[czi]', or convert it to tiled JPEG TIFF")
    assert "\n" not in str(error.value)


def test_fluorescence_and_damage_are_named(tmp_path: Path, picture: Pixels) -> None:
    grey = tmp_path / "grey.czi"
    with czi.create_czi(str(grey)) as file:
        file.write(np.ascontiguousarray(picture[:512, :512, :1]))
    with pytest.raises(SlideError, match="its pixels are Gray8, not 8-bit RGB: give a brightfield slide"):
        open_slide(grey, 0.5)
    path = write_czi(tmp_path / "a.czi", picture[:1024, :1024], jpeg_xr=True)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SlideError, match="damaged, copy it again"):
        open_slide(path)
    channel = content.rindex(b"C\0\0\0") + 7  # pylibCZIrw lists the types of all channels that are claimed
    path.write_bytes(content[:channel] + b"\x7f" + content[channel + 1 :])
    with open_slide(path) as slide:
        assert slide.read(0, (500, 500), (50, 50)).min() < 255
    stream = content.index(b"II\xbc\x01")  # of the first tile
    path.write_bytes(content[:stream] + bytes(400) + content[stream + 400 :])
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"cannot decode level 0 at \(0, 0\).*: copy the slide again"):
            slide.read(0, (0, 0), (50, 50))
        assert slide.read(0, (500, 500), (50, 50)).min() < 255
