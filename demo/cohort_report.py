"""`python -m demo.cohort_report`: from slides and labels to a served model and its maps, on the cohort.

Embeddings through the server, fine-tuning on them, export, serving, scores and attributions of held-out
slides: every step by the command that a user would type. Writes docs/cohort.md.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.common import run_driver, table
from benchmarks.planted_slides import planted_slide, read_cohort
from client.outputs.layout import Layout
from demo.__main__ import ROOT, console, run
from demo.planted import (
    LESION,
    answered_tiles,
    planted_auroc,
    planted_tiles,
    read_csv,
    served_layout,
    write_planted,
)
from server.local import run_triton

WORK = ROOT / "build" / "cohort-report"
COHORT = ROOT / "build" / "cohort"
PAGE = ROOT / "docs" / "cohort.md"
METHODS = ("partition_shap", "keep_one")
PATTERNS = ("contiguous", "scattered")
LEAST_AUROC = 0.99
"""Of the planted tiles that the model answers to, by the values of the default method."""
LARGE, LARGE_PLANTED, LARGE_SEED = 1000, 20, 20261127
LEAST_PRECISION = 0.85


@dataclass(frozen=True)
class AttributedSlide:
    """One positive held-out slide: the AUROC of its planted tiles by each method's values.

    `answered`: number of planted tiles that the model answers to; `answered_auroc`: their AUROC.
    """

    slide_id: str
    pattern: str
    mpp: float
    tiles: int
    planted: int
    answered: int
    auroc: dict[str, float]
    answered_auroc: dict[str, float]


@dataclass(frozen=True)
class LargeSlide:
    """Tiles of the large slide, how many are planted and answered, and the precision of as many strongest."""

    tiles: int
    planted: int
    answered: int
    precision: float


def main() -> None:
    """Run everything, write the page; exit 1 with the step's own message where one fails."""
    start = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run("training", "make-cohort", "--out", str(COHORT))
    repository = new_repository()
    features = embed(repository)
    fine_tune(features)
    report = make_report(*serve(repository))
    page = page_of(report, time.monotonic() - start)
    PAGE.write_text(page, encoding="utf-8")
    console.print(page, markup=False)
    failures = report.failures()
    for line in failures:
        console.print(f"error: {line}", style="red", markup=False)
    sys.exit(bool(failures))


def new_repository() -> Path:
    """An empty model repository with the committed configs."""
    from export.repository import copy_configs

    repository = WORK / "model_repository"
    copy_configs(ROOT / "model_repository", repository)
    return repository


@contextmanager
def server(repository: Path, name: str) -> Iterator[str]:
    """The url of a Triton that serves `repository`."""
    with run_triton(repository, log=WORK / f"{name}.log") as running:
        yield running.url


def embed(repository: Path) -> Path:
    """Every slide's tile embeddings, by the packaged tile encoder through the server; their folder."""
    run("export", "run", "--preset", "demo", "--repository", str(repository))
    out = WORK / "embedded"
    with server(repository, "embed") as url:
        run("client", "batch", str(COHORT / "labels.csv"), "--out", str(out), "--url", url)
    return next(out.glob("*/features_*"))


def fine_tune(features: Path) -> None:
    """Train the slide encoder and head, from random weights, on the embeddings that the client wrote."""
    config = ROOT / "training" / "configs" / "demo-slides.yaml"
    labels, splits = COHORT / "labels.csv", COHORT / "splits"
    data = ("--features", str(features), "--labels", str(labels), "--splits", str(splits))
    run("training", "finetune", "--config", str(config), *data, "--out", str(WORK / "run"), "--quiet")


