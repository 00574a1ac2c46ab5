"""The bills of materials name what the images hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.assemble import TRITON, tritonserver
from server.local import server_environment

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {
    "gigapath-client": ["client"],
    "gigapath-triton-cpu": ["server", "triton"],
    "gigapath-front": ["front"],
}


@pytest.mark.parametrize("image", LOCKS)
def test_every_locked_package_is_listed_with_its_version(tmp_path: Path, image: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "docker" / "sbom.py"), str(tmp_path)], check=True)
    bill = json.loads((tmp_path / f"{image}.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    listed = {part["purl"] for part in bill["components"]}
    assert len(listed) == len(bill["components"])
    assert bill["dependencies"][0]["dependsOn"] == [part["bom-ref"] for part in bill["components"]]
    for lock in LOCKS[image]:
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        without_marker = re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE)
        assert without_marker
        assert {f"pkg:pypi/{name}@{version}" for name, version in without_marker} <= listed


def test_the_listed_triton_is_the_one_that_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docker" / "sbom.py"), str(tmp_path)], check=True)
    bill = json.loads((tmp_path / "gigapath-triton-cpu.cdx.json").read_text())
    (part,) = (part for part in bill["components"] if part["name"] == "tritonserver")
    library = tritonserver(TRITON).parent
    command = [str(tritonserver(TRITON)), "--model-repository=/nowhere", "--allow-grpc=false"]
    command += ["--allow-http=false", "--allow-metrics=false"]
    done = subprocess.run(
        command, env=server_environment(TRITON), capture_output=True, text=True, cwd=library
    )
    version = re.search(r"server_version\s+\| (\S+)", done.stdout + done.stderr)
    assert version
    assert version[1] == part["version"]
