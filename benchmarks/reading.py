"""Reading tiles against a loop over OpenSlide, decoding alone, and the other readers' own libraries."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import openslide
import simplejpeg
import tifffile
from dicomweb_client.api import DICOMwebClient
from pylibCZIrw.czi import CziReader
from requests import Session
from wsidicom import WsiDicom, WsiDicomWebClient

from benchmarks.common import (
    MACHINE,
    PAGES,
    REAL_SLIDE,
    WORK,
    Pages,
    Trials,
    alternate,
    fresh_folder,
    in_own_process,
    median_ratio,
    peak_bytes,
    seconds_of,
    table,
    write_page,
)
from benchmarks.orthanc import LOGIN, MISSING, serve_orthanc
from client.arrays import Pixels
from client.reading.handle_reader import HandleReader
from client.reading.stream import read_tiles, resize
from client.reading.tile_reader import open_reader
from client.slides.address import RemotePath, slide_path
from client.slides.dicomweb import forget_series
from client.slides.mirror import CACHE
from client.slides.slide import open_slide
from client.slides.stored_tiles import StoredTiles
from client.slides.tiff import all_pages
from client.slides.tiling import TilePlan, plan_tiles
from tests.support.czi import write_czi
from tests.support.dicom import write_series
from tests.support.pyramid import shrink, write_pyramid
from tests.support.web import serve_files

SIZE = (40_000, 36_000)  # 22,137 tiles
TILES_PER_TASK = 16  # of a thread, in every method
SAMPLE, SLOW_SAMPLE = 2400, 480  # tiles per trial

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Case:
    """One slide, and the tiles to read of it."""

    name: str
    path: Path
    mpp: float | None = None  # level 0's, in place of the file's own

    def plan(self, count: int) -> TilePlan:
        """The first `count` tiles, tissue or not."""
        with open_slide(self.path, self.mpp) as slide:
            plan = plan_tiles(slide, None)
        return dataclasses.replace(plan, coords=plan.coords[:count])


def cases() -> list[Case]:
    """The real slide and two large ones made of it, written where they are not there yet."""
    folder = WORK / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    with open_slide(REAL_SLIDE) as slide:
        picture = slide.read(0, (0, 0), slide.dimensions)
    large = {}
    for tile in (256, 240):
        large[tile] = folder / f"large-{tile}.tif"
        if not large[tile].exists():
            whole = picture[: picture.shape[0] // tile * tile, : picture.shape[1] // tile * tile]
            part = large[tile].with_suffix(".part")
            write_pyramid(part, whole, size=SIZE, tile=tile, levels=(1, 4, 16), bigtiff=True)
            part.replace(large[tile])
    return [
        Case("real slide, 240-px storage", REAL_SLIDE),
        Case("large, 256-px storage", large[256]),
        Case("large, 240-px storage", large[240]),
        Case("large, 256-px storage, 0.25 mpp", large[256], 0.25),
    ]


Method = Callable[[Case, int], tuple[int, float]]
"""Reads tiles of a case with a number of threads; how many tiles, and in how many seconds."""


def loop(case: Case, threads: int) -> tuple[int, float]:
    """`read_region` of every whole tile, RGB, crop: the straightforward loop."""
    plan = case.plan(SLOW_SAMPLE)
    size = plan.tile_size
    margin = (plan.tile_px - plan.crop_px) // 2
    kept = slice(margin, margin + plan.crop_px)

    def read(slide: openslide.OpenSlide, x: int, y: int) -> Pixels:
        pixels = np.asarray(slide.read_region((x, y), plan.level, size).convert("RGB"))
        return resize(pixels, (plan.tile_px, plan.tile_px))[kept, kept]

    return _openslide(plan, threads, read)


def middle_loop(case: Case, threads: int) -> tuple[int, float]:
    """`read_region` of the tiles' middles alone: the pixels that the client delivers."""
    plan = case.plan(SLOW_SAMPLE)
    dx, dy = (round(side * plan.downsample) for side in plan.read_offset)

    def read(slide: openslide.OpenSlide, x: int, y: int) -> Pixels:
        pixels = np.asarray(slide.read_region((x + dx, y + dy), plan.level, plan.read_size).convert("RGB"))
        return resize(pixels, (plan.crop_px, plan.crop_px))

    return _openslide(plan, threads, read)


def _openslide(
    plan: TilePlan, threads: int, read: Callable[[openslide.OpenSlide, int, int], Pixels]
) -> tuple[int, float]:
    with openslide.OpenSlide(plan.path) as slide:  # OpenSlide's handles may be shared by threads

        def some(corners: list[list[int]]) -> None:
            for x, y in corners:
                read(slide, x, y)

        return len(plan), _timed(some, plan.coords.tolist(), threads)


