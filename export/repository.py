"""The model repository: versions are installed, served, listed and removed here.

An export is one version number V in all four models' folders. The ensemble has no model file, so its version
folder holds what belongs to the export as a whole:

    slide_pipeline/<V>/{contract.json, inputs.json, parity.json, reference.npz, onnxruntime/<model>.pbtxt}
    slide_pipeline/configs/current -> ../<V>
    <model>/configs/onnxruntime.pbtxt -> ../../slide_pipeline/configs/current/onnxruntime/<model>.pbtxt

Triton reads `<model>/configs/onnxruntime.pbtxt` (`--model-config-name=onnxruntime`), which names version V
alone. All four models change over in one `rename` of the link `current`; until then a new version is
installed but not served.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.configs import read_config, served_config
from export.errors import ExportError
from gigapath_contract.files import flush, locked, parse_json, write_text
from gigapath_contract.schema import MODELS, Contract

EXPORT_MODEL = "slide_pipeline"
"""The model whose version folders hold what belongs to an export as a whole."""
CONTRACT, INPUTS = "contract.json", "inputs.json"
VARIANTS = ("onnxruntime", "tensorrt")
"""The configurations of a version: for ONNX Runtime, and for the engines built from it (`export.engines`)."""


@dataclass(frozen=True)
class Version:
    """One installed export; `served` marks the one that Triton serves."""

    number: int
    served: bool
    contract: Contract
    size_bytes: int


def copy_configs(source: Path, destination: Path) -> None:
    """Copy the committed configs of `source` into `destination`, without what an export wrote or linked."""
    for model in MODELS:
        read_config(source / model / "config.pbtxt")
        for path in [source / model / "config.pbtxt", *(source / model / "configs").glob("*.pbtxt")]:
            if path.stem not in VARIANTS and not path.is_symlink():
                write_text(destination / path.relative_to(source), path.read_text())


def list_versions(repository: Path) -> list[Version]:
    """The installed exports, oldest first.

    Raises:
        ExportError: the folder is no model repository, or the contract of a version cannot be read.
    """
    _check_repository(repository)
    current = served_version(repository)
    versions = []
    for number in _installed(repository):
        folders = [repository / model / str(number) for model in MODELS]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        versions.append(Version(number, number == current, read_contract(repository, number), size))
    return versions


def served_version(repository: Path) -> int | None:
    """The version that the link `current` points at; None before the first export."""
    path = _current_link(repository) / CONTRACT
    return _parse(path).version if path.exists() else None


def served_contract(repository: Path) -> Contract:
    """The contract of the version that is served.

    Raises:
        ExportError: nothing is exported, or its contract cannot be read.
    """
    version = served_version(repository)
    if version is None:
        raise ExportError(f"nothing is exported into {repository}: run make export")
    return read_contract(repository, version)


def read_contract(repository: Path, number: int) -> Contract:
    """The contract of an installed version.

    Raises:
        ExportError: its file cannot be read as a contract.
    """
    return _parse(export_folder(repository, number) / CONTRACT)


def remove_version(repository: Path, number: int) -> None:
    """Remove one installed export.

    Raises:
        ExportError: it is being served, or it is not installed.
    """
    with exclusive(repository):
        if number == served_version(repository):
            raise ExportError(
                f"version {number} is the one being served: export again, or serve another one first "
                "(python -m export serve VERSION)"
            )
        _check_installed(repository, number)
        _remove_folders(repository, number)


def serve_version(repository: Path, number: int) -> Contract:
    """Serve another installed export from Triton's next start on; its contract.

    Raises:
        ExportError: the version is not installed, or a file of it is missing or cut short. What was served
            before still is.
    """
    with exclusive(repository):
        _check_installed(repository, number)
        if damaged := _damaged_file(repository, number):
            raise ExportError(f"version {number} is damaged ({damaged}): export the model again")
        serve(repository, number)
        return read_contract(repository, number)


@contextmanager
def exclusive(repository: Path) -> Iterator[None]:
    """Lock the repository against other exports and remove what a killed one left behind.

    Raises:
        ExportError: another process holds the lock, or the folder is no model repository.
    """
    _check_repository(repository)
    busy = ExportError(f"another export is writing to {repository}: wait for it to end")
    with locked(repository / EXPORT_MODEL / ".lock", busy):
        _sweep(repository)
        yield


def next_version(repository: Path) -> int:
    """One more than any version folder of any model, so that no number is given twice."""
    return 1 + max((number for model in MODELS for number in _numbers(repository / model)), default=0)


def new_staging(repository: Path) -> Path:
    """An empty folder with a subfolder per model, on the versions' file system, for an export to write to."""
    staging = _staging(repository)
    shutil.rmtree(staging, ignore_errors=True)
    for model in MODELS:
        (staging / model).mkdir(parents=True)
    return staging


