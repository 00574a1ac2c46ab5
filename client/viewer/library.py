"""The slides of output folders: where their results and their files lie, and how they ended."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py

from gigapath_contract.errors import FeatureFileError
from gigapath_contract.features import check_self_contained, dataset, one_line_errors
from gigapath_contract.slides import SLIDE_SUFFIXES, is_file_name

from ..errors import ClientError, SlideError
from ..outputs.layout import StoredSlide, stored_slides
from ..outputs.records import FAILED, OK, SlideRecord, find_records, record_folders
from ..slides.address import RemotePath, slide_path
from ..slides.geojson import SUFFIXES, Frame
from ..slides.slide import open_slide
from .deepzoom import DeepZoom

OPEN_SLIDES = 8


@dataclass(frozen=True)
class Entry:
    """One slide of an output folder.

    Attributes:
        key: its name in addresses; the slide's id, numbered where several entries have the same.
        folder: that of the results: of one export, where a batch wrote them.
        stored: the files of its embeddings and attributions, None where it has none.
        record: its outcome, None where another tool wrote the features.
        scores: probability by class; empty where unknown.
    """

    key: str
    slide_id: str
    folder: Path
    stored: StoredSlide | None
    record: SlideRecord | None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """`ok`, `degraded` or `failed`, as recorded."""
        return self.record.status if self.record else OK if self.stored else FAILED


@dataclass(frozen=True)
class Library:
    """The slides of output folders, and where else their files may lie.

    Attributes:
        folders: output folders of `score` or `batch`.
        slide: the file of the only slide, in place of the recorded one.
        wsi_dir: where slides are looked for, by the recorded file name, before their recorded path.
        annotations: a GeoJSON file, or a folder with SLIDE_ID.geojson.
        frame: where those annotations have their (0, 0).
    """

    folders: tuple[Path, ...]
    slide: Path | None = None
    wsi_dir: Path | None = None
    annotations: Path | None = None
    frame: Frame = "qupath"

    def entries(self) -> dict[str, Entry]:
        """Every slide by key; reads the folders anew, as a batch may be writing to them.

        Raises:
            ClientError: a folder is missing.
        """
        found: dict[str, Entry] = {}
        for folder in self.folders:
            if not folder.is_dir():
                raise ClientError(f"{folder}: no such folder: name the --out folder of score or batch")
            for slide_id, place, stored, record in _slides_of(folder):
                numbered = (f"{slide_id}@{number}" for number in itertools.count(2))
                key = next(name for name in itertools.chain([slide_id], numbered) if name not in found)
                scores = _stored_scores(stored) if stored else {}
                found[key] = Entry(key, slide_id, place, stored, record, scores)
        return found

    def slide_path(self, entry: Entry) -> Path | None:
        """Where the slide's file should be; None where nothing says it.

        Raises:
            SlideError: the record has an address of a kind that is not read.
        """
        if self.slide is not None:
            return self.slide
        recorded = slide_path(entry.record.path) if entry.record and entry.record.path else None
        if self.wsi_dir is not None:
            names = [recorded.name] if recorded else []
            names += [f"{entry.slide_id}{suffix}" for suffix in sorted(SLIDE_SUFFIXES)]
            for path in (self.wsi_dir / name for name in names):
                if path.exists():
                    return path
        if recorded is None or isinstance(recorded, RemotePath):
            return recorded
        # A relative path was meant from where the slide was scored, often somewhere above the results.
        places = (base / recorded for base in (Path(), *entry.folder.resolve().parents))
        return next((path for path in places if path.exists()), recorded)

    def open(self, entry: Entry) -> DeepZoom:
        """The slide's tiles; a few slides stay open.

        Raises:
            SlideError, SlideServerError: its file is missing, unreadable or damaged, or its server does not
                give it.
        """
        path = self.slide_path(entry)
        if path is None:
            raise SlideError("nothing says where the slide's file is: name its --wsi-dir")
        record = entry.record
        explicit = record.mpp if record and record.mpp_source == "explicit" else None
        try:
            changed = 0 if isinstance(path, RemotePath) else path.stat().st_mtime_ns
            return _opened(path, changed, explicit)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SlideError(f"{path}: {reason}: name the slides' folder with --wsi-dir") from None

    def own_geojson(self, entry: Entry) -> list[Path]:
        """The user's own annotations of a slide."""
        own = self.annotations
        if own is not None and own.is_dir():
            named = [own / f"{entry.slide_id}{suffix}" for suffix in SUFFIXES]
            return [path for path in named if path.is_file()]
        return [own] if own else []

    def found_geojson(self, entry: Entry) -> list[Path]:
        """A slide's evidence that `attribute` found, and its tissue."""
        found: list[Path] = []
        name = glob.escape(entry.slide_id)
        for folder in self._near(entry):
            near = [
                *folder.glob(f"{name}-*-evidence.geojson"),
                *folder.glob(f"tissue_geojson/{name}.geojson"),
            ]
            found += [path for path in sorted(near) if _is_inside(path, folder)]
        return found

    def tile_maps(self, entry: Entry) -> dict[tuple[int, int], Path]:
        """Pictures of maps inside tiles by the tile's level-0 corner (x, y)."""
        found = {}
        for folder in self._near(entry):
            for path in sorted(folder.glob(f"{glob.escape(entry.slide_id)}-*-tile-*.png")):
                x, y = path.stem.split("-")[-2:]
                if x.isdecimal() and y.isdecimal() and _is_inside(path, folder):
                    found[int(x), int(y)] = path
        return found

    def _near(self, entry: Entry) -> list[Path]:
        """The folders that may hold what explains a slide, that of its export first."""
        return list(dict.fromkeys([*([entry.stored.folder] if entry.stored else []), *self.folders]))