def client(case: Case, threads: int) -> tuple[int, float]:
    """`read_tiles`, without opening, which is reported separately."""
    plan = case.plan(SAMPLE)
    start = time.perf_counter()
    with closing(open_reader(plan)) as reader:
        opening = time.perf_counter() - start
        assert reader.name == "jpeg tiles", reader.reason
    start = time.perf_counter()
    count = sum(int(batch.valid.sum()) for batch in read_tiles(plan, workers=threads))
    assert count == len(plan)
    return count, time.perf_counter() - start - opening


def client_openslide(case: Case, threads: int) -> tuple[int, float]:
    """The client's reader for all other formats."""
    plan = case.plan(SLOW_SAMPLE)
    with closing(HandleReader(plan)) as reader:

        def some(indices: list[int]) -> None:
            region = np.empty((*plan.read_size[::-1], 3), np.uint8)
            for index in indices:
                assert reader.read(index, region)
                resize(region, (plan.crop_px, plan.crop_px))

        return len(plan), _timed(some, list(range(len(plan))), threads)


def decode(case: Case, threads: int) -> tuple[int, float]:
    """Decode each stored tile under the plan once and throw it away: the limit."""
    plan = case.plan(SAMPLE)
    stored = plan.stored
    assert isinstance(stored, StoredTiles)
    first = plan.level_positions() // np.array(stored.tile)
    last = (np.minimum(plan.level_positions() + plan.read_size, stored.size) - 1) // np.array(stored.tile)
    keys = {
        y * stored.columns + x
        for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True)
        for x in range(x0, x1 + 1)
        for y in range(y0, y1 + 1)
    }
    with case.path.open("rb") as file:
        streams = []
        for key in sorted(keys):
            file.seek(stored.offsets[key])
            streams.append(stored.prefix + file.read(stored.counts[key])[2:])

    def some(few: list[bytes]) -> None:
        for stream in few:
            simplejpeg.decode_jpeg(stream)

    return len(plan), _timed(some, streams, threads)


def _timed(work: Callable[[list[T]], None], items: list[T], threads: int) -> float:
    """Seconds that a pool takes for `items`, TILES_PER_TASK at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [items[i : i + TILES_PER_TASK] for i in range(0, len(items), TILES_PER_TASK)]))
    return time.perf_counter() - start


def large_picture() -> Pixels:
    """RGB of four times a part of the real slide, 4,096 px wide."""
    with open_slide(REAL_SLIDE) as slide:
        return np.tile(slide.read(0, (0, 0), (2048, 2816)), (2, 2, 1))


def others() -> dict[str, tuple[TilePlan, Callable[[TilePlan, int], float]]]:
    """Tiles of level 1 of slides that other libraries read, and what takes their time in those."""
    whole = large_picture()
    folder = fresh_folder(WORK / "other-readers")
    found: dict[str, tuple[TilePlan, Callable[[TilePlan, int], float]]] = {}
    for codec, count in (("jpeg", 88), ("zstd", 88), ("jpeg2000", 16)):
        path = folder / f"{codec}.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as file:
            for factor in (1, 2):
                file.write(
                    shrink(whole, factor),
                    tile=(256, 256),
                    photometric="rgb",
                    compression=codec,
                    subifds=2 - factor,
                    subfiletype=factor - 1,
                    metadata={"axes": "YXS"} if factor == 1 else None,
                )
        found[f"OME-TIFF, {codec}: tifffile"] = Case(codec, path, 0.25).plan(count), decode_tiff
    path = write_czi(folder / "slide.czi", whole, mpp=0.25, factors=(1, 2), jpeg_xr=True)
    found["CZI, JPEG XR: pylibCZIrw"] = Case("czi", path).plan(88), read_czi
    return found


def decode_tiff(plan: TilePlan, threads: int) -> float:
    """Seconds in which tifffile decodes the stored tile under each tile."""
    with tifffile.TiffFile(plan.path) as file:
        page = all_pages(file)[plan.level]
        columns = -(-page.imagewidth // page.tilewidth)
        stored = []
        for x, y in (plan.level_positions() // page.tilewidth).tolist():
            file.filehandle.seek(page.dataoffsets[key := y * columns + x])
            stored.append((file.filehandle.read(page.databytecounts[key]), key))

        def some(few: list[tuple[bytes, int]]) -> None:
            for data, key in few:
                page.decode(data, key, jpegtables=page.jpegtables)

        return _timed(some, stored, threads)


def read_czi(plan: TilePlan, threads: int) -> float:
    """Seconds in which `CziReader.read` reads the middle of each tile."""
    factor = round(plan.downsample)
    reader = CziReader(str(plan.path))

    def some(few: list[list[int]]) -> None:
        for x, y in few:
            reader.read((x, y, plan.read_size[0] * factor, plan.read_size[1] * factor), zoom=1 / factor)

    try:
        return _timed(some, (plan.level_positions() * factor).tolist(), threads)
    finally:
        reader.close()


def read_with_client(plan: TilePlan, threads: int) -> float:
    """Seconds in which `read_tiles` opens the slide and reads all."""
    return seconds_of(lambda: list(read_tiles(plan, workers=threads)))


METHODS: dict[str, Method] = {
    "OpenSlide, `read_region` per tile": loop,
    "OpenSlide, only the middle read": middle_loop,
    "client, through OpenSlide": client_openslide,
    "**client, stored JPEG tiles**": client,
    "decoding the stored tiles alone": decode,
}
LOOP, MIDDLE, _, CLIENT, LIMIT = METHODS


def main(trials: Trials = 5, pages: Pages = PAGES) -> None:
    """Measure tile reading."""
    measured = cases()

    def rate(case: Case, threads: int, method: str) -> float:
        count, seconds = METHODS[method](case, threads)
        return count / seconds

    keys = [(case, threads, method) for case in measured for threads in (1, 2) for method in METHODS]
    rates = alternate({key: partial(rate, *key) for key in keys}, trials)
    write_page(
        pages / "reading.md",
        _page(measured, rates, trials) + _others(trials) + _dicomweb(trials) + _remote(trials),
    )


def _others(trials: int) -> str:
    found = others()
    seconds = alternate(
        {
            (name, threads, method): partial(method, plan, threads)
            for name, (plan, own) in found.items()
            for threads in (1, 2)
            for method in (own, read_with_client)
        },
        trials,
    )
    rows = []
    for name, (plan, own) in found.items():
        cells = []
        for threads in (1, 2):
            base, ours = seconds[name, threads, own], seconds[name, threads, read_with_client]
            rate, own_rate = (len(plan) / statistics.median(trial) for trial in (ours, base))
            cells.append(f"{own_rate:,.0f} | {rate:,.0f} ({median_ratio(base, ours):.2f})")
        rows.append(f"{name} | {' | '.join(cells)}")
    return f"""
