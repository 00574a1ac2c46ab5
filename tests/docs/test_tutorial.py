"""docs/tutorial.md, typed block after block in a fresh checkout with a real Triton, and what comes of it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from server.local import LOOPBACK
from server.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LONG_AGO = 10**9  # of the copied files, so that make finds what they lead to up to date
READY = {"make serve": "serving ", "gigapath-client view": " at http"}
"""Commands that run until Ctrl-C, and what their output has when they are ready."""

pytestmark = pytest.mark.timeout(1800)


def blocks() -> list[str]:
    """The commands of the page, a block each."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def fresh_checkout(target: Path, repository: Path) -> None:
    """A clone with an environment, slide and server fetched, and the demo exported into its repository."""
    git = ["git", "-c", f"safe.directory={ROOT}"]  # also where another user owns it, as in a container
    listed = [*git, "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
            os.utime(target / name, (LONG_AGO, LONG_AGO))
    for name in ("build/CMU-1-Small-Region.svs", "build/triton"):
        assert (ROOT / name).exists(), f"{name} is missing: make demo fetches it"
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(ROOT / name)
    shutil.copytree(repository, target / "model_repository", dirs_exist_ok=True)
    here = Path(sys.prefix)
    environment = target / ".venv"
    (environment / "bin").mkdir(parents=True)
    packages = Path(sysconfig.get_path("purelib"))  # linked one by one, as make adds a file
    (environment / packages.relative_to(here)).mkdir(parents=True)
    for path in [here / "pyvenv.cfg", *(here / "bin").iterdir(), *packages.iterdir()]:
        if path.name not in ("gigapath-client", "activate", "checkout.pth"):
            (environment / path.relative_to(here)).symlink_to(path)
    activate = (here / "bin" / "activate").read_text()
    activate = re.sub(r"VIRTUAL_ENV=\S+", f"VIRTUAL_ENV='{environment}'", activate)
    (environment / "bin" / "activate").write_text(activate)
    (environment / ".ready").touch()


@contextmanager
def running(script: str, ready: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A command that runs until Ctrl-C; yields its output up to the line with `ready`."""
    with subprocess.Popen(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            shown = ""
            for line in process.stdout:
                shown += line
                if ready in line:
                    break
            assert ready in shown, shown
            yield shown
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=120)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def typed(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The checkout after the whole page has been typed, and all that was shown."""
    folder = tmp_path_factory.mktemp("tutorial")
    fresh_checkout(folder, demo_repository)
    port = free_port(LOOPBACK)
    # The page's server is on Triton's usual port, which here may be taken.
    ports = {
        "ARGS": f"--grpc-port {port} --metrics-port {free_port(LOOPBACK)}",
        "TRITON_URL": f"127.0.0.1:{port}",
    }
    of_others = {"VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in of_others} | ports
    environment["COLUMNS"] = "200"
    # `make setup` fetches the viewer, here from what `make test` downloaded.
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(ROOT / "build" / "wheels")}
    shown, activated = "", ""
    with ExitStack() as server:
        for block in blocks():
            script = activated + block
            command = next((name for name in READY if block.startswith(name)), None)
            if command == "make serve":
                server.close()  # Ctrl-C in the second terminal
                shown += server.enter_context(running(script, READY[command], folder, environment))
            elif command:
                with running(script, READY[command], folder, environment) as output:
                    url = re.findall(r"http://\S+", output)[0]
                    shown += output + urllib.request.urlopen(url).read().decode()
            else:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", script],
                    cwd=folder,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
                assert done.returncode == 0, f"{block}\n{done.stdout}"
                shown += done.stdout
                activated += block if "activate" in block else ""
    return folder, shown


def test_the_tissue_and_the_embeddings_of_every_slide_are_found(typed: tuple[Path, str]) -> None:
    folder, _ = typed
    tissue = rows(folder / "study" / "tissue" / "tissue.csv")
    assert len(tissue) == 20
    assert {row["label"] for row in tissue} == {"benign", "lesion"}
    assert len(list((folder / "study" / "tissue" / "thumbnails").iterdir())) == 20
    (features,) = (folder / "study" / "results").glob("*/features_*")  # both exports share them
    for row in tissue:
        with h5py.File(features / f"{row['slide_id']}.h5") as file:
            assert file["features"].shape == (int(row["tiles"]), 96)


def test_the_report_says_how_well_held_out_slides_are_told_apart(typed: tuple[Path, str]) -> None:
    report = json.loads((typed[0] / "runs" / "own" / "report" / "report.json").read_text())
    assert (report["slides"], report["patients"], report["folds"]) == (20, 10, 5)
    assert report["metrics"]["auroc_lesion"] > 0.9
    assert np.sum(report["confusion"]["counts"]) == 20
    with Image.open(typed[0] / "runs" / "own" / "report" / "report.png") as picture:
        assert picture.width > 1500


def test_the_served_model_scores_as_the_trained_one(typed: tuple[Path, str]) -> None:
    held_out = rows(typed[0] / "runs" / "own" / "fold_0" / "predictions_test.csv")
    earlier, own = sorted(
        (typed[0] / "study" / "results").glob("demo-*"), key=lambda path: path.stat().st_mtime
    )
    assert len(rows(earlier / "scores.csv")) == 20
    served = {row["slide_id"]: row for row in rows(own / "scores.csv")}
    assert len(served) == 20
    for row in held_out:
        assert float(served[row["slide_id"]]["score_lesion"]) == pytest.approx(
            float(row["prob_lesion"]), abs=1e-4
        )


def test_held_out_slides_are_explained_and_maps_find_the_planted_lesions(typed: tuple[Path, str]) -> None:
    from demo.planted import planted_auroc, planted_tiles  # with scikit-learn

    folder, shown = typed
    held_out = rows(folder / "runs" / "own" / "fold_0" / "predictions_test.csv")
    (table,) = (folder / "study" / "results").glob("demo-*/attribution/attributions.csv")
    maps = rows(table)
    assert {row["slide_id"] for row in maps} == {row["slide_id"] for row in held_out}
    found = []
    for row in maps:
        assert row["status"] == "ok"
        with Image.open(table.parent / row["map"]) as picture:
            assert picture.width > 500
        (stored,) = table.parent.parent.glob(f"slide_features_*/{row['slide_id']}.h5")
        if row["target"] == "lesion":
            found.append(planted_auroc(planted_tiles(folder / "study", stored), stored))
    assert len(found) >= 2
    assert np.mean(found) > 0.8
    assert table.with_suffix(".pdf").stat().st_size > 10_000
    assert "<title>" in shown  # of the viewer


def test_each_command_names_the_next_as_the_page_has_it(typed: tuple[Path, str]) -> None:
    named = re.findall(r"(?:next|in a checkout): (.*?)(?: --all| \(.*)?$", typed[1], re.MULTILINE)
    # The page keeps a few columns of the table that the program wrote.
    named = [name.replace("study/labels.csv", "study/own.csv") for name in named]
    page = "".join(blocks())
    assert [name for name in named if name not in page] == []
    assert [name.partition(" --")[0] for name in dict.fromkeys(named)] == [
        "make serve",
        "gigapath-client tissue study/own.csv",
        "gigapath-client batch study/tissue/tissue.csv",
        "gigapath-client attribute study/results",
        "python -m training init-recipe study/tissue/tissue.csv",
        "python -m training finetune",
        "make export CHECKPOINT=runs/own/fold_0",
        "gigapath-client view study/results",
    ]
