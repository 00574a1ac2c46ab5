"""Where outputs lie: TRIDENT's job folder, a folder per export, and how a slide's features are found again.

What all exports share lies in the job folder: coordinates, and the tile embeddings by encoder. What an export
made of them, slide embeddings, scores, tables and attributions, lies in a folder of its own beside it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gigapath_contract.files import NO_SUCH
from gigapath_contract.schema import Contract

from ..errors import ClientError
from ..files import write_text
from .hdf5 import may_hold_features, stored_attributes

CONTRACT = "contract.json"
TENSOR_SUFFIXES = (".pt", ".pth", ".npz", ".npy")
"""Of files with embeddings alone, such as CLAM's and slide2vec's."""
TRIDENT_NAMES = {"gigapath_tile_enc_vitg": "gigapath"}
"""What TRIDENT calls a published tile encoder: its slide stage takes embeddings from features_<name>."""


@dataclass(frozen=True)
class Layout:
    """The paths of outputs below `out`, for a contract's encoders and export."""

    out: Path
    contract: Contract

    @property
    def job(self) -> Path:
        """TRIDENT's job folder, `<magnification>x_<tile px>px_<overlap>px_overlap`: ours don't overlap."""
        tile = self.contract.tile
        return self.out / f"{10 / tile.mpp:g}x_{tile.size_px}px_0px_overlap"

    def patches(self, slide_id: str) -> Path:
        """Coordinates alone."""
        return self.job / "patches" / f"{slide_id}_patches.h5"

    @property
    def export(self) -> Path:
        """The folder of this export's own results."""
        return self.out / export_name(self.contract)

    @property
    def status(self) -> Path:
        """How every slide of the last run ended."""
        return self.export / "status.csv"

    @property
    def scores(self) -> Path:
        """The table of scores of the last run's slides."""
        return self.export / "scores.csv"

    @property
    def patients(self) -> Path:
        """The same by patient, where a column names the patients."""
        return self.export / "patients.csv"

    @property
    def encoder(self) -> str:
        """Tile encoder, first 8 digits of its weights' digest, precision, and those digits of a tile head."""
        encoder, head = self.contract.tile_encoder, self.contract.tile_head
        name = f"{file_stem(encoder.name)}-{encoder.weights_sha256[:8]}-{self.contract.precision}"
        return f"{name}-head-{head.weights_sha256[:8]}" if head else name

    def features(self, slide_id: str, suffix: str = ".h5") -> Path:
        """Tile embeddings and coordinates; every export with this tile encoder shares them."""
        return self.job / f"features_{self.encoder}" / f"{slide_id}{suffix}"

    def patch_tokens(self, slide_id: str) -> Path:
        """Every patch's token, on request."""
        return self.job / f"patch_tokens_{self.encoder}" / f"{slide_id}.h5"

    def slide_features(self, slide_id: str) -> Path:
        """Slide embedding, layers, scores and attributions."""
        folder = f"slide_features_{file_stem(self.contract.slide_encoder.name)}"
        return self.export / folder / f"{slide_id}.h5"

    @property
    def attribution(self) -> Path:
        """The folder of maps and whatever else explains this export's scores."""
        return self.export / "attribution"

    def picture(self, slide_id: str) -> Path:
        """The thumbnail with the tiles."""
        return self.job / "visualization" / f"{slide_id}.jpg"

    def contours(self, slide_id: str) -> Path:
        """The tissue's outlines in level-0 pixels, as TRIDENT has them."""
        return self.out / "contours_geojson" / f"{slide_id}.geojson"

    def tissue_geojson(self, slide_id: str) -> Path:
        """The tissue's outlines for QuPath, whose pixels begin at the slide's bounds."""
        return self.out / "tissue_geojson" / f"{slide_id}.geojson"

    def tiles_geojson(self, slide_id: str) -> Path:
        """The tiles for QuPath, in its pixels; by export where they have a tile head's scores."""
        folder = self.export if self.contract.tile_head else self.out
        return folder / "tiles_geojson" / f"{slide_id}.geojson"

    def clam(self, kind: str, slide_id: str) -> Path:
        """CLAM's `patches`, `h5_files` or `pt_files`."""
        suffix = ".pt" if kind == "pt_files" else ".h5"
        return self.out / "clam" / self.encoder / kind / f"{slide_id}{suffix}"

    def stored(self, slide_id: str) -> StoredSlide:
        """Where a slide's files lie once it is scored."""
        files = self.features(slide_id), self.slide_features(slide_id)
        return StoredSlide(*files, self.attribution, self.out, self.export)

    def write_contract(self) -> None:
        """Keep the contract in the export's folder, where `stored_layouts` finds it. Raises OutputError.

        A published encoder's embeddings also get the folder name that TRIDENT looks for, as a link.
        """
        write_text(self.export / CONTRACT, self.contract.to_json() + "\n")
        known = TRIDENT_NAMES.get(self.contract.tile_encoder.name)
        if known is not None:
            link = self.job / f"features_{known}"
            with contextlib.suppress(OSError):  # some file systems have no links
                self.job.mkdir(parents=True, exist_ok=True)
                if link.is_symlink() or not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(f"features_{self.encoder}")