def serve(repository: Path) -> tuple[dict[str, float], list[AttributedSlide], LargeSlide]:
    """Export the run, serve it, score the held-out slides, attribute the positive ones and a large one."""
    run("export", "run", "--checkpoint", str(WORK / "run"), "--repository", str(repository))
    held_out = [row for row in read_csv(COHORT / "labels.csv") if row["split"] == "test"]
    manifest = WORK / "held-out.csv"
    with manifest.open("w", newline="") as file:
        table = csv.DictWriter(file, list(held_out[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(held_out)
    out = WORK / "scored"
    with server(repository, "serve") as url:
        run("client", "batch", str(manifest), "--wsi-dir", str(COHORT), "--out", str(out), "--url", url)
        layout = served_layout(out, url)
        scores = {row["slide_id"]: float(row["score_lesion"]) for row in read_csv(layout.scores)}
        attributed = [attribute(row, layout, url) for row in held_out if row["label"] == "lesion"]
        like = next(row["slide_id"] for row in held_out if row["scanner"] == "0.5")
        return scores, attributed, attribute_large(layout.features(like), url)


def attribute(row: dict[str, str], layout: Layout, url: str) -> AttributedSlide:
    """Attribute one slide's score as lesion, and compare the values with where its lesion was planted."""
    name, slide = row["slide_id"], COHORT / row["image_path"]
    about = (str(layout.out), "--slide-id", name, "--slide", str(slide), "--target", "lesion")
    run("client", "attribute", *about, "--out", str(WORK / "maps"), "--url", url)
    h5 = layout.slide_features(name)
    truth = planted_tiles(COHORT, h5)
    answered = answered_tiles(truth, layout.features(name), url)
    return AttributedSlide(
        slide_id=name,
        pattern=row["pattern"],
        mpp=float(row["scanner"]),
        tiles=len(truth),
        planted=int(truth.sum()),
        answered=int(answered.sum()),
        auroc={method: planted_auroc(truth, h5, method) for method in METHODS},
        answered_auroc={
            method: planted_auroc(truth, h5, method, among=answered | ~truth) for method in METHODS
        },
    )


def attribute_large(like: Path, url: str) -> LargeSlide:
    """Put a large slide together from the held-out tiles in the folder of `like`, and attribute its score."""
    tiles = read_cohort(like.parent, COHORT / "tiles.csv")
    slide = planted_slide(tiles, LARGE, LARGE_PLANTED, "scattered", np.random.default_rng(LARGE_SEED))
    h5 = WORK / "large.h5"
    write_planted(slide, like, h5)
    run("client", "attribute", str(h5), "--target", "lesion", "--out", str(WORK / "maps"), "--url", url)
    answered = answered_tiles(slide.planted, h5, url)
    with h5py.File(h5) as file:
        values = file[f"attribution_{METHODS[0]}"][:, LESION]
    return LargeSlide(LARGE, LARGE_PLANTED, int(answered.sum()), slide.precision(values, answered))


@dataclass(frozen=True)
class Report:
    """Scores of the held-out slides in training and served, and how well maps find the lesions."""

    slides: int
    patients: int
    trained_auroc: float
    interval: tuple[float, float]
    served_auroc: float
    furthest: float  # largest difference of a slide's probability, trained and served
    attributed: list[AttributedSlide]
    large: LargeSlide

    def mean(self, pattern: str, method: str) -> tuple[float, float]:
        """Mean AUROC over the slides of a pattern, of all planted tiles and of those that are answered."""
        slides = [each for each in self.attributed if each.pattern == pattern]
        everything = np.mean([each.auroc[method] for each in slides])
        return float(everything), float(np.nanmean([each.answered_auroc[method] for each in slides]))

    def failures(self) -> list[str]:
        """What falls short of what the project promises."""
        found = []
        if abs(self.trained_auroc - self.served_auroc) > 1e-3:
            found.append(f"served AUROC {self.served_auroc:.4f} is not training's {self.trained_auroc:.4f}")
        if self.served_auroc < 0.95:
            found.append(f"held-out AUROC {self.served_auroc:.3f} is under 0.95")
        if not self.large.precision >= LEAST_PRECISION:
            found.append(
                f"precision on the large slide {self.large.precision:.2f} is under {LEAST_PRECISION}"
            )
        means = {name: self.mean(name, METHODS[0])[1] for name in PATTERNS}
        return found + [
            f"AUROC of answered {pattern} tiles {mean:.3f} is under {LEAST_AUROC}"
            for pattern, mean in means.items()
            if mean < LEAST_AUROC
        ]


def make_report(served: dict[str, float], attributed: list[AttributedSlide], large: LargeSlide) -> Report:
    """The run's own predictions and intervals against the served scores of the same slides."""
    trained = json.loads((WORK / "run" / "metrics.json").read_text())["test"]
    predicted = read_csv(WORK / "run" / "predictions_test.csv")
    labels = [int(row["target"]) for row in predicted]
    low, high = trained["intervals_95"]["auroc_lesion"]
    return Report(
        slides=len(predicted),
        patients=len({row["pat_id"] for row in predicted}),
        trained_auroc=trained["metrics"]["auroc_lesion"],
        interval=(low, high),
        served_auroc=float(roc_auc_score(labels, [served[row["slide_id"]] for row in predicted])),
        furthest=max(abs(served[row["slide_id"]] - float(row["prob_lesion"])) for row in predicted),
        attributed=attributed,
        large=large,
    )


def page_of(report: Report, seconds: float) -> str:
    """docs/cohort.md."""
    low, high = report.interval
    apart = abs(report.served_auroc - report.trained_auroc)
    facts = (
        f"slides, patients | {report.slides}, {report.patients}",
        f"AUROC, training's report (95 % interval) | {report.trained_auroc:.4f} ({low:.3f}–{high:.3f})",
        f"AUROC, served and scored by `batch` | {report.served_auroc:.4f} (difference {apart:.1g})",
        f"largest difference of a slide's probability | {report.furthest:.1g}",
    )
    columns = " | ".join(f"{method} | {method}, answered" for method in METHODS)
    rows = []
    for each in report.attributed:
        row = [each.slide_id, each.pattern, f"{each.mpp:g}", each.tiles, each.planted, each.answered]
        for method in METHODS:
            row += [f"{each.auroc[method]:.3f}", f"{each.answered_auroc[method]:.3f}"]
        rows.append(" | ".join(map(str, row)))
    for pattern in PATTERNS:
        means = [mean for method in METHODS for mean in report.mean(pattern, method)]
        rows.append(f"**mean** | **{pattern}** | | | | | {' | '.join(f'**{mean:.3f}**' for mean in means)}")
    large = report.large
    return f"""# From labels to maps on the synthetic cohort

Made by `make cohort-report`: cohort, embeddings through Triton, fine-tuning, export, serving,
`batch` and `attribute` on held-out slides, in {seconds / 60:.0f} minutes on the machine that
wrote it. docs/training.md describes the cohort. Its lesions are planted: these
figures test the software and are no evidence for diagnosis.

{table("held-out slides |", facts)}

AUROC of the planted tiles among a positive slide's tiles, by the values that `attribute` gives
them (default settings: {METHODS[0]}, 512 masks; with {METHODS[1]}):

A planted tile is answered if it raises the log-odds by 0.3 when it joins the slide's benign tiles.
What the model ignores, no faithful map shows: the report fails if the mean AUROC among answered
tiles is under {LEAST_AUROC}, and gives that of all planted tiles as well.

{table(f"slide | lesion | mpp | tiles | planted | answered | {columns}", rows)}

A large slide of {large.tiles:,} tiles, put together from the held-out slides' embeddings as in
[the benchmark of maps](benchmarks/maps.md), has {large.planted} scattered lesion tiles, and the
model answers to {large.answered}. Of the {large.answered} strongest tiles on its map, the other
planted ones left out, {large.precision:.0%} are among these (wanted: {LEAST_PRECISION:.0%}).
"""


if __name__ == "__main__":
    run_driver(main)
