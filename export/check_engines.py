"""Test the graphs without a GPU: TensorRT-RTX builds their engines for named compute capabilities."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from export.engines import profiles
from export.errors import ExportError
from export.repository import served_contract
from export.tensorrt_builder import Profile, build_engine
from gigapath_contract.schema import GRAPHS

CAPABILITIES = ("SM80", "SM89")


@dataclass(frozen=True)
class Check:
    """One engine that was built as a test and discarded."""

    model: str
    capability: str
    layers: int
    size_bytes: int
    seconds: float


def check_engines(
    repository: Path, *, max_tiles: int, max_masks: int, capabilities: tuple[str, ...] = CAPABILITIES
) -> Iterator[Check]:
    """Build the served version's graphs for each of `capabilities`.

    Raises:
        ExportError: nothing is exported, TensorRT-RTX is not installed, or a graph does not build.
    """
    contract = served_contract(repository)
    for model in GRAPHS:
        for capability in capabilities:
            shapes = profiles(model, contract, max_tiles, max_masks)
            yield check_engine(repository / model / str(contract.version) / "model.onnx", shapes, capability)


def check_engine(onnx_file: Path, shapes: list[Profile], capability: str) -> Check:
    """Build one engine in a separate process, since a crash of the builder ends its process."""
    began = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            layers, size = pool.submit(_build, onnx_file, shapes, capability).result()
        except BrokenProcessPool:
            raise ExportError(f"{onnx_file}: TensorRT-RTX's builder crashed for {capability}") from None
    return Check(onnx_file.parent.parent.name, capability, layers, size, time.monotonic() - began)


def _build(onnx_file: Path, shapes: list[Profile], capability: str) -> tuple[int, int]:
    try:
        trt = importlib.import_module("tensorrt_rtx_bindings")
    except ImportError:
        raise ExportError(
            "TensorRT-RTX is not installed: .venv/bin/uv pip install --group check-engines"
        ) from None
    engine = build_engine(trt, onnx_file, shapes, compute_capability=capability)
    return engine.layers, len(engine.plan)
