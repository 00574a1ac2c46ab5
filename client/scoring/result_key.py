"""What a slide's result depends on, as one short key: the same key means the same outputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from gigapath_contract.schema import Contract

from ..slides.fingerprint import file_fingerprint, slide_sha256
from ..version import __version__
from .score import SlideSource, TilingOptions


@dataclass(frozen=True)
class ResultKey:
    """The key (`value`) of a slide's result, with the slide's SHA-256 and the state of its files."""

    file_fingerprint: list[list[Any]]
    slide_sha256: str
    value: str


def find_result_key(
    source: SlideSource, contract: Contract, tiling: TilingOptions, previous: ResultKey | None = None
) -> ResultKey:
    """Hash a slide, unless `previous` shows that its files are unchanged since they were hashed.

    Raises:
        SlideError: a file is missing or cannot be read.
    """
    files = file_fingerprint(source.path)
    unchanged = previous is not None and previous.file_fingerprint == files
    content = previous.slide_sha256 if previous and unchanged else slide_sha256(source.path)
    return ResultKey(files, content, result_key(source, content, contract, tiling))


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
