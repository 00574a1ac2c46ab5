"""TensorRT engines of the served version: `model.plan` next to `model.onnx`, and the configs that serve them.

An engine fits one kind of GPU, one version of TensorRT and one ONNX file. `model.plan.json` names them, and
an engine that does not match is refused.

`slide_occlusion` stays with ONNX Runtime: an engine would reserve memory for the most masks of the largest
slide at once, and compute every masked tile (`export.ways`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.configs import engine_config, read_config
from export.errors import ExportError
from export.repository import EXPORT_MODEL, exclusive, export_folder, serve, served_contract
from export.tensorrt_builder import Profile, build_engine, slide_profiles, tile_profiles
from gigapath_contract.files import atomic_path, file_sha256, parse_json, write_text
from gigapath_contract.schema import MODELS, Contract

ENGINES = ("tile_encoder", "slide_encoder")


@dataclass(frozen=True)
class EngineMetadata:
    """What an engine was built from and for, as `model.plan.json` keeps it."""

    gpu: str
    tensorrt: str
    onnx_sha256: str
    max_tiles: int
    tf32: bool = False

    def differences(self, other: EngineMetadata) -> str:
        """The fields in which `other` differs, in words; empty if none."""
        return ", ".join(
            f"{field.name} {getattr(self, field.name)} instead of {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def build_engines(
    repository: Path,
    *,
    max_tiles: int,
    progress: Callable[[str], None],
    tensorrt: str | None = None,
) -> dict[str, Path]:
    """Build the engines of `ENGINES` that are missing or stale on this machine's GPU; the file of each.

    Every model gets a `tensorrt.pbtxt`.

    Args:
        repository: the model repository; the version that it serves gets the engines.
        max_tiles: tiles of the largest slide that the engines accept.
        progress: called with a line for each step.
        tensorrt: TensorRT version of the server that will load the engines; None accepts the installed one.

    Raises:
        ExportError: no GPU, no `tensorrt` package or not the server's version, nothing exported, or a graph
            that does not build.
    """
    gpu = find_gpu()
    trt = import_tensorrt()
    check_version(trt.__version__, tensorrt)
    with exclusive(repository):
        contract = served_contract(repository)
        version = contract.version
        plans = {}
        for model in ENGINES:
            folder = repository / model / str(version)
            wanted = EngineMetadata(gpu, trt.__version__, onnx_digest(folder), max_tiles)
            plans[model] = folder / "model.plan"
            reason = stale_reason(plans[model], wanted)
            if reason is None:
                progress(f"{model}: the engine is up to date")
                continue
            progress(f"{model}: building ({reason})")
            cache = repository / EXPORT_MODEL / ".timing_cache"
            engine = build_engine(
                trt,
                folder / "model.onnx",
                profiles(model, contract, max_tiles),
                timing_cache=cache.read_bytes() if cache.exists() else b"",
            )
            # The metadata is removed first and written last: an engine without it counts as stale.
            metadata_file(plans[model]).unlink(missing_ok=True)
            with atomic_path(plans[model]) as part:
                part.write_bytes(engine.plan)
            write_text(metadata_file(plans[model]), json.dumps(dataclasses.asdict(wanted), indent=1) + "\n")
            with atomic_path(cache) as part:
                part.write_bytes(engine.timing_cache)
        write_configs(repository, version)
        serve(repository, version)
    return plans


def check_metadata(repository: Path, *, gpu: str, tensorrt: str) -> None:
    """Refuse the served version's engines unless they were built from its graphs for this GPU and TensorRT.

    Raises:
        ExportError: an engine is missing or differs; it and the difference are named.
    """
    version = served_contract(repository).version
    for model in ENGINES:
        plan = repository / model / str(version) / "model.plan"
        built = read_metadata(plan)
        if built is None:
            raise ExportError(f"{plan} or its {metadata_file(plan).name} is missing: run make engines")
        digest = onnx_digest(plan.parent)
        wanted = dataclasses.replace(built, gpu=gpu, tensorrt=tensorrt, onnx_sha256=digest, tf32=False)
        if difference := built.differences(wanted):
            raise ExportError(f"{plan} is stale ({difference}): run make engines")


def write_configs(repository: Path, version: int) -> None:
    """Write `tensorrt/<model>.pbtxt` of a version from its `onnxruntime/<model>.pbtxt`."""
    folder = export_folder(repository, version)
    for model in MODELS:
        config = read_config(folder / "onnxruntime" / f"{model}.pbtxt")
        profiles = 3 if model == "tile_encoder" else 1
        text = engine_config(config, profiles) if model in ENGINES else str(config)
        write_text(folder / "tensorrt" / f"{model}.pbtxt", text)


def profiles(model: str, contract: Contract, max_tiles: int, max_masks: int = 1) -> list[Profile]:
    """The optimisation profiles of one model's engine; `max_masks` counts for `slide_occlusion` alone."""
    if model == "tile_encoder":
        return tile_profiles(contract.tile.max_batch)
    width = contract.tile_encoder.embed_dim
    return slide_profiles(width, max_tiles, max_masks if model == "slide_occlusion" else None)


def stale_reason(plan: Path, wanted: EngineMetadata) -> str | None:
    """Why an engine has to be built, in words; None if it fits."""
    built = read_metadata(plan)
    if built is None:
        return "there is none"
    return built.differences(wanted) or None


def read_metadata(plan: Path) -> EngineMetadata | None:
    """The metadata of an engine; None if it or the engine is missing, or it has other fields."""
    try:
        metadata = EngineMetadata(**{"tf32": True, **parse_json(metadata_file(plan).read_bytes())})
    except (OSError, ValueError, TypeError):
        return None
    return metadata if plan.exists() else None


def metadata_file(plan: Path) -> Path:
    """`model.plan.json`."""
    return plan.with_name(f"{plan.name}.json")


def onnx_digest(folder: Path) -> str:
    """SHA-256 over a model's ONNX file and its external data."""
    digests = (bytes.fromhex(file_sha256(path)) for path in sorted(folder.glob("model.onnx*")))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def check_version(installed: str, server: str | None) -> None:
    """Refuse a TensorRT whose engines the server could not load.

    Args:
        installed: version of the `tensorrt` package.
        server: TensorRT version of the server; None accepts any.

    Raises:
        ExportError: the two differ.
    """
    if server is not None and installed != server:
        raise ExportError(
            f"the server loads engines of TensorRT {server} only, and {installed} is installed here: "
            f"pip install tensorrt=={server}"
        )


def find_gpu() -> str:
    """The first GPU's name and compute capability, such as `NVIDIA A100-SXM4-80GB, 8.0`.

    Raises:
        ExportError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ExportError(
            "no NVIDIA GPU here: run this on the machine that is to serve "
            "(make check-engines tests the graphs without one)"
        )
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, {gpu.major}.{gpu.minor}"


def import_tensorrt() -> Any:
    """The `tensorrt` package.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError:
        raise ExportError(
            "the tensorrt package is not installed: pip install tensorrt, in the version that Triton has"
        ) from None
