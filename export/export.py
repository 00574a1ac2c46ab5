"""One export from start to end: build, compare, install; or find that it is installed already."""

from __future__ import annotations

import importlib.metadata
import logging
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export import repository as repo
from export.errors import ExportError
from export.fingerprint import HUB, LIBRARIES, ROOT, input_key
from export.parity import GATES, ParityError, Report
from export.target import CPU, Target, on_gpu
from training.runs.placement import warn_misplaced

if TYPE_CHECKING:
    from training.models.build import Models

DEFAULT_SLIDE = ROOT / "build" / "CMU-1-Small-Region.svs"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """The version now served, its folder (contract, parity report, reference), and how it came about.

    `report` is None where nothing had to be built.
    """

    version: int
    folder: Path
    contract: str
    report: Report | None
    seconds: float
    peak_memory_bytes: int


def export_preset(
    preset: str | None = None,
    *,
    repository: Path,
    slide: Path | None = None,
    precision: str = "fp32",
    weights: str | None = None,
    checkpoints: Sequence[Path] = (),
    occlusion_precision: str = "fp32",
    gpu_memory: int | None = None,
    patch_tokens: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> ExportResult:
    """Export a preset's models into `repository` as its next version, served from Triton's next start on.

    Args:
        preset: `demo`, `gigapath-flash` or `gigapath`; None is the checkpoints', or else `demo`.
        repository: a folder that holds the committed `config.pbtxt` of the four models.
        slide: the real slide that the parity report takes its tiles from; None is the quick start's.
        precision: `fp32`, `fp16` or `fp16-mixed` (`export.precision`).
        weights: a folder with `pytorch_model.bin` and `slide_encoder.pth`, or `hf-hub:OWNER/REPOSITORY`; None
            is the preset's own. What a checkpoint brings is taken from there.
        checkpoints: the folder of a run of `finetune`, which brings slide encoder, head and variant; of one
            of `tiles`, which brings the tile encoder and its head; or of both.
        occlusion_precision: that of `slide_occlusion`: single tiles' effects drown in half precision.
        gpu_memory: GiB of the GPU that is to serve (`export.target`); None is a CPU.
        patch_tokens: add PATCH_TOKENS to the outputs of `tile_encoder`.
        progress: called with a line for each step.

    Raises:
        ExportError: nothing was installed, and the version served before still is (a ParityError: the graphs
            don't return what PyTorch returns).
        TrainingError: weights or a checkpoint that can't be had or don't fit.
    """
    began = time.monotonic()
    for name in (precision, occlusion_precision):
        if name not in GATES:
            raise ExportError(f"no precision {name!r}: choose {' or '.join(GATES)}")
    if weights is not None and not weights.startswith(HUB) and not Path(weights).is_dir():
        raise ExportError(
            f"no folder {weights}: give one with pytorch_model.bin and slide_encoder.pth, "
            f"or {HUB}OWNER/REPOSITORY"
        )
    if slide is not None and not slide.is_file():
        raise ExportError(f"{slide} cannot be read: no such file; give another slide with --slide")
    slide = slide or DEFAULT_SLIDE
    for checkpoint in checkpoints:
        warn_misplaced(checkpoint)
    with repo.exclusive(repository):
        key = input_key(
            preset, precision, occlusion_precision, weights, checkpoints, gpu_memory, patch_tokens
        )
        version, report = repo.find_version(repository, key=key), None
        if version is None:
            progress("building the model")
            models = choose_models(preset, weights, checkpoints)
            target = CPU if gpu_memory is None else on_gpu(gpu_memory)
            version, report = _build(
                repository, models, key, slide, precision, occlusion_precision, target, patch_tokens, progress
            )
        repo.serve(repository, version)
    folder = repo.export_folder(repository, version)
    return ExportResult(
        version=version,
        folder=folder,
        contract=(folder / repo.CONTRACT).read_text(),
        report=report,
        seconds=time.monotonic() - began,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _build(
    repository: Path,
    models: Models,
    key: str,
    slide: Path,
    precision: str,
    occlusion_precision: str,
    target: Target,
    patch_tokens: bool,
    progress: Callable[[str], None],
) -> tuple[int, Report]:
    """Build into a staging folder and install it, unless a version with the same content is installed."""
    from export.build_graphs import build  # it imports PyTorch

    staging = repo.new_staging(repository)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    number = repo.next_version(repository)
    contract, report = build(
        models,
        staging,
        slide=slide,
        precision=precision,
        occlusion_precision=occlusion_precision,
        target=target,
        patch_tokens=patch_tokens,
        version=number,
        versions=versions,
        progress=progress,
    )
    overflow = report.overflow()
    if overflow and not report.passed:
        raise ParityError(
            f"{overflow.model}: {overflow.name} (layer {overflow.layer or overflow.name}) reaches "
            f"{overflow.largest:.2g} and float16 ends at 65,504: choose another precision; "
            "nothing was installed",
            report,
        )
    if not report.passed:
        worst = report.worst()
        remedy = (
            ": choose --precision fp16-mixed" if precision == "fp16" and worst.model == "tile_encoder" else ""
        )
        raise ParityError(
            f"{worst.model}, {worst.case}: {worst.output} differs from PyTorch by {worst.max_abs:.2g} "
            f"({worst.max_relative:.1%} of its scale, cosine {worst.min_cosine:.6f}): nothing was installed"
            f"{remedy}",
            report,
        )
    known = repo.find_version(repository, export_id=contract.export_id)
    if known is None:
        repo.install(repository, staging, contract, key)
        return number, report
    repo.add_key(repository, known, key)
    return known, report


def choose_models(preset: str | None, weights: str | None, checkpoints: Sequence[Path] = ()) -> Models:
    """The models that `export_preset` exports for these arguments; the same errors."""
    from training.models.build import build_models
    from training.runs.checkpoint import is_tile_run, load_run, load_tile_run

    hub = weights is not None and weights.startswith(HUB)
    tile = weights if weights is None or hub else str(Path(weights) / "pytorch_model.bin")
    slide = weights if weights is None or hub else str(Path(weights) / "slide_encoder.pth")
    if not checkpoints:
        return build_models(preset or "demo", tile, slide)
    tile_runs = [folder for folder in checkpoints if is_tile_run(folder)]
    slide_runs = [folder for folder in checkpoints if folder not in tile_runs]
    if max(len(tile_runs), len(slide_runs)) > 1:
        raise ExportError(
            f"several checkpoints of one kind ({', '.join(map(str, checkpoints))}): give one run of "
            "`finetune`, one of `tiles`, or one of each"
        )
    if not tile_runs:
        models = load_run(slide_runs[0], tile)
    elif slide_runs:
        models = load_tile_run(tile_runs[0], slide_run=slide_runs[0])
    else:
        models = load_tile_run(tile_runs[0], slide)
    if preset not in (None, models.preset.name):
        raise ExportError(
            f"{checkpoints[0]} was fine-tuned from {models.preset.name}, not {preset}: leave the preset out"
        )
    return models
