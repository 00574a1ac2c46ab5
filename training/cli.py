"""The commands of `python -m training`. Heavy imports are inside the commands, so that help is fast."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.files import make_folder, parse_yaml

app = typer.Typer(
    help="Train: make a cohort with planted lesions, fine-tune the encoders, train the demo's weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
ROOT = Path(__file__).resolve().parent.parent
RunFolder = Annotated[Path, typer.Option(help="Run folder; the same command resumes an interrupted run.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, such as seed=1 or 'task.classes=[a, b]'; repeatable."),
]
Quiet = Annotated[bool, typer.Option(help="No progress bars.")]
Source = Annotated[Path, typer.Option(help="Real slide to take the tissue from.")]
REAL_SLIDE = Path("build/CMU-1-Small-Region.svs")


def _bar(quiet: bool = False) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


@app.command("make-cohort")
def make_cohort_command(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("build/cohort"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed gives the same bytes.")] = 0,
    source: Source = REAL_SLIDE,
    patients: Annotated[
        tuple[int, int, int],
        typer.Option(min=1, help="Patients in train, val and test, with two slides each."),
    ] = (20, 4, 12),
    only: Annotated[
        list[str] | None, typer.Option(help="Make only this slide, such as test-24B; repeatable.")
    ] = None,
) -> None:
    """Make pyramidal slides with planted lesions, labels, splits, tile truth and QuPath annotations.

    Example: python -m training make-cohort --out build/cohort --seed 0
    """
    from training.cohort.files import make_cohort

    with _bar() as bar:
        task = bar.add_task("drawing slides", total=None)
        plans = make_cohort(
            source,
            out,
            seed=seed,
            patients=patients,
            only=only or (),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        bar.update(task, completed=len(plans), total=len(plans))  # also for slides that exist already
    console.print(f"{len(plans)} slides, {sum(len(p.tissue) for p in plans)} tissue tiles in {out}")
    _print_next("gigapath-client", "tissue", f"{out}/labels.csv", "--out", f"{out}/tissue")


@app.command("finetune")
def finetune_command(
    config: Annotated[Path, typer.Option(help="A YAML file such as training/configs/panda.yaml.")],
    out: RunFolder,
    features: Annotated[Path | None, typer.Option(help="Folder of <slide>.h5 (data.features).")] = None,
    labels: Annotated[Path | None, typer.Option(help="Table of labels (data.labels).")] = None,
    splits: Annotated[Path | None, typer.Option(help="Folder of train_0.csv … (data.splits).")] = None,
    change: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a slide encoder and a head on slides' embeddings, then export with CHECKPOINT=<out>.

    Example: python -m training finetune --config training/configs/demo-slides.yaml --features out/features
    --labels build/cohort/labels.csv --out runs/cohort
    """
    from training.config import read_config
    from training.runs.slide_level import plan_runs, run

    changes = dict(_assignment(each) for each in change or [])
    given = {"data.features": features, "data.labels": labels, "data.splits": splits}
    changes |= {name: str(path) for name, path in given.items() if path is not None}
    settings = read_config(config, changes)
    make_folder(out)
    with _bar(quiet) as bar:
        task = bar.add_task("checking the data", total=None)
        plan = plan_runs(settings, lambda done, total: bar.update(task, completed=done, total=total))
    began, notes = time.monotonic(), Console(stderr=True)

    def begin(fold: int, folds: int) -> None:
        spent = f", {(time.monotonic() - began) / 60:.1f} minutes so far" if fold else ""
        notes.print(f"fold {fold + 1} of {folds}{spent}", highlight=False)

    if run(plan, out, bar=not quiet, begin=begin):  # not in the other processes of several
        _print_report(out)
        folders = plan.folders(out)
        if len(folders) > 1:
            console.print(
                f"{len(folders)} models, one a fold, which the report measures together; export any of them",
                soft_wrap=True,
            )
        weights = [
            f"WEIGHTS={settings.slide_weights or 'FOLDER_OR_HUB'}"
        ]  # the run has the slide encoder alone
        _print_export(folders[0], *(weights if settings.preset != "demo" else []))


