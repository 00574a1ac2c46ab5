"""Write what each image holds as CycloneDX 1.6 JSON: `python docker/sbom.py [FOLDER]` (`make sbom`).

From the locks and the Dockerfile that the images are built from. The base image's own packages are its
publisher's to list; it is one component here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "gigapath-client": ("client",),
    "gigapath-triton-cpu": ("server", "triton"),
    "gigapath-front": ("front",),
}
"""The images, and the locks in `requirements/` that they are filled from."""
TRITON = "2.51.0"
"""The tritonserver inside the wheel of `requirements/triton.txt`; tests/deploy asks it."""


def locked(lock: str) -> list[Requirement]:
    """The pinned packages of a lock that this platform and interpreter install."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ")
    lines = [line.split("--hash")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def component(kind: str, name: str, version: str, purl: str) -> dict[str, str]:
    """One entry of the list."""
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def bill(image: str) -> dict[str, Any]:
    """The bill of materials of one image."""
    version = _search(r'^__version__ = "(.+)"$', ROOT / "client" / "version.py")[1]
    base = _search(r"^ARG BASE_IMAGE=(.+):(.+)$", ROOT / "docker" / "Dockerfile")
    parts = [component("container", base[1], base[2], f"pkg:docker/{base[1]}@{base[2]}")]
    for lock in LOCKS[image]:
        for one in locked(lock):
            pin = next(iter(one.specifier)).version
            parts.append(component("library", one.name, pin, f"pkg:pypi/{one.name.lower()}@{pin}"))
    if "triton" in LOCKS[image]:
        purl = f"pkg:github/triton-inference-server/server@v{TRITON}"
        parts.append(component("application", "tritonserver", TRITON, purl))
    if "client" in LOCKS[image]:
        parts.append(component("library", "gigapath-triton", version, f"pkg:pypi/gigapath-triton@{version}"))
    subject = {"type": "container", "bom-ref": image, "name": image, "version": version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": parts,
        "dependencies": [{"ref": image, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def _search(pattern: str, path: Path) -> re.Match[str]:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"sbom: {path} has no line like {pattern}")
    return found


def main(folder: Path) -> None:
    """Write one file per image."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in LOCKS:
        (folder / f"{image}.cdx.json").write_text(json.dumps(bill(image), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "sbom")
