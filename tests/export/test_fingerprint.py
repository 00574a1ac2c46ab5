"""What an export depends on: the modules that it imports and the packaged weights, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.fingerprint import ROOT, code_digest, input_key, source_files

AN_EXPORT = """
import sys
from pathlib import Path
import export.build_graphs
from export.export import choose_models
try:
    choose_models(None, None, [Path("/nowhere")])
except Exception as error:
    assert "run.json" in str(error), error
for name, module in sys.modules.items():
    if getattr(module, "__file__", None) and Path(module.__file__).is_relative_to(Path.cwd() / ".venv"):
        continue
    if getattr(module, "__file__", None) and Path(module.__file__).is_relative_to(Path.cwd()):
        print(name)
"""


def test_the_source_files_are_those_that_python_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AN_EXPORT], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert sorted(source_files()) == sorted(done.stdout.split())


@pytest.fixture(scope="module")
def digest() -> str:
    """That of this checkout."""
    return code_digest()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the Python files and weights of this repository's rooms."""
    for room in {path.relative_to(ROOT).parts[0] for path in source_files().values()} | {"client"}:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(path: Path, text: str = "# a comment\n") -> None:
    assert path.is_file(), path
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    "name",
    [
        "export/export.py",
        "export/graphs.py",
        "gigapath_contract/schema.py",
        "export/longnet.py",
        "training/__init__.py",
        "training/models/positions.py",
        "training/models/fused_attention.py",
        "training/runs/checkpoint.py",
        "training/pretrained/demo/tile_encoder.safetensors",
    ],
)
def test_what_takes_part_makes_another_export(checkout: Path, digest: str, name: str) -> None:
    append(checkout / name)
    assert code_digest(checkout) != digest


@pytest.mark.parametrize(
    "name",
    [
        "export/cli.py",
        "export/engines.py",
        "training/cli.py",
        "training/loops/optim.py",
        "training/configs/panda.yaml",
        "training/pretrained/demo/facts.json",
        "client/cli.py",
    ],
)
def test_what_takes_no_part_does_not(checkout: Path, digest: str, name: str) -> None:
    append(checkout / name)
    assert code_digest(checkout) == digest, "equal files, equal digest, wherever they lie"


def test_every_way_of_importing_counts(tmp_path: Path) -> None:
    files = {
        "room/__init__.py": "",
        "room/start.py": "from . import a\nfrom room.b import name\nimport room.c as c\n"
        "def late():\n    if True:\n        from .deep.d import thing\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import room.hint\n"
        "else:\n    import room.e\n"
        "import numpy\n",
        "room/a.py": "import room.start\n",
        "room/deep/__init__.py": "from ..f import x\n",
        "room/deep/d.py": "",
        **{f"room/{name}.py": "" for name in ("b", "c", "e", "f", "hint", "unused")},
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = ["", ".a", ".b", ".c", ".deep", ".deep.d", ".e", ".f", ".start"]
    assert list(source_files(tmp_path, "room.start")) == [f"room{name}" for name in names]


def test_settings_and_weights_count(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    given = input_key("demo", weights=str(tmp_path))
    assert input_key("demo") == input_key(None)
    other = (input_key("gigapath"), input_key("demo", "fp16"), input_key("demo", gpu_memory=80), given)
    dense = input_key("demo", patch_tokens=True)
    assert len({input_key("demo"), dense, *other}) == 6
    (tmp_path / "pytorch_model.bin").write_bytes(b"other weights")
    assert input_key("demo", weights=str(tmp_path)) != given


def test_a_folder_without_its_files_is_not_the_export_without_it(tmp_path: Path) -> None:
    missing = tmp_path / "typo"
    keys = [input_key(None), input_key(None, weights=str(missing)), input_key(None, checkpoints=[missing])]
    assert len({*keys, input_key(None, checkpoints=[missing] * 2)}) == 4
