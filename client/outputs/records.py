"""The record of each slide: its outcome, the key of what was computed, and where the time went."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gigapath_contract.files import parse_json
from gigapath_contract.schema import Contract

from ..errors import ClientError
from ..files import write_text
from ..scoring.result_key import SlideKeys
from ..scoring.score import ScoredSlide, SlideSource
from ..scoring.timings import StageTimer

OK, DEGRADED, FAILED = "ok", "degraded", "failed"


class Fault(StrEnum):
    """Whose fault a failure is, which decides what a batch does next."""

    NONE = ""  # the slide's own, or none
    DEADLINE = "deadline"  # a request took too long
    DISK_FULL = "disk full"
    SERVER_LOST = "server lost"  # no server could be reached
    EXPORT_CHANGED = "export changed"  # a server serves another export
    PROCESS_DIED = "process died"  # the slide's own, or others' where memory was short


@dataclass(frozen=True)
class SlideRecord:
    """The outcome of one slide, kept as `records/<slide_id>.json`.

    `result_key` names what was computed (see `scoring.result_key`) and `outputs` the files, relative to the
    output folder. `resumed_tiles` were not embedded by this run. `reused`: it found everything done.
    """

    slide_id: str
    path: str
    status: str
    reason: str = ""
    fault: Fault = Fault.NONE
    tiles: int = 0
    invalid_tiles: int = 0
    resumed_tiles: int = 0
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    export_id: str = ""
    result_key: str = ""
    slide_sha256: str = ""
    notes: list[str] = field(default_factory=list)  # what was odd about the slide and was dealt with
    outputs: list[str] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    reused: bool = False


def slide_record(
    source: SlideSource,
    contract: Contract,
    keys: SlideKeys,
    scored: ScoredSlide,
    outputs: list[str],
    timer: StageTimer,
    *,
    seconds: float,
) -> SlideRecord:
    """The record of a slide that was scored."""
    return SlideRecord(
        slide_id=source.slide_id,
        path=str(source.path),
        status=DEGRADED if scored.degraded_reason else OK,
        reason=scored.degraded_reason,
        tiles=len(scored.valid),
        invalid_tiles=int((~scored.valid).sum()),
        resumed_tiles=scored.resumed_tiles,
        seconds=round(seconds, 3),
        mpp=scored.plan.mpp_level0[0],
        mpp_source=scored.plan.mpp_source,
        export_id=contract.export_id,
        result_key=keys.result,
        slide_sha256=keys.content.sha256,
        notes=list(scored.notes),
        outputs=outputs,
        stages=timer.as_dict(),
    )


def record_path(out: Path, slide_id: str) -> Path:
    """Where a slide's record is kept."""
    return out / "records" / f"{slide_id}.json"


def write_record(out: Path, record: SlideRecord) -> None:
    """Keep a record, as a whole or not at all."""
    write_text(record_path(out, record.slide_id), json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_record(out: Path, slide_id: str) -> SlideRecord | None:
    """The record of a slide, None where there is none or another version wrote it."""
    try:
        return SlideRecord(**parse_json(record_path(out, slide_id).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_records(out: Path) -> list[SlideRecord]:
    """Every record of a folder, by slide id: of `score`'s or a batch's, or of one export's in a batch's.

    Raises:
        ClientError: there is none, or several exports have scored into the folder.
    """
    folders = record_folders(out)
    if len(folders) > 1:
        some = ", ".join(map(str, folders))
        raise ClientError(f"{out}: holds results of several exports: give one of {some}")
    found = find_records(folders[0]) if folders else []
    if not found:
        raise ClientError(f"{out}: holds no records: score slides into it first, or name their --out folder")
    return found


def record_folders(out: Path) -> list[Path]:
    """The folders with records: `out` itself, or those of exports in a batch's."""
    return sorted({path.parent.parent for place in ("", "*/") for path in out.glob(f"{place}records/*.json")})


def find_records(out: Path) -> list[SlideRecord]:
    """Every record of an output folder, by slide id; none where nothing was scored into it."""
    records = [read_record(out, path.stem) for path in sorted((out / "records").glob("*.json"))]
    return [record for record in records if record]
