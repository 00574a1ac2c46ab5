"""What is known of each slide of a run: its outcome, the key of what was computed, its timer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigapath_contract.schema import Contract

from .. import __version__
from ..errors import ClientError
from ..files import write_text
from ..scoring.score import ScoredSlide, SlideSource, TilingOptions
from ..scoring.timings import StageTimer
from ..slides.fingerprint import slide_sha256, slide_stamp

OK, DEGRADED, FAILED = "ok", "degraded", "failed"


@dataclass(frozen=True)
class SlideRecord:
    """The outcome of one slide, kept as `records/<slide_id>.json`.

    `key` names what was computed (see `result_key`) and `stamp` the slide's files with size and time, so
    that an unchanged slide needs no hashing. `reused` tells that this run found everything done.
    """

    slide_id: str
    path: str
    status: str
    reason: str = ""
    error: str = ""
    tiles: int = 0
    invalid_tiles: int = 0
    resumed_tiles: int = 0
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    key: str = ""
    slide_sha256: str = ""
    stamp: list[list[Any]] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    reused: bool = False


def result_key(source: SlideSource, content: str, contract: Contract, tiling: TilingOptions) -> str:
    """16 hex digits of what decides a slide's outputs: content, contract, tiling, mpp, mask, our version."""
    parts = {
        "slide_sha256": content,
        "export_id": contract.export_id,
        "tiling": dataclasses.asdict(tiling),
        "mpp": source.mpp,
        "mask_sha256": slide_sha256(source.mask) if source.mask else None,
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Identity:
    """A slide by its files and content, and with all else that decides its outputs: `key`."""

    stamp: list[list[Any]]
    slide_sha256: str
    key: str


def identify(
    source: SlideSource, contract: Contract, tiling: TilingOptions, known: SlideRecord | None = None
) -> Identity:
    """Hash a slide, or take the digest that is `known` of files that nobody wrote to since.

    Raises:
        SlideError: a file is missing or can't be read.
    """
    stamp = slide_stamp(source.path)
    content = known.slide_sha256 if known and known.stamp == stamp else slide_sha256(source.path)
    return Identity(stamp, content, result_key(source, content, contract, tiling))


def slide_record(
    source: SlideSource, identity: Identity, scored: ScoredSlide, timer: StageTimer, *, seconds: float
) -> SlideRecord:
    """The record of a slide that was scored."""
    return SlideRecord(
        slide_id=source.slide_id,
        path=str(source.path),
        status=DEGRADED if scored.degraded else OK,
        reason=scored.degraded,
        tiles=len(scored.valid),
        invalid_tiles=int((~scored.valid).sum()),
        resumed_tiles=scored.resumed_tiles,
        seconds=round(seconds, 3),
        mpp=scored.plan.mpp_level0[0],
        mpp_source=scored.plan.mpp_source,
        key=identity.key,
        slide_sha256=identity.slide_sha256,
        stamp=identity.stamp,
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
        return SlideRecord(**json.loads(record_path(out, slide_id).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_records(out: Path) -> list[SlideRecord]:
    """Every record of an output folder, by slide id.

    Raises:
        ClientError: there is none.
    """
    records = [read_record(out, path.stem) for path in sorted((out / "records").glob("*.json"))]
    found = [record for record in records if record]
    if not found:
        raise ClientError(f"{out}: holds no records: score slides into it first, or name their --out folder")
    return found
