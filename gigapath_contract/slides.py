"""Suffixes of slide files, and the id by which tables, records and HDF5 files name a slide."""

from __future__ import annotations

from pathlib import PurePath

# What OpenSlide opens, see https://openslide.org/formats/, and further names of pyramidal TIFFs
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
    | {".qptiff", ".ptif", ".btf", ".tf8"}
)
FEATURES_SUFFIX = ".h5"
# Of the pictures that `client convert` makes slides of: a table may still name them.
PICTURE_SUFFIXES = frozenset({".tif", ".tiff", ".png", ".jpg", ".jpeg"})


def slide_id(name: str) -> str:
    """The id of the slide that a table calls `name`: a file's name without folder and suffix, else `name`.

    prov-gigapath and STAMP write ids with the slide's suffix, others name the feature file; an id without a
    known suffix is taken as it is, dots and slashes included.
    """
    path = PurePath(name)
    known = SLIDE_SUFFIXES | PICTURE_SUFFIXES | {FEATURES_SUFFIX}
    return path.stem if path.suffix.lower() in known else name


LONGEST_ID = 180
"""Bytes in UTF-8: file systems allow names of 255, and outputs append up to 75."""


def is_file_name(slide_id: str) -> bool:
    """Whether an id can name a slide's outputs, and stand in a table that a spreadsheet opens.

    It can't where it is empty, hidden, too long or not printable, holds a slash, or begins like a formula.
    """
    return (
        slide_id.isprintable()
        and "/" not in slide_id
        and not slide_id.startswith((".", "=", "+", "-", "@"))
        and 0 < len(slide_id.encode(errors="replace")) <= LONGEST_ID
    )