@app.command("init-recipe")
def init_recipe_command(
    labels: Annotated[Path, typer.Argument(help="Table of labels: slide, label, patient.")],
    features: Annotated[
        Path, typer.Option(help="The --out folder of gigapath-client batch, or of h5 files.")
    ],
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("own-slides.yaml"),
    label_column: Annotated[
        str | None, typer.Option(help="The column of labels.", show_default="label, isup_grade or target")
    ] = None,
    patient_column: Annotated[
        str | None, typer.Option(help="The column of patients.", show_default="pat_id, case_id, patient …")
    ] = None,
) -> None:
    """Write a recipe for finetune that fits a table of labels and its slides' embeddings.

    Classes, preset and number of folds are taken from the data; the rest is training/configs/own-slides.yaml.

    Example: python -m training init-recipe labels.csv --features results
    """
    from training.recipe import plan_recipe

    recipe = plan_recipe(labels, features, label_column, patient_column)
    recipe.write(out)
    console.print(f"{out}: {recipe.data}", soft_wrap=True, highlight=False, markup=False)
    _print_next("python", "-m", "training", "finetune", "--config", str(out), "--out", f"runs/{out.stem}")


def _print_export(run: Path, *settings: str) -> None:
    """The export of a run as it is typed in this folder, which need not be the checkout."""
    here = Path.cwd() == ROOT
    checkout = [] if here else ["-C", str(ROOT)]
    _print_next("make", *checkout, "export", f"CHECKPOINT={run if here else run.resolve()}", *settings)


def _print_next(*command: str) -> None:
    console.print(f"next: {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _assignment(text: str) -> tuple[str, Any]:
    """`optim.epochs=10` as a name and a YAML value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    return name, parse_yaml(value, f"--set {name}")


def _print_report(out: Path) -> None:
    """The metrics of a finished run with their intervals, and where its report is."""
    from training.runs.record import interval_text
    from training.runs.report import chance_text, read_report

    picture, report = read_report(out)
    pooled = f", pooled over {report['folds']} folds" if report["folds"] > 1 else ""
    metrics, limits = report["metrics"], report["intervals_95"]
    intervals = [interval_text(value, *limits[name]) for name, value in metrics.items()]
    alike = len(set(intervals)) == 1
    table = Table("metric", f"held out{pooled}", *([] if alike else ["95 % interval"]))
    for (name, value), interval in zip(metrics.items(), intervals, strict=True):
        table.add_row(name, _number(value), *([] if alike else [interval]))
    console.print(table)
    if alike:
        console.print(f"95 % intervals: {intervals[0]}", highlight=False)
    if doubt := chance_text(report):
        console.print(doubt, soft_wrap=True, highlight=False, markup=False)
    console.print(f"run folder: {out}\nreport: {picture}", soft_wrap=True, highlight=False, markup=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


@app.command("tiles")
def tiles_command(
    data: Annotated[Path, typer.Option(help="Folder SPLIT/CLASS/*.png, or a CSV: see docs/training.md.")],
    config: Annotated[Path, typer.Option(help="A YAML file such as training/configs/tile-probe.yaml.")],
    out: RunFolder,
    change: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Train at the tile level: a linear probe, or the tile encoder's last blocks.

    Example: python -m training tiles --data build/cohort/tiles.csv --config training/configs/tile-probe.yaml
    --out runs/probe
    """
    from training.config import read_yaml
    from training.data.tiles import list_tiles
    from training.loops.tile_level import TileConfig
    from training.runs.tile_level import run_tiles

    settings = read_yaml(config, TileConfig, dict(_assignment(each) for each in change or []))
    make_folder(out)
    run_tiles(settings, list_tiles(data), out, bar=not quiet)
    _print_report(out)
    _print_export(out)


@app.command("train-demo")
def train_demo_command(
    cohort: Annotated[Path, typer.Option(help="Cohort folder; made if missing.")] = Path("build/cohort"),
    work: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("build/demo-training"),
    source: Source = REAL_SLIDE,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the packaged weights; don't replace them.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train the demo preset from a random initialisation on the cohort, and package the weights.

    Example: python -m training train-demo --check
    """
    from training.cohort.files import make_cohort
    from training.demo_training import compare, package, train_demo

    began = time.monotonic()

    def say(stage: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {stage}")

    make_folder(work)
    say("making the cohort")
    make_cohort(source, cohort)
    facts = train_demo(cohort, work, bar=not quiet, say=say)
    if check:
        say(f"held-out slides score within {compare(facts['held_out']):.2g} of the packaged weights")
    else:
        package(work)
        say("packaged in training/pretrained/demo")
    auroc = (facts[level]["auroc_lesion"] for level in ("tiles", "slides"))
    console.print("held-out AUROC: {:.3f} of tiles, {:.3f} of slides".format(*auroc))