## Other readers

Tiles per second of level 1 of slides that OpenSlide does not read, or only in part: the library decoding or
reading each of them, and the client with all that it does, opening included, and its ratio to the library.

{table("| library, 1 thread | client, 1 thread | library, 2 threads | client, 2 threads", rows)}
"""


def _dicomweb(trials: int) -> str:
    """A series of Orthanc's, read with a login; both open it in each trial and start without its frames."""
    with TemporaryDirectory() as work, serve_orthanc(Path(work)) as server:
        if server is None:
            return f"\n## A slide on a DICOMweb server\n\nNot measured: {MISSING}.\n"
        os.environ |= server.tokens
        (series,) = server.store(write_series(Path(work), "slide", large_picture(), mpp=0.25, levels=(1, 2)))
        plan = Case("series", slide_path(series)).plan(88)
        loop = partial(read_with_wsidicom, plan, server.service)
        ways = {"wsidicom": loop, "client": partial(read_series, plan)}
        expected, _ = loop(1)
        keys = [(threads, name) for threads in (1, 2) for name in ways]

        def rate(threads: int, name: str) -> float:
            pixels, seconds = ways[name](threads)
            assert np.array_equal(pixels, expected)
            return len(plan) / seconds

        rates = alternate({key: partial(rate, *key) for key in keys}, trials)
    rows = []
    for threads in (1, 2):
        base, ours = rates[threads, "wsidicom"], rates[threads, "client"]
        cells = [f"{statistics.median(values):,.0f}" for values in (base, ours)]
        rows.append(f"{threads} | {' | '.join(cells)} | {median_ratio(ours, base):.2f}")
    return f"""
## A slide on a DICOMweb server

Tiles per second of level 1 of a JPEG series in Orthanc on the same machine, opening included: a loop over
wsidicom's `read_region` with dicomweb-client, and the client. All pixels are the same.

{table("threads | wsidicom | client | ratio", rows)}
"""


