"""Score a slide and store the result, unless the output folder already holds it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import ClientError, ExportChanged, OutputError, RequestRefused, SlideError
from ..files import check_folder
from ..scoring.embedding import Progress, Throughput, chunk_size, row_width
from ..scoring.result_key import KeyKind, find_keys
from ..scoring.resume import EmbeddingCheckpoint
from ..scoring.score import (
    DEFAULT_THROUGHPUT,
    DEFAULT_TILING,
    ScoredSlide,
    SlideSource,
    TilingOptions,
    score_slide,
)
from ..scoring.timings import StageTimer
from ..slides.address import slide_path
from ..slides.fingerprint import file_fingerprint, slide_sha256
from ..slides.geojson import tissue_features, write_feature_collection
from ..slides.tiling import TilePlan
from ..triton.connection import Connection
from ..triton.contract import check_same
from .file_keys import FileKeys
from .hdf5 import (
    Provenance,
    read_features,
    write_features_h5,
    write_patches_h5,
    write_slide_features_h5,
    write_slide_h5,
)
from .layout import Layout, StoredSlide
from .records import SlideRecord, read_record, slide_record, write_record
from .thumbnail import draw_tiles, write_picture

Writer = Callable[[Path, ScoredSlide, Provenance], None]


@dataclass(frozen=True)
class SingleFile:
    """`client score`: everything in OUT/SLIDE.h5, and OUT/SLIDE-tiles.png."""

    out: Path

    @property
    def results(self) -> Path:
        """The folder itself."""
        return self.out

    def paths(self, slide_id: str) -> list[Path]:
        """The HDF5 file and the picture."""
        return list(self.files(slide_id))

    def files(self, slide_id: str) -> Mapping[Path, tuple[KeyKind, Writer]]:
        """The HDF5 file and the picture."""
        return {
            self.tile_file(slide_id): ("file", write_slide_h5),
            self.out / f"{slide_id}-tiles.png": ("file", _write_picture),
        }

    def tile_file(self, slide_id: str) -> Path:
        """The HDF5 file."""
        return self.out / f"{slide_id}.h5"

    def patch_tokens(self, slide_id: str) -> Path:
        """OUT/patch_tokens/SLIDE.h5: every HDF5 file beside the scored one is a slide's."""
        return self.out / "patch_tokens" / f"{slide_id}.h5"

    @property
    def tile_maps(self) -> Path:
        """The folder itself."""
        return self.out

    def features(self, slide_id: str) -> None:
        """None: all is in one file."""

    def checkpoint(self, slide_id: str) -> None:
        """None: one slide is scored in one go."""


@dataclass(frozen=True)
class TridentFiles:
    """`client batch`: TRIDENT's layout, and a folder per export; `formats` makes further files from these."""

    layout: Layout

    @property
    def out(self) -> Path:
        """The layout's folder."""
        return self.layout.out

    @property
    def results(self) -> Path:
        """The export's own folder."""
        return self.layout.export

    def files(self, slide_id: str) -> Mapping[Path, tuple[KeyKind, Writer]]:
        """The layout's files."""
        layout = self.layout
        return {
            layout.patches(slide_id): ("plan", write_patches_h5),
            layout.picture(slide_id): ("plan", _write_picture),
            layout.contours(slide_id): ("plan", _write_contours),
            layout.tissue_geojson(slide_id): ("plan", _write_tissue),
            layout.features(slide_id): ("tiles", write_features_h5),
            layout.slide_features(slide_id): ("result", write_slide_features_h5),
        }

    def tile_file(self, slide_id: str) -> Path:
        """The same as `features`."""
        return self.features(slide_id)

    def patch_tokens(self, slide_id: str) -> Path:
        """In a folder beside that of the embeddings."""
        return self.layout.patch_tokens(slide_id)

    @property
    def tile_maps(self) -> Path:
        """A folder of the export's own."""
        return self.layout.export / "tile_head_maps"

    def features(self, slide_id: str) -> Path:
        """The tile embeddings, one file per tile encoder and precision."""
        return self.layout.features(slide_id)

    def checkpoint(self, slide_id: str) -> Path:
        """OUT/.partial/SLIDE.part."""
        return self.out / ".partial" / f"{slide_id}.part"


Outputs = SingleFile | TridentFiles
"""The files of a scored slide below the folder `out`; records lie in `results/records`."""


def check_free(out: Path, source: SlideSource) -> None:
    """Check that `out` does not hold the result of another slide by the same id, from another file.

    Raises:
        OutputError: it does.
        SlideError: the slide cannot be read.
    """
    previous = read_record(out, source.slide_id)
    if (
        previous is not None
        and previous.slide_sha256
        and slide_path(previous.path).resolve() != source.path.resolve()
        and previous.slide_sha256 != slide_sha256(source.path)
    ):
        raise OutputError(
            f"{out} holds the result of another slide called {source.slide_id} ({previous.path}): choose "
            "another --out, or rename one of them"
        )


