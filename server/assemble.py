"""Assemble the folder that tritonserver loads its backends from: the unpacked wheel's and our own."""

from __future__ import annotations

import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from server.errors import ServerError

ROOT = Path(__file__).resolve().parent.parent
TRITON = ROOT / "build" / "triton"
BACKENDS = ROOT / "build" / "backends"
OURS = Path(__file__).resolve().parent / "backends"


def tritonserver(triton: Path = TRITON) -> Path:
    """The tritonserver program of the wheel unpacked at `triton`.

    Raises:
        ServerError: there is none.
    """
    program = triton / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if not program.is_file():
        raise ServerError(
            f"no tritonserver in {triton}: run `make triton`, which unpacks NVIDIA's wheel there"
        )
    return program


def assemble_backends(triton: Path = TRITON, target: Path = BACKENDS) -> Path:
    """Fill `target` with the python backend, the stub of the running interpreter and our onnxruntime backend.

    Files that are up to date stay; the others are replaced in one step each, so that servers which run from
    the same folder never read half a file.

    Raises:
        ServerError: no wheel is unpacked at `triton`, or it has no stub for the running interpreter.
    """
    server = tritonserver(triton).parent.parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(
            f"this Triton has no stub for Python {version}: use one of {', '.join(_stub_versions(server))}"
        )
    python = server / "backends" / "python"
    for source in (python / "libtriton_python.so", python / "triton_python_backend_utils.py", stub):
        _place(source, target / "python" / source.name)
    for source in (OURS / "onnxruntime").glob("*.py"):
        _place(source, target / "onnxruntime" / source.name)
    return target


def _stub_versions(server: Path) -> list[str]:
    folders = (server / "python_backend_stubs").iterdir()
    return sorted((path.name for path in folders), key=lambda name: [int(part) for part in name.split(".")])


def _place(source: Path, target: Path) -> None:
    if target.exists() and filecmp.cmp(source, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        shutil.copy2(source, Path(scratch) / source.name)
        (Path(scratch) / source.name).replace(target)
