"""The wheel, installed into an environment without the checkout: its content, and that it scores a slide."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sysconfig.get_path("scripts"), "uv")
SOURCES = ("client", "gigapath_contract", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, in `cwd` and without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, since a build takes up files that earlier ones left behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    offline = ("--offline", "--no-build-isolation", "--python", sys.executable)
    run(UV, "build", "--wheel", *offline, "--out-dir", built, cwd=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and, as links, the packages that requirements/client.txt locks."""
    folder = tmp_path_factory.mktemp("installed")
    run(UV, "venv", "-q", "--python", sys.executable, folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(UV, "pip", "install", "-q", "--offline", "--no-deps", "--python", python, wheel, cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    locked = (ROOT / "requirements" / "client.txt").read_text()
    for name in re.findall(r"^([\w.-]+)==", locked, re.MULTILINE):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # locked for another platform
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(str(distribution.locate_file(entry)))
    return folder / "venv"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_module_of_the_client_and_the_contract_and_nothing_else(wheel: Path) -> None:
    expected = {
        Path(installed_as, path.relative_to(ROOT / folder)).as_posix()
        for folder, installed_as in {
            "client": "gigapath_client",
            "gigapath_contract": "gigapath_contract",
        }.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"gigapath_client/py.typed", "gigapath_contract/py.typed"} <= names


def test_the_metadata_name_licence_python_and_only_what_the_wheel_uses(
    wheel: Path, metadata: Message
) -> None:
    assert metadata["Name"] == "gigapath-triton"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    extras = sorted(metadata.get_all("Provides-Extra", ()))
    assert extras == ["benchmark", "czi", "dicomweb", "ray", "remote", "torch", "view"]
    required = {re.split(r"[\[<>=;]", line)[0] for line in metadata.get_all("Requires-Dist", ())}
    assert not required & {"timm", "lightning", "onnx", "tensorrt", "pytest"}
    licences = {
        Path(name).name: zipfile.ZipFile(wheel).read(name)
        for name in zipfile.ZipFile(wheel).namelist()
        if ".dist-info/licenses/" in name
    }
    assert licences == {name: (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")}


def test_neither_the_checkout_nor_its_module_names_are_visible_where_it_is_installed(
    installed: Path, tmp_path: Path
) -> None:
    ours, absent = (
        ("gigapath_client", "gigapath_contract"),
        ("client", "training", "export", "server", "torch"),
    )
    code = f"from importlib.util import find_spec; print([n for n in {ours + absent} if find_spec(n)])"
    assert run(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout.strip() == str([*ours])


def test_the_command_prints_its_version_and_help(installed: Path, metadata: Message, tmp_path: Path) -> None:
    command = installed / "bin" / "gigapath-client"
    assert metadata["Version"] in run(command, "--version", cwd=tmp_path).stdout
    assert "score" in run(command, "--help", cwd=tmp_path).stdout
    module = run(installed / "bin" / "python", "-m", "gigapath_client", "score", "--help", cwd=tmp_path)
    assert "gigapath-client score CMU-1-Small-Region.svs" in " ".join(module.stdout.split())


def test_the_installed_command_scores_a_real_slide(
    installed: Path, triton_url: str, real_slide: Path, tmp_path: Path
) -> None:
    command = installed / "bin" / "gigapath-client"
    done = run(command, "-v", "score", real_slide, "--url", triton_url, "--out", "results", cwd=tmp_path)
    assert "tiles through" in " ".join(done.stderr.split())  # a detail that -v logs
    with h5py.File(tmp_path / "results" / f"{real_slide.stem}.h5") as result:
        features, scores = result["features"][:], result["scores"][:]
    assert features.ndim == 2
    assert len(features) > 20
    assert np.isfinite(features).all()
    assert scores.sum() == pytest.approx(1, abs=1e-5)