def stored_layouts(out: Path) -> list[Layout]:
    """The layout of every export that a batch has scored into `out`, by the folder's name.

    Raises:
        ContractError: a contract can't be read.
    """
    return [
        Layout(out, Contract.parse(path.read_text("utf-8"))) for path in sorted(out.glob(f"*/{CONTRACT}"))
    ]


@dataclass(frozen=True)
class StoredSlide:
    """Where what is known of a slide lies, as one export sees it.

    Attributes:
        features: the HDF5 file with the tile embeddings.
        results: the one with the export's scores and attributions: the same unless a batch wrote it.
        folder: where explanations go.
        out: the folder that holds all of it, with the files' keys.
        export: the folder of records and tables: the export's own in a batch's folder, else `out`.
    """

    features: Path
    results: Path
    folder: Path
    out: Path
    export: Path

    @classmethod
    def in_one_file(cls, path: Path, folder: Path | None = None) -> Self:
        """A slide's only file, as `score` writes it; explanations go to `folder`, by default beside it."""
        return cls(path, path, folder or path.parent, path.parent, path.parent)


def find_slide(target: Path, slide_id: str | None, contract: Contract) -> StoredSlide:
    """A slide's files in `target`, as `find_features` finds them, for the export of `contract`.

    Raises:
        ClientError: as `find_features`; in a batch's folder this export has no result for the slide, or one
            of other tiles than are stored; a slide-level file of another export.
    """
    features = find_features(target, slide_id, contract)
    layout, slide_id = Layout(features.parent.parent.parent, contract), features.stem
    others = ", ".join(other.export.name for other in stored_layouts(layout.out))
    if not (others and features.parent.name.startswith("features_")):
        folder = target if target.is_dir() else features.parent
        return StoredSlide.in_one_file(features, folder)
    stored, again = layout.stored(slide_id), "run the batch again: it takes up the stored tile embeddings"
    if not stored.results.exists():
        raise ClientError(
            f"{layout.out}: the served export {contract.export_id} has not scored {slide_id} (results there: "
            f"{others}): {again}"
        )
    if is_slide_level(target) and not target.samefile(stored.results):
        raise ClientError(
            f"{target}: is of another export than the served {contract.export_id}: give {stored.results}"
        )
    if len({stored_attributes(file).get("tile_key") for file in (features, stored.results)}) > 1:
        raise ClientError(
            f"{layout.out}: {slide_id} was embedded again after export {contract.export_id} had scored it: "
            f"{again}"
        )
    return stored


