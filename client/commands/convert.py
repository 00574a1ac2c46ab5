"""`client convert`: plain pictures to slides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gigapath_contract.slides import PICTURE_SUFFIXES

from ..batch.manifest import read_work_list
from ..errors import ClientError, OutputError
from ..files import check_folder
from ..scoring.score import SlideSource
from ..slides.convert import convert_picture
from . import options
from .display import warn


def command(
    source: Annotated[
        Path,
        typer.Argument(help="A picture, a folder of them, or a table with path and mpp.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the slides.")] = Path("slides"),
    mpp: Annotated[
        float | None,
        typer.Option(
            callback=options.finite, help="Microns per pixel, where neither table nor TIFF has them."
        ),
    ] = None,
    wsi_dir: options.WsiDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace slides that exist.")] = False,
) -> None:
    """Convert untiled TIFF, PNG and JPEG to tiled pyramidal TIFF (JPEG, quality 90), which batch reads.

    Example: `gigapath-client convert scans.csv --wsi-dir scans/ --out slides/`
    """
    check_folder(out)
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        pictures = [SlideSource(path, path.stem) for path in found]
    elif source.suffix.lower() in PICTURE_SUFFIXES:
        pictures = [SlideSource(source, source.stem)]
    else:
        work_list = read_work_list(source, wsi_dir)
        for bad in work_list.bad:
            warn(options.console, f"{bad.slide_id}: {bad.reason}")
        pictures = work_list.slides
    if not pictures:
        raise ClientError(f"{source}: holds no pictures (looked for {' '.join(sorted(PICTURE_SUFFIXES))})")
    failed, written = 0, set[Path]()
    for picture in pictures:
        target = out / f"{picture.slide_id}.tiff"
        try:
            if target in written:
                raise ClientError(f"{picture.path}: another picture is called {picture.slide_id}: rename one")
            if target.exists() and not overwrite:
                raise ClientError(f"{target}: exists: choose another --out, or replace it (--overwrite)")
            scale, levels = convert_picture(picture.path, target, picture.mpp or mpp)
        except OutputError:
            raise
        except ClientError as error:
            failed += 1
            warn(options.console, str(error))
        else:
            written.add(target)
            typer.echo(f"{target}  {scale[0]:.4g} mpp, {levels} level{'s' * (levels > 1)}")
    if failed:
        raise typer.Exit(1)
