"""Opening slides: what a good one tells, what a bad one says in one line, white where there is nothing."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from client.arrays import Pixels
from client.errors import ClientError, MppError, SlideError
from client.slides.handles import RegionReader, flatten_alpha
from client.slides.mpp import objective_power
from client.slides.slide import open_slide
from tests.support.dicom import write_series
from tests.support.pyramid import write_pyramid


def test_the_real_slide(real_slide: Path) -> None:
    with open_slide(real_slide) as slide:
        assert slide.slide_id == "CMU-1-Small-Region"
        assert slide.dimensions == (2220, 2967)
        assert slide.level_dimensions == ((2220, 2967),)
        assert slide.level_downsamples == (1.0,)
        assert (slide.mpp, slide.mpp_source) == ((0.499, 0.499), "openslide.mpp")
        assert slide.bounds == (0, 0, 2220, 2967)
        assert slide.vendor == "aperio"
    with openslide.OpenSlide(real_slide) as handle:
        assert objective_power(handle.properties) == 20.0


def test_explicit_mpp_overrules_the_file(real_slide: Path) -> None:
    with open_slide(real_slide, 0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == ((0.25, 0.25), "explicit")


def test_anisotropic_mpp(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", picture[:512, :512], mpp=(0.25, 0.26))) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.26), rel=1e-6)


def test_overview_pixels_are_means(real_slide: Path, picture: NDArray[np.uint8]) -> None:
    with open_slide(real_slide) as slide:
        overview = slide.overview(16)
    assert overview.downsample == (16.0, 16.0)
    assert overview.pixels.shape == (186, 139, 3)  # the last row and column reach beyond the edge
    whole = picture[: 185 * 16, : 138 * 16].reshape(185, 16, 138, 16, 3).mean(axis=(1, 3))
    assert np.abs(overview.pixels[:185, :138] - whole).max() <= 0.5 + 1e-9
    last = picture[:16, 138 * 16 :].reshape(-1, 3)  # 12 of 16 columns; the rest is white
    mean = (last.sum(axis=0) + (256 - len(last)) * 255) / 256
    assert np.abs(overview.pixels[0, 138] - mean).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "tile missing", "tile damaged", "tables apart"])
def test_an_overview_from_stored_tiles_is_openslides_own(
    tmp_path: Path, picture: NDArray[np.uint8], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(
        tmp_path / "a.tif",
        picture[:1900, :2100],
        tile=240,
        subsampling="444" if kind == "4:4:4" else "420",
        missing=[(1, 0)] if kind == "tile missing" else (),
        tables=kind == "tables apart",
    )
    if kind == "tile damaged":
        with tifffile.TiffFile(path) as file:
            offset = file.pages.first.dataoffsets[3]
        content = bytearray(path.read_bytes())
        content[offset : offset + 300] = bytes(300)
        path.write_bytes(content)
    through_openslide = 0
    read = RegionReader.read

    def count(reader: RegionReader, *args: Any) -> NDArray[np.uint8]:
        nonlocal through_openslide
        through_openslide += 1
        return read(reader, *args)

    monkeypatch.setattr(RegionReader, "read", count)
    with open_slide(path) as slide:
        direct = slide.overview(17)
    assert (through_openslide == 5) == ("missing" not in kind and "damaged" not in kind)  # five spots
    monkeypatch.setattr("client.slides.slide_file.VENDORS", ())
    through_openslide = 0
    with open_slide(path) as slide:
        reference = slide.overview(17)
    assert through_openslide > 0
    assert np.array_equal(direct.pixels, reference.pixels)
    assert np.array_equal(direct.unreadable, reference.unreadable)
    assert reference.unreadable.any() == (kind == "tile damaged")


def test_overview_reads_a_coarse_level(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[:2048, :2048], levels=(1, 4, 16))
    with open_slide(path) as slide:
        overview = slide.overview(20)
        assert overview.downsample == (16.0, 16.0)
        assert overview.pixels.shape == (128, 128, 3)
        assert np.array_equal(overview.pixels, slide.read(2, (0, 0), (128, 128)))


@pytest.mark.parametrize("max_px", [100, 1000, 5000])
def test_thumbnail_fits(real_slide: Path, max_px: int) -> None:
    with open_slide(real_slide) as slide:
        thumbnail = slide.thumbnail(max_px)
    assert max(thumbnail.shape) <= max_px
    assert max(thumbnail.shape) >= min(2967, max_px / 2)
    assert thumbnail.shape[0] / thumbnail.shape[1] == pytest.approx(2967 / 2220, rel=0.02)


def test_thumbnail_is_the_smallest_level_with_half_the_pixels(
    tmp_path: Path, picture: NDArray[np.uint8]
) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[:2048, :2048], levels=(1, 4, 16))
    with open_slide(path) as slide:
        assert np.array_equal(slide.thumbnail(1000), slide.read(1, (0, 0), (512, 512)))
        assert np.array_equal(slide.thumbnail(200), slide.read(2, (0, 0), (128, 128)))
        slide.overview(16)
        assert slide.thumbnail(100).shape == (100, 100, 3)


def test_a_slide_without_a_pyramid_is_read_once_for_overview_and_thumbnail(real_slide: Path) -> None:
    with open_slide(real_slide) as slide:
        direct = slide.thumbnail(500)  # 6 x 6 pixels are one: 370 x 495
    with open_slide(real_slide) as slide:
        slide.overview(3)  # 740 x 989
        reduced = slide.thumbnail(500)
    assert reduced.shape == (500, 374, 3)
    alike = cv2.resize(direct, (374, 500), interpolation=cv2.INTER_LINEAR).astype(int)
    assert np.abs(reduced - alike).mean() < 4


def test_transparent_is_white() -> None:
    rgba = np.array([[0, 0, 0, 0], [10, 20, 30, 255], [100, 0, 200, 51]], np.uint8)
    assert flatten_alpha(rgba).tolist() == [[255, 255, 255], [10, 20, 30], [224, 204, 244]]


def test_outside_and_missing_tiles_are_white(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[1000:1600, 600:1300], missing=[(1, 0)])
    with open_slide(path) as slide:
        pixels = slide.read(0, (-50, -50), (900, 800))
    assert (pixels[:50] == 255).all()
    assert (pixels[:, :50] == 255).all()
    assert (pixels[650:] == 255).all()
    assert (pixels[50 : 50 + 256, 50 + 256 : 50 + 512] == 255).all()
    assert (pixels[50 : 50 + 256, 50 : 50 + 256].mean(axis=2) < 200).any()


def test_bounds(leica_slide: Path) -> None:
    with open_slide(leica_slide) as slide:
        assert slide.vendor == "leica"
        assert slide.dimensions == (2000, 1500)
        assert slide.bounds == (300, 200, 1000, 700)


def _text(path: Path, picture: NDArray[np.uint8]) -> None:
    path.write_text("slide_id,label\na,1\n")


def _empty(path: Path, picture: NDArray[np.uint8]) -> None:
    path.touch()


def _folder(path: Path, picture: NDArray[np.uint8]) -> None:
    path.mkdir()


def _without_directory(path: Path, picture: NDArray[np.uint8]) -> None:
    """Cut before the directory, which most scanners write last."""
    write_pyramid(path, picture[:512, :512])
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", len(data) + 1000)
    path.write_bytes(data)


def _without_last_level(path: Path, picture: NDArray[np.uint8]) -> None:
    """Cut in what OpenSlide looks at when it opens a slide."""
    write_pyramid(path, picture[:1024, :1024], levels=(1, 4))
    path.write_bytes(path.read_bytes()[:-2000])


def _without_tail(path: Path, picture: NDArray[np.uint8]) -> None:
    """Cut in level 0, which here comes last, as in cloud-optimised TIFFs: OpenSlide opens it."""
    write_pyramid(path, picture[:1024, :1024], levels=(4, 1))
    path.write_bytes(path.read_bytes()[:-2000])


def _huge(path: Path, picture: NDArray[np.uint8]) -> None:
    """A header that claims 2^31 pixels a side."""
    write_pyramid(path, picture[:512, :512])
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].aspage().tags[name].overwrite(2**31 - 256, dtype="I")


def _many_entries(path: Path, picture: NDArray[np.uint8]) -> None:
    """A directory that claims 65,535 entries and has none."""
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(40))


def _pipe(path: Path, picture: NDArray[np.uint8]) -> None:
    os.mkfifo(path)


def _untold(path: Path, picture: NDArray[np.uint8]) -> None:
    write_pyramid(path, picture[:512, :512], mpp=None)


def _photo(path: Path, picture: NDArray[np.uint8]) -> None:
    """72 dpi: a scale, and not a microscope's."""
    write_pyramid(path, picture[:512, :512], mpp=25_400 / 72)


