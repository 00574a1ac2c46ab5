"""What the maps of many slides say, in one table, and the maps on sheets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from ...errors import ClientError
from ...files import atomic_path, write_csv
from ..explain import Explanation

TABLE, SHEET = "attributions.csv", "attributions.pdf"
_PAGE, _COLUMNS, _ROWS = (2480, 1754), 3, 2  # A4 across at 210 pixels per inch


@dataclass(frozen=True)
class SummaryRow:
    """One map, or why there is none; `key` names what it was made from."""

    slide_id: str
    status: str
    target: str = ""
    method: str = ""
    score: str = ""
    full: str = ""
    empty: str = ""
    noise_floor: str = ""
    agreement: str = ""
    warnings: str = ""
    map: str = ""
    key: str = ""


def summary_row(explanation: Explanation, picture: Path, key: str) -> SummaryRow:
    """The row of an explanation whose map is `picture`."""
    result, trust, target = explanation.attribution, explanation.reliability, explanation.target_index
    return SummaryRow(
        slide_id=explanation.slide.slide_id,
        status="ok",
        target=explanation.target_class,
        method=str(result.method),
        score=str(explanation.score),
        full=f"{result.full[target]:.6g}",
        empty=f"{result.base[target]:.6g}",
        noise_floor=f"{trust.noise_floor:.3g}" if trust else "",
        agreement=f"{trust.agreement:.3f}" if trust else "",
        warnings="; ".join(trust.warnings()) if trust else "",
        map=picture.name,
        key=key,
    )


def read_summary(folder: Path) -> list[SummaryRow]:
    """The rows that an earlier run left; none where there is no such table.

    Raises:
        ClientError: it is another table.
    """
    path = folder / TABLE
    if not path.exists():
        return []
    names = [field.name for field in fields(SummaryRow)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [SummaryRow(*(row[name] for name in names)) for row in csv.DictReader(file)]
    except (OSError, UnicodeError, csv.Error, KeyError) as error:
        raise ClientError(f"{path}: not our table ({error}): move it away") from error


def write_summary(folder: Path, rows: Sequence[SummaryRow]) -> Path:
    """Write the table. Raises OutputError."""
    names = [field.name for field in fields(SummaryRow)]
    write_csv(folder / TABLE, names, [asdict(row).values() for row in rows])
    return folder / TABLE


def write_sheet(folder: Path, rows: Sequence[SummaryRow]) -> Path:
    """Write the maps, six on a page, in the table's order. Raises OutputError."""
    pictures = [path for row in rows if row.map and (path := folder / row.map).exists()]
    cell = _PAGE[0] // _COLUMNS, _PAGE[1] // _ROWS
    with atomic_path(folder / SHEET) as part:
        part.touch()
        for start in range(0, len(pictures), _COLUMNS * _ROWS):
            page = Image.new("RGB", _PAGE, "white")
            for number, path in enumerate(pictures[start : start + _COLUMNS * _ROWS]):
                with Image.open(path) as picture:
                    small = picture.convert("RGB")
                small.thumbnail((cell[0] - 20, cell[1] - 20))
                page.paste(small, (number % _COLUMNS * cell[0] + 10, number // _COLUMNS * cell[1] + 10))
            # One page in memory at a time: each has 13 MB.
            page.save(part, format="PDF", append=start > 0, resolution=210)
    return folder / SHEET
