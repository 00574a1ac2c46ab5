"""Build one engine: with `tensorrt` on the GPU that will serve it, or with TensorRT-RTX for a named one.

The two packages have the same API, so `make check-engines` tests on a CPU the code that `make engines` runs
on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from export.errors import ExportError
from export.plain import expanded

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Shapes]
"""Minimum, optimum and maximum shape of each input, as TensorRT's optimisation profiles name them."""


@dataclass(frozen=True)
class SerializedEngine:
    """An engine's bytes, the number of layers of its parsed graph, and the updated timing cache."""

    plan: bytes
    layers: int
    timing_cache: bytes


def tile_profiles(max_batch: int) -> list[Profile]:
    """Profiles for 1, up to half of and up to `max_batch` tiles; Triton picks the best for each batch.

    The first admits 2 tiles: TensorRT-RTX 1.7 crashes on a single query of a single tile in fixed shapes.
    """
    shape = (224, 224, 3)
    return [
        {"TILES": ((1, *shape), (n, *shape), (max(n, 2), *shape))} for n in (1, max_batch // 2, max_batch)
    ]


def slide_profiles(embed_dim: int, max_tiles: int, masks: int | None = None) -> list[Profile]:
    """One profile for 1 to `max_tiles` tiles and, for occlusion, 1 to `masks` masks."""
    sizes = (1, min(5000, max_tiles), max_tiles)
    profile: Profile = {
        "EMBEDDINGS": tuple((n, embed_dim) for n in sizes),  # type: ignore[dict-item]
        "COORDS": tuple((n, 2) for n in sizes),  # type: ignore[dict-item]
    }
    if masks is not None:
        profile["KEEP"] = tuple(zip((1, min(4, masks), masks), sizes, strict=True))  # type: ignore[assignment]
    return [profile]


def build_engine(
    trt: Any,
    onnx_file: Path,
    profiles: list[Profile],
    *,
    compute_capability: str | None = None,
    timing_cache: bytes = b"",
) -> SerializedEngine:
    """Parse an ONNX file and build a strongly typed engine.

    Args:
        trt: the package, `tensorrt` or `tensorrt_rtx_bindings`.
        onnx_file: the graph, in a folder with its external data.
        profiles: one or more optimisation profiles.
        compute_capability: a name such as `SM80`, for TensorRT-RTX; None builds for this machine's GPU.
        timing_cache: the timing cache of an earlier build.

    Raises:
        ExportError: the graph does not parse or build; the message has the builder's first error.
    """
    errors: list[str] = []
    logger = _logger(trt, errors)
    builder = trt.Builder(logger)
    # From TensorRT 11 on networks are strongly typed anyway and the flag is gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_plain(onnx_file), str(onnx_file)):
        raise ExportError(f"{onnx_file} does not parse: {_first(errors)}")

    config = exact_config(trt, builder)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[compute_capability], 0)
    cache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{onnx_file} does not build: {_first(errors)}")
    return SerializedEngine(bytes(plan), network.num_layers, bytes(config.get_timing_cache().serialize()))


def exact_config(trt: Any, builder: Any) -> Any:
    """A builder configuration that keeps float32 exact: without TF32, which TensorRT allows by default.

    NaN stays NaN too: it marks a tile outside the position grid.
    """
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.STRICT_NANS)
    return config


def _plain(onnx_file: Path) -> bytes:
    """The graph in operators that TensorRT knows; weights outside the file stay there."""
    try:
        model = onnx.load(onnx_file, load_external_data=False)
    except DecodeError:
        raise ExportError(f"{onnx_file} does not parse: it is no ONNX model") from None
    graph: bytes = expanded(model).SerializeToString()
    return graph


def _first(errors: list[str]) -> str:
    # Without a GPU the first error is about the CUDA driver; ignore it.
    relevant = [error for error in errors if "CUDA driver" not in error]
    return relevant[0].splitlines()[0] if relevant else "it gave no reason"


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger that appends errors to `errors` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Logger()
