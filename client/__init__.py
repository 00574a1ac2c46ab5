"""From slides to embeddings, scores and occlusion attributions over gRPC; never imports torch.

The names of `__all__` are the public API; every other module may change. Scoring one slide::

    from pathlib import Path

    from gigapath_client import Connection, Endpoint, SlideSource, read_contract, score_slide

    with Connection(Endpoint("127.0.0.1:8001")) as connection:
        contract = read_contract(connection)
        scored = score_slide(SlideSource(Path("CMU-1-Small-Region.svs")), connection, contract)
    print(len(scored.plan), "tiles", scored.slide_embedding)
    if contract.head and scored.logits is not None:
        print(dict(zip(contract.head.classes, contract.head.probabilities(scored.logits))))

In a checkout the package is called `client`. Modules are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from gigapath_contract.schema import Contract

    from .attribution.attribute import Settings
    from .attribution.explain import Explanation, explain
    from .attribution.model.embedded import EmbeddedSlide, read_embedded
    from .attribution.model.served import ServedForward
    from .errors import (
        Cancelled,
        ClientError,
        ContractMismatch,
        DeadlineExceeded,
        ExportChanged,
        ManifestError,
        MaskError,
        MppError,
        NonFiniteAnswer,
        OutputError,
        PlanError,
        RequestRefused,
        ServerUnavailable,
        SlideError,
        SlideServerError,
    )
    from .outputs.hdf5 import StoredFeatures, read_features
    from .outputs.layout import find_features
    from .outputs.store import SingleFile, TridentFiles, score_to
    from .reading.stream import TileBatch, read_tiles
    from .scoring.embedding import Throughput
    from .scoring.score import ScoredSlide, SlideSource, TilingOptions, score_slide
    from .slides.address import slide_path
    from .slides.slide import Slide, open_slide
    from .slides.tiling import TilePlan, plan_tiles
    from .slides.tissue import TissueMask, mask_from_file, tissue_mask
    from .triton.connection import Connection
    from .triton.contract import read_contract
    from .triton.endpoint import Endpoint

__all__ = [
    "Cancelled",
    "ClientError",
    "Connection",
    "Contract",
    "ContractMismatch",
    "DeadlineExceeded",
    "EmbeddedSlide",
    "Endpoint",
    "Explanation",
    "ExportChanged",
    "ManifestError",
    "MaskError",
    "MppError",
    "NonFiniteAnswer",
    "OutputError",
    "PlanError",
    "RequestRefused",
    "ScoredSlide",
    "ServedForward",
    "ServerUnavailable",
    "Settings",
    "SingleFile",
    "Slide",
    "SlideError",
    "SlideServerError",
    "SlideSource",
    "StoredFeatures",
    "Throughput",
    "TileBatch",
    "TilePlan",
    "TilingOptions",
    "TissueMask",
    "TridentFiles",
    "explain",
    "find_features",
    "mask_from_file",
    "open_slide",
    "plan_tiles",
    "read_contract",
    "read_embedded",
    "read_features",
    "read_tiles",
    "score_slide",
    "score_to",
    "slide_path",
    "tissue_mask",
]

_MODULES = {
    "gigapath_contract.schema": ("Contract",),
    ".attribution.attribute": ("Settings",),
    ".attribution.explain": ("Explanation", "explain"),
    ".attribution.model.embedded": ("EmbeddedSlide", "read_embedded"),
    ".attribution.model.served": ("ServedForward",),
    ".errors": (
        *("Cancelled", "ClientError", "ContractMismatch", "DeadlineExceeded", "ExportChanged"),
        *("ManifestError", "MaskError", "MppError", "NonFiniteAnswer", "OutputError", "PlanError"),
        *("RequestRefused", "ServerUnavailable", "SlideError", "SlideServerError"),
    ),
    ".outputs.hdf5": ("StoredFeatures", "read_features"),
    ".outputs.layout": ("find_features",),
    ".outputs.store": ("SingleFile", "TridentFiles", "score_to"),
    ".reading.stream": ("TileBatch", "read_tiles"),
    ".scoring.embedding": ("Throughput",),
    ".scoring.score": ("ScoredSlide", "SlideSource", "TilingOptions", "score_slide"),
    ".slides.address": ("slide_path",),
    ".slides.slide": ("Slide", "open_slide"),
    ".slides.tiling": ("TilePlan", "plan_tiles"),
    ".slides.tissue": ("TissueMask", "mask_from_file", "tissue_mask"),
    ".triton.connection": ("Connection",),
    ".triton.contract": ("read_contract",),
    ".triton.endpoint": ("Endpoint",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