def score_to(
    outputs: Outputs,
    source: SlideSource,
    connection: Connection,
    contract: Contract,
    tiling: TilingOptions = DEFAULT_TILING,
    throughput: Throughput = DEFAULT_THROUGHPUT,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[SlideRecord, ScoredSlide | None]:
    """Score a slide into `outputs` with its record; None for the result where it was there already.

    It is there when the record and all files have the keys of this run. Where only the tile embeddings are,
    no tile is embedded again. Files that were made from what is replaced are removed.

    Args:
        outputs: the files to write, `SingleFile(out)` or `TridentFiles(Layout(out, contract))`.
        source, connection, contract, tiling, throughput, progress: as for `score_slide`.
        overwrite: score also what is there already, and what another export left in the same files.

    Raises:
        OutputError: the files cannot be written.
        ExportChanged: a server serves another export than `contract` was read from.
        SlideError: the slide can't be read, or was changed while it was.
        ClientError: as `score_slide` raises; another export's results would be overwritten.

    Example::

        record, scored = score_to(SingleFile(Path("out")), SlideSource(path), connection, contract)
    """
    began, timer, slide_id = time.perf_counter(), StageTimer(), source.slide_id
    check_folder(outputs.out)
    noted, previous = FileKeys(outputs.out, slide_id), read_record(outputs.results, slide_id)
    with timer.time("hash"):
        keys = find_keys(source, contract, tiling, noted.content)
    files = outputs.files(slide_id)
    wanted = {path: keys[kind] for path, (kind, _) in files.items()}
    missing = list(files) if overwrite else noted.stale(wanted)
    if previous and previous.result_key == keys.result and not missing:
        if previous.path != str(source.path):
            previous = dataclasses.replace(previous, path=str(source.path))
            write_record(outputs.results, previous)
        return dataclasses.replace(previous, reused=True), None
    if previous and previous.export_id not in ("", contract.export_id) and not overwrite:
        raise ClientError(
            f"{outputs.results}: holds the result of export {previous.export_id} for {slide_id}, the server "
            f"serves {contract.export_id}: choose another --out, or replace it (gigapath-client score "
            "--overwrite)"
        )
    unfinished, features = outputs.checkpoint(slide_id), outputs.features(slide_id)
    stored = None
    if features and features not in missing:
        with contextlib.suppress(ClientError):  # damaged: the tiles are embedded again
            stored = read_features(features)

    def open_checkpoint(plan: TilePlan) -> EmbeddingCheckpoint | None:
        fingerprint = [keys.tiles, plan.fingerprint, chunk_size(throughput, contract)]
        return EmbeddingCheckpoint(unfinished, fingerprint, row_width(contract)) if unfinished else None

    check_same(connection, contract)
    try:
        with _naming_a_change(connection, contract):
            scored = score_slide(
                source,
                connection,
                contract,
                tiling,
                throughput,
                timer=timer,
                stored=stored,
                open_checkpoint=open_checkpoint,
                progress=progress,
            )
        check_same(connection, contract)
    except ExportChanged:
        if unfinished:  # some of its rows may be the other export's
            unfinished.unlink(missing_ok=True)
        raise
    if file_fingerprint(source.path) != keys.content.files:
        if unfinished:
            unfinished.unlink(missing_ok=True)
        raise SlideError(f"{source.path}: was changed while it was read: score it again once it is complete")
    if features and not scored.reused:
        missing = list({**dict.fromkeys(missing), features: None})
    provenance = Provenance(contract, keys)
    with timer.time("write"), noted.writing({path: wanted[path] for path in missing}, keys.content):
        for path in missing:
            files[path][1](path, scored, provenance)
    names = [path.relative_to(outputs.out).as_posix() for path in files]
    record = slide_record(source, contract, keys, scored, names, timer, seconds=time.perf_counter() - began)
    write_record(outputs.results, record)
    if unfinished:
        unfinished.unlink(missing_ok=True)
    return record, scored


def note_maps(stored: StoredSlide, slide_id: str, files: Iterable[Path]) -> None:
    """Note that files explain a slide's stored result: they are removed when it is replaced.

    Raises OutputError. Files elsewhere, and those of a slide that we didn't score, are passed over.
    """
    noted = FileKeys(stored.out, slide_id)
    if key := noted.of(stored.results):
        noted.note({path: key for path in files if path != stored.results})


def _write_picture(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    write_picture(path, draw_tiles(scored))


def _write_contours(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    write_feature_collection(path, tissue_features(scored.contours, scored.plan.slide_id))


def _write_tissue(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    tissue = tissue_features(scored.contours, scored.plan.slide_id, origin=scored.origin)
    write_feature_collection(path, tissue)


@contextmanager
def _naming_a_change(connection: Connection, contract: Contract) -> Iterator[None]:
    """Name as the cause of a refused request that a server now serves another export, where it does."""
    try:
        yield
    except RequestRefused:
        check_same(connection, contract)
        raise
