"""Held-out slides of the cohort: where their lesions were planted, and how well a map finds them."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from benchmarks.planted_slides import PlantedSlide
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.model.embedded import read_embedded
from client.attribution.model.served import ServedForward
from client.outputs.layout import Layout
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint

LESION = 1  # its index among the classes of the demo's head


def read_csv(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def served_layout(out: Path, url: str) -> Layout:
    """Where a batch by the server at `url` has left its results below `out`."""
    with Connection(Endpoint(url)) as connection:
        return Layout(out, read_contract(connection))


def planted_tiles(cohort: Path, h5: Path) -> npt.NDArray[np.bool_]:
    """Which tiles of a slide's `h5` hold a lesion, bool [N], by the truth in the folder `cohort`."""
    planted = {
        (int(tile["x"]), int(tile["y"]))
        for tile in read_csv(cohort / "tiles.csv")
        if tile["slide_id"] == h5.stem and tile["kind"] == "lesion"
    }
    with h5py.File(h5) as file:
        return np.array([tuple(place) in planted for place in file["coords"][:].tolist()])


def write_planted(slide: PlantedSlide, like: Path, path: Path) -> None:
    """Write a slide that was put together from embeddings as an H5 file with the attributes of `like`."""
    with h5py.File(like) as source, h5py.File(path, "w") as file:
        for name, values in (("features", slide.embeddings), ("coords", slide.coords)):
            file[name] = values
            file[name].attrs.update(source[name].attrs)
            file[name].attrs["name"] = path.stem
        width, height = slide.coords.max(axis=0) + source["coords"].attrs["patch_size_level0"]
        file["coords"].attrs.update({"level0_width": width, "level0_height": height})


def planted_auroc(
    truth: npt.NDArray[np.bool_],
    h5: Path,
    method: str = "partition_shap",
    among: npt.NDArray[np.bool_] | None = None,
) -> float:
    """AUROC of the planted tiles by the values that `client attribute` left in `h5` for the lesion.

    among: the tiles that count, all by default. NaN if none of them is planted.
    """
    inside = np.ones_like(truth) if among is None else among
    if not truth[inside].any():
        return float("nan")
    with h5py.File(h5) as file:
        return float(roc_auc_score(truth[inside], file[f"attribution_{method}"][:][inside, LESION]))


def answered_tiles(
    truth: npt.NDArray[np.bool_], h5: Path, url: str, *, least: float = 0.3
) -> npt.NDArray[np.bool_]:
    """The planted tiles that the served model answers to, bool [N].

    Each of them alone raises the log-odds of a lesion by `least`, when it joins the slide's benign tiles.
    What the model ignores, no faithful map can show.
    """
    slide = read_embedded(h5)
    planted = np.flatnonzero(truth[slide.rows])
    keep = np.repeat(~truth[slide.rows][None], 1 + len(planted), axis=0)
    keep[np.arange(1, len(keep)), planted] = True
    with Connection(Endpoint(url)) as connection:
        contract = read_contract(connection)
        scores = ServedForward(connection, contract)(slide.embeddings, slide.model_coords(contract), keep)
    gain = ModelOutputs(("benign", "lesion"))(scores)[:, LESION]
    answered = np.zeros_like(truth)
    answered[slide.rows[planted]] = gain[1:] - gain[0] >= least
    return answered
