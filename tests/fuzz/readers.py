"""`python -m tests.fuzz.readers NAME SECONDS SEED`: give one reader damaged and hostile files for a while.

A reader may refuse a file with an error of ours. Anything else, ten seconds on one file, and over 1 GB of
memory end the process; the file is then kept in build/fuzz.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import psutil
import tifffile
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from client.arrays import Pixels
from client.attribution.model.embedded import read_embedded
from client.batch.manifest import read_work_list
from client.errors import ClientError
from client.outputs.records import SlideRecord, read_records, write_record
from client.reading.tile_reader import open_reader
from client.scoring.resume import EmbeddingCheckpoint
from client.scoring.timings import total
from client.slides.contours import rasterise
from client.slides.detect import fault_of_frames, read_instance
from client.slides.geojson import read_annotations
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.slides.tissue import mask_from_image, tissue_mask
from gigapath_contract.errors import ContractError
from gigapath_contract.schema import Contract
from tests.support.dicom import write_series
from tests.support.pyramid import write_pyramid

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "fuzz"
LONGEST_S = 10
MOST_MEMORY = 1 << 30
FEWEST = 300  # the same ones on every machine
PER_ROUND = 100

Seeds = list[bytes]


@dataclass(frozen=True)
class Reader:
    """A reader: valid files (written into a folder), the reading, and the name its file must have."""

    name: str
    valid: Callable[[Path], Seeds]
    read: Callable[[Path], object]
    other: st.SearchStrategy[bytes] | None = None


def valid_slides(folder: Path) -> Seeds:
    """TIFFs of JPEG tiles: with and without tables, levels, missing tiles and 64-bit offsets; Aperio's."""
    pixels = small_picture()
    kinds: list[dict[str, object]] = [
        {},
        {"levels": (1, 4), "tables": True},
        {"bigtiff": True, "missing": [(0, 1)], "photometric": "rgb", "subsampling": "444"},
        {"description": "Aperio Image Library v1\r\n512x512 |AppMag = 20|MPP = 0.5", "tables": True},
    ]
    return [
        write_pyramid(folder / f"{number}.tif", pixels, **kind).read_bytes()  # type: ignore[arg-type]
        for number, kind in enumerate(kinds)
    ]


def small_picture() -> Pixels:
    """RGB noise [512, 512, 3] in which tissue is found."""
    tissue = cv2.resize(np.random.default_rng(0).integers(120, 255, (8, 8, 3), np.uint8), (512, 512))
    return np.asarray(tissue, np.uint8)


def valid_ome(folder: Path) -> Seeds:
    """OME-TIFF of two levels in SubIFDs, as Bio-Formats writes it."""
    found = []
    for compression in ("jpeg", "lzw", "jpeg2000"):
        path = folder / f"{compression}.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as file:
            options: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "compression": compression}
            scale = {f"PhysicalSize{axis}": 0.5 for axis in "XY"}
            file.write(small_picture(), **options, subifds=1, metadata={"axes": "YXS", **scale})
            file.write(small_picture()[::2, ::2], **options, subfiletype=1)
        found.append(path.read_bytes())
    return found


def valid_dicom(folder: Path) -> Seeds:
    """Instances of one level each."""
    return [
        write_series(folder, f"{lossless}", small_picture(), levels=(1,), lossless=lossless)[0].read_bytes()
        for lossless in (False, True)
    ]


def read_header(path: Path) -> None:
    """Read what we read ourselves: OpenSlide dies of some damage to what follows it."""
    read_instance(path)
    fault_of_frames(path)


def valid_recipes(folder: Path) -> Seeds:
    """Those of the checkout."""
    return [path.read_bytes() for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))]


def read_recipe(path: Path) -> None:
    """Read either kind of configuration; only one of them fits."""
    from training.config import TrainingConfig, read_yaml
    from training.errors import TrainingError
    from training.loops.tile_level import TileConfig

    for kind in (TrainingConfig, TileConfig):
        with contextlib.suppress(TrainingError):
            read_yaml(path, kind)


