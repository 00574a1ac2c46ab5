"""What decides an export, as one digest: settings, weights, source code and library versions.

Files are read and nothing is run or imported, so that an unchanged export is recognised in under a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gigapath_contract.files import file_sha256

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "timm", "numpy", "onnx", "onnxscript", "onnxruntime")
HUB = "hf-hub:"
ENTRY = "export.export"
"""The module that an export starts from; what it imports, however indirectly, takes part."""
WEIGHTS = Path("training", "pretrained")


def input_key(
    preset: str | None,
    precision: str = "fp32",
    occlusion_precision: str = "fp32",
    weights: str | None = None,
    checkpoints: Sequence[Path] = (),
    gpu_memory: int | None = None,
    patch_tokens: bool = False,
) -> str:
    """SHA-256 over everything that decides the graphs: equal keys mean equal exports.

    The arguments are those of `export.export.export_preset`. A hub repository counts by its name alone. A
    folder that lacks its files counts as well: it is not the export that was made without it.
    """
    digest = hashlib.sha256()
    hub = weights if weights is not None and weights.startswith(HUB) else None
    settings: list[str | int | None] = [preset or "demo", precision, occlusion_precision, hub, gpu_memory]
    settings += [patch_tokens, weights is not None, len(checkpoints)]
    settings += [importlib.metadata.version(name) for name in LIBRARIES]
    digest.update(json.dumps(settings).encode())
    digest.update(_code_digest_at_start().encode())
    if weights is not None and hub is None:
        folder = Path(weights)
        _add_files(digest, (folder / name for name in ("pytorch_model.bin", "slide_encoder.pth")), folder)
    for checkpoint in checkpoints:
        _add_files(digest, checkpoint.glob("*"), checkpoint)
    return digest.hexdigest()


def code_digest(root: Path = ROOT) -> str:
    """SHA-256 over the repository's own share: the source files that an export imports, and packaged weights.

    Other files, such as a room's command line, can change without a new export.
    """
    digest = hashlib.sha256()
    _add_files(digest, [*source_files(root).values(), *(root / WEIGHTS).rglob("*.safetensors")], root)
    return digest.hexdigest()


def source_files(root: Path = ROOT, entry: str = ENTRY) -> dict[str, Path]:
    """The repository's modules that `entry` imports, directly or not, itself included: name to file.

    An import inside a function counts, one under `if TYPE_CHECKING:` does not. A package counts with its
    `__init__.py`. Modules outside `root` (libraries) are left out.
    """
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        path = None if name in found else _source_file(root, name)
        if path is None:
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _packages(name)
        waiting += _imported_names([ast.parse(path.read_text(encoding="utf-8"))], package)
    return dict(sorted(found.items()))


def _imported_names(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """Every name that `nodes`, code of `package`, import and that may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _imported_names(node.orelse, package)
        else:
            yield from _imported_names(ast.iter_child_nodes(node), package)


def _packages(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _source_file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@functools.cache
def _code_digest_at_start() -> str:
    """Read once a process: the code that runs is what was there when it was imported."""
    return code_digest()


def _add_files(digest: hashlib._Hash, files: Iterable[Path], root: Path) -> None:
    for path in sorted(files):
        if path.is_file():
            digest.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
