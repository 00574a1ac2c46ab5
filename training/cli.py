"""The commands of `python -m training`. Heavy imports wait until a command needs them: help is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

app = typer.Typer(
    help="Train: make a cohort with planted lesions, fine-tune the encoders, train the demo's weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()


@app.callback()
def _commands() -> None:
    """Keep `make-cohort` a subcommand however many there are."""


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


@app.command("make-cohort")
def make_cohort_command(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("build/cohort"),
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    source: Annotated[Path, typer.Option(help="The real slide that the tissue is taken from.")] = Path(
        "build/CMU-1-Small-Region.svs"
    ),
    patients: Annotated[
        tuple[int, int, int], typer.Option(help="Patients in train, val and test; two slides each.")
    ] = (20, 4, 12),
) -> None:
    """Make pyramidal slides with planted lesions, labels, splits, tile truth and QuPath annotations.

    Example: python -m training make-cohort --out build/cohort --seed 0
    """
    from training.cohort_files import make_cohort

    with _bar() as bar:
        task = bar.add_task("drawing slides", total=None)
        plans = make_cohort(
            source,
            out,
            seed=seed,
            patients=patients,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(f"{len(plans)} slides, {sum(len(p.tissue) for p in plans)} tissue tiles in {out}")