def _strips(path: Path, picture: NDArray[np.uint8]) -> None:
    tifffile.imwrite(path, picture[:512, :512], photometric="rgb")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (None, "no such file"),
        (_empty, "an empty file: copy it again"),
        (_folder, "a folder, not a slide"),
        (_pipe, "a pipe or device, not a slide"),
        (_text, "no slide that OpenSlide knows, or damaged: copy it again or convert it"),
        (_strips, "no slide that OpenSlide knows, or damaged: copy it again or convert it"),
        (_without_directory, "cut off"),
        (_without_last_level, "cut off"),
        (_without_tail, "cut off"),
        (_huge, "damaged, copy it again"),
        (_many_entries, "copy it again"),
        (_untold, "give --mpp or an mpp column in the manifest"),
        (_photo, "implausible 352.778"),
    ],
)
def test_bad_slides_say_so_in_one_line(
    tmp_path: Path, picture: NDArray[np.uint8], make: object, said: str
) -> None:
    path = tmp_path / "bad.tif"
    if callable(make):
        make(path, picture)
    with pytest.raises(SlideError) as error:
        open_slide(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message


def test_a_kind_that_openslide_does_not_read_is_not_called_damaged(tmp_path: Path, picture: Pixels) -> None:
    path = tmp_path / "webp.tif"
    tifffile.imwrite(path, picture[:512, :512], tile=(256, 256), photometric="rgb", compression="webp")
    with pytest.raises(SlideError, match=r"does not read \(TIFF compression WEBP\): convert it"):
        open_slide(path)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].aspage().tags["Compression"].overwrite(9999)
    with pytest.raises(SlideError, match="damaged, copy it again"):
        open_slide(path)
    [dicom] = write_series(tmp_path, "a", picture[:512, :512], levels=(1,), flavour="")
    with pytest.raises(SlideError, match=r"does not read \(.*\): convert it"):
        open_slide(dicom)


