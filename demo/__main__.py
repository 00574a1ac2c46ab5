"""`python -m demo`: the way of the data on one real slide, each step by the command a user would type."""

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

from client.store import read_features
from server.errors import ServerError
from server.local import run_triton

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "model_repository"

console = Console(highlight=False)


class StepFailed(Exception):
    """A step's command ended with this exit code; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def demo(
    slide: Annotated[Path, typer.Option(help="The slide.")] = ROOT / "build" / "CMU-1-Small-Region.svs",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out"),
) -> None:
    """Export the `demo` model, serve it with a local Triton, score and explain a slide, stop the server."""
    seconds: dict[str, float] = {}
    h5 = out / f"{slide.stem}.h5"
    try:
        with timed(seconds, "export"):
            run("export")
        with ExitStack() as stack:
            with timed(seconds, "start Triton"):
                server = stack.enter_context(run_triton(REPOSITORY, log=ROOT / "build" / "log" / "demo.log"))
            with timed(seconds, "score"):
                run("client", "score", str(slide), "--out", str(out), "--url", server.url)
            with timed(seconds, "attribute"):
                run("client", "attribute", str(h5), "--slide", str(slide), "--url", server.url)
    except StepFailed as failure:
        sys.exit(failure.code)
    except ServerError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    report(h5, seconds)


def report(h5: Path, seconds: dict[str, float]) -> None:
    """The short table at the end."""
    stored = read_features(h5)
    mpp = stored.attributes["mpp_level0_x"]
    table = Table(title=h5.stem, title_style="bold", show_header=False)
    table.add_row("tiles", f"{len(stored.coords)} of 256 px at {stored.attributes['mpp_target']} mpp")
    table.add_row("slide's own mpp", f"{mpp:.4g} ({stored.attributes['mpp_source']})")
    for stage, duration in seconds.items():
        table.add_row(f"seconds to {stage}", f"{duration:.1f}")
    for path in sorted(h5.parent.glob(f"{h5.stem}*")):
        table.add_row("file", str(path))
    console.print()
    console.print(table)
    if not stored.attributes["trained"]:
        console.print("[yellow]The demo model's weights are untrained: scores and map mean nothing yet.")


def run(*arguments: str) -> None:
    """Show and run `python -m ...`; raises StepFailed if it fails."""
    console.print(f"\n[bold]$ python -m {shlex.join(arguments)}")
    code = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=False).returncode
    if code:
        raise StepFailed(code)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block takes as `seconds[stage]`."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


if __name__ == "__main__":
    typer.run(demo)
