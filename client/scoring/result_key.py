"""What a slide's outputs depend on, as short keys: the same key means the same content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from gigapath_contract.schema import Contract

from ..slides.fingerprint import file_fingerprint, slide_sha256
from ..version import __version__
from .score import SlideSource, TilingOptions

KeyKind = Literal["plan", "tiles", "result", "file"]
"""What decides an output: see `SlideKeys`; `file` is the result, all of it in one file."""


@dataclass(frozen=True)
class SlideContent:
    """A slide's SHA-256, and the state of its files when they were hashed: name, size, time of each."""

    sha256: str = ""
    files: list[list[Any]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class SlideKeys:
    """The keys of a slide's outputs, 16 hex digits each, and the content that they were made from.

    `plan` names where the tiles lie: content, tile size and scale, tiling options, mpp, mask, our version.
    `tiles` names their embeddings: plan, tile encoder with its head, and precision. `result` names
    the slide embedding and the scores: the tiles and the export.
    """

    content: SlideContent = dataclasses.field(default_factory=SlideContent)
    plan: str = ""
    tiles: str = ""
    result: str = ""

    def __getitem__(self, kind: KeyKind) -> str:
        return f"{self.result}-file" if kind == "file" else str(getattr(self, kind))


def find_keys(
    source: SlideSource, contract: Contract, tiling: TilingOptions, known: SlideContent
) -> SlideKeys:
    """Hash a slide, unless `known` shows that its files are unchanged since they were hashed.

    Raises:
        SlideError: a file is missing or cannot be read.
    """
    files = file_fingerprint(source.path)
    content = known if known.files == files else SlideContent(slide_sha256(source.path), files)
    encoder = contract.tile_encoder
    tile = {**dataclasses.asdict(contract.tile), "max_batch": 0}  # however many are sent at a time
    mask = slide_sha256(source.mask) if source.mask else None
    order = contract.variant.order
    plan = _digest(content.sha256, tile, order, dataclasses.asdict(tiling), source.mpp, mask, __version__)
    head = [dataclasses.asdict(contract.tile_head)] if contract.tile_head else []
    tiles = _digest(plan, encoder.name, encoder.weights_sha256, contract.precision, *head)
    return SlideKeys(content, plan, tiles, _digest(tiles, contract.export_id))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