def read_slide(path: Path) -> None:
    """Open, look for tissue, plan, and read tiles as a score does."""
    with open_slide(path) as slide:
        plan = plan_tiles(slide, tissue_mask(slide), min_tissue=0)
    with contextlib.closing(open_reader(plan)) as reader:
        out = np.empty((plan.read_size[1], plan.read_size[0], 3), np.uint8)
        for index in range(min(4, len(plan))):
            reader.read(index, out)


def valid_features(folder: Path) -> Seeds:
    """Feature files, plain and compressed."""
    found = []
    for compression in (None, "gzip"):
        path = folder / "features.h5"
        with h5py.File(path, "w") as file:
            options = {"compression": compression, "chunks": (4, 8)} if compression else {}
            file.create_dataset("features", data=np.ones((6, 8), np.float32), **options)
            coords = file.create_dataset("coords", data=np.arange(12).reshape(6, 2) * 256)
            coords.attrs.update({"patch_size": 256, "patch_size_level0": 256, "overlap": 0, "name": "a"})
            file.create_dataset("valid", data=np.ones(6, np.bool_))
        found.append(path.read_bytes())
    return found


def valid_annotations(folder: Path) -> Seeds:
    """QuPath's forms."""
    ring = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
    square = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring, [[9, 9], [20, 9], [9, 20], [9, 9]]]},
        "properties": {"classification": {"name": "Tissue", "color": [1, 2, 3]}},
    }
    many = {"type": "MultiPolygon", "coordinates": [[ring], [[[x + 500, y] for x, y in ring]]]}
    collection = {"type": "FeatureCollection", "features": [square, {**square, "geometry": many}]}
    return [json.dumps(collection).encode(), json.dumps([square]).encode()]


def draw_annotations(path: Path) -> None:
    """Read areas and draw them."""
    rasterise(read_annotations(path), (16.0, 16.0), (100, 100))


def valid_manifests(folder: Path) -> Seeds:
    """CSV, TSV and semicolons."""
    rows = [["slide_id", "path", "mpp", "label"], ["a", "a.tif", "0.5", "x"], ["b", "b.svs", "", ""]]
    return ["\n".join(cut.join(row) for row in rows).encode() for cut in (",", "\t", ";")] + [
        b'slide_id,note\na,"two\nlines"\nb,"say ""so"""\n'
    ]


def valid_contract(folder: Path) -> Seeds:
    """The contract of the tests."""
    return [(ROOT / "tests" / "gigapath_contract" / "contract.json").read_bytes()]


def valid_records(folder: Path) -> Seeds:
    """A record as a batch writes it."""
    stages = {"read": {"seconds": 1.5, "bytes": 10.0, "calls": 2.0}}
    write_record(folder, SlideRecord("a", "a.tif", "ok", tiles=3, stages=stages))
    return [(folder / "records" / "a.json").read_bytes()]


def read_timings(path: Path) -> None:
    """Read a folder of records as `client timings` does."""
    records = read_records(path.parents[1])
    total([record.stages for record in records])
    sum(record.tiles - record.resumed_tiles + record.seconds for record in records)


def valid_checkpoint(folder: Path) -> Seeds:
    """Two records of rows."""
    with EmbeddingCheckpoint(folder / "a.part", "f", 4) as part:
        for rows in (3, 2):
            part.append(np.ones((rows, 4), np.float32), np.ones(rows, np.bool_))
    return [(folder / "a.part").read_bytes()]


def resume(path: Path) -> None:
    """Continue from a checkpoint."""
    with EmbeddingCheckpoint(path, "f", 4) as part:
        assert part.embeddings.shape == (len(part.valid), 4)


def valid_mask(folder: Path) -> Seeds:
    """A mask image as PNG and TIFF."""
    drawn = np.zeros((32, 32), np.uint8)
    drawn[8:20, 8:20] = 255
    return [cv2.imencode(suffix, drawn)[1].tobytes() for suffix in (".png", ".tif", ".jpg")]


class Square:
    """All of a slide that a mask image is held against."""

    dimensions, mpp, bounds = (1024, 1024), (0.5, 0.5), (0, 0, 1024, 1024)

    def __init__(self) -> None:
        self.notes: list[str] = []


numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=30,
)
points = st.lists(st.lists(numbers, min_size=1, max_size=3), max_size=12)
near = st.lists(st.tuples(*[st.integers(0, 6)] * 2).map(list), min_size=3, max_size=60)
rings = st.one_of(points, near.map(lambda ring: [*ring, ring[0]]))
geometries = st.recursive(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["Polygon", "MultiPolygon", "LineString", "Point", "MultiPoint", "Cube"]),
            "coordinates": st.one_of(
                st.lists(rings, max_size=3), st.lists(st.lists(rings, max_size=3), max_size=3), points, values
            ),
        }
    ),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("GeometryCollection"), "geometries": st.lists(inner, max_size=3)}
    ),
    max_leaves=5,
)
features = st.fixed_dictionaries({"geometry": st.one_of(geometries, values), "properties": values})


def as_json(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[bytes]:
    """JSON of what a strategy draws."""
    return strategy.map(lambda value: json.dumps(value).encode())


@st.composite
def changed_fields(draw: st.DrawFn, data: bytes) -> bytes:
    """A valid JSON object in which some fields, at any depth, have other values."""
    content = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(values)
            break
    return json.dumps(content).encode()


_CONTRACT = valid_contract(Path())[0]
READERS = {
    "slide": Reader("slide.tif", valid_slides, read_slide),
    "ome": Reader("slide.ome.tif", valid_ome, read_slide),
    "dicom": Reader("slide.dcm", valid_dicom, read_header),
    "features": Reader("slide.h5", valid_features, read_embedded),
    "annotations": Reader(
        "areas.geojson", valid_annotations, draw_annotations, as_json(st.lists(features, max_size=4))
    ),
    "manifest": Reader("cohort.csv", valid_manifests, read_work_list, st.text().map(str.encode)),
    "contract": Reader(
        "contract.json",
        valid_contract,
        lambda path: Contract.parse(path.read_text(errors="replace")),
        st.one_of(changed_fields(_CONTRACT), as_json(values)),
    ),
    "records": Reader("records/a.json", valid_records, read_timings, as_json(values)),
    "checkpoint": Reader("a.part", valid_checkpoint, resume),
    "mask": Reader("mask.png", valid_mask, lambda path: mask_from_image(path, Square())),  # type: ignore[arg-type]
}

if find_spec("torch"):
    READERS["recipe"] = Reader("recipe.yaml", valid_recipes, read_recipe, as_json(values))


@st.composite
def damaged(draw: st.DrawFn, seeds: Seeds) -> bytes:
    """A valid file with some bytes overwritten, left out, repeated or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        where = draw(st.integers(0, len(data) - 1))
        count = draw(st.integers(1, 16))
        some = draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from(
                    [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x40", b"\xff" * 8, b"[" * 5000]
                ),
            )
        )
        match draw(st.integers(0, 5)):
            case 0 | 1 | 2:
                data[where : where + len(some)] = some
            case 3:
                data[where:where] = some
            case 4:
                del data[where : where + count]
            case _:
                data[where:where] = data[where : where + count] * draw(st.integers(1, 50))
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def fuzz(name: str, seconds: float, number: int) -> int:
    """Read files until the time is over, but `FEWEST` at least; how many were read."""
    reader, read = READERS[name], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seeds = reader.valid(folder)
        path = folder / "fuzz" / reader.name
        path.parent.mkdir(parents=True)
        for data in seeds:
            path.write_bytes(data)
            reader.read(path)  # what is whole is read
        until = time.monotonic() + seconds
        limit = psutil.Process().memory_info().vms + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        strategy = damaged(seeds) if reader.other is None else st.one_of(damaged(seeds), reader.other)

        def one(data: bytes) -> None:
            nonlocal read
            if time.monotonic() > until and read >= FEWEST:
                return
            KEPT.joinpath(name).write_bytes(data)
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # of the processor: others may use the machine
            with contextlib.suppress(ClientError, ContractError):
                reader.read(path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            read += 1

        KEPT.mkdir(parents=True, exist_ok=True)
        faulthandler.register(signal.SIGPROF, chain=True)  # print where it is; then the signal ends it
        while time.monotonic() < until or read < FEWEST:
            test = settings(
                max_examples=PER_ROUND,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(seed(number)(given(strategy)(one)))
            test()
            number += 1
        KEPT.joinpath(name).unlink(missing_ok=True)
    return read


if __name__ == "__main__":
    print(fuzz(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])), "files")  # noqa: T201
