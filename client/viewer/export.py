"""The page as files, for a web host or a disk: nothing needs a server, so nothing can be asked of a model."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import OutputError, SlideError, SlideServerError
from ..files import make_folder, output_errors, write_text
from .app import OPENSEADRAGON, PAGE
from .contents import describe, limits, summary
from .library import Entry, Library
from .safety import POLICY

logger = logging.getLogger(__name__)

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([\w.]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|const|class) (\w+))", re.MULTILINE)
# A page on disk has no header, and `frame-ancestors` works in a header alone.
_META = f'<meta http-equiv="Content-Security-Policy" content="{POLICY.rpartition(";")[0]}">'

_DZI = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
    'Format="jpeg" Overlap="0" TileSize="{tile}"><Size Width="{width}" Height="{height}"/></Image>\n'
)


def export_page(library: Library, folder: Path) -> None:
    """Write the page with all slides of a library.

    Raises:
        OutputError: the folder holds something, or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"cannot export into {folder}: it is not an empty folder; choose another path")
    entries = library.entries()
    make_folder(folder / "data")
    make_folder(folder / "page" / "openseadragon")
    html = (PAGE / "index.html").read_text()
    html = html.replace("<head>", f"<head>\n    {_META}", 1)
    html = html.replace('type="module" src="page/main.js"', 'defer src="page/viewer.js"')
    write_text(folder / "index.html", html)
    write_text(folder / "page" / "viewer.js", bundle("main.js"))
    with output_errors(folder):
        shutil.copy(PAGE / "style.css", folder / "page")
        for path in OPENSEADRAGON.parent.iterdir():
            shutil.copy(path, folder / "page" / "openseadragon")
    for entry in entries.values():
        _write_slide(library, entry, folder)
    _write_data(folder, "slides", [_shareable(summary(entry)) for entry in entries.values()])
    _write_data(folder, "limits", limits(library))


def bundle(main: str) -> str:
    """The page's modules as one plain script: a browser loads no modules from a disk."""
    parts = ["globalThis.viewerData = {};", "const modules = {};"]
    for name in _in_order(main, []):
        code = _text(name)
        exported = ", ".join(_EXPORT.findall(code))
        code = _EXPORT.sub("", _IMPORT.sub(r'const \1 = modules["\2"];', code))
        parts.append(f'modules["{name}"] = (() => {{\n{code}\nreturn {{ {exported} }};\n}})();')
    return "\n".join(parts)


def _in_order(name: str, found: list[str]) -> list[str]:
    """A module after those that it imports."""
    for _, imported in _IMPORT.findall(_text(name)):
        if imported not in found:
            _in_order(imported, found)
    found.append(name)
    return found


def _text(name: str) -> str:
    return (PAGE / name).read_text()


def _write_slide(library: Library, entry: Entry, folder: Path) -> None:
    """A slide's data, its tiles and the maps inside its tiles; parts that cannot be read are left out."""
    _write_data(folder, f"slide-{entry.key}", _shareable(describe(library, entry)))
    slides = folder / "slides"
    maps = slides / entry.key / "maps"
    for (x, y), path in library.tile_maps(entry).items():
        make_folder(maps)
        with output_errors(maps):
            shutil.copy(path, maps / f"{x}_{y}.png")
    try:
        tiles = library.open(entry)
    except (SlideError, SlideServerError):
        return  # among the slide's problems
    width, height = tiles.slide.dimensions
    make_folder(slides)
    write_text(slides / f"{entry.key}.dzi", _DZI.format(tile=tiles.tile, width=width, height=height))
    for level, column, row in tiles.places():
        place = slides / f"{entry.key}_files" / str(level)
        try:
            jpeg = tiles.read(level, column, row)
        except SlideError as error:
            logger.warning("%s", error)
            continue
        make_folder(place)
        with output_errors(place):
            (place / f"{column}_{row}.jpeg").write_bytes(jpeg or b"")


def _write_data(folder: Path, name: str, data: Any) -> None:
    write_text(folder / "data" / f"{name}.js", f"viewerData[{json.dumps(name)}] = {json.dumps(data)};\n")


def _shareable(data: dict[str, Any]) -> dict[str, Any]:
    """Without where files lie on this machine."""
    if data.get("record"):
        data["record"]["path"] = Path(data["record"]["path"]).name
    return data | ({"folder": Path(data["folder"]).name} if "folder" in data else {})