def install(repository: Path, staging: Path, contract: Contract, key: str) -> None:
    """Move a finished staging folder into place as `contract.version`, not served yet.

    Call inside `exclusive`, and `serve` after it.
    """
    (staging / EXPORT_MODEL / CONTRACT).write_text(contract.to_json() + "\n")
    files = [
        (path.parent.name, path.name, path.stat().st_size)
        for path in sorted(staging.rglob("*"))
        if path.is_file() and path.parent.name in MODELS
    ]
    inputs = {"keys": [key], "export_id": contract.export_id, "files": files}
    (staging / EXPORT_MODEL / INPUTS).write_text(json.dumps(inputs) + "\n")
    for path in staging.rglob("*"):
        if path.is_file():
            flush(path)
        # Another user runs the server; `onnx` writes its data files for the owner alone.
        path.chmod(0o755 if path.is_dir() else 0o644)
    for model in (EXPORT_MODEL, *(model for model in MODELS if model != EXPORT_MODEL)):
        (repository / model).mkdir(exist_ok=True)
        (staging / model).rename(repository / model / str(contract.version))
    staging.rmdir()


def find_version(repository: Path, *, key: str | None = None, export_id: str | None = None) -> int | None:
    """The newest undamaged version that was made from the input `key` or is the export `export_id`."""
    for number in reversed(_installed(repository)):
        inputs = _read_inputs(repository, number)
        same = key in inputs["keys"] or (export_id is not None and inputs.get("export_id") == export_id)
        if same and _damaged_file(repository, number) is None:
            return number
    return None


def add_key(repository: Path, number: int, key: str) -> None:
    """Note that the input `key` makes version `number` as well."""
    inputs = _read_inputs(repository, number)
    inputs["keys"].append(key)
    write_text(export_folder(repository, number) / INPUTS, json.dumps(inputs) + "\n")


def serve(repository: Path, number: int) -> None:
    """Point the link `current` at an installed version. Call inside `exclusive`.

    Killed at any moment, either the version served before or this one is served, in all four models. A
    running Triton takes it up when it is restarted.
    """
    folder = export_folder(repository, number)
    contract = read_contract(repository, number)
    for model in MODELS:
        config = served_config(read_config(repository / model / "config.pbtxt"), contract)
        write_text(folder / "onnxruntime" / f"{model}.pbtxt", config)
    variants = [variant for variant in VARIANTS if (folder / variant).exists()]
    for model in MODELS:
        for variant in variants:
            link = repository / model / "configs" / f"{variant}.pbtxt"
            _link(link, f"../../{EXPORT_MODEL}/configs/current/{variant}/{model}.pbtxt")
    _link(_current_link(repository), f"../{number}")
    for model in MODELS:
        for variant in set(VARIANTS) - set(variants):
            (repository / model / "configs" / f"{variant}.pbtxt").unlink(missing_ok=True)


def export_folder(repository: Path, number: int) -> Path:
    """The folder of what belongs to version `number` as a whole."""
    return repository / EXPORT_MODEL / str(number)


def _parse(path: Path) -> Contract:
    try:
        return Contract.parse(path.read_text())
    except ValueError as error:  # a ContractError, or not UTF-8
        folder = path.parent.resolve()  # the version, where `current` was followed
        raise ExportError(f"{folder / path.name}: {error}; delete {folder} and export again") from error


def _read_inputs(repository: Path, number: int) -> dict[str, Any]:
    inputs: dict[str, Any] = parse_json((export_folder(repository, number) / INPUTS).read_bytes())
    return inputs


def _damaged_file(repository: Path, number: int) -> str | None:
    """What is wrong with the first file that is missing or not of the size installed; None if none is."""
    for model, name, size in _read_inputs(repository, number)["files"]:
        path = repository / model / str(number) / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
    return None


def _check_repository(repository: Path) -> None:
    if not (repository / EXPORT_MODEL).is_dir():
        raise ExportError(
            f"{repository} is no model repository (it has no folder {EXPORT_MODEL}): "
            "a repository starts from the committed configs of model_repository/"
        )


def _check_installed(repository: Path, number: int) -> None:
    installed = _installed(repository)
    if number not in installed:
        have = ", ".join(map(str, installed)) or "none"
        raise ExportError(f"there is no version {number} in {repository} (installed: {have})")


def _current_link(repository: Path) -> Path:
    return repository / EXPORT_MODEL / "configs" / "current"


def _staging(repository: Path) -> Path:
    return repository / EXPORT_MODEL / ".staging"


def _link(link: Path, target: str) -> None:
    """Make or replace a symbolic link in one step."""
    if link.is_symlink() and os.fspath(link.readlink()) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # the repository was copied with its links followed
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]


def _exports(repository: Path) -> list[int]:
    """The version numbers that an export made, in order; other version folders were made by hand."""
    numbers = sorted(_numbers(repository / EXPORT_MODEL))
    return [number for number in numbers if (export_folder(repository, number) / CONTRACT).exists()]


def _installed(repository: Path) -> list[int]:
    """Those with a folder in every model: a killed install or removal leaves some out until it is swept."""
    return [
        number
        for number in _exports(repository)
        if all((repository / model / str(number)).exists() for model in MODELS)
    ]


def _remove_folders(repository: Path, number: int) -> None:
    """Move away, then delete; the export's folder last, by which an interrupted removal is recognised."""
    staging = new_staging(repository)
    for model in (*(model for model in MODELS if model != EXPORT_MODEL), EXPORT_MODEL):
        folder = repository / model / str(number)
        if folder.exists():
            folder.rename(staging / model / str(number))
    shutil.rmtree(staging)


def _sweep(repository: Path) -> None:
    """Remove what a killed export or removal left: its staging folder, and versions that lack a folder."""
    shutil.rmtree(_staging(repository), ignore_errors=True)
    for number in set(_exports(repository)) - set(_installed(repository)):
        _remove_folders(repository, number)
