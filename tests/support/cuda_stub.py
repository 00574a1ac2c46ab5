"""Builds a CUDA runtime without a GPU (`cuda_stub.c`), in which ONNX Runtime's CUDA provider opens sessions.

It shows what happens before anything is computed: where each node and constant is placed, and whether the
CPU reads what is in the GPU's memory, which ends the process as it does on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
CUDA_SYMBOL = re.compile(r"(?:__)?cu(?:da|blas|rand|[A-Z])\w+")


def build_stub(provider: Path, folder: Path) -> Path:
    """Every CUDA library that `provider` (ONNX Runtime's) is linked to, in `folder`, for LD_LIBRARY_PATH."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for line in _output("nm", "-D", "--undefined-only", provider).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if CUDA_SYMBOL.fullmatch(name):
            nodes[version].append(name)
    defined = set(re.findall(r"^[\w *]*?\b(\w+)\(", SOURCE.read_text(), re.MULTILINE))
    others = [name for names in nodes.values() for name in names if name not in defined]
    (folder / "others.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in others))
    versions = (
        f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in nodes.items() if version
    )
    (folder / "versions").write_text("".join(versions))
    library = folder / "libstub.so"
    command: list[str | Path] = ["cc", "-shared", "-fPIC", "-w", "-o", library, SOURCE, folder / "others.c"]
    subprocess.run([*command, f"-Wl,--version-script={folder / 'versions'}"], check=True)
    for needed in re.findall(r"\[(libcu\S+)\]", _output("readelf", "-d", provider)):
        (folder / needed).symlink_to(library)
    return folder


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
