"""What the client's tests share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from client.cli import main
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.tiling import TilePlan, plan_tiles
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from gigapath_contract.schema import Contract
from server.local import RunningServer, run_triton
from tests.support.pyramid import write_pyramid


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def picture(real_slide: Path) -> NDArray[np.uint8]:
    """The real slide's pixels, RGB uint8 [2967, 2220, 3]: what test slides are made of."""
    with open_slide(real_slide) as slide:
        return slide.read(0, (0, 0), slide.dimensions)


@pytest.fixture
def run_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run_client("score", path, …)` runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["client", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr()
        code = end.value.code
        return Outcome(code if isinstance(code, int) else 0, written.out, written.err)

    return run


@pytest.fixture(scope="session")
def connection(triton_url: str) -> Iterator[Connection]:
    """An open connection to the demo server."""
    with Connection(Endpoint(triton_url, retry_for=2)) as opened:
        yield opened


@pytest.fixture(scope="session")
def contract(connection: Connection) -> Contract:
    """The demo server's contract."""
    return read_contract(connection)


@pytest.fixture(scope="session")
def slides(picture: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three small slides, a.tif to c.tif, cut from the real one; read only."""
    folder = tmp_path_factory.mktemp("slides")
    for name, top in (("a", 0), ("b", 900), ("c", 1900)):
        write_pyramid(folder / f"{name}.tif", picture[top : top + 1024, 700:1980], levels=(1, 4))
    return folder


@pytest.fixture(scope="session")
def leica_slide(picture: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Leica SCN slide of 2000x1500 px at 0.5 mpp, of which 1000x700 px from (300, 200) on are scanned."""

    def image(name: str, page: int, pixels: tuple[int, int], place: tuple[int, int, int, int]) -> str:
        x, y, width, height = (500 * side for side in place)  # nanometres
        return (
            f'<image name="{name}" uuid="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
            f'<device model="m" version="1"/><pixels sizeX="{pixels[0]}" sizeY="{pixels[1]}">'
            f'<dimension sizeX="{pixels[0]}" sizeY="{pixels[1]}" r="0" ifd="{page}"/></pixels>'
            f'<view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}" spacingZ="0"/>'
            "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    description = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="s">'
        f'<collection name="c" uuid="c" sizeX="{2000 * 500}" sizeY="{1500 * 500}"><barcode></barcode>'
        + image("macro", 0, (200, 150), (0, 0, 2000, 1500))
        + image("main", 1, (1000, 700), (300, 200, 1000, 700))
        + "</collection></scn>"
    )
    path = tmp_path_factory.mktemp("leica") / "leica.scn"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for pixels, text in ((picture[:150, :200], description), (picture[1500:2200, 700:1700], None)):
            file.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                description=text,
                metadata=None,
                software=False,
            )
    return path


@pytest.fixture(scope="session")
def reading() -> SimpleNamespace:
    """What the tests of reading do all the time: plan, collect, plainly, write_deflate."""

    def plan(path: Path, **options: Any) -> TilePlan:
        """Plan all tiles of a slide, tissue or not."""
        with open_slide(path) as slide:
            return plan_tiles(slide, None, **options)

    def collect(tiles: TilePlan, **options: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], set[str]]:
        """Read all tiles: pixels [N, h, w, 3], valid [N] and the readers' names."""
        batches = list(read_tiles(tiles, **options))
        pixels = np.concatenate([batch.pixels for batch in batches])
        valid = np.concatenate([batch.valid for batch in batches])
        return pixels, valid, {batch.reader for batch in batches}

    def plainly(tiles: TilePlan) -> Iterator[NDArray[np.uint8] | None]:
        """Read unresampled tiles by OpenSlide and Pillow alone; None where OpenSlide fails."""
        white = Image.new("RGBA", tiles.read_size, (255, 255, 255, 255))
        slide = openslide.OpenSlide(tiles.path)
        for x, y in np.rint(tiles.level_positions() * tiles.downsample).astype(int).tolist():
            try:
                rgba = slide.read_region((x, y), tiles.level, tiles.read_size)
                yield np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
            except openslide.OpenSlideError:
                slide.close()
                slide = openslide.OpenSlide(tiles.path)
                yield None
        slide.close()

    def write_deflate(path: Path, pixels: NDArray[np.uint8]) -> None:
        """Write a tiled TIFF that isn't JPEG, at 0.5 mpp."""
        tifffile.imwrite(
            path,
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
            metadata=None,
        )

    return SimpleNamespace(plan=plan, collect=collect, plainly=plainly, write_deflate=write_deflate)


OTHER_EXPORT = "0123456789abcdef"


@pytest.fixture(scope="session")
def other_server(
    demo_repository: Path, contract: Contract, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A Triton that serves the demo's models as another export with the same tile encoder."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(demo_repository, folder / "repository")
    for path in (folder / "repository").rglob("*"):
        if path.suffix in (".json", ".pbtxt"):
            path.write_text(path.read_text().replace(contract.export_id, OTHER_EXPORT))
    with run_triton(folder / "repository", log=folder / "triton.log") as server:
        yield server


@pytest.fixture(scope="session")
def other_export(other_server: RunningServer) -> str:
    """Its host:port."""
    return other_server.url
