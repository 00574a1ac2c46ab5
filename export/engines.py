"""TensorRT engines of the served version: `model.plan` beside `model.onnx`, and the configs that serve them.

An engine fits one kind of GPU, one TensorRT and one ONNX file. A sidecar, `model.plan.json`, says which,
and an engine whose sidecar does not match is refused by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.configs import engine_config, read_config
from export.errors import ExportError
from export.repository import HOME, exclusive, home, read_contract, serve, served_version, write_text
from export.tensorrt_builder import Profile, build_engine, slide_profiles, tile_profiles
from gigapath_contract.schema import MODELS, Contract

GRAPHS = ("tile_encoder", "slide_encoder", "slide_occlusion")


@dataclass(frozen=True)
class Sidecar:
    """What an engine was built from and for."""

    gpu: str
    tensorrt: str
    onnx_sha256: str
    max_tiles: int
    max_masks: int

    def differences(self, other: Sidecar) -> str:
        """The fields in which `other` is something else, in words; empty if none."""
        return ", ".join(
            f"{field.name} {getattr(self, field.name)} instead of {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def build_engines(
    repository: Path,
    *,
    max_tiles: int,
    max_masks: int,
    progress: Callable[[str], None],
    tensorrt: str | None = None,
) -> dict[str, Path]:
    """Build what is missing or stale, on this machine's GPU, and write every model's `tensorrt.pbtxt`.

    `tensorrt` is the version of the server that is to load the engines.
    Raises:
        ExportError: no GPU, no `tensorrt` or another one than the server's, nothing exported, or a graph that
            does not build.
    """
    gpu = find_gpu()
    trt = import_tensorrt()
    check_version(trt.__version__, tensorrt)
    with exclusive(repository):
        version, contract = _served(repository)
        plans = {}
        for model in GRAPHS:
            folder = repository / model / str(version)
            wanted = Sidecar(gpu, trt.__version__, onnx_digest(folder), max_tiles, max_masks)
            plans[model] = folder / "model.plan"
            reason = stale(plans[model], wanted)
            if reason is None:
                progress(f"{model}: the engine is there already")
                continue
            progress(f"{model}: building ({reason})")
            cache = repository / HOME / ".timing_cache"
            engine = build_engine(
                trt,
                folder / "model.onnx",
                profiles(model, contract, max_tiles, max_masks),
                timing_cache=cache.read_bytes() if cache.exists() else b"",
            )
            # The sidecar goes first and comes last: a plan without one is stale.
            sidecar_file(plans[model]).unlink(missing_ok=True)
            plans[model].write_bytes(engine.plan)
            write_text(sidecar_file(plans[model]), json.dumps(dataclasses.asdict(wanted), indent=1) + "\n")
            cache.write_bytes(engine.timing_cache)
        write_configs(repository, version)
        serve(repository, version)
    return plans


def check_sidecars(repository: Path, *, gpu: str, tensorrt: str) -> None:
    """Refuse the served version's engines unless they were built from its graphs for this GPU and TensorRT.

    Raises:
        ExportError: it names the engine and what is different.
    """
    version, _ = _served(repository)
    for model in GRAPHS:
        plan = repository / model / str(version) / "model.plan"
        built = read_sidecar(plan)
        if built is None:
            raise ExportError(f"{plan} is missing or has no sidecar: run make engines")
        wanted = dataclasses.replace(built, gpu=gpu, tensorrt=tensorrt, onnx_sha256=onnx_digest(plan.parent))
        if difference := built.differences(wanted):
            raise ExportError(f"{plan} is stale ({difference}): run make engines")


def write_configs(repository: Path, version: int) -> None:
    """Write `tensorrt/<model>.pbtxt` of a version from its served configs."""
    folder = home(repository, version)
    for model in MODELS:
        served = read_config(folder / "onnxruntime" / f"{model}.pbtxt")
        profiles = 3 if model == "tile_encoder" else 1
        text = engine_config(served, profiles) if model in GRAPHS else str(served)
        write_text(folder / "tensorrt" / f"{model}.pbtxt", text)


def profiles(model: str, contract: Contract, max_tiles: int, max_masks: int) -> list[Profile]:
    """The optimisation profiles of one model's engine."""
    if model == "tile_encoder":
        return tile_profiles()
    width = contract.tile_encoder.embed_dim
    return slide_profiles(width, max_tiles, max_masks if model == "slide_occlusion" else None)


def stale(plan: Path, wanted: Sidecar) -> str | None:
    """Why an engine has to be built, in words; None if it fits."""
    built = read_sidecar(plan)
    if built is None:
        return "there is none"
    return built.differences(wanted) or None


def read_sidecar(plan: Path) -> Sidecar | None:
    """The sidecar of an engine that is there; None if either is missing or the sidecar is of another form."""
    try:
        sidecar = Sidecar(**json.loads(sidecar_file(plan).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return sidecar if plan.exists() else None


def sidecar_file(plan: Path) -> Path:
    """`model.plan.json`."""
    return plan.with_name(f"{plan.name}.json")


def onnx_digest(folder: Path) -> str:
    """SHA-256 over a model's ONNX file and its external data."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model.onnx*")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_version(installed: str, server: str | None) -> None:
    """Refuse a TensorRT whose engines the server, of version `server`, could not load.

    Raises:
        ExportError
    """
    if server is not None and installed != server:
        raise ExportError(
            f"the server loads engines of TensorRT {server} only, and {installed} is installed here: "
            f"pip install tensorrt=={server}"
        )


def find_gpu() -> str:
    """The first GPU's name and compute capability, as the driver tells them.

    Raises:
        ExportError: there is none.
    """
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        answer = ""
    if not answer:
        raise ExportError(
            "no NVIDIA GPU here: run this on the machine that is to serve "
            "(make check-engines proves the graphs without one)"
        )
    return answer.splitlines()[0]


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


def _served(repository: Path) -> tuple[int, Contract]:
    version = served_version(repository)
    if version is None:
        raise ExportError(f"nothing is exported into {repository}: run make export")
    return version, read_contract(repository, version)
