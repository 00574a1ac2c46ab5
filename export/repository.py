"""The model repository: versions are installed, switched, listed and removed here.

An export is one version number V in all four models' folders. The ensemble has no model file, so its version
folder holds what belongs to the export as a whole:

    slide_pipeline/<V>/{contract.json, inputs.json, parity.json, reference.npz, onnxruntime/<model>.pbtxt}
    slide_pipeline/configs/current -> ../<V>                                  the one switch
    <model>/configs/onnxruntime.pbtxt -> ../../slide_pipeline/configs/current/onnxruntime/<model>.pbtxt

Triton reads `<model>/configs/onnxruntime.pbtxt` (`--model-config-name=onnxruntime`), which names version V
alone. All four models change over in one `rename` of the switch; until then a new version's folders lie
there, unserved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.configs import read_config, served_config
from export.errors import ExportError
from gigapath_contract.errors import ContractError
from gigapath_contract.schema import MODELS, Contract

HOME = "slide_pipeline"
CONTRACT, INPUTS = "contract.json", "inputs.json"
VARIANTS = ("onnxruntime", "tensorrt")
"""The configs that a version brings: for ONNX Runtime, and for the engines built from it
(`export.engines`).
"""


@dataclass(frozen=True)
class Version:
    """One installed export; `served` marks the one that Triton serves."""

    number: int
    served: bool
    export_id: str
    preset: str
    precision: str
    trained: bool
    size_bytes: int


def copy_configs(source: Path, destination: Path) -> None:
    """Copy the committed configs (nothing that an export wrote) of `source` into `destination`."""
    for model in MODELS:
        read_config(source / model / "config.pbtxt")
        for path in [source / model / "config.pbtxt", *(source / model / "configs").glob("*.pbtxt")]:
            if path.stem not in VARIANTS:
                target = destination / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def list_versions(repository: Path) -> list[Version]:
    """The installed exports, oldest first."""
    current = served_version(repository)
    versions = []
    for number in sorted(_exports(repository)):
        folders = [repository / model / str(number) for model in MODELS]
        if not all(folder.exists() for folder in folders):
            continue  # cut short by a kill: swept at the next export
        contract = read_contract(repository, number)
        versions.append(
            Version(
                number=number,
                served=number == current,
                export_id=contract.export_id,
                preset=contract.preset,
                precision=contract.precision,
                trained=contract.trained,
                size_bytes=sum(
                    p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file()
                ),
            )
        )
    return versions


def served_version(repository: Path) -> int | None:
    """The version that the switch points at; None before the first export."""
    path = _switch(repository) / CONTRACT
    return _parse(path).version if path.exists() else None


def read_contract(repository: Path, number: int) -> Contract:
    """The contract of an installed version.

    Raises:
        ExportError: its file cannot be read as a contract.
    """
    return _parse(home(repository, number) / CONTRACT)


def remove_version(repository: Path, number: int) -> None:
    """Remove one installed export.

    Raises:
        ExportError: it is being served, or it is not there.
    """
    with exclusive(repository):
        if number == served_version(repository):
            raise ExportError(
                f"version {number} is the one being served: export or switch to another one first"
            )
        if number not in _exports(repository):
            have = ", ".join(str(version.number) for version in list_versions(repository)) or "none"
            raise ExportError(f"there is no version {number} in {repository} (installed: {have})")
        _remove_folders(repository, number)


@contextmanager
def exclusive(repository: Path) -> Iterator[None]:
    """Hold the repository against another export; what a killed one left behind is swept away.

    Raises:
        ExportError: another export or removal holds it.
    """
    (repository / HOME).mkdir(parents=True, exist_ok=True)
    with (repository / HOME / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"another export is writing to {repository}: wait for it to end") from None
        _sweep(repository)
        yield


def next_version(repository: Path) -> int:
    """One more than any version folder of any model, so that a number is never used twice at a time."""
    return 1 + max((number for model in MODELS for number in _numbers(repository / model)), default=0)


def new_stage(repository: Path) -> Path:
    """An empty folder on the versions' file system for an export to write into, one folder a model."""
    stage = repository / HOME / ".stage"
    shutil.rmtree(stage, ignore_errors=True)
    for model in MODELS:
        (stage / model).mkdir(parents=True)
    return stage


