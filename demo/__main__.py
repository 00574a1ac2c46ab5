"""`python -m demo`: one real slide end to end, each step by the command that a user would type.

Three slides of the synthetic cohort, which the demo's weights never saw, follow: their scores and maps can be
compared with the truth.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import run_driver
from client.outputs.hdf5 import read_features
from client.outputs.layout import Layout
from demo.planted import planted_auroc, planted_tiles, read_csv, served_layout
from server.local import run_triton

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "model_repository"
COHORT = ROOT / "build" / "demo-cohort"
HELD_OUT = ("test-24A", "test-24B", "test-25B")  # no lesion, a contiguous and a scattered one

console = Console(highlight=False)


def demo(
    slide: Annotated[Path, typer.Option(help="The slide.")] = ROOT / "build" / "CMU-1-Small-Region.svs",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out"),
) -> None:
    """Export the `demo` model, serve it with a local Triton, score slides, and attribute their scores."""
    seconds: dict[str, float] = {}
    h5 = out / f"{slide.stem}.h5"
    with timed(seconds, "export"):
        run("export", "run")
    with timed(seconds, "draw slides"):
        named = [argument for name in HELD_OUT for argument in ("--only", name)]
        run("training", "make-cohort", "--out", str(COHORT), *named)
    with ExitStack() as stack:
        with timed(seconds, "start Triton"):
            server = stack.enter_context(run_triton(REPOSITORY, log=ROOT / "build" / "log" / "demo.log"))
        with timed(seconds, "score"):
            run("client", "score", str(slide), "--out", str(out), "--url", server.url)
            manifest = str(COHORT / "labels.csv")
            run("client", "batch", manifest, "--out", str(out / "cohort"), "--url", server.url)
        with timed(seconds, "attribute"):
            run("client", "attribute", str(h5), "--slide", str(slide), "--url", server.url)
            layout = served_layout(out / "cohort", server.url)
            scores = read_csv(layout.scores)
            for row in (row for row in scores if row["label"] == "lesion"):
                source = COHORT / "slides" / f"{row['slide_id']}.tiff"
                cohort = (str(out / "cohort"), "--slide-id", row["slide_id"])
                about = (*cohort, "--slide", str(source), "--target", "lesion")
                run("client", "attribute", *about, "--out", str(out), "--url", server.url)
    report(h5, seconds)
    report_held_out(scores, layout)
    console.print("\nMade, of every slide:")
    for path in (*sorted(out.glob("[!.]*.*")), out / "cohort"):
        console.print(str(path), soft_wrap=True, highlight=False)
    console.print("\nLook at them in the browser:\n[bold]$ . .venv/bin/activate")
    console.print(f"[bold]$ gigapath-client view {out} {out / 'cohort'}", soft_wrap=True)
    console.print("\nWith slides and labels of your own: docs/tutorial.md")


def report(h5: Path, seconds: dict[str, float]) -> None:
    """Print what was made of the slide, and how long it took."""
    stored = read_features(h5)
    mpp = stored.attributes["mpp_level0_x"]
    table = Table(title=h5.stem, title_style="bold", show_header=False)
    table.add_row("tiles", f"{len(stored.coords)} of 256 px at {stored.attributes['mpp_target']} mpp")
    table.add_row("slide's own mpp", f"{mpp:.4g} ({stored.attributes['mpp_source']})")
    for stage, duration in seconds.items():
        table.add_row(f"seconds to {stage}", f"{duration:.1f}")
    console.print()
    console.print(table)
    if not stored.attributes["trained"]:
        console.print("[yellow]The demo model's weights are untrained: scores and map mean nothing yet.")


def report_held_out(scores: list[dict[str, str]], layout: Layout) -> None:
    """Print the scores of the held-out slides, and how well their maps find the planted lesions."""
    columns = ("slide", "truth", "score for a lesion", "planted tiles", "their AUROC on the map")
    table = Table(*columns, title="held-out slides, with planted lesions", title_style="bold")
    for row in scores:
        name, score = row["slide_id"], f"{float(row['score_lesion']):.3f}"
        if row["label"] != "lesion":
            table.add_row(name, "no lesion", score, "0", "")
            continue
        h5 = layout.slide_features(name)
        truth = planted_tiles(COHORT, h5)
        found = f"{planted_auroc(truth, h5):.3f}"
        table.add_row(name, f"{row['pattern']} lesion", score, f"{truth.sum()} of {len(truth)}", found)
    console.print(table)


def run(*arguments: str) -> None:
    """Show and run `python -m ...` or `gigapath-client ...`; where it fails, this process ends as it did."""
    shown = shlex.join(arguments)
    shown = (
        shown.replace("client", "gigapath-client", 1) if arguments[0] == "client" else f"python -m {shown}"
    )
    console.print(f"\n[bold]$ {shown}", soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record how long the block takes as `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


if __name__ == "__main__":
    run_driver(demo)
