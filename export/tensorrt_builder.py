"""Building one engine, with `tensorrt` on the GPU that will serve it or with TensorRT-RTX for a named one.

The two packages have one API, so the code that `make engines` runs on a GPU is the code that `make
check-engines` proves on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Shapes]
"""Smallest, usual and largest shape of each input."""


@dataclass(frozen=True)
class Engine:
    """A serialized engine, the number of layers it was parsed into, and the timing cache as it is now."""

    plan: bytes
    layers: int
    timing_cache: bytes


def tile_profiles() -> list[Profile]:
    """For 1, up to 32 and up to 64 tiles; Triton takes the one that fits a batch best."""
    shape = (224, 224, 3)
    return [{"TILES": ((1, *shape), (n, *shape), (n, *shape))} for n in (1, 32, 64)]


def slide_profiles(embed_dim: int, max_tiles: int, masks: int | None = None) -> list[Profile]:
    """For 1 to `max_tiles` tiles and, for occlusion, 1 to `masks` masks."""
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
) -> Engine:
    """Parse an ONNX file and build a strongly typed engine.

    Args:
        trt: the package, `tensorrt` or `tensorrt_rtx_bindings`.
        onnx_file: with its external data beside it.
        profiles: one or more.
        compute_capability: `SM80` and so on, with TensorRT-RTX; None is the GPU at hand.
        timing_cache: what an earlier build left.

    Raises:
        ExportError: it does not parse or build; the builder's first complaint is in the message.
    """
    errors: list[str] = []
    logger = _logger(trt, errors)
    builder = trt.Builder(logger)
    # From TensorRT 11 on networks are strongly typed anyway and the flag is gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise ExportError(f"{onnx_file} does not parse: {_first(errors)}")

    config = builder.create_builder_config()
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
    return Engine(bytes(plan), network.num_layers, bytes(config.get_timing_cache().serialize()))


def _first(errors: list[str]) -> str:
    # A machine without a GPU complains about that first, and then does what it is asked to.
    told = [error for error in errors if "CUDA driver" not in error]
    return told[0].splitlines()[0] if told else "it gave no reason"


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps errors and says nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Logger()