@lru_cache(OPEN_SLIDES)
def _opened(path: Path, changed: int, mpp: float | None) -> DeepZoom:
    """The tiles of a slide; `changed` is its file's time, so that a new file is opened anew."""
    return DeepZoom(open_slide(path, mpp))


def _slides_of(folder: Path) -> Iterator[tuple[str, Path, StoredSlide | None, SlideRecord | None]]:
    """Id, place, files and record of a folder's slides by export; links that lead out of it are left out.

    Where `attribute` explained another tool's file, its copy with the maps is taken.
    """
    records = {
        (place, one.slide_id): one
        for place in record_folders(folder)
        for one in find_records(place)
        if _is_sound(one)
    }
    found = stored_slides(folder)
    ours = {one.features.stem for one in found if one.results != one.features}
    copies = [path for path in sorted((folder / "attribution").glob("*.h5")) if path.stem not in ours]
    replaced = {path.stem for path in copies}
    found = [one for one in found if one.features.stem not in replaced]
    found += [StoredSlide(path, path, folder, folder, folder) for path in copies]
    listed = set()
    for stored in found:
        if _is_inside(stored.features, folder) and _is_inside(stored.results, folder):
            key = stored.export, stored.features.stem
            listed.add(key)
            yield key[1], key[0], stored, records.get(key)
    for place, slide_id in sorted(records.keys() - listed):
        yield slide_id, place, None, records[place, slide_id]


def _stored_scores(stored: StoredSlide) -> dict[str, float]:
    """The probabilities in the slide's own HDF5 file."""
    try:
        return _scores_in(stored.results, stored.results.stat().st_mtime_ns)
    except (OSError, FeatureFileError):
        return {}  # the slide's page says what is wrong with the file


@lru_cache(4096)
def _scores_in(path: Path, changed: int) -> dict[str, float]:
    """`scores` of a file; `changed` is the file's time."""
    with one_line_errors(), h5py.File(path) as file:
        check_self_contained(file)
        if "scores" not in file:
            return {}
        stored = dataset(file, "scores", "f")
        return dict(zip(map(str, stored.attrs["classes"]), stored[:].tolist(), strict=False))


def _is_sound(record: SlideRecord) -> bool:
    """Whether a record holds what it should; anyone may have written it."""
    kinds: dict[str, Any] = {
        **dict.fromkeys(("slide_id", "path", "status", "reason", "mpp_source"), str),
        **dict.fromkeys(("tiles", "invalid_tiles"), int),
        "mpp": int | float | None,
        "notes": list,
    }
    sound = all(isinstance(getattr(record, name), kind) for name, kind in kinds.items())
    return sound and is_file_name(record.slide_id) and all(isinstance(note, str) for note in record.notes)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with links followed, lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())