@pytest.mark.parametrize(
    ("size", "unit", "mpp"), [("0.25", None, 0.25), ("250", "nm", 0.25), ("0,5", "µm", 0.5)]
)
def test_the_scale_of_an_ome_tiff(
    tmp_path: Path, picture: Pixels, size: str, unit: str | None, mpp: float
) -> None:
    units = f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"' if unit else ""
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="0"><Pixels SizeX="512" PhysicalSizeX="{size}" PhysicalSizeY="{size}"{units}/></Image>'
        '<Image ID="1"><Pixels PhysicalSizeX="9" PhysicalSizeY="9"/></Image></OME>'
    )
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path,
        picture[:512, :512],
        tile=(256, 256),
        photometric="rgb",
        compression="deflate",
        description=xml.encode(),
        metadata=None,
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((mpp, mpp))
        assert slide.mpp_source == "ome.PhysicalSize"


@pytest.mark.parametrize("levels", [False, True])
def test_the_scale_of_an_ome_tiff_goes_before_that_of_its_tags(
    tmp_path: Path, picture: Pixels, levels: bool
) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (256, 256), "compression": "jpeg"}
    scale = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tags: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(picture[:512, :512], subifds=1 if levels else None, metadata=scale, **options, **tags)
        if levels:
            file.write(picture[:512:2, :512:2], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == ((0.25, 0.25), "ome.PhysicalSize")
        [note] = slide.notes
        assert note.startswith("0.25 mpp is used, the file says 0.5 (")


def test_mpp_error_is_a_slide_error(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    _untold(tmp_path / "a.tif", picture)
    with pytest.raises(MppError) as error:
        open_slide(tmp_path / "a.tif")
    assert isinstance(error.value, SlideError)
    assert isinstance(error.value, ClientError)
    with open_slide(tmp_path / "a.tif", 0.5) as slide:
        assert slide.mpp_source == "explicit"


def test_no_permission(real_slide: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "a.svs"
        path.write_bytes(real_slide.read_bytes())
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read all: be nobody for a moment
            os.seteuid(65534)
        try:
            with pytest.raises(SlideError, match=r"cannot be read \(Permission denied\)"):
                open_slide(path)
        finally:
            os.seteuid(user)


def test_a_closed_slide_is_not_opened_again(real_slide: Path) -> None:
    with open_slide(real_slide) as slide:
        pass
    with pytest.raises(ValueError, match="closed"):
        slide.read(0, (0, 0), (8, 8))


def test_closed_slides_leave_no_file_open(real_slide: Path) -> None:
    def open_files() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [str(link.readlink()) for link in links].count(str(real_slide))

    before = open_files()
    with open_slide(real_slide):
        pass
    with pytest.raises(MppError):
        open_slide(real_slide, -1)
    assert open_files() == before
