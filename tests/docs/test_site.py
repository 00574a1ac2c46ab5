"""The documentation builds as a site without a warning: every link between pages leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import client

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_with_strict_links_and_documents_the_whole_api(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "docs",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    documented = set(re.findall(r'id="client\.(\w+)"', (tmp_path / "api.html").read_text()))
    assert documented >= set(client.__all__)
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((tmp_path / page).exists() for page in pages)