def read_with_wsidicom(plan: TilePlan, service: str, threads: int) -> tuple[Pixels, float]:
    """The middle of each tile by wsidicom alone, and the seconds that it takes."""
    assert isinstance(plan.path, RemotePath)
    assert plan.path.series
    _, study, series = plan.path.series
    pixels = np.empty((len(plan), plan.crop_px, plan.crop_px, 3), np.uint8)
    corners = plan.level_positions().tolist()
    start = time.perf_counter()
    session = Session()
    session.auth = LOGIN
    client = WsiDicomWebClient(DICOMwebClient(service, session=session))
    with WsiDicom.open_web(client, study, series) as slide:

        def some(indices: list[int]) -> None:
            for index in indices:
                region = slide.read_region(tuple(corners[index]), plan.level, plan.read_size, as_array=True)
                pixels[index] = region

        _timed(some, list(range(len(plan))), threads)
    return pixels, time.perf_counter() - start


def read_series(plan: TilePlan, threads: int) -> tuple[Pixels, float]:
    """The same by the client."""
    forget_series()
    start = time.perf_counter()
    pixels = np.concatenate([batch.pixels for batch in read_tiles(plan, workers=threads)])
    return pixels, time.perf_counter() - start


def _remote(trials: int) -> str:
    """The real slide from a web server in this process, read for the first time and again, and from disk."""
    local = Case("local", REAL_SLIDE)
    with TemporaryDirectory() as cache, serve_files({}) as files:
        os.environ[CACHE] = cache
        addresses: list[Path] = []

        def first(threads: int) -> float:
            name = f"{len(addresses)}.svs"
            files.content[f"/{name}"] = REAL_SLIDE.read_bytes()
            addresses.append(slide_path(f"{files.address}/{name}"))
            return again(threads)

        def again(threads: int) -> float:
            plan = Case("remote", addresses[-1]).plan(SAMPLE)
            return len(plan) / read_with_client(plan, threads)

        def disk(threads: int) -> float:
            count, seconds = client_openslide(local, threads)
            return count / seconds

        ways = {"OpenSlide, the file on disk": disk, "first read": first, "read again": again}
        keys = [(threads, name) for threads in (1, 2) for name in ways]
        rates = alternate({(n, name): partial(ways[name], n) for n, name in keys}, trials)
        del os.environ[CACHE]
    rows = [
        f"{name} | {' | '.join(f'{statistics.median(rates[threads, name]):,.0f}' for threads in (1, 2))}"
        for name in ways
    ]
    return f"""
## A slide on a web server

Tiles per second of the real slide, from a server in the same process (so without a network's delay), opening
included; what was read lies in the cache.

{table("| 1 thread | 2 threads", rows)}
"""


def _page(measured: list[Case], rates: dict[tuple[Case, int, str], list[float]], trials: int) -> str:
    sections = "\n".join(_section(case, rates) for case in measured)
    memory = []
    for case in measured[1:3]:
        few, many = (in_own_process(peak_of_reading, case, count) / 2**20 for count in (2_000, 20_000))
        memory.append(f"{case.name} | {few:.0f} | {many:.0f} | {many / few:.2f}")
    return f"""# Reading tiles

`make bench NAME=reading`: {MACHINE}, {trials} trials, methods alternately. Tiles per second (median), and in
brackets the median of the trials' ratios to the first line. 256-px tiles of 0.5 mpp, the middle 224 px
delivered; files in the page cache; opening is separate.

{sections}
## Memory

Peak resident memory, MiB, of a process that plans a slide and reads its first tiles with 2 threads.

{table("| 2,000 tiles | 20,000 tiles | ratio", memory)}
"""


def _section(case: Case, rates: dict[tuple[Case, int, str], list[float]]) -> str:
    rows = []
    for method in METHODS:
        cells = []
        for threads in (1, 2):
            own, base = rates[case, threads, method], rates[case, threads, LOOP]
            cells.append(f"{statistics.median(own):,.0f} ({median_ratio(own, base):.1f})")
        rows.append(f"{method} | {' | '.join(cells)}")
    for other, text in (
        (MIDDLE, "the client to OpenSlide's middles"),
        (LIMIT, "the client to the limit"),
    ):
        one, two = (median_ratio(rates[case, n, CLIENT], rates[case, n, other]) for n in (1, 2))
        rows.append(f"*{text}* | {one:.2f} | {two:.2f}")
    plan = case.plan(SAMPLE)
    opening = statistics.median(seconds_of(lambda: open_reader(plan).close()) for _ in range(9))
    return f"""## {case.name}: {len(plan)} tiles

{table("| 1 thread | 2 threads", rows)}

Opening, with the comparison with OpenSlide: {opening * 1e3:.0f} ms.
"""


def peak_of_reading(case: Case, count: int) -> int:
    """This process's peak in bytes after reading tiles."""
    for _ in read_tiles(case.plan(count)):
        pass
    return peak_bytes()