def install(repository: Path, stage: Path, contract: Contract, key: str) -> None:
    """Move a finished stage into place as `contract.version`. Call inside `exclusive`, and `serve` after.

    Killed at any moment, the version served before is served still: the switch comes last, in one step.
    """
    (stage / HOME / CONTRACT).write_text(contract.to_json() + "\n")
    files = [
        (path.parent.name, path.name, path.stat().st_size)
        for path in sorted(stage.rglob("*"))
        if path.is_file() and path.parent.name in MODELS
    ]
    (stage / HOME / INPUTS).write_text(json.dumps({"keys": [key], "files": files}) + "\n")
    for path in stage.rglob("*"):
        # Another user runs the server; `onnx` writes its data files for the owner alone.
        path.chmod(0o755 if path.is_dir() else 0o644)
    for model in (HOME, *(model for model in MODELS if model != HOME)):
        (repository / model).mkdir(exist_ok=True)
        (stage / model).rename(repository / model / str(contract.version))
    stage.rmdir()


def find(repository: Path, *, key: str | None = None, export_id: str | None = None) -> int | None:
    """The installed version, complete, that was made from the input `key` or is the export `export_id`."""
    for version in reversed(list_versions(repository)):
        inputs = json.loads((home(repository, version.number) / INPUTS).read_text())
        if key in inputs["keys"] or version.export_id == export_id:
            folders = {model: repository / model / str(version.number) for model in MODELS}
            paths = {folders[model] / name: size for model, name, size in inputs["files"]}
            if all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
                return version.number
    return None


def note_key(repository: Path, number: int, key: str) -> None:
    """Remember that the input `key` makes version `number` too."""
    path = home(repository, number) / INPUTS
    inputs = json.loads(path.read_text())
    inputs["keys"].append(key)
    write_text(path, json.dumps(inputs) + "\n")


def serve(repository: Path, number: int) -> None:
    """Point the switch at an installed version (a running Triton takes it up when it is restarted).

    Raises:
        ExportError: the version is not there.
    """
    if not (home(repository, number) / CONTRACT).exists():
        raise ExportError(f"there is no version {number} in {repository}")
    _write_served(repository, number)
    variants = [variant for variant in VARIANTS if (home(repository, number) / variant).exists()]
    for model in MODELS:
        for variant in variants:
            link = repository / model / "configs" / f"{variant}.pbtxt"
            _link(link, f"../../{HOME}/configs/current/{variant}/{model}.pbtxt")
    _link(_switch(repository), f"../{number}")
    for model in MODELS:
        for variant in set(VARIANTS) - set(variants):
            (repository / model / "configs" / f"{variant}.pbtxt").unlink(missing_ok=True)


def home(repository: Path, number: int) -> Path:
    """The folder of what belongs to version `number` as a whole."""
    return repository / HOME / str(number)


def _parse(path: Path) -> Contract:
    try:
        return Contract.parse(path.read_text())
    except ContractError as error:
        raise ExportError(f"{path}: {error}") from error


def _write_served(repository: Path, number: int) -> None:
    """Write `onnxruntime/<model>.pbtxt` of a version from the repository's committed configs."""
    contract = read_contract(repository, number)
    for model in MODELS:
        config = served_config(read_config(repository / model / "config.pbtxt"), contract)
        write_text(home(repository, number) / "onnxruntime" / f"{model}.pbtxt", config)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _switch(repository: Path) -> Path:
    return repository / HOME / "configs" / "current"


def _link(link: Path, target: str) -> None:
    """Make or replace a symbolic link in one step."""
    if link.is_symlink() and os.fspath(link.readlink()) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # the repository was copied by something that knows no links
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]


def _exports(repository: Path) -> list[int]:
    """The version numbers that an export made; folders laid by hand are none of ours."""
    return [n for n in _numbers(repository / HOME) if (home(repository, n) / CONTRACT).exists()]


def _remove_folders(repository: Path, number: int) -> None:
    """Move away, then delete; the export's own folder last: a removal cut short is still known as one."""
    stage = new_stage(repository)
    for model in (*(model for model in MODELS if model != HOME), HOME):
        folder = repository / model / str(number)
        if folder.exists():
            folder.rename(stage / model / str(number))
    shutil.rmtree(stage)


def _sweep(repository: Path) -> None:
    """Remove what a killed export or removal left: its stage, and versions that lack a folder."""
    shutil.rmtree(repository / HOME / ".stage", ignore_errors=True)
    for number in _exports(repository):
        if not all((repository / model / str(number)).exists() for model in MODELS):
            _remove_folders(repository, number)