def stored_slides(out: Path) -> list[StoredSlide]:
    """Every slide of a folder of `score` or `batch`, once per export, and other tools' feature files in it.

    Raises:
        ContractError: an export's contract can't be read.
    """
    found = [
        layout.stored(path.stem)
        for layout in stored_layouts(out)
        for path in sorted(layout.slide_features("any").parent.glob("*.h5"))
        if layout.features(path.stem).exists()
    ]
    known = {stored.features for stored in found}
    others = [path for path in features_files(out) if path not in known]
    return found + [StoredSlide(path, path, out, path.parent, out) for path in others]


def find_features(target: Path, slide_id: str | None = None, contract: Contract | None = None) -> Path:
    """The HDF5 file with a slide's tile embeddings: `target` itself, or the one of `slide_id` below it.

    A folder is what `client score` (OUT/SLIDE.h5) or `client batch` (OUT/*/features_*/SLIDE.h5) wrote to;
    `slide_id` may be left out where it holds a single slide. Where several tile encoders have embedded it,
    `contract` chooses the one of its export. A slide-level file, ours or TRIDENT's, stands for its slide.

    Raises:
        ClientError: there is no such file or slide, or several, or the file has embeddings alone.
    """
    if slide_id is None and is_slide_level(target):
        folder, slide_id = target.absolute().parents[1], target.stem
        in_job = features_files(folder, glob.escape(slide_id))  # TRIDENT has both in one job folder
        target = folder if in_job else folder.parent
    if not target.is_dir():
        if not target.exists():
            raise ClientError(f"{target}: {NO_SUCH}")
        if slide_id is not None:
            raise ClientError(f"--slide-id chooses a slide of a folder, but {target} is a file: leave it out")
        if target.suffix in TENSOR_SUFFIXES:
            raise ClientError(f"{target}: embeddings without coordinates: give an H5 file that holds both")
        return target
    found = features_files(target, "*" if slide_id is None else glob.escape(slide_id))
    if contract is not None:
        served = f"features_{Layout(target, contract).encoder}"
        found = [path for path in found if path.parent.name == served] or found
    if len(found) == 1:
        return found[0]
    if slide_id is None:
        slides = sorted({path.stem for path in found})
        some = ", ".join(slides[:3]) + (", …" if len(slides) > 3 else "")
        raise ClientError(
            f"{target}: holds features of {len(slides)} slides ({some}): choose one with --slide-id"
            if found
            else f"{target}: holds no slide's features: score slides into it first"
        )
    raise ClientError(
        f"{target}: holds several files with features of {slide_id}: give one of {', '.join(map(str, found))}"
        if found
        else f"{target}: holds no features of slide {slide_id}: score it first, or check the name"
    )


def is_slide_level(path: Path) -> bool:
    """Whether a file holds slide embeddings, by the folder name that TRIDENT and we give them."""
    return path.parent.name.startswith("slide_features_") and path.is_file()


def features_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The files of tile embeddings that `client score` or `client batch` wrote into a folder, by slide id.

    HDF5 files of another kind may lie directly in the folder: they are no slides.
    """
    places = (f"{pattern}.h5", f"features_*/{pattern}.h5", f"*/features_*/{pattern}.h5")
    found = [path for place in places for path in sorted(folder.glob(place))]
    own = (path for path in found if not path.parent.is_symlink())  # TRIDENT's name for one of the others
    return [path for path in own if path.parent != folder or may_hold_features(path)]


def export_name(contract: Contract) -> str:
    """`<preset>-<first 8 digits of the export's id>`."""
    return f"{file_stem(contract.preset)}-{contract.export_id[:8]}"


def file_stem(name: str) -> str:
    """A name as part of a file name: all but letters, digits, `.`, `_`, `+` and `-` becomes `_`.

    Where more than spaces were replaced, digits of the name's digest follow: `<1%` and `>1%` differ.
    """
    stem = re.sub(r"[^\w.+-]+", "_", name)
    if stem == re.sub(r"\s+", "_", name):
        return stem
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
